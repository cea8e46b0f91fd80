"""rms_norm: root mean square normalisation, with what stands around it in a Transformer block.

    h      = x + residual                                     rounded to x's dtype; x without one
    n      = h / sqrt(mean of h^2 + eps)                      in fp32
    output = weight n, n rounded to x's dtype first           offset 0: Llama, Qwen, Mistral
             (offset + weight) n, rounded once                otherwise: Gemma has an offset of 1

rounded where Transformers' LlamaRMSNorm and GemmaRMSNorm round, so that the reference gives their
bits (Zhang and Sennrich, arXiv 1910.07467). The output may be rounded further, to int8 or fp8, for
the products behind it: linear/rounding.py.

    x, residual   (..., D) fp32, bf16 or fp16       weight   (D,) of x's dtype

With a = offset + weight, g the output's gradient, s that of h where it goes on as the residual and
r = 1 / sqrt(...):

    h       s + r (g a - n mean of (g a n)); also the gradient of x and of residual
    weight  sum over tokens of g n
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.rounding import (
    as_output,
    as_rows,
    check_no_gradient,
    empty_results,
    rounded_reference,
    rounding_of,
)
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? residual, float eps, float offset, int codes, int group,"
    " Tensor? static_scale) -> (Tensor output, Tensor scale, Tensor h, Tensor inverse)"
)
# h (T, D) is (0, D) without a residual, where it is x; inverse (T,) fp32 is r, for the backward.
SCHEMA_BACKWARD = (
    "(Tensor grad, Tensor? grad_h, Tensor h, Tensor weight, Tensor inverse, float offset)"
    " -> (Tensor, Tensor)"
)


class RMSNorm(NamedTuple):
    """What rms_norm returns."""

    output: Tensor | QuantizedInput  # (..., D)
    residual: Tensor | None  # h, (..., D) of x's dtype: None where no residual was given


def rms_norm_reference(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and h in plain torch, in fp64 as well: specification, oracle and baseline."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return weight * normed.to(h.dtype), h
    return (normed * (offset + weight.to(wide.dtype))).to(h.dtype), h


ROUTES = routes(
    "rms_norm",
    {"cpu": "cpu", "cuda": "triton"},
    cpu=Implementation(("cpu",), needs="native"),
    triton=Implementation(("cuda", "cpu"), needs="triton"),  # cpu: the interpreter
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)


def _fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, codes: int,
    group: int, static_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = x.shape
    result, scale = empty_results(x, (rows, width), codes, group, static_scale)
    h = x.new_empty((0 if residual is None else rows, width))
    return result, scale, h, x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, residual, _, ctx.offset, *_ = inputs
    result, scale, h, inverse = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, inverse)
    codes = [] if result.dtype == x.dtype else [result]
    ctx.mark_non_differentiable(scale, inverse, *codes)
    ctx.set_materialize_grads(False)


def _register(impl: str) -> None:
    """One overload, its backward, its fakes and its autograd formula."""
    forward, backward = f"slmperf::rms_norm.{impl}", f"slmperf::rms_norm_backward.{impl}"
    torch.library.define(forward, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(backward, SCHEMA_BACKWARD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    backward_op = getattr(torch.ops.slmperf.rms_norm_backward, impl)

    def gradient(ctx: Any, grad: Tensor | None, _: Any, grad_h: Tensor | None, __: Any) -> tuple:
        h, weight, inverse = ctx.saved_tensors
        if not ctx.has_residual:
            grad_h = None  # of h (0, D)
        if grad is None:
            return (grad_h, None, grad_h, *(None,) * 5)
        # A gradient may have any strides: `sum().backward()` hands down one number.
        grad_h = None if grad_h is None else as_rows(grad_h)
        of_h, of_weight = backward_op(as_rows(grad), grad_h, h, weight, inverse, ctx.offset)
        return of_h, of_weight, of_h if ctx.has_residual else None, *(None,) * 5

    def no_second_gradient(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError("rms_norm: only impl='reference' can be differentiated twice")

    torch.library.register_autograd(forward, gradient, setup_context=_save)
    torch.library.register_autograd(backward, no_second_gradient)


_register("cpu")
_register("triton")


@torch.library.impl("slmperf::rms_norm.triton", ("cpu", "cuda"))
def _triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, codes: int,
    group: int, static_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    require_interpreter("rms_norm", x)
    from slmperf.triton_kernels.rms_norm import rms_norm as launch

    made = empty_results(x, (x.shape[0], x.shape[1]), codes, group, static_scale)
    h, inverse = launch(x, weight, residual, eps, offset, group, static_scale, *made)
    return *made, h, inverse


@torch.library.impl("slmperf::rms_norm_backward.triton", ("cpu", "cuda"))
def _triton_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    require_interpreter("rms_norm", grad)
    from slmperf.triton_kernels.rms_norm import rms_norm_backward as launch

    return launch(grad, *arguments)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    activations: ActivationSpec | None = None,
    input_scale: Tensor | None = None,
    impl: str = "auto",
) -> RMSNorm:
    """Normalise x (..., D) along its last dimension; formulas, shapes and rounding are above.

    residual     like x; is added first, and the sum comes back as the new residual
    activations  how the output is rounded for the products behind it, codes and scales as
                 quantize_input gives them for the output; None: not at all
    input_scale  one fp32 number, where `activations` is static
    impl         "auto" (CUDA: "triton"; CPU: "cpu"), "triton" (D of at most 32768, with
                 gradients of 16384), "cpu" or "reference"

    x, residual and weight receive gradients, where the output stays floating. The cpu
    implementation gives the same bits for any number of threads, triton the same from run to run.
    InputError for shapes, dtypes, devices and groups that do not fit, NotImplementedError for what
    `impl` does not take and for codes of what wants a gradient.
    """
    width = x.shape[-1] if x.dim() else 0
    check_shapes("rms_norm", weight=(weight, str(width)))
    if width == 0:
        raise InputError(f"rms_norm: x is {tuple(x.shape)}, wanted (..., D) with D of 1 or more")
    if residual is not None and residual.shape != x.shape:
        raise InputError(
            f"rms_norm: residual is {tuple(residual.shape)}, wanted x's {tuple(x.shape)}"
        )
    for name, one in (("weight", weight), ("residual", residual)):
        if one is not None and (one.dtype != x.dtype or one.device != x.device):
            raise InputError(
                f"rms_norm: {name} is {one.dtype} on {one.device}, wanted x's {x.dtype} on "
                f"{x.device}"
            )
    for name, number, least in (("eps", eps, 0.0), ("offset", offset, -math.inf)):
        if not least <= number < math.inf or math.isinf(number):
            raise InputError(f"rms_norm: {name} is {number}, wanted a finite number")
    rounding = rounding_of("rms_norm", activations, input_scale, x, width)
    check_no_gradient("rms_norm", rounding, x=x, weight=weight, residual=residual)
    chosen = ROUTES.choose(impl, x)
    if chosen == "reference":
        output, h = rms_norm_reference(x, weight, residual, eps=eps, offset=offset)
        output, scale = rounded_reference(output.reshape(-1, width), rounding)
    else:
        op = getattr(torch.ops.slmperf.rms_norm, chosen)
        rows = None if residual is None else as_rows(residual)
        output, scale, h, _ = op(as_rows(x), weight.contiguous(), rows, eps, offset, *rounding)
    made = as_output(output, scale, rounding, tuple(x.shape))
    return RMSNorm(made, None if residual is None else h.view(x.shape))
