"""The product with a weight of 8-bit codes, for linear_int8 and linear_fp8 on GPU.

Rounded inputs: codes are multiplied by IMMA, IGMMA or QGMMA; scales of rows and outputs come in on
the way out, scales of 128 inputs in the loop. What fp8 units sum up, with fewer digits than fp32
has, is added to fp32 every 128 inputs. Weight-only: a tile's codes become numbers in registers, on
sm_90 the ones that wgmma takes its left operand from.

    flops              2 M N K
    bytes of a weight  1 for each tile of rows; of an input 1, or its own, for each tile of outputs

Scales of blocks are under way while a block is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels import linear_tiles
from slmperf.triton_kernels.common import e4m3, on_device
from slmperf.triton_kernels.linear_tiles import leave, place, plan, row_tiles, tile_of

MATRIX_EXEMPT = {
    "_product(*fp32*": "fp32 inputs, whose weights have more digits than TF32",
}
SHARED = tl.constexpr(128)  # inputs of a group, outputs and inputs of a block


@triton.jit
def _numbers(codes, scale, dtype: tl.constexpr):
    """Codes (N, K) times scale (N,), rounded to the scale's dtype, in dtype."""
    wide = e4m3(codes).to(tl.float32) if codes.dtype == tl.uint8 else codes.to(tl.float32)
    return (wide * scale.to(tl.float32)[:, None]).to(scale.dtype).to(dtype)


@triton.jit
def _block(pointers, offset, first, inputs, MASKED: tl.constexpr):
    """Numbers of the inputs from `first` on; 0 where there are none."""
    if MASKED:
        there = offset + first < inputs
        return tl.load(pointers, mask=there[None, :], other=0.0)
    else:
        return tl.load(pointers)


# Not specialised: numbers that differ from call to call.
@triton.jit(do_not_specialize=["rows", "experts", "step", "splits", "x_scale_row"])
def _product(
    x_ptr, x_scale_ptr, codes_ptr, scale_ptr, bias_ptr, residual_ptr, starts_ptr, y_ptr, sums_ptr,
    rows, outputs, inputs, experts, step, splits, x_row, x_scale_row, codes_row, codes_expert,
    scale_row, scale_block, scale_expert, residual_row, ROUNDED: tl.constexpr,
    GROUPS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EXPERTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile after tile of y, or of sums of a split of `step` inputs.

    scale_row    from output to output, with BLOCKS from 128 of them to the next
    scale_block  from 128 inputs to the next
    MASKED       inputs are no multiple of BLOCK_K
    """
    down = row_tiles(starts_ptr, rows, experts, BLOCK_M, EXPERTS)
    across = tl.cdiv(outputs, BLOCK_N)
    last_shared = (inputs - 1) // SHARED
    within = tl.arange(0, BLOCK_K)
    for index in range(tl.program_id(0), down * across * splits, tl.num_programs(0)):
        expert, start, end, column_tile, split = place(
            index, down, across, starts_ptr, rows, experts, BLOCK_M, EXPERTS
        )  # fmt: skip
        begin = tl.multiple_of(split * step, BLOCK_K)
        # Rows and outputs behind the last are the last: they are read, and not written.
        column = tl.minimum(column_tile * BLOCK_N + tl.arange(0, BLOCK_N), outputs - 1)
        row = tl.minimum(start + tl.arange(0, BLOCK_M), end - 1)
        weights_ptr = codes_ptr + tl.cast(expert, tl.int64) * codes_expert + begin
        weights_ptr += tl.cast(column_tile, tl.int64) * BLOCK_N * codes_row
        inputs_ptr = x_ptr + tl.cast(start, tl.int64) * x_row + begin
        # Inside a tile 32 bits are enough for an offset, and take half the registers.
        weights_at = (column - column_tile * BLOCK_N)[:, None] * codes_row + within[None, :]
        inputs_at = (row - start)[:, None] * x_row + within[None, :]
        scales_ptr = scale_ptr + tl.cast(expert, tl.int64) * scale_expert
        scales_at = (column // SHARED if BLOCKS else column) * scale_row
        if GROUPS:
            x_scales_ptr = x_scale_ptr + tl.cast(start, tl.int64) * x_scale_row
            x_scales_at = (row - start) * x_scale_row
        if not ROUNDED:
            scale = tl.load(scales_ptr + begin // SHARED * scale_block + scales_at)
        if codes_ptr.dtype.element_ty == tl.int8 and ROUNDED:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        else:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in range(begin, tl.minimum(begin + step, inputs), BLOCK_K):
            codes = _block(weights_ptr + weights_at, within, first, inputs, MASKED)
            x = _block(inputs_ptr + inputs_at, within, first, inputs, MASKED)
            if not ROUNDED:
                weights = _numbers(codes, scale, x.dtype)
                if BLOCKS:  # the next block's, under way while this one is multiplied
                    shared = tl.minimum((first + BLOCK_K) // SHARED, last_shared)
                    scale = tl.load(scales_ptr + shared * scale_block + scales_at)
                sums = tl.dot(weights, tl.trans(x), sums, input_precision="ieee")
            elif GROUPS or BLOCKS:
                shared = first // SHARED
                if BLOCKS:
                    scale = tl.load(scales_ptr + shared * scale_block + scales_at)
                if GROUPS:
                    x_scale = tl.load(x_scales_ptr + shared + x_scales_at)
                part = tl.dot(codes, tl.trans(x))
                if BLOCKS:
                    part *= scale[:, None]
                if GROUPS:
                    part *= x_scale[None, :]
                sums += part
            elif codes.dtype == tl.int8:
                sums = tl.dot(codes, tl.trans(x), sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(codes, tl.trans(x), sums, max_num_imprecise_acc=BLOCK_K)
            weights_ptr += BLOCK_K
            inputs_ptr += BLOCK_K
        leave(
            sums, start, end, column_tile, split, rows, outputs, expert, y_ptr, sums_ptr,
            None if GROUPS or not ROUNDED else x_scale_ptr,
            None if BLOCKS or not ROUNDED else scale_ptr, bias_ptr, residual_ptr, x_scale_row,
            scale_row, scale_expert, residual_row,
        )  # fmt: skip


def product(
    x: Tensor, x_scale: Tensor | None, codes: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, rounded: bool, blocks: bool,
    out_dtype: torch.dtype, config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """y (M, N). rounded: x (M, K) are codes with x_scale, fp32 (M, 1), (1, 1) or (M, K / 128); else
    numbers, and x_scale is None. blocks: scale is of blocks. config: of the table's row. The rest
    as of the operators."""
    rows, inputs = x.shape
    outputs = codes.shape[-2]
    y = x.new_empty((rows, outputs), dtype=out_dtype)
    if rows == 0:
        return y
    experts = 0 if starts is None else len(starts) - 1
    bias = None if bias is None else bias.contiguous()
    groups = x_scale is not None and x_scale.shape[1] > 1
    tile = tile_of(config, x)
    exact = rounded and codes.dtype == torch.int8
    launch = plan(tile, x, outputs, experts, torch.int32 if exact else torch.float32)
    on_way_out = (
        None if groups or not rounded else x_scale, None if blocks or not rounded else scale
    )  # fmt: skip
    of_row, of_column, of_expert, of_residual = linear_tiles.strides_of(x_scale, scale, residual)
    with on_device(x):
        _product[(launch.programs,)](
            x, x_scale, codes, scale, bias, residual, starts, y, launch.sums, rows, outputs,
            inputs, experts, launch.step, launch.splits, x.stride(0), of_row, codes.stride(-2),
            codes.stride(0) if experts else 0, of_column, scale.stride(-1) if blocks else 0,
            of_expert, of_residual, ROUNDED=rounded, GROUPS=groups, BLOCKS=blocks, BLOCK_M=tile.m,
            BLOCK_N=tile.n, BLOCK_K=tile.k, EXPERTS=linear_tiles.experts_block(experts),
            MASKED=inputs % tile.k > 0, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if launch.sums is not None:
        strides = of_row, of_column, of_expert, of_residual
        linear_tiles.sum_splits(launch.sums, y, *on_way_out, bias, residual, strides)
    return y
