"""linear_int8: x times an int8 weight, a scale for each output (W8A8, W8A16).

Products of codes are summed exactly, in int32; a weight alone is widened first:

    y = x_scale w_scale (codes of x . codes of W)       rounded inputs
    y = x W', W = code * scale rounded to the scale's dtype, then to x's        activations NONE

    x        (M, K) fp32, bf16 or fp16, rounded here as `activations` says; or int8 codes
    x_scale  of codes: fp32 (M, 1) or (1, 1); of floating x: (1, 1) where inputs are static
    codes    (N, K) int8, any row stride
    scale    (N, 1) fp32; for NONE also bf16, fp16
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.ops.linear import table
from slmperf.ops.linear.product import product_reference, register
from slmperf.ops.linear.quantize_input import quantize_input_reference, round_rows
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

# activations: the place in NONE, TOKEN, STATIC of what happens to floating x
NONE, TOKEN, STATIC = 0, 1, 2
SCHEMA = (
    "(Tensor x, Tensor? x_scale, Tensor codes, Tensor scale, Tensor? bias, Tensor? residual,"
    " Tensor? starts, int activations, ScalarType out_dtype) -> Tensor"
)


def linear_int8_reference(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in plain torch; what was rounded is multiplied out in the wider dtype of the scales
    and of the output, fp64 where x is."""
    if activations == NONE:
        weight = codes.to(scale.dtype) * scale
        return product_reference(x, weight, bias, residual, starts, out_dtype)
    wide = torch.promote_types(torch.float32, out_dtype)
    if x.is_floating_point():
        wide = torch.promote_types(wide, x.dtype)
        x, x_scale = quantize_input_reference(x, _one(x_scale), False, 0)
    assert x_scale is not None
    rounded = x.to(wide) * x_scale.to(wide).view(-1, 1)
    weight = codes.to(wide) * scale.to(wide)
    return product_reference(rounded, weight, bias, residual, starts, out_dtype)


def _one(x_scale: Tensor | None) -> Tensor | None:
    return None if x_scale is None else x_scale.view(1)


ROUTES = routes(
    "linear_int8",
    {"cpu": "by table", "cuda": "by table"},
    cpu=Implementation(("cpu",), (*HALF_AND_FLOAT, torch.int8), "native"),
    triton=Implementation(("cuda", "cpu"), (*HALF_AND_FLOAT, torch.int8), "triton"),
    torch=Implementation(("cpu", "cuda"), (*HALF_AND_FLOAT, torch.int8)),
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64, torch.int8)),
)


def _torch(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's int8 product (`torch._int_mm`; on GPUs of N and K that are multiples of 8) and its
    scales in a second pass; else a dequantised weight."""
    outputs, inputs = codes.shape[-2:]
    on_gpu = x.device.type == "cuda"
    odd = on_gpu and (outputs % 8 or inputs % 8 or codes.stride(-2) % 8)
    if activations == NONE or starts is not None or odd:
        return linear_int8_reference(
            x, x_scale, codes, scale, bias, residual, starts, activations, out_dtype
        )
    if x.is_floating_point():
        x, x_scale = round_rows(x, _one(x_scale), False, 0)
    assert x_scale is not None
    rows = len(x)
    if on_gpu and rows <= 16:  # it wants more than 16 there
        x = torch.nn.functional.pad(x, (0, 0, 0, 17 - rows))
    sums = torch._int_mm(x.contiguous(), codes.T)[:rows]
    y = sums * x_scale.view(-1, 1) * scale.view(1, -1)
    for added in (bias, residual):
        if added is not None:
            y = y + added
    return y.to(out_dtype)


def _triton(x: Tensor, x_scale: Tensor | None, codes: Tensor, *arguments: Any) -> Tensor:
    require_interpreter("linear_int8", x)
    from slmperf.triton_kernels.common import machine
    from slmperf.triton_kernels.linear_int8 import linear_int8 as launch

    *_, starts, activations, _ = arguments
    call = table.Call(
        "linear_int8", x.shape[0], codes.shape[-2], x.shape[1], x.dtype,
        rounded=activations != NONE, experts=0 if starts is None else len(starts) - 1,
    )  # fmt: skip
    return launch(x, x_scale, codes, *arguments, table.tile(call, machine(x).capability))


def _weight(given: dict[str, Any], inputs: int, dtype: torch.dtype) -> Tensor:
    scale = given["scale"]
    return (given["codes"].to(scale.dtype) * scale).to(dtype)


chosen = register(
    "linear_int8",
    SCHEMA,
    ROUTES,
    implementations={"triton": _triton, "torch": _torch, "reference": linear_int8_reference},
    weight_of=_weight,
)
