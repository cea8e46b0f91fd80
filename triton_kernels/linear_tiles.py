"""What the kernels of linear share: tiles and their config, experts' rows, the way out.

A product is computed as y' = W x', so that a weight's tile is the left operand, whose rows a warp
group takes 64 at a time, and x may have any number of rows from 16 on. A tile is (BLOCK_N outputs,
BLOCK_M rows); programs stay and take tile after tile. Where there are fewer tiles than a device
takes, inputs are cut into splits, whose sums `_sum` adds up in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels import common
from slmperf.triton_kernels.common import on_device


class Tile(NamedTuple):
    """A config, as a row of slmperf/ops/linear/tables holds it: rows, outputs, inputs of a block,
    warps, blocks of inputs on their way, programs that a multiprocessor runs at once."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1


# Of fp32 inputs, whose products no matrix unit takes, on every GPU; of the interpreter.
WIDE, WIDE_INTERPRETED = Tile(32, 32, 64, 4, 2, 2), Tile(16, 32, 64, 1, 1)
_INTERPRETED = Tile(16, 64, 128, 1, 1)
# A split has no fewer blocks of inputs than these; no more splits than these.
LEAST_BLOCKS, MOST_SPLITS = 4, 16
# Rows of tiles that take the same outputs one after another, while these lie in the second-level
# cache.
BAND = tl.constexpr(8)


def tile_of(config: Mapping[str, int], x: Tensor) -> Tile:
    """The tile of a table's row, for inputs that reach the kernel as x."""
    if x.dtype == torch.float32:
        return WIDE if config else WIDE_INTERPRETED
    return Tile(**config) if config else _INTERPRETED


class Plan(NamedTuple):
    """How a call is launched: programs, splits and inputs of each; sums of splits, if any."""

    programs: int
    splits: int
    step: int
    sums: Tensor | None


def plan(tile: Tile, x: Tensor, outputs: int, experts: int, sums: torch.dtype) -> Plan:
    """The launch for x (M, K). Experts' rows are not split: they are many tiles already."""
    rows, inputs = x.shape
    tiles = (triton.cdiv(rows, tile.m) + experts) * triton.cdiv(outputs, tile.n)
    room, blocks = common.processors(x) * tile.programs, triton.cdiv(inputs, tile.k)
    splits = max(1, min(room // tiles, blocks // LEAST_BLOCKS, MOST_SPLITS)) if not experts else 1
    step = triton.cdiv(blocks, splits) * tile.k
    splits = triton.cdiv(inputs, step)
    parts = x.new_empty((splits, rows, outputs), dtype=sums) if splits > 1 else None
    return Plan(min(room, tiles * splits), splits, step, parts)


def experts_block(experts: int) -> int:
    """Lanes that hold experts, for `row_tiles` and `place`; 0: one weight."""
    return triton.next_power_of_2(experts) if experts else 0


@triton.jit
def row_tiles(starts_ptr, rows, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Tiles of rows: no tile has rows of two experts."""
    if EXPERTS == 0:
        return tl.cdiv(rows, BLOCK_M)
    else:
        expert = tl.arange(0, EXPERTS)
        first = tl.load(starts_ptr + expert, mask=expert < experts, other=0)
        end = tl.load(starts_ptr + expert + 1, mask=expert < experts, other=0)
        return tl.sum(tl.cdiv(end - first, BLOCK_M))


@triton.jit
def place(
    index, row_tiles, column_tiles, starts_ptr, rows, experts, BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """A tile by its number -> its expert, first row, the end of the expert's rows, tile of outputs,
    split."""
    split = index // (row_tiles * column_tiles)
    index = index % (row_tiles * column_tiles)
    above = index // (BAND * column_tiles) * BAND
    within = index % (BAND * column_tiles)
    band = tl.minimum(row_tiles - above, BAND)
    row_tile, column_tile = above + within % band, within // band
    if EXPERTS == 0:
        return 0, row_tile * BLOCK_M, rows, column_tile, split
    else:
        lane = tl.arange(0, EXPERTS)
        first = tl.load(starts_ptr + lane, mask=lane < experts, other=0)
        end = tl.load(starts_ptr + lane + 1, mask=lane < experts, other=0)
        tiles = tl.cdiv(end - first, BLOCK_M)
        until = tl.cumsum(tiles, axis=0)
        expert = tl.sum((until <= row_tile).to(tl.int32))
        mine = lane == expert
        start = tl.sum(tl.where(mine, first + (row_tile - until + tiles) * BLOCK_M, 0))
        return expert, start, tl.sum(tl.where(mine, end, 0)), column_tile, split


@triton.jit
def _put(
    sums, row, end, column, outputs, expert, y_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr,
    x_scale_row, scale_column, scale_expert, residual_row,
):  # fmt: skip
    """Sums (N, M) times the scales that are left, plus what is added, rounded once, to y (M, N)."""
    there = column < outputs
    total = sums.to(tl.float32)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + row.to(tl.int64) * x_scale_row, mask=row < end, other=0.0)
        total *= x_scale[None, :]
    if scale_ptr is not None:
        at = tl.cast(expert, tl.int64) * scale_expert + column * scale_column
        total *= tl.load(scale_ptr + at, mask=there, other=0.0)[:, None]
    if bias_ptr is not None:
        at = tl.cast(expert, tl.int64) * outputs + column
        total += tl.load(bias_ptr + at, mask=there, other=0.0).to(tl.float32)[:, None]
    both = there[:, None] & (row < end)[None, :]
    if residual_ptr is not None:
        at = (row.to(tl.int64) * residual_row)[None, :] + column[:, None]
        total += tl.load(residual_ptr + at, mask=both, other=0.0).to(tl.float32)
    at = (row.to(tl.int64) * outputs)[None, :] + column[:, None]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=both)


@triton.jit
def _leave(
    sums, start, end, column, split, rows, outputs, expert, y_ptr, sums_ptr, x_scale_ptr,
    scale_ptr, bias_ptr, residual_ptr, x_scale_row, scale_column, scale_expert, residual_row,
):  # fmt: skip
    """The sums (BLOCK_N, M) of the rows from `start` on."""
    row = start + tl.arange(0, sums.shape[1])
    if sums_ptr is None:
        _put(
            sums, row, end, column, outputs, expert, y_ptr, x_scale_ptr, scale_ptr, bias_ptr,
            residual_ptr, x_scale_row, scale_column, scale_expert, residual_row,
        )  # fmt: skip
    else:
        at = (tl.cast(split, tl.int64) * rows + row)[None, :] * outputs + column[:, None]
        tl.store(sums_ptr + at, sums, mask=(column < outputs)[:, None] & (row < end)[None, :])


@triton.jit
def leave(
    sums, start, end, column_tile, split, rows, outputs, expert, y_ptr, sums_ptr, x_scale_ptr,
    scale_ptr, bias_ptr, residual_ptr, x_scale_row, scale_column, scale_expert, residual_row,
):  # fmt: skip
    """A tile's sums (BLOCK_N, BLOCK_M) to y, or, of a split, to its part of sums_ptr. Large ones go
    in two halves, whose addresses fit beside them in registers."""
    N: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[1]
    column = column_tile * N + tl.arange(0, N)
    if M * N > 128 * 128:
        halves = tl.permute(tl.reshape(sums, (N, 2, M // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        _leave(
            first, start, end, column, split, rows, outputs, expert, y_ptr, sums_ptr, x_scale_ptr,
            scale_ptr, bias_ptr, residual_ptr, x_scale_row, scale_column, scale_expert,
            residual_row,
        )  # fmt: skip
        _leave(
            second, start + M // 2, end, column, split, rows, outputs, expert, y_ptr, sums_ptr,
            x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, x_scale_row, scale_column,
            scale_expert, residual_row,
        )  # fmt: skip
    else:
        _leave(
            sums, start, end, column, split, rows, outputs, expert, y_ptr, sums_ptr, x_scale_ptr,
            scale_ptr, bias_ptr, residual_ptr, x_scale_row, scale_column, scale_expert,
            residual_row,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits"])
def _sum(
    sums_ptr, y_ptr, x_scale_ptr, scale_ptr, bias_ptr, residual_ptr, rows, outputs, splits,
    x_scale_row, scale_column, scale_expert, residual_row, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's sums of all splits, in their order."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (row.to(tl.int64) * outputs)[None, :] + column[:, None]
    both = (column < outputs)[:, None] & (row < rows)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), sums_ptr.dtype.element_ty)
    for split in range(splits):
        part = tl.cast(split, tl.int64) * rows * outputs
        total += tl.load(sums_ptr + part + at, mask=both, other=0)
    _put(
        total, row, rows, column, outputs, 0, y_ptr, x_scale_ptr, scale_ptr, bias_ptr,
        residual_ptr, x_scale_row, scale_column, scale_expert, residual_row,
    )  # fmt: skip


def sum_splits(
    sums: Tensor, y: Tensor, x_scale: Tensor | None, scale: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, strides: tuple[int, int, int, int],
) -> None:  # fmt: skip
    """y (M, N) of the sums (splits, M, N). strides: the last four arguments of `leave`."""
    splits, rows, outputs = sums.shape
    with on_device(y):
        _sum[triton.cdiv(rows, 4), triton.cdiv(outputs, 128)](
            sums, y, x_scale, scale, bias, residual, rows, outputs, splits, *strides, BLOCK_M=4,
            BLOCK_N=128, num_warps=4,
        )  # fmt: skip


def strides_of(
    x_scale: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[int, int, int, int]:
    """x_scale_row, scale_column, scale_expert, residual_row; 0 where one number is for all.

    x_scale (M, 1) or (1, 1); scale (N, 1) or (1, 1), experts' (E, ...).
    """
    of_row = 0 if x_scale is None or x_scale.shape[0] == 1 else x_scale.stride(0)
    of_column = 0 if scale is None or scale.shape[-2] == 1 else scale.stride(-2)
    of_expert = scale.stride(0) if scale is not None and scale.dim() == 3 else 0
    return of_row, of_column, of_expert, 0 if residual is None else residual.stride(0)
