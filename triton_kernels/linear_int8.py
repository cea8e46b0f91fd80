"""linear_int8 on GPU: inputs are rounded in a pass of their own, then codes are multiplied.

Formulas: slmperf/ops/linear/int8.py; the kernel: linear_codes.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slmperf.triton_kernels.linear_codes import product
from slmperf.triton_kernels.quantize_input import quantize_input


def linear_int8(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, activations: int, out_dtype: torch.dtype,
    config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Arguments as of the operator; config: of the table's row."""
    rounded = activations != 0
    if rounded and x.is_floating_point():
        static = None if x_scale is None else x_scale.view(1)
        x, x_scale = quantize_input(x, static, False, 0)
        x_scale = x_scale.view(-1, 1)
    return product(
        x, x_scale, codes, scale, bias, residual, starts, rounded, False, out_dtype, config
    )
