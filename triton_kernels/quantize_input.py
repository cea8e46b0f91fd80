"""quantize_input on GPU: a row is read once, its scale found, its codes written.

Formulas: slmperf/ops/linear/quantize_input.py; the arithmetic, to the bit: encode.py. A program has
some parts of rows that share a scale each: whole rows, or 128 numbers. A part of more numbers than
registers hold is read a second time.

    bytes per number   those of x, and 1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import on_device
from slmperf.triton_kernels.encode import codes_of, largest_size, rounded, scale_of

# Numbers of a program, at most in registers; warps for so many.
NUMBERS, WARPS = 16384, {1024: 4, 4096: 8, 16384: 16}


@triton.jit
def _put(
    x, at, there, scale, codes_ptr, FP8: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    codes = codes_of(x, tl.broadcast_to(scale[:, None], x.shape), FP8, dtype)
    tl.store(codes_ptr + at, codes, mask=there)


@triton.jit(do_not_specialize=["parts"])
def _encode(
    x_ptr, given_ptr, codes_ptr, scale_ptr, parts, groups, width, x_row, FP8: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """PARTS parts of `width` numbers, `groups` to a row.

    given  one scale for all, or None; WHOLE: a part has no more than BLOCK numbers
    """
    part = tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    within = tl.arange(0, BLOCK)
    mine = (part < parts)[:, None]
    from_ = (part // groups * x_row + part % groups * width)[:, None] + within[None, :]
    to = (part * width)[:, None] + within[None, :]
    there = mine & (within < width)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + from_, mask=there, other=0.0).to(tl.float32)
    if given_ptr is not None:
        scale = rounded(tl.zeros((PARTS,), tl.float32) + tl.load(given_ptr), dtype)
    else:
        largest = largest_size(x, 1)
        if not WHOLE:
            for first in range(BLOCK, width, BLOCK):
                more = mine & (within < width - first)[None, :]
                y = tl.load(x_ptr + from_ + first, mask=more, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, largest_size(y, 1), propagate_nan=tl.PropagateNan.ALL)
        scale = scale_of(largest, FP8, dtype)
        tl.store(scale_ptr + part, scale, mask=part < parts)
    _put(x, to, there, scale, codes_ptr, FP8, dtype)
    if not WHOLE:
        for first in range(BLOCK, width, BLOCK):
            more = mine & (within < width - first)[None, :]
            x = tl.load(x_ptr + from_ + first, mask=more, other=0.0).to(tl.float32)
            _put(x, to + first, more, scale, codes_ptr, FP8, dtype)


def quantize_input(
    x: Tensor, static_scale: Tensor | None, fp8: bool, group: int
) -> tuple[Tensor, Tensor]:
    """Arguments as of the operator."""
    rows, inputs = x.shape
    width = group or inputs
    groups = inputs // width if width else 0
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    scale = x.new_empty((rows, groups), dtype=torch.float32)
    if static_scale is not None:
        scale = static_scale.clone()
    if x.numel() == 0:
        return codes, scale
    block = min(NUMBERS, triton.next_power_of_2(width))
    together = max(1, 1024 // block)
    warps = next(warps for most, warps in WARPS.items() if together * block <= most)
    with on_device(x):
        _encode[(triton.cdiv(rows * groups, together),)](
            x, static_scale, codes.view(torch.uint8) if fp8 else codes,
            None if static_scale is not None else scale, rows * groups, groups, width,
            x.stride(0), FP8=fp8, PARTS=together, BLOCK=block, WHOLE=width <= block,
            num_warps=warps,
        )  # fmt: skip
    return codes, scale
