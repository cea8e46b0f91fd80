"""linear_int4 on GPU: x times a weight of 4 bits, put together in registers (W4A16).

Formulas and layout: slmperf/ops/linear/int4.py and int4_layout.py. A tile of the weight is loaded
as words, 16 bytes a lane, in cp.async stages beside x's. A word's nibbles get the exponent that
makes them numbers above a power of 2 of the scale's dtype, from which that power, 8 and the zero
point are taken off, exactly; times the scale is the one rounding that the format has. The layout is
that of the left operand of a matrix instruction: on sm_90 words, numbers and the operand of wgmma
stay in the same registers; on sm_80 too, where a warp has its own outputs, BLOCK_N >= 2 BLOCK_M.

    flops                2 M N K
    bytes of a weight    1/2, and its part of a scale, for each tile of rows
    instructions         per pair of weights of bf16 or fp16: a shift, a lop3, a subtraction, a
                         multiplication

Scales of the next block of inputs are under way while a block is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels import linear_tiles
from slmperf.triton_kernels.common import on_device
from slmperf.triton_kernels.linear_tiles import leave, place, plan, row_tiles, tile_of

MATRIX_EXEMPT = {
    "_product(*fp32*": "fp32 inputs, whose weights have more digits than TF32",
}
# Outputs and inputs that a program of `_dequantize` writes.
DEQUANTIZED = (64, 64)


@triton.jit
def _pair(words, SHIFT: tl.constexpr, scale, zero, dtype: tl.constexpr):
    """The weights of nibbles SHIFT / 4 and SHIFT / 4 + 4, side by side, in dtype."""
    if scale.dtype == tl.float32:
        low = (((words >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
        high = (((words >> (SHIFT + 16)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
    else:  # 128 + code of bf16, 1024 + code of fp16: the last digit counts ones
        bits: tl.constexpr = 0x43004300 if scale.dtype == tl.bfloat16 else 0x64006400
        both = ((words >> SHIFT) & 0x000F000F) | bits
        low = both.to(tl.int16).to(scale.dtype, bitcast=True)
        high = (both >> 16).to(tl.int16).to(scale.dtype, bitcast=True)
    return tl.join(((low - zero) * scale).to(dtype), ((high - zero) * scale).to(dtype))


@triton.jit
def _scale_of(scale_ptr, zero_ptr, at, group, of_scale, of_zero):
    """Scales of one group, and what stands for a weight of 0."""
    scale = tl.load(scale_ptr + group * of_scale + at)
    nothing: tl.constexpr = (
        8388608.0 if scale.dtype == tl.float32 else 128.0 if scale.dtype == tl.bfloat16 else 1024.0
    )
    if zero_ptr is None:
        return scale, tl.full((1, 1, 1, 1, 1, 1), nothing + 8.0, tl.float32).to(scale.dtype)
    else:
        zero = tl.load(zero_ptr + group * of_zero + at).to(tl.float32)
        return scale, (zero + (nothing + 8.0)).to(scale.dtype)


@triton.jit
def _weights(words, scale_0, zero_0, scale_8, zero_8, dtype: tl.constexpr):
    """Words (n, k, 8, 4, s, 4 / s) of n x k tiles -> weights (16 n, 64 k).

    scale_0, zero_0  of the outputs 0 to 7 of a tile, (n, k or 1, 8, 1, s, 1); scale_8: 8 to 15
    """
    first = tl.join(
        _pair(words, 0, scale_0, zero_0, dtype), _pair(words, 8, scale_0, zero_0, dtype)
    )
    second = tl.join(
        _pair(words, 4, scale_8, zero_8, dtype), _pair(words, 12, scale_8, zero_8, dtype)
    )
    # n, k, g, t, s, j, l, h, r -> n, r, g; k, s, j, h, t, l: see the layout
    parts = tl.permute(tl.join(first, second), (0, 8, 2, 1, 4, 5, 7, 3, 6))
    return tl.reshape(parts, (16 * words.shape[0], 64 * words.shape[1]))


@triton.jit
def _lanes(column_tile, outputs, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr):
    """Tiles of outputs; offsets of words from the first of a row of tiles; of scales from the first
    output; inputs at which a group begins. All with six dimensions, those of `_weights`' words.

    SUB  groups of the 64 inputs of a tile. Outputs behind the last are those of the last tile
    """
    n = column_tile * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    n = tl.minimum(n, tl.cdiv(outputs, 16) - 1)[:, None, None, None, None, None]
    k = tl.arange(0, BLOCK_K // 64)[None, :, None, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None, None]
    sub = tl.arange(0, SUB)[None, None, None, None, :, None]
    j = tl.arange(0, 4 // SUB)[None, None, None, None, None, :]
    words = k * 128 + g * 16 + t * 4 + sub * (4 // SUB) + j
    return n, words, n * 16 + g, k * 64 + sub * (64 // SUB)


@triton.jit
def _words(packed_ptr, at, k, inside, MASKED: tl.constexpr):
    """The words of a block; 0 behind the last tile of inputs."""
    if MASKED:
        return tl.load(packed_ptr + at, mask=k < inside, other=0)
    else:
        return tl.load(packed_ptr + at)


# Not specialised: numbers that differ from call to call.
@triton.jit(do_not_specialize=["rows", "experts", "step", "splits"])
def _product(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, starts_ptr, y_ptr, sums_ptr,
    rows, outputs, inputs, experts, step, splits, x_row, packed_tile, packed_expert, scale_group,
    scale_expert, zero_group, zero_expert, residual_row, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
    EXPERTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile after tile of y, or of sums of a split of `step` inputs.

    GROUP   inputs that share a scale; 0: all
    MASKED  inputs are no multiple of BLOCK_K
    """
    down = row_tiles(starts_ptr, rows, experts, BLOCK_M, EXPERTS)
    across = tl.cdiv(outputs, BLOCK_N)
    last_group = (inputs - 1) // GROUP if GROUP else 0
    within = tl.arange(0, BLOCK_K)
    for index in range(tl.program_id(0), down * across * splits, tl.num_programs(0)):
        expert, start, end, column_tile, split = place(
            index, down, across, starts_ptr, rows, experts, BLOCK_M, EXPERTS
        )  # fmt: skip
        n, words_at, scales_at, of_input = _lanes(column_tile, outputs, BLOCK_N, BLOCK_K, SUB)
        begin = tl.multiple_of(split * step, BLOCK_K)
        words_ptr = packed_ptr + tl.cast(expert, tl.int64) * packed_expert
        words_at = n.to(tl.int64) * packed_tile + (begin // 64) * 128 + words_at
        scales_ptr = scale_ptr + tl.cast(expert, tl.int64) * scale_expert
        zeros_ptr = zero_ptr
        if zero_ptr is not None:
            zeros_ptr += tl.cast(expert, tl.int64) * zero_expert
        # Rows behind the last are the last: they are read, and not written.
        row = tl.minimum(start + tl.arange(0, BLOCK_M), end - 1)
        x_at = row.to(tl.int64)[:, None] * x_row + begin + within[None, :]

        group = tl.minimum((begin + of_input) // GROUP, last_group) if GROUP else of_input * 0
        scale_0, zero_0 = _scale_of(
            scales_ptr, zeros_ptr, scales_at, group, scale_group, zero_group
        )
        scale_8, zero_8 = _scale_of(
            scales_ptr, zeros_ptr, scales_at + 8, group, scale_group, zero_group
        )
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in range(begin, tl.minimum(begin + step, inputs), BLOCK_K):
            words = _words(words_ptr, words_at, first + of_input, inputs, MASKED)
            if MASKED:
                x = tl.load(x_ptr + x_at, mask=(within < inputs - first)[None, :], other=0.0)
            else:
                x = tl.load(x_ptr + x_at)
            next_0, next_zero_0, next_8, next_zero_8 = scale_0, zero_0, scale_8, zero_8
            if GROUP:
                group = tl.minimum((first + BLOCK_K + of_input) // GROUP, last_group)
                next_0, next_zero_0 = _scale_of(
                    scales_ptr, zeros_ptr, scales_at, group, scale_group, zero_group
                )
                next_8, next_zero_8 = _scale_of(
                    scales_ptr, zeros_ptr, scales_at + 8, group, scale_group, zero_group
                )
            weights = _weights(words, scale_0, zero_0, scale_8, zero_8, x.dtype)
            sums = tl.dot(weights, tl.trans(x), sums, input_precision="ieee")
            scale_0, zero_0, scale_8, zero_8 = next_0, next_zero_0, next_8, next_zero_8
            words_at += BLOCK_K * 2
            x_at += BLOCK_K
        leave(
            sums, start, end, column_tile, split, rows, outputs, expert, y_ptr, sums_ptr, None,
            None, bias_ptr, residual_ptr, 0, 0, 0, residual_row,
        )  # fmt: skip


@triton.jit
def _dequantize(
    packed_ptr, scale_ptr, zero_ptr, weight_ptr, outputs, inputs, packed_tile, packed_expert,
    scale_group, scale_expert, zero_group, zero_expert, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """A block of weights (N, K) of one expert, in the scale's dtype."""
    expert = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_K
    n, words_at, scales_at, of_input = _lanes(tl.program_id(1), outputs, BLOCK_N, BLOCK_K, SUB)
    words_at = n.to(tl.int64) * packed_tile + (first // 64) * 128 + words_at
    words_ptr, scale_ptr = packed_ptr + expert * packed_expert, scale_ptr + expert * scale_expert
    if zero_ptr is not None:
        zero_ptr += expert * zero_expert
    words = _words(words_ptr, words_at, first + of_input, inputs, True)
    group = of_input * 0
    if GROUP:
        group = tl.minimum((first + of_input) // GROUP, (inputs - 1) // GROUP)
    scale_0, zero_0 = _scale_of(scale_ptr, zero_ptr, scales_at, group, scale_group, zero_group)
    scale_8, zero_8 = _scale_of(scale_ptr, zero_ptr, scales_at + 8, group, scale_group, zero_group)
    weights = _weights(words, scale_0, zero_0, scale_8, zero_8, scale_0.dtype)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    input_ = first + tl.arange(0, BLOCK_K)
    weight_ptr += expert * outputs * inputs
    at = (output.to(tl.int64) * inputs)[:, None] + input_[None, :]
    tl.store(
        weight_ptr + at, weights, mask=(output < outputs)[:, None] & (input_ < inputs)[None, :]
    )


def _strides(packed: Tensor, values: Tensor | None) -> tuple[int, int, int]:
    """Words from tile to tile of outputs; of scales or zero points from group to group, and from
    expert to expert."""
    if values is None:
        return packed.stride(-4), 0, 0
    return packed.stride(-4), values.stride(-2), values.stride(0) if values.dim() == 3 else 0


def _group(group_size: int) -> dict[str, int]:
    """GROUP and SUB."""
    return {"GROUP": max(0, group_size), "SUB": 2 if group_size == 32 else 1}


def dequantize_int4(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, outputs: int, inputs: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """Arguments as of the operator."""
    experts = packed.shape[0] if packed.dim() == 5 else 1
    weight = scale.new_empty((*packed.shape[:-4], outputs, inputs))
    of_tile, *of_scale = _strides(packed, scale)
    block_n, block_k = DEQUANTIZED
    with on_device(packed):
        _dequantize[triton.cdiv(inputs, block_k), triton.cdiv(outputs, block_n), experts](
            packed, scale, zero_point, weight, outputs, inputs, of_tile,
            packed.stride(0) if packed.dim() == 5 else 0, *of_scale,
            *_strides(packed, zero_point)[1:], **_group(group_size), BLOCK_N=block_n,
            BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return weight


def linear_int4(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, outputs: int, group_size: int,
    out_dtype: torch.dtype, config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Arguments as of the operator; config: of the table's row."""
    rows, inputs = x.shape
    y = x.new_empty((rows, outputs), dtype=out_dtype)
    if rows == 0:
        return y
    experts = 0 if starts is None else len(starts) - 1
    bias = None if bias is None else bias.contiguous()
    tile = tile_of(config, x)
    launch = plan(tile, x, outputs, experts, torch.float32)
    of_tile, *of_scale = _strides(packed, scale)
    strides = linear_tiles.strides_of(None, None, residual)
    with on_device(x):
        _product[(launch.programs,)](
            x, packed, scale, zero_point, bias, residual, starts, y, launch.sums, rows, outputs,
            inputs, experts, launch.step, launch.splits, x.stride(0), of_tile,
            packed.stride(0) if experts else 0, *of_scale, *_strides(packed, zero_point)[1:],
            strides[3], **_group(group_size), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            EXPERTS=linear_tiles.experts_block(experts), MASKED=inputs % tile.k > 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if launch.sums is not None:
        linear_tiles.sum_splits(launch.sums, y, None, None, bias, residual, strides)
    return y
