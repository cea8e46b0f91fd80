"""silu_mul: the gate of a Transformer's MLP.

    output = silu(gate) up,   silu(x) = x / (1 + e^-x)

silu in fp32 and rounded to the inputs' dtype, then the product: where Transformers' MLPs round, so
that the reference gives their bits (SwiGLU: Shazeer, arXiv 2002.05202). The output may be rounded
further, to int8 or fp8, for the product behind it: linear/rounding.py.

    gate, up   (..., F) fp32, bf16 or fp16; or both in one, (..., 2 F), gates first, as one product
               of both matrices gives them

With s = 1 / (1 + e^-gate) and g the output's gradient:

    gate  g up s (1 + gate (1 - s))          up  g gate s
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.rounding import (
    FP8,
    NONE,
    as_output,
    as_rows,
    check_no_gradient,
    empty_results,
    rounded_reference,
    rounding_of,
)
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

# up None: gate is (T, 2 F) and holds both.
SCHEMA = (
    "(Tensor gate, Tensor? up, int codes, int group, Tensor? static_scale)"
    " -> (Tensor output, Tensor scale)"
)
# Gradients of gate and of up; without up the first is of both, (T, 2 F), the second (0,).
SCHEMA_BACKWARD = "(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)"


def silu_mul_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The same in plain torch, in fp64 as well: specification, oracle and baseline."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


ROUTES = routes(
    "silu_mul",
    {"cpu": "cpu", "cuda": "triton"},
    cpu=Implementation(("cpu",), needs="native"),
    triton=Implementation(("cuda", "cpu"), needs="triton"),  # cpu: the interpreter
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)


def _fake(
    gate: Tensor, up: Tensor | None, codes: int, group: int, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = gate.shape
    shape = rows, width // 2 if up is None else width
    return empty_results(gate, shape, codes, group, static_scale)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    of_gate = gate.new_empty(gate.shape)
    return of_gate, gate.new_empty(0) if up is None else up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    gate, up, *_ = inputs
    result, scale = output
    ctx.save_for_backward(gate, up)
    codes = [] if result.dtype == gate.dtype else [result]
    ctx.mark_non_differentiable(scale, *codes)


def _register(impl: str) -> None:
    """One overload, its backward, its fakes and its autograd formula."""
    forward, backward = f"slmperf::silu_mul.{impl}", f"slmperf::silu_mul_backward.{impl}"
    torch.library.define(forward, SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.define(backward, SCHEMA_BACKWARD, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    backward_op = getattr(torch.ops.slmperf.silu_mul_backward, impl)

    def gradient(ctx: Any, grad: Tensor, _: Any) -> tuple:
        gate, up = ctx.saved_tensors
        # A gradient may have any strides: `sum().backward()` hands down one number.
        of_gate, of_up = backward_op(as_rows(grad), gate, up)
        return of_gate, None if up is None else of_up, None, None, None

    def no_second_gradient(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError("silu_mul: only impl='reference' can be differentiated twice")

    torch.library.register_autograd(forward, gradient, setup_context=_save)
    torch.library.register_autograd(backward, no_second_gradient)


_register("cpu")
_register("triton")


@torch.library.impl("slmperf::silu_mul.triton", ("cpu", "cuda"))
def _triton(
    gate: Tensor, up: Tensor | None, codes: int, group: int, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    require_interpreter("silu_mul", gate)
    from slmperf.triton_kernels import silu_mul as kernels

    shape = gate.shape[0], gate.shape[1] // 2 if up is None else gate.shape[1]
    by_token = codes != NONE and group == 0 and static_scale is None
    in_two_passes = by_token and shape[1] > kernels.MOST_COLUMNS
    made = empty_results(gate, shape, NONE if in_two_passes else codes, group, static_scale)
    kernels.silu_mul(gate, up, group, static_scale, *made)
    if in_two_passes:
        from slmperf.triton_kernels.quantize_input import quantize_input

        return quantize_input(made[0], None, codes == FP8, group)
    return made


@torch.library.impl("slmperf::silu_mul_backward.triton", ("cpu", "cuda"))
def _triton_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    require_interpreter("silu_mul", gate)
    from slmperf.triton_kernels.silu_mul import silu_mul_backward as launch

    return launch(grad, gate, up)


def silu_mul(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activations: ActivationSpec | None = None,
    input_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | QuantizedInput:
    """silu(gate) up, (..., F); the formula, shapes and rounding are above.

    up           like gate; None: gate holds both, (..., 2 F)
    activations  how the output is rounded for the product behind it, codes and scales as
                 quantize_input gives them for the output; None: not at all
    input_scale  one fp32 number, where `activations` is static
    impl         "auto" (CUDA: "triton"; CPU: "cpu"), "triton", "cpu" or "reference"

    Both receive gradients, where the output stays floating. The same bits from run to run, on a CPU
    for any number of threads. InputError for shapes, dtypes, devices and groups that do not fit,
    NotImplementedError for what `impl` does not take and for codes of what wants a gradient.
    """
    if gate.dim() == 0 or (up is None and gate.shape[-1] % 2):
        wanted = "(..., 2 F)" if up is None else "(..., F)"
        raise InputError(f"silu_mul: gate is {tuple(gate.shape)}, wanted {wanted}")
    if up is not None and up.shape != gate.shape:
        raise InputError(f"silu_mul: up is {tuple(up.shape)}, wanted gate's {tuple(gate.shape)}")
    if up is not None and (up.dtype != gate.dtype or up.device != gate.device):
        raise InputError(
            f"silu_mul: up is {up.dtype} on {up.device}, wanted gate's {gate.dtype} on "
            f"{gate.device}"
        )
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    if width == 0:
        raise InputError(f"silu_mul: gate is {tuple(gate.shape)}, wanted F of 1 or more")
    rounding = rounding_of("silu_mul", activations, input_scale, gate, width)
    check_no_gradient("silu_mul", rounding, gate=gate, up=up)
    rows, others = as_rows(gate), None if up is None else as_rows(up)
    chosen = ROUTES.choose(impl, gate)
    if chosen == "reference":
        result, scale = rounded_reference(silu_mul_reference(rows, others), rounding)
    else:
        result, scale = getattr(torch.ops.slmperf.silu_mul, chosen)(rows, others, *rounding)
    return as_output(result, scale, rounding, (*gate.shape[:-1], width))
