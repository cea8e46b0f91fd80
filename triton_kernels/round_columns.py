"""round_columns on GPU: one program rounds all columns of a block for a tile of outputs.

Formulas and layout: slmperf/ops/round_columns.py. Columns go in groups of SUB. Before a group, what
the columns before it did wrong is taken off its gradient by matrix products; inside it, column
after column, with the steps of the group in registers. Each thread has an output of its own, so
none waits for another; what a column reads is under way while the one before it is rounded.

    flops per weight   b + SUB, of which the products take b - SUB
    bytes per weight   28, and 4 for each group of columns after its own, which reads its step

Products are of fp32: what they lose would be taken for an error of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import configured, on_device

# (capability, bytes per element) -> columns of a group, outputs of a program, columns at a time of
# the products, warps. 0 is the interpreter. Programs of one warp, an output for each thread, spread
# over the device the widest. Not yet tuned on one.
CONFIGS = {
    (0, 4): (16, 64, 16, 1),
    (80, 4): (32, 32, 8, 1),
    (90, 4): (32, 32, 16, 1),
}
MATRIX_EXEMPT = {"_round_columns(*": "fp32 products, their factors not rounded to TF32"}
INT, FLOAT = tl.constexpr(1), tl.constexpr(2)  # places in GRIDS of slmperf/ops/round_columns.py


@triton.jit
def _even(x):
    """The nearest whole number, the even one of two; above 2^22 it may be off by one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_e4m3(x):
    """The nearest value of fp8 e4m3: a whole number of eighths of the power of 2 below, or of
    2^-9. By arithmetic, for an A100 has no such type."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power * 0.125, 0.001953125)
    return _even(tl.div_rn(x, step)) * step


@triton.jit
def _take_off(
    gradient_ptr, coefficients_ptr, steps_ptr, start, columns, outputs, output, SUB: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """What the columns before the group at `start` did wrong, off its gradient. The result waits
    in `steps` where the group's own steps will be."""
    within, depth = tl.arange(0, SUB), tl.arange(0, DEPTH)
    of_tile, of_group = (output < outputs)[None, :], (within < columns - start)[:, None]
    # Inside a group 32 bits are enough for an offset, and take half the registers.
    at = within[:, None] * outputs + output[None, :]
    first = tl.cast(start, tl.int64) * outputs
    left = tl.load(gradient_ptr + first + at, mask=of_group & of_tile, other=0.0)
    rows = within[:, None] * columns + depth[None, :]
    coefficients_ptr += tl.cast(start, tl.int64) * columns
    done = depth[:, None] * outputs + output[None, :]
    for before in range(0, start, DEPTH):
        factors = tl.load(coefficients_ptr + before + rows, mask=of_group, other=0.0)
        steps = tl.load(
            steps_ptr + tl.cast(before, tl.int64) * outputs + done, mask=of_tile, other=0.0
        )
        left -= tl.dot(factors, steps, input_precision="ieee")
    tl.store(steps_ptr + first + at, left, mask=of_group & of_tile)


@triton.jit
def _column(
    column, start, end, current_ptr, left_ptr, coefficients_ptr, scale_ptr, zero_point_ptr,
    group_ptr, keep_ptr, columns, outputs, output, GRID: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """What a column of the group from `start` to `end` needs; nothing is read from `end` on."""
    there = end > column
    inside = output < tl.where(there, outputs, 0)
    place = start + tl.arange(0, SUB)
    row = coefficients_ptr + column * columns
    factors = tl.load(row + place, mask=place < tl.where(there, column, 0), other=0.0)
    diagonal = tl.load(row + column, mask=there, other=1.0)
    at = tl.cast(column, tl.int64) * outputs + output
    current = tl.load(current_ptr + at, mask=inside, other=0.0)
    left = tl.load(left_ptr + at, mask=inside, other=0.0)
    scale, zero_point, keep = current, current, inside  # where there are none, they are not used
    if GRID != 0:
        of_group = tl.load(group_ptr + column, mask=there, other=0) * outputs + output
        scale = tl.load(scale_ptr + of_group, mask=inside, other=1.0)
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr + of_group, mask=inside, other=0.0)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + at, mask=inside, other=0) != 0
    return factors, diagonal, current, left, scale, zero_point, keep


@triton.jit(do_not_specialize=["columns", "outputs"])
def _round_columns(
    current_ptr, gradient_ptr, coefficients_ptr, scale_ptr, zero_point_ptr, group_ptr, keep_ptr,
    steps_ptr, columns, outputs, lowest, highest, GRID: tl.constexpr, SUB: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """TILE outputs. `outputs` is not specialised: rows that triton knows to start on 16 bytes would
    give each thread four of them."""
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    for start in range(0, columns, SUB):
        _take_off(
            gradient_ptr, coefficients_ptr, steps_ptr, start, columns, outputs, output, SUB, DEPTH
        )  # fmt: skip
        tl.debug_barrier()  # other threads read it
        end = tl.minimum(start + SUB, columns)
        steps = tl.zeros((SUB, TILE), tl.float32)
        needs = _column(
            start, start, end, current_ptr, steps_ptr, coefficients_ptr, scale_ptr,
            zero_point_ptr, group_ptr, keep_ptr, columns, outputs, output, GRID, SUB,
        )  # fmt: skip
        for column in range(start, end):
            following = _column(
                column + 1, start, end, current_ptr, steps_ptr, coefficients_ptr, scale_ptr,
                zero_point_ptr, group_ptr, keep_ptr, columns, outputs, output, GRID, SUB,
            )  # fmt: skip
            factors, diagonal, old, left, scale, zero_point, keep = needs
            left -= tl.sum(factors[:, None] * steps, axis=0)
            new = old + tl.div_rn(left, diagonal)
            if GRID == INT:
                code = _even(tl.div_rn(new, scale))
                if zero_point_ptr is None:
                    new = tl.minimum(tl.maximum(code, lowest), highest) * scale
                else:
                    code = tl.minimum(tl.maximum(code + zero_point, lowest), highest)
                    new = (code - zero_point) * scale
            elif GRID == FLOAT:
                code = tl.minimum(tl.maximum(tl.div_rn(new, scale), lowest), highest)
                new = _nearest_e4m3(code) * scale
            if keep_ptr is not None:
                new = tl.where(keep, new, 0.0)
            step = new - old
            own = (start + tl.arange(0, SUB) == column)[:, None]
            steps = tl.where(own, step[None, :], steps)
            at = tl.cast(column, tl.int64) * outputs + output
            tl.store(current_ptr + at, new, mask=output < outputs)
            tl.store(steps_ptr + at, step, mask=output < outputs)
            needs = following
        tl.debug_barrier()


def round_columns(
    current: Tensor, gradient: Tensor, coefficients: Tensor, scale: Tensor,
    zero_point: Tensor | None, group: Tensor, keep: Tensor | None, lowest: float, highest: float,
    grid: int,
) -> None:  # fmt: skip
    """Round the columns of a block, in place: arguments as of the operator, contiguous."""
    columns, outputs = current.shape
    if current.numel() == 0:
        return
    given = (current, gradient, coefficients, scale, zero_point, group, keep)
    assert all(x is None or x.is_contiguous() for x in given)
    sub, tile, depth, warps = configured(CONFIGS, current)
    with on_device(current):
        _round_columns[(triton.cdiv(outputs, tile),)](
            current, gradient, coefficients, scale, zero_point, group, keep,
            torch.empty_like(current), columns, outputs, lowest, highest,
            GRID=grid, SUB=sub, TILE=tile, DEPTH=depth, num_stages=1, num_warps=warps,
        )  # fmt: skip
