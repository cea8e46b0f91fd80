"""divergence: how far a student's next-token distribution is from a teacher's, token by token.

With p = softmax(teacher / temperature) and q = softmax(student / temperature) along the vocabulary:

    ForwardKL             KL(p || q) = sum_v p (log p - log q)
    ReverseKL             KL(q || p) = sum_v q (log q - log p)
    JSD(beta)             beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q
    SkewForwardKL(alpha)  KL(p || m),                                 m = alpha p + (1 - alpha) q
    SkewReverseKL(alpha)  KL(q || m),                                 m = (1 - alpha) p + alpha q
    TotalVariation        1/2 sum_v |p - q|

The JSD is that of GKD (Agarwal et al., arXiv 2306.13649), the skewed divergences are those of
DistiLLM (Ko et al., arXiv 2402.03898): alpha is the share in m of the distribution that the
divergence is taken of, so that a skew of 0 is the KL itself. By
the formula the JSD vanishes at both ends of beta; as everywhere in the field JSD(0) is ForwardKL
and JSD(1) is ReverseKL, by special case at exactly these numbers, and beta is never clamped.
JSD(beta, rescale=True) divides the interior by beta (1 - beta), which tends to the two KLs
(logarithmically slowly). Values are true divergences, zero at p = q; nothing is multiplied by
temperature squared.

Terms follow 0 log 0 = 0, so entries that both models mask with -inf drop out. ForwardKL is +inf
where the student gives nothing to what the teacher allows (its gradient q - p stays finite);
ReverseKL is +inf in the opposite case, and its gradient is then not finite; the others always are.

Gradients by the student's logits, with l = log q - log p and m as above:

    ForwardKL       (q - p) / temperature
    ReverseKL       q (l - KL(q || p)) / temperature
    JSD             (1 - beta) q (log(q / m) - KL(q || m)) / temperature
    SkewForwardKL   -(1 - alpha) q (r - sum q r) / temperature,   r = p / m
    SkewReverseKL   q (g - sum q g) / temperature,    g = log(q / m) - alpha q / m
    TotalVariation  1/2 q (s - sum q s) / temperature,    s = sign(q - p)

Inputs are float32, bfloat16 or float16 (float64 in the reference); all maths is float32 or wider
and the result is float32 (float64 for float64).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student): the student covers all that the teacher does."""


@dataclass(frozen=True)
class ReverseKL:
    """KL(student || teacher): the student keeps to what the teacher does most."""


@dataclass(frozen=True)
class JSD:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m the mixture with the same weights.

    beta     0 to 1; exactly 0 is ForwardKL(), exactly 1 ReverseKL()
    rescale  divide by beta (1 - beta), so that the strength of the gradient does not fall to 0
             towards the ends; nothing at the ends themselves
    """

    beta: float = 0.5
    rescale: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise InputError(f"JSD: beta is {self.beta}, expected 0 <= beta <= 1")
        if 0.0 < min(self.beta, 1.0 - self.beta) < 0.01 and not self.rescale:
            warnings.warn(
                f"JSD: beta is {self.beta}; near an end value and gradient shrink towards 0",
                stacklevel=3,
            )


@dataclass(frozen=True)
class SkewForwardKL:
    """KL(teacher || alpha teacher + (1 - alpha) student); alpha 0 is ForwardKL()."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self)


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(student || (1 - alpha) teacher + alpha student); alpha 0 is ReverseKL()."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha(self)


@dataclass(frozen=True)
class TotalVariation:
    """Half the sum of absolute differences of the probabilities, 0 to 1."""


def _check_alpha(kind: SkewForwardKL | SkewReverseKL) -> None:
    if not 0.0 <= kind.alpha < 1.0:
        name = type(kind).__name__
        raise InputError(f"{name}: alpha is {kind.alpha}, expected 0 <= alpha < 1")


Kind = ForwardKL | ReverseKL | JSD | SkewForwardKL | SkewReverseKL | TotalVariation
KINDS = (ForwardKL, ReverseKL, JSD, SkewForwardKL, SkewReverseKL, TotalVariation)
_FORWARD_KL = ForwardKL()

SCHEMA = (
    "(Tensor student, Tensor teacher, str kind, float weight, float temperature)"
    " -> (Tensor value, Tensor statistics)"
)
SCHEMA_BACKWARD = (
    "(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, str kind, float weight,"
    " float temperature) -> Tensor"
)
# Kept per row by the forward, so that the backward is one pass. With x the logits less the row's
# largest: [0] the student's largest logit, [1] log sum exp(x / temperature) of the student,
# [2] the teacher's largest logit, [3] the student's log-sum less the teacher's, [4] what centres
# the gradient. For ForwardKL that is 0; for ReverseKL the mean under q of x_student - x_teacher, in
# which the log-sums cancel; for the JSD KL(q || m); for the others the mean under q of p / m - 1,
# of log(q / m) - alpha (q / m - 1), of the sign. [5] is what rounding took from [4]: where
# the models are apart, the gradient is a small difference from it. [6] is log sum exp(x) of the
# student, for a cross entropy beside the divergence (kd_loss), else 0.
STATISTICS = 7


def divergence_reference(
    student: Tensor, teacher: Tensor, *, kind: Kind = _FORWARD_KL, temperature: float = 1.0
) -> Tensor:
    """The divergence in plain torch: (T, V), (T, V) -> (T,). Specification, oracle and baseline.

    Differentiable by autograd in the student alone.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(wide) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.detach().to(wide) / temperature, dim=-1)
    return divergence_of(log_p, log_q, kind)


def divergence_of(log_p: Tensor, log_q: Tensor, kind: Kind) -> Tensor:
    """The formulas above on log-probabilities (T, V), those of the teacher first -> (T,)."""
    p, q = log_p.exp(), log_q.exp()
    code, weight = code_of(kind)
    if code == "forward_kl":
        return _mean_under(p, log_p - log_q)
    if code == "reverse_kl":
        return _mean_under(q, log_q - log_p)
    if code == "total_variation":
        return 0.5 * (p - q).abs().sum(dim=-1)
    # Where both are -inf, the mixture's gradient would be NaN; the term is 0 whatever stands there.
    nowhere = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = log_p.masked_fill(nowhere, 0.0), log_q.masked_fill(nowhere, 0.0)
    log_m = torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))
    if code == "skew_forward_kl":
        return _mean_under(p, log_p - log_m)
    if code == "skew_reverse_kl":
        return _mean_under(q, log_q - log_m)
    jsd = weight * _mean_under(p, log_p - log_m) + (1 - weight) * _mean_under(q, log_q - log_m)
    return jsd * rescale_of(kind)


def _mean_under(weight: Tensor, value: Tensor) -> Tensor:
    """sum_v weight value, with 0 times anything = 0 in the value and in the gradient."""
    return (weight * value.masked_fill(weight == 0, 0.0)).sum(dim=-1)


ROUTES = routes(
    "divergence",
    auto={"cuda": "triton", "cpu": "cpu"},
    cpu=Implementation(devices=("cpu",), needs="native"),
    triton=Implementation(devices=("cuda", "cpu"), needs="triton"),  # cpu: the interpreter
    reference=Implementation(devices=(), dtypes=(*HALF_AND_FLOAT, torch.float64)),
)


def code_of(kind: Kind) -> tuple[str, float]:
    """What the kernels call a kind, and the teacher's weight in its mixture (0 where none).

    JSD(0), JSD(1) and a skew of 0 are the KLs that they stand for.
    """
    if isinstance(kind, JSD) and 0.0 < kind.beta < 1.0:
        return "jsd", kind.beta
    if isinstance(kind, SkewForwardKL) and kind.alpha:
        return "skew_forward_kl", kind.alpha
    if isinstance(kind, SkewReverseKL) and kind.alpha:
        return "skew_reverse_kl", 1.0 - kind.alpha
    if isinstance(kind, TotalVariation):
        return "total_variation", 0.0
    if isinstance(kind, ForwardKL | SkewForwardKL) or (isinstance(kind, JSD) and kind.beta == 0.0):
        return "forward_kl", 0.0
    if isinstance(kind, ReverseKL | SkewReverseKL | JSD):
        return "reverse_kl", 0.0
    names = ", ".join(known.__name__ for known in KINDS)
    raise InputError(f"divergence: kind is {kind!r}, expected one of {names}")


def rescale_of(kind: Kind) -> float:
    """What value and gradient of a kind are multiplied by: 1 but for JSD(beta, rescale=True)."""
    if isinstance(kind, JSD) and kind.rescale and 0.0 < kind.beta < 1.0:
        return 1.0 / (kind.beta * (1.0 - kind.beta))
    return 1.0


def _fake(student, teacher, kind, weight, temperature):
    rows = student.shape[0]
    return (
        student.new_empty(rows, dtype=torch.float32),
        student.new_empty(rows, STATISTICS, dtype=torch.float32),
    )


def _fake_backward(grad, student, teacher, statistics, kind, weight, temperature):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output):
    student, teacher, *ctx.settings = inputs
    ctx.save_for_backward(student, teacher, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _register(impl: str) -> None:
    """One overload, its backward, its fakes and its autograd formula."""
    forward, backward = f"slmperf::divergence.{impl}", f"slmperf::divergence_backward.{impl}"
    torch.library.define(forward, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(backward, SCHEMA_BACKWARD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    backward_op = getattr(torch.ops.slmperf.divergence_backward, impl)

    def gradient(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        return backward_op(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None

    def no_second_gradient(ctx, grad):
        raise NotImplementedError("divergence: only impl='reference' can be differentiated twice")

    torch.library.register_autograd(forward, gradient, setup_context=_save)
    torch.library.register_autograd(backward, no_second_gradient)


_register("cpu")
_register("triton")


@torch.library.impl("slmperf::divergence.triton", ("cpu", "cuda"))
def _triton(student, teacher, kind, weight, temperature):
    require_interpreter("divergence", student)
    from slmperf.triton_kernels.divergence import divergence_forward

    return divergence_forward(student, teacher, kind, weight, temperature)


@torch.library.impl("slmperf::divergence_backward.triton", ("cpu", "cuda"))
def _triton_backward(grad, student, teacher, statistics, kind, weight, temperature):
    require_interpreter("divergence", student)
    from slmperf.triton_kernels.divergence import divergence_backward

    return divergence_backward(grad, student, teacher, statistics, kind, weight, temperature)


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Kind = _FORWARD_KL,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Divergence of the student's distribution from the teacher's, per token.

    student      (T, V) logits, float32, bfloat16 or float16; any row stride; receives a gradient
    teacher      (T, V) logits, same dtype and device; receives none
    kind         one of the dataclasses above
    temperature  > 0, divides both; the value is not multiplied by its square
    impl         "auto" (ROUTES: CUDA -> triton, CPU -> cpu), "triton", "cpu" or "reference"

    Returns (T,) float32. The cpu implementation gives the same bits for any number of threads,
    triton the same bits from run to run. Raises InputError for shapes, kind or temperature that
    do not fit and NotImplementedError, naming what there is, where `impl` cannot run on these
    tensors.
    """
    sizes = check_shapes("divergence", student=(student, "T V"), teacher=(teacher, "T V"))
    if sizes["V"] == 0:
        raise InputError("divergence: V is 0, expected at least one entry per row")
    if not 0.0 < temperature < math.inf:
        raise InputError(f"divergence: temperature is {temperature}, expected a finite number > 0")
    if teacher.dtype != student.dtype or teacher.device != student.device:
        raise InputError(
            f"divergence: teacher is {teacher.dtype} on {teacher.device}, expected the student's "
            f"{student.dtype} on {student.device}"
        )
    code, weight = code_of(kind)
    chosen = ROUTES.choose(impl, student)
    if chosen == "reference":
        return divergence_reference(student, teacher, kind=kind, temperature=temperature)
    op = getattr(torch.ops.slmperf.divergence, chosen)
    value = op(student, teacher.detach(), code, weight, temperature)[0]
    scale = rescale_of(kind)
    return value if scale == 1.0 else value * scale
