"""linear_fp8: x times an fp8 (e4m3) weight, with rounded inputs or weight-only.

    y = sum of x_scale w_scale (codes of x . codes of W), over what shares both   rounded inputs
    y = x W', W = code * scale rounded to the scale's dtype, then to x's          activations NONE

    x        (M, K) fp32, bf16 or fp16, rounded here as `activations` says; or float8_e4m3fn codes
    x_scale  of codes: fp32 (M, 1), (1, 1) or (M, K / 128); of floating x: (1, 1) where it is static
    codes    (N, K) float8_e4m3fn, any row stride
    scale    (1, 1), (N, 1) or (ceil(N / 128), ceil(K / 128)) fp32; for "none" also bf16, fp16

sm_80 has no fp8 units: there floating x is multiplied as it is, whatever `activations` says, and
codes are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf import arch
from slmperf.ops.linear import table
from slmperf.ops.linear.product import product_reference, register
from slmperf.ops.linear.quantize_input import quantize_input_reference, round_rows
from slmperf.ops.linear.weights import BLOCK, has_blocks
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

NONE, TOKEN, STATIC, GROUP = 0, 1, 2, 3  # what happens to floating x
SCHEMA = (
    "(Tensor x, Tensor? x_scale, Tensor codes, Tensor scale, Tensor? bias, Tensor? residual,"
    " Tensor? starts, int activations, ScalarType out_dtype) -> Tensor"
)


def dequantized_fp8(codes: Tensor, scale: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """(..., N, K) codes times their scales, in `wide` or the scale's dtype."""
    dtype = wide or scale.dtype
    outputs, inputs = codes.shape[-2:]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(BLOCK, dim=-1)[..., :inputs]
    if scale.shape[-2] not in (1, outputs):
        scale = scale.repeat_interleave(BLOCK, dim=-2)[..., :outputs, :]
    return codes.to(dtype) * scale.to(dtype)


def linear_fp8_reference(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in plain torch; what was rounded is multiplied out in the wider dtype of the scales
    and of the output, fp64 where x is."""
    if activations == NONE:
        weight = dequantized_fp8(codes, scale)
        return product_reference(x, weight, bias, residual, starts, out_dtype)
    wide = torch.promote_types(torch.float32, out_dtype)
    if x.dtype != torch.float8_e4m3fn:
        wide = torch.promote_types(wide, x.dtype)
        given = None if x_scale is None else x_scale.view(1)
        x, x_scale = quantize_input_reference(x, given, True, BLOCK if activations == GROUP else 0)
    assert x_scale is not None
    x_scale = x_scale.to(wide)
    if x_scale.dim() == 2 and x_scale.shape[1] > 1:
        x_scale = x_scale.repeat_interleave(BLOCK, dim=1)
    else:
        x_scale = x_scale.view(-1, 1)
    weight = dequantized_fp8(codes, scale, wide)
    return product_reference(x.to(wide) * x_scale, weight, bias, residual, starts, out_dtype)


ROUTES = routes(
    "linear_fp8",
    {"cpu": "by table", "cuda": "by table"},
    cpu=Implementation(("cpu",), (*HALF_AND_FLOAT, torch.float8_e4m3fn), "native"),
    triton=Implementation(("cuda", "cpu"), (*HALF_AND_FLOAT, torch.float8_e4m3fn), "triton"),
    torch=Implementation(("cpu", "cuda"), (*HALF_AND_FLOAT, torch.float8_e4m3fn)),
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64, torch.float8_e4m3fn)),
)


def _torch(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's fp8 product (`torch._scaled_mm`; on GPUs cuBLASLt's) where there is one: of rounded
    inputs, scales of rows and outputs, N and K multiples of 16; else a dequantised weight."""
    if x.device.type == "cuda" and (arch.cuda_capability(x.device.index or 0) or (0, 0)) < (8, 9):
        activations = NONE  # linear has refused codes
    outputs, inputs = codes.shape[-2:]
    odd = outputs % 16 or inputs % 16 or codes.stride(-2) % 16 or len(x) == 0
    if activations in (NONE, GROUP) or starts is not None or odd or has_blocks(scale, outputs):
        return linear_fp8_reference(
            x, x_scale, codes, scale, bias, residual, starts, activations, out_dtype
        )
    if x.dtype != torch.float8_e4m3fn:
        given = None if x_scale is None else x_scale.view(1)
        x, x_scale = round_rows(x, given, True, 0)
    assert x_scale is not None
    of_rows, of_columns = x_scale.view(-1, 1), scale.view(1, -1)
    single = of_rows.numel() == of_columns.numel() == 1
    if single:
        scales = of_rows, of_columns
    elif out_dtype == torch.bfloat16:
        scales = (
            of_rows.expand(len(x), 1).contiguous(), of_columns.expand(1, outputs).contiguous()
        )  # fmt: skip
    else:  # of rows and columns cuBLASLt takes scales with bf16 results alone
        one = scale.new_ones(1, 1)
        y = torch._scaled_mm(
            x.contiguous(), codes.T, one, one, out_dtype=torch.float32, use_fast_accum=False
        )
        return _added(y * of_rows * of_columns, bias, residual).to(out_dtype)
    fused = bias if bias is not None and bias.dtype == out_dtype != torch.float32 else None
    y = torch._scaled_mm(
        x.contiguous(), codes.T, *scales, bias=fused, out_dtype=out_dtype, use_fast_accum=False
    )
    return _added(y, None if fused is not None else bias, residual).to(out_dtype)


def _added(y: Tensor, *others: Tensor | None) -> Tensor:
    for other in others:
        if other is not None:
            y = y + other
    return y


def _triton(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    require_interpreter("linear_fp8", x)
    from slmperf.triton_kernels.common import machine
    from slmperf.triton_kernels.linear_fp8 import linear_fp8 as launch

    capability, outputs = machine(x).capability, codes.shape[-2]
    rounded = activations != NONE and not 0 < capability < 89
    if x.dtype == torch.float8_e4m3fn and not rounded:
        raise NotImplementedError("linear_fp8: fp8 inputs on a GPU without fp8 units")
    call = table.Call(
        "linear_fp8", x.shape[0], outputs, x.shape[1], x.dtype, rounded=rounded,
        blocks=has_blocks(scale, outputs), experts=0 if starts is None else len(starts) - 1,
    )  # fmt: skip
    return launch(
        x, x_scale if rounded else None, codes, scale, bias, residual, starts, out_dtype,
        rounded=rounded, group=BLOCK if activations == GROUP else 0, blocks=call.blocks,
        config=table.tile(call, capability),
    )  # fmt: skip


def _weight(given: dict[str, Any], inputs: int, dtype: torch.dtype) -> Tensor:
    return dequantized_fp8(given["codes"], given["scale"]).to(dtype)


chosen = register(
    "linear_fp8",
    SCHEMA,
    ROUTES,
    implementations={"triton": _triton, "torch": _torch, "reference": linear_fp8_reference},
    weight_of=_weight,
)
