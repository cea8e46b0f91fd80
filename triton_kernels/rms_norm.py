"""rms_norm on GPU: a program has whole rows in its registers, from the first load to the codes.

Formulas and rounding: slmperf/ops/rms_norm.py. Forward reads x and the residual once and writes
their sum and the output, or its codes, once. Backward goes through a share of the rows in each
program, which adds up its part of the weight's gradient; the parts are added in order.

    bytes per number, forward    2 elements; with a residual 4; codes count as one byte
    bytes per number, backward   3 elements; 4 where the residual has a gradient of its own
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import configured, load_rows, on_device, processors
from slmperf.triton_kernels.encode import encode_rows, rounded

# (capability, bytes per element) -> numbers of a tile (short rows share one), numbers of a thread.
# 0 is the interpreter. Not yet tuned on a device.
CONFIGS = {
    (0, 2): (64, 32),
    (0, 4): (64, 32),
    (80, 2): (2048, 16),
    (80, 4): (1024, 8),
    (90, 2): (2048, 16),
    (90, 4): (1024, 8),
}
# What a program's registers hold, with 128 for each thread of so many warps.
MOST_COLUMNS, MOST_COLUMNS_BACKWARD, MOST_WARPS = 32768, 16384, 16
# The backward's programs for each multiprocessor: each writes a row of partial sums.
PROGRAMS_EACH = 2


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x_ptr, weight_ptr, residual_ptr, static_ptr, output_ptr, scale_ptr, h_ptr, inverse_ptr, rows,
    columns, x_row, residual_row, eps, offset, OFFSET: tl.constexpr, CODES: tl.constexpr,
    GROUP: tl.constexpr, IS_FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows. output_ptr is of bytes where there are CODES; OFFSET: the offset is not 0."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    to = row[:, None] * columns + column[None, :]
    h = load_rows(x_ptr, row, x_row, column, inside)
    if residual_ptr is not None:
        h = rounded(h + load_rows(residual_ptr, row, residual_row, column, inside), dtype)
        tl.store(h_ptr + to, h.to(dtype), mask=inside)
    inverse = tl.rsqrt(tl.sum(h * h, axis=1) / columns + eps)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    normed = h * inverse[:, None]
    if OFFSET:
        output = normed * (offset + weight)[None, :]
    else:
        output = rounded(normed, dtype) * weight[None, :]
    if CODES:
        codes = encode_rows(
            rounded(output, dtype), static_ptr, scale_ptr, row, rows, 0, columns, ROWS, BLOCK,
            GROUP, IS_FP8, dtype,
        )  # fmt: skip
        tl.store(output_ptr + to, codes, mask=inside)
    else:
        tl.store(output_ptr + to, output.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows", "share"])
def _gradient(
    grad_ptr, grad_h_ptr, h_ptr, weight_ptr, inverse_ptr, of_h_ptr, of_weight_ptr, rows, share,
    columns, grad_row, grad_h_row, h_row, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of the rows, ROWS at a time; of_weight_ptr: (programs, columns) fp32."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    first, end = program * share, tl.minimum((program + 1) * share, rows)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        grad = load_rows(grad_ptr, row, grad_row, column, inside)
        inverse = tl.load(inverse_ptr + row, mask=row < end, other=0.0)[:, None]
        normed = load_rows(h_ptr, row, h_row, column, inside) * inverse
        total += grad * normed
        # Read again for every row, from the cache: there are no registers for it.
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        grad *= (offset + weight)[None, :]
        mean = tl.sum(grad * normed, axis=1) / columns
        of_h = (grad - normed * mean[:, None]) * inverse
        if grad_h_ptr is not None:
            of_h += load_rows(grad_h_ptr, row, grad_h_row, column, inside)
        at = row[:, None] * columns + column[None, :]
        tl.store(of_h_ptr + at, of_h.to(of_h_ptr.dtype.element_ty), mask=inside)
    tl.store(
        of_weight_ptr + program * columns + column, tl.sum(total, axis=0), mask=column < columns
    )


def _tile(x: Tensor, columns: int, most: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, warps."""
    if columns > most:
        raise NotImplementedError(
            f"rms_norm: impl='triton' takes rows of {MOST_COLUMNS} at most, with gradients of "
            f"{MOST_COLUMNS_BACKWARD}, found {columns}"
        )
    numbers, of_thread = configured(CONFIGS, x)
    block = triton.next_power_of_2(columns)
    rows = max(1, numbers // block)
    return rows, block, min(MOST_WARPS, max(1, rows * block // (32 * of_thread)))


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, group: int,
    static_scale: Tensor | None, output: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h and inverse; arguments and these as of the operator, no strides within a row.

    output  (T, D) to be filled: of x's dtype, or int8 or e4m3 codes, whose scales go to `scale`
    """
    rows, columns = x.shape
    tile, block, warps = _tile(x, columns, MOST_COLUMNS)
    h = x.new_empty((0 if residual is None else rows, columns))
    inverse = x.new_empty(rows, dtype=torch.float32)
    if rows:
        fp8 = output.dtype == torch.float8_e4m3fn
        with on_device(x):
            _norm[(triton.cdiv(rows, tile),)](
                x, weight, residual, static_scale, output.view(torch.uint8) if fp8 else output,
                scale, h, inverse, rows, columns, x.stride(0),
                0 if residual is None else residual.stride(0), eps, offset, OFFSET=offset != 0.0,
                CODES=output.dtype != x.dtype, GROUP=group, IS_FP8=fp8, ROWS=tile, BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
    return h, inverse


def rms_norm_backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of the weight; arguments as of the operator."""
    rows, columns = h.shape
    tile, block, warps = _tile(h, columns, MOST_COLUMNS_BACKWARD)
    of_h = h.new_empty((rows, columns))
    share = triton.cdiv(triton.cdiv(rows, PROGRAMS_EACH * processors(h)), tile) * tile
    programs = triton.cdiv(rows, share) if rows else 0
    parts = h.new_empty((programs, columns), dtype=torch.float32)
    if rows:
        with on_device(h):
            _gradient[(programs,)](
                grad, grad_h, h, weight, inverse, of_h, parts, rows, share, columns,
                grad.stride(0), 0 if grad_h is None else grad_h.stride(0), h.stride(0), offset,
                ROWS=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return of_h, parts.sum(dim=0).to(weight.dtype)
