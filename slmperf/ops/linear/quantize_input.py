"""quantize_input: the inputs of a low-precision product, rounded to int8 or fp8 (e4m3).

    scale = max |x| / 127.5 (int8) or / 448 (fp8), of a token or of 128 of its numbers
    code  = round(clamp(x / scale))

step by step in x's dtype, as `ActivationSpec` defines it: every implementation gives its codes and
scales to the bit, so a served model rounds what the quantiser's model rounded. A row of zeros has
the dtype's epsilon for a scale.

    x      (M, K) fp32, bf16 or fp16; any row stride
    codes  (M, K) int8 or float8_e4m3fn
    scale  fp32: (M, 1), (M, K / 128), or the given one, (1,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.rounding import (
    FP8,
    INT8,
    Rounding,
    as_output,
    as_rows,
    check_no_gradient,
    rounded_reference,
    rounding_of,
)
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

# fp8: codes are e4m3, otherwise int8. group: numbers of a token that share a scale; 0: all of them.
SCHEMA = "(Tensor x, Tensor? static_scale, bool fp8, int group) -> (Tensor, Tensor)"


def quantize_input_reference(
    x: Tensor, static_scale: Tensor | None, fp8: bool, group: int
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    rounding = Rounding(FP8 if fp8 else INT8, group, static_scale)
    codes, scale = rounded_reference(x, rounding)
    return codes, scale if static_scale is None else static_scale.clone()


ROUTES = routes(
    "quantize_input",
    {"cpu": "cpu", "cuda": "triton"},
    cpu=Implementation(("cpu",), needs="native"),
    triton=Implementation(("cuda", "cpu"), needs="triton"),
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)


def _fake(x: Tensor, static_scale: Tensor | None, fp8: bool, group: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    if static_scale is not None:
        return codes, torch.empty_like(static_scale)
    groups = x.shape[1] // group if group else 1
    return codes, x.new_empty((x.shape[0], groups), dtype=torch.float32)


for _name in ("cpu", "triton", "reference"):
    torch.library.define(
        f"slmperf::quantize_input.{_name}", SCHEMA, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.register_fake(f"slmperf::quantize_input.{_name}", _fake)
torch.library.impl("slmperf::quantize_input.reference", ("cpu", "cuda"))(quantize_input_reference)


@torch.library.impl("slmperf::quantize_input.triton", ("cpu", "cuda"))
def _triton(x: Tensor, static_scale: Tensor | None, fp8: bool, group: int) -> tuple[Tensor, Tensor]:
    require_interpreter("quantize_input", x)
    from slmperf.triton_kernels.quantize_input import quantize_input as launch

    return launch(x, static_scale, fp8, group)


def round_rows(
    x: Tensor, static_scale: Tensor | None, fp8: bool, group: int
) -> tuple[Tensor, Tensor]:
    """The op by the fastest means there is on x's device."""
    auto = ROUTES.auto[x.device.type]
    overload = auto if ROUTES.takes(auto, x) else "reference"
    return getattr(torch.ops.slmperf.quantize_input, overload)(x, static_scale, fp8, group)


def quantize_input(
    x: Tensor,
    activations: ActivationSpec,
    input_scale: Tensor | None = None,
    *,
    impl: str = "auto",
) -> QuantizedInput:
    """Round x (..., K) once for several products with the same inputs.

    activations  how; input_scale  one fp32 number, where they are static
    impl         "auto" (CUDA: "triton"; CPU: "cpu"), "triton", "cpu" or "reference"

    Forward only (`linear` of x itself has a gradient). InputError for groups that do not divide K
    and a static scale that is missing, NotImplementedError for what `impl` does not take.
    """
    rounding = rounding_of("quantize_input", activations, input_scale, x, x.shape[-1])
    check_no_gradient("quantize_input", rounding, x=x)
    op = getattr(torch.ops.slmperf.quantize_input, ROUTES.choose(impl, x))
    codes, scale = op(as_rows(x), rounding.static_scale, rounding.codes == FP8, rounding.group)
    made = as_output(codes, scale, rounding, tuple(x.shape))
    assert isinstance(made, QuantizedInput)
    return made
