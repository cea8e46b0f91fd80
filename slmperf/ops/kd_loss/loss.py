"""kd_loss: distillation from hidden states, without the logits of all tokens at any time.

Over 400 lines, because the op reads from formula to public function in one file.

For token t with weight w_t (token_weight, 0 where the label is ignore_index), student logits z_t
and teacher distribution p_t:

    l_t   = (1 - cross_entropy) D(p_t, softmax(z_t / temperature)) + cross_entropy CE_t
    CE_t  = -log softmax(z_t)[label_t]                               (at temperature 1, always)
    loss  = sum_t w_t l_t / sum_t w_t                                (mean; 0 where nothing counts)

D is a divergence of slmperf.ops.divergence, times temperature^2 where `tau_squared` asks for it.
z = softcap(scale (hidden weight' + bias)); the teacher's side is one of heads.py. Of a top-k
teacher D is taken over k + 1 outcomes: the k tokens, and all others together. That is exact,
not an approximation, where the teacher gives the others nothing: every D above is a sum of
q f(p / q), so entries with p = 0 enter by the sum of their q alone.

Least work, for Hs and Ht the hidden sizes of student and teacher: 2 T V (3 Hs + Ht) operations, of
which the implementations do no more: chunks of rows are multiplied with both heads, turned into
gradients where they lie, and multiplied into the gradients of hidden states and head
(chunks.py). So gradients are made in the forward; the backward multiplies them by the one
number that comes in, and only reduction="none", or a second backward, makes them anew.

Rows that do not count are left out before the heads; what they hold, NaN included, does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.divergence import (
    ForwardKL,
    Kind,
    code_of,
    divergence_of,
    divergence_reference,
    rescale_of,
)
from slmperf.ops.kd_loss import inputs
from slmperf.ops.kd_loss.heads import (
    StudentHead,
    Teacher,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    scaled,
)
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KDLoss(NamedTuple):
    """The loss and its two parts before they are weighed: () or, with reduction="none", (T,).

    fp32 (float64 for float64). Only `loss` carries a gradient. A part whose weight is 0 is not
    computed, and is 0.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


# --- reference ----------------------------------------------------------------------------------


def kd_loss_reference(
    student: StudentHead,
    teacher: Teacher | None,
    *,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: Kind = ForwardKL(),  # noqa: B008  (frozen)
    cross_entropy: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    tau_squared: bool = False,
    logits: str = "fp32",
) -> KDLoss:
    """The loss in plain torch, over the logits of all tokens that count; arguments as of kd_loss.

    logits="bf16" multiplies in the dtype of the inputs and rounds the logits to it; "fp32" widens
    both factors first.
    """
    rows, device = student.hidden.shape[0], student.hidden.device
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    weight = torch.ones(rows, device=device) if token_weight is None else token_weight
    weight = weight.to(wide)
    if labels is not None:
        weight = weight.masked_fill(labels == ignore_index, 0.0)
    (counted,) = weight.nonzero(as_tuple=True)
    z = _logits(student, counted, logits)
    kd = ce = torch.zeros(len(counted), dtype=wide, device=device)
    if cross_entropy < 1.0:
        assert teacher is not None
        if isinstance(teacher, TeacherTopK):
            kd = _top_k_divergence(z, teacher, counted, divergence, temperature)
        else:
            given = (
                teacher.logits[counted].to(wide)
                if isinstance(teacher, TeacherLogits)
                else _logits(teacher, counted, logits)
            )
            kd = divergence_reference(z, given, kind=divergence, temperature=temperature)
        kd = kd * (temperature**2 if tau_squared else 1.0)
    if cross_entropy > 0.0:
        assert labels is not None
        ce = torch.nn.functional.cross_entropy(z, labels[counted], reduction="none")
    parts = ((1 - cross_entropy) * kd if cross_entropy else kd, kd.detach(), ce.detach())
    loss = parts[0] + cross_entropy * ce if cross_entropy else parts[0]
    total = weight.sum() if normalizer is None else torch.as_tensor(normalizer).to(weight)
    scale = torch.where(total == 0, 0.0, 1.0 / total) if reduction == "mean" else 1.0
    found = []
    for one in (loss, *parts[1:]):
        weighed = weight[counted] * one
        if reduction == "none":
            zeros = torch.zeros(rows, dtype=wide, device=device)
            found.append(zeros.index_put((counted,), weighed))
        else:
            found.append(weighed.sum() * scale)
    return KDLoss(*found)


def _logits(head: StudentHead | TeacherHead, counted: Tensor, logits: str) -> Tensor:
    """softcap(scale (hidden weight' + bias)) of the rows that count, fp32 or wider."""
    hidden, weight, bias = head.hidden[counted], head.weight, head.bias
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if logits != "bf16":
        hidden, weight = hidden.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(hidden.dtype)
    raw = torch.nn.functional.linear(hidden, weight, bias)
    return scaled(raw, head.scale, head.softcap).to(wide)


def _top_k_divergence(
    z: Tensor, teacher: TeacherTopK, counted: Tensor, kind: Kind, temperature: float
) -> Tensor:
    """D over the k tokens and all others together: (n, V) logits -> (n,)."""
    indices, log_p = teacher.indices[counted], teacher.log_probs[counted].detach().to(z.dtype)
    others = torch.zeros_like(z, dtype=torch.bool).scatter_(1, indices, True)
    log_q = torch.log_softmax(z / temperature, dim=-1)
    tail_q = torch.logsumexp(log_q.masked_fill(others, -torch.inf), dim=-1, keepdim=True)
    if teacher.tail == "renormalise":
        log_p = torch.log_softmax(log_p / temperature, dim=-1)
    tail_p = torch.full_like(tail_q, -torch.inf)
    if teacher.tail == "bucket" and indices.shape[1] < z.shape[1]:
        tail_p = torch.log1p(-log_p.exp().sum(dim=-1, keepdim=True).clamp(max=1.0))
    log_p, log_q = torch.cat([log_p, tail_p], 1), torch.cat([log_q.gather(1, indices), tail_q], 1)
    return divergence_of(log_p, log_q, kind)


# --- operators ----------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the operators take, in the order of their schema."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None  # (T, D of the teacher)
    teacher_weight: Tensor | None  # (V, D of the teacher)
    teacher_bias: Tensor | None  # (V,)
    teacher_logits: Tensor | None  # (T, V)
    indices: Tensor | None  # (T, K)
    log_probs: Tensor | None  # (T, K)
    labels: Tensor | None  # (T,)
    token_weight: Tensor | None  # (T,)
    normalizer: Tensor | None  # ()
    rows: Tensor | None  # (n,)
    scale: float  # of the student's logits
    softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    tail: str
    kind: str  # a code of divergence.code_of; "none" where no divergence is wanted
    mixture: float  # the teacher's weight in the kind's mixture
    divergence_factor: float  # what rescaling and temperature^2 make of the divergence
    cross_entropy: float
    temperature: float
    reduction: str
    ignore_index: int
    logits: str
    capacity: int  # 0: none
    chunk_bytes: int  # 0: the device's own
    group: str  # name of the process group of vocabulary shards, or ""


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight,"
    " Tensor? teacher_bias, Tensor? teacher_logits, Tensor? indices, Tensor? log_probs,"
    " Tensor? labels, Tensor? token_weight, Tensor? normalizer, Tensor? rows, float scale,"
    " float softcap, float teacher_scale, float teacher_softcap, str tail, str kind, float mixture,"
    " float divergence_factor, float cross_entropy, float temperature, str reduction,"
    " int ignore_index, str logits, int capacity, int chunk_bytes, str group, bool needs_hidden,"
    " bool needs_weight, bool needs_bias"
)
SCHEMA = (
    f"({_ARGUMENTS}) -> (Tensor loss, Tensor divergence, Tensor cross_entropy, Tensor grad_hidden,"
    " Tensor grad_weight, Tensor grad_bias)"
)
SCHEMA_GRADIENT = (
    f"(Tensor upstream, {_ARGUMENTS}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_TENSORS = 13  # of the arguments of a Call
_REDUCTION = Call._fields.index("reduction")

ROUTES = routes(
    "kd_loss",
    auto={"cuda": "triton", "cpu": "cpu"},
    cpu=Implementation(devices=("cpu",), needs="native"),
    triton=Implementation(devices=("cuda", "cpu"), needs="triton"),  # cpu: the interpreter
    reference=Implementation(devices=(), dtypes=(*HALF_AND_FLOAT, torch.float64)),
)


# Until a GradScaler's factor comes in, fp16 has no room for the gradients of a mean.
GRADIENTS = {torch.float16: torch.float32}


def _empty_gradients(call: Call, needs: tuple[bool, ...]) -> list[Tensor]:
    """Uninitialised gradients of hidden, weight and bias; (0,) for those that nobody needs."""
    return [
        torch.empty_like(
            like, dtype=GRADIENTS.get(like.dtype), memory_format=torch.contiguous_format
        )
        if needed and like is not None
        else call.hidden.new_empty(0)
        for like, needed in zip((call.hidden, call.weight, call.bias), needs, strict=True)
    ]


def _fake(*arguments):
    call, needs = Call(*arguments[:-3]), arguments[-3:]
    shape = call.hidden.shape[:1] if call.reduction == "none" else ()
    values = [call.hidden.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    needs = needs if call.reduction != "none" else (False,) * 3
    return (*values, *_empty_gradients(call, needs))


def _fake_gradient(upstream, *arguments):
    return tuple(_empty_gradients(Call(*arguments[:-3]), arguments[-3:]))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.settings, ctx.dtype = inputs[_TENSORS:], inputs[0].dtype
    # Not among the saved tensors: the first backward takes them, and changes them in place.
    ctx.gradients = None if inputs[_REDUCTION] == "none" else output[3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _register(impl: str) -> None:
    """One overload, its gradient, its fakes and its autograd formula."""
    forward, again = f"slmperf::kd_loss.{impl}", f"slmperf::kd_loss_gradient.{impl}"
    torch.library.define(forward, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(again, SCHEMA_GRADIENT, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(again, _fake_gradient)
    gradient_op = getattr(torch.ops.slmperf.kd_loss_gradient, impl)

    def gradient(ctx, grad, *_):
        if grad is None:
            return (None,) * (_TENSORS + len(ctx.settings))
        if grad.requires_grad:
            raise NotImplementedError("kd_loss: only impl='reference' can be differentiated twice")
        found, ctx.gradients = ctx.gradients, None
        # With a graph wanted, the operator is in it, and refuses to be differentiated again.
        if found is None or torch.is_grad_enabled():
            found = gradient_op(grad, *ctx.saved_tensors, *ctx.settings)
        else:
            found = [_scaled(one, grad) for one in found]
        needed = ctx.settings[-3:]
        wanted = [
            one.to(ctx.dtype) if need else None for one, need in zip(found, needed, strict=True)
        ]
        return (*wanted, *(None,) * (_TENSORS + len(ctx.settings) - 3))

    def no_second_gradient(ctx, *grads):
        raise NotImplementedError("kd_loss: only impl='reference' can be differentiated twice")

    torch.library.register_autograd(forward, gradient, setup_context=_save)
    torch.library.register_autograd(again, no_second_gradient)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, in its own memory where nobody traces: the head's is large."""
    if type(gradient) is not torch.Tensor:  # fake: a graph is being made, and may not mutate
        return gradient * factor
    if gradient.device.type == "cuda":
        from slmperf.triton_kernels.kd_loss import scale_

        scale_(gradient, factor)
    elif factor != 1.0:
        gradient.mul_(factor)
    return gradient


_register("cpu")
_register("triton")


@torch.library.impl("slmperf::kd_loss.cpu", "cpu")
def _cpu(*arguments):
    from slmperf.ops.kd_loss.chunks import Native, forward

    return forward(Native(), Call(*arguments[:-3]), arguments[-3:])


@torch.library.impl("slmperf::kd_loss_gradient.cpu", "cpu")
def _cpu_gradient(upstream, *arguments):
    from slmperf.ops.kd_loss.chunks import Native, gradient

    return gradient(Native(), Call(*arguments[:-3]), arguments[-3:], upstream)


@torch.library.impl("slmperf::kd_loss.triton", ("cpu", "cuda"))
def _triton(*arguments):
    require_interpreter("kd_loss", arguments[0])
    from slmperf.ops.kd_loss.chunks import forward
    from slmperf.triton_kernels import kd_loss as phases

    return forward(phases, Call(*arguments[:-3]), arguments[-3:])


@torch.library.impl("slmperf::kd_loss_gradient.triton", ("cpu", "cuda"))
def _triton_gradient(upstream, *arguments):
    require_interpreter("kd_loss", arguments[0])
    from slmperf.ops.kd_loss.chunks import gradient
    from slmperf.triton_kernels import kd_loss as phases

    return gradient(phases, Call(*arguments[:-3]), arguments[-3:], upstream)


# --- the public function ------------------------------------------------------------------------


def kd_loss(
    student: StudentHead,
    teacher: Teacher | None,
    *,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence: Kind = ForwardKL(),  # noqa: B008  (frozen)
    cross_entropy: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    tau_squared: bool = False,
    rows: Tensor | None = None,
    capacity: int | None = None,
    vocabulary: Sequence[int] | Tensor | None = None,
    logits: str = "auto",
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> KDLoss:
    """Distillation loss of T tokens, from the hidden states of both models and their heads.

    student        StudentHead, hidden (T, D) and weight (V, D); T counts flattened tokens
    teacher        TeacherHead, TeacherLogits or TeacherTopK; None where cross_entropy is 1
    labels         (T,) int64; a row whose label is `ignore_index` does not count. Their values
                   matter for the cross entropy alone
    token_weight   (T,) float32, w_t; None: 1. A row of weight 0 does not count
    divergence     one of slmperf.ops' dataclasses, ForwardKL() to TotalVariation()
    cross_entropy  0 to 1, its share of the loss; the divergence has the rest
    temperature    > 0, divides both models' logits in the divergence alone. Of a top-k teacher the
                   log-probabilities are divided with tail="renormalise"; other tails take 1
    reduction      "mean" (by the sum of weights), "sum", "none" (w_t l_t per token)
    normalizer     () tensor or number that "mean" divides by instead: under gradient accumulation
                   and over ranks, the weights of all tokens of the step
    tau_squared    multiply the divergence by temperature^2
    rows           (n,) int64, where the rows that count are known: from the collator, on the CPU,
                   without a wait for the device; each at most once. Rows not listed do not count
    capacity       without `rows` on a GPU: at most so many rows count. They are packed on the
                   device; where there are more, the loss is NaN. None: all T are multiplied, those
                   of weight 0 masked. (On a CPU the rows that count are always found and packed.)
    vocabulary     K token ids: both heads are cut to these columns, the softmax is over them alone,
                   and labels are among them: the answer tokens of a ranking model
    logits         "fp32"; "bf16", rounded as Transformers rounds them; "difference" (triton, both
                   heads in bf16): the student's logit less the teacher's is formed in fp32 and then
                   rounded, so that a student near its teacher gets the right gradient. "auto" is
                   fp32 on a CPU and for other inputs than bf16, else difference where it can be
    chunk_bytes    of logits held at a time; None: 1 GiB on a GPU, 44 MiB on a CPU, with a group
                   1024 rows or 128
    group          process group over whose ranks the vocabulary is cut, in rank order: weights,
                   bias and given logits are each rank's own rows, unequal numbers allowed; all
                   else is the same on every rank. Hidden states get the gradient of all shards
    impl           "auto" (ROUTES: CUDA -> triton, CPU -> cpu), "triton", "cpu" or "reference"

    Returns KDLoss. DTensor heads (FSDP2) are gathered once, their gradients go back the way they
    came, as the mean over ranks; a teacher's under ZeRO-3 is gathered while the loss runs, and a
    student's has to be whole until the backward is done. Under autocast heads are cast as by a
    Linear.

    Sums are fp32 or wider; neither the size of the chunks nor, on a CPU, the number of threads
    changes results by more than rounding. Raises InputError (a ValueError) naming argument, wanted
    and found, and NotImplementedError where `impl` cannot run on these tensors. On a GPU, where
    looking at labels would wait for the device, one out of range makes its row's loss NaN.
    """
    inputs.check_settings(
        student, teacher, cross_entropy, temperature, reduction, normalizer, logits
    )
    code, mixture = ("none", 0.0) if cross_entropy == 1.0 else code_of(divergence)
    if code != "none":
        inputs.check_teacher(student, teacher, code, temperature)
    if cross_entropy == 1.0:
        teacher = None
    inputs.check_rows(student, labels, token_weight, rows, capacity)
    inputs.check_chunks(chunk_bytes, group)
    if cross_entropy > 0.0 and labels is None:
        raise InputError(
            f"kd_loss: labels is None, expected (T,) int64 with cross_entropy={cross_entropy}"
        )
    with inputs.gathered(student, teacher):
        student, teacher = inputs.whole(student), inputs.whole(teacher)
        if vocabulary is not None:
            matter = inputs.counting(student, token_weight, rows, cross_entropy)
            student, teacher, labels = inputs.narrow(
                student, teacher, labels, matter, vocabulary, ignore_index, group
            )
        chosen = ROUTES.choose(impl, student.hidden)
        mode = inputs.logits_mode(logits, chosen, student, teacher)
        if chosen == "reference":
            if group is not None:
                raise NotImplementedError("kd_loss: impl='reference' takes no group")
            return kd_loss_reference(
                student,
                teacher,
                labels=labels,
                token_weight=inputs.listed(token_weight, rows, student.hidden),
                divergence=divergence,
                cross_entropy=cross_entropy,
                temperature=temperature,
                reduction=reduction,
                normalizer=normalizer,
                ignore_index=ignore_index,
                tau_squared=tau_squared,
                logits=mode,
            )
        head = teacher if isinstance(teacher, TeacherHead) else None
        top = teacher if isinstance(teacher, TeacherTopK) else None
        call = Call(
            hidden=student.hidden,
            weight=student.weight,
            bias=student.bias,
            teacher_hidden=None if head is None else head.hidden.detach(),
            teacher_weight=None if head is None else head.weight.detach(),
            teacher_bias=None if head is None or head.bias is None else head.bias.detach(),
            teacher_logits=teacher.logits.detach() if isinstance(teacher, TeacherLogits) else None,
            indices=None if top is None else top.indices,
            log_probs=None if top is None else top.log_probs.detach(),
            labels=labels,
            token_weight=None if token_weight is None else token_weight.detach(),
            normalizer=inputs.number(normalizer, student.hidden),
            rows=rows,
            scale=student.scale or 1.0,
            softcap=student.softcap or 0.0,
            teacher_scale=1.0 if head is None else head.scale or 1.0,
            teacher_softcap=0.0 if head is None else head.softcap or 0.0,
            tail="" if top is None else top.tail,
            kind=code,
            mixture=mixture,
            divergence_factor=rescale_of(divergence) * (temperature**2 if tau_squared else 1.0),
            cross_entropy=float(cross_entropy),
            temperature=float(temperature),
            reduction=reduction,
            ignore_index=ignore_index,
            logits=mode,
            capacity=capacity or 0,
            chunk_bytes=chunk_bytes or 0,
            group="" if group is None else group.group_name,
        )
        needs = [
            torch.is_grad_enabled() and one is not None and one.requires_grad
            for one in (call.hidden, call.weight, call.bias)
        ]
        op = getattr(torch.ops.slmperf.kd_loss, chosen)
        return KDLoss(*op(*call, *needs)[:3])
