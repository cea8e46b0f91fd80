"""linear_fp8 on GPU: inputs are rounded in a pass of their own, then codes are multiplied.

Formulas: slmperf/ops/linear/fp8.py; the kernel: linear_codes.py. Weight-only, a GPU without fp8
units takes the weight's codes as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slmperf.triton_kernels import common
from slmperf.triton_kernels.linear_codes import product
from slmperf.triton_kernels.quantize_input import quantize_input


def linear_fp8(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, out_dtype: torch.dtype, *, rounded: bool,
    group: int, blocks: bool, config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Arguments as of the operator; instead of its `activations`

    rounded  whether x is to be rounded, or was; else x_scale is None
    group    inputs of a token that share a scale; 0: all
    blocks   whether scale is of blocks
    config   of the table's row
    """
    if rounded and x.dtype != torch.float8_e4m3fn:
        static = None if x_scale is None else x_scale.view(1)
        x, x_scale = quantize_input(x, static, True, group)
        x_scale = x_scale if x_scale.dim() == 2 else x_scale.view(1, 1)
    if 0 < common.machine(x).capability < 89:
        codes = codes.view(torch.uint8)
    return product(
        x, x_scale, codes, scale, bias, residual, starts, rounded, blocks, out_dtype, config
    )
