"""silu_mul on GPU: tiles of gates and of what they let through, in one pass.

Formulas and rounding: slmperf/ops/silu_mul.py. Where a scale is found for each token, a tile holds
whole rows.

    bytes per output, forward    3 elements; codes count as one byte
    bytes per output, backward   5 elements
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import configured, load_rows, on_device
from slmperf.triton_kernels.encode import encode_rows, rounded

# (capability, bytes per element) -> numbers of a tile, numbers of a thread. 0 is the interpreter.
# Not yet tuned on a device.
CONFIGS = {
    (0, 2): (128, 32),
    (0, 4): (128, 32),
    (80, 2): (2048, 8),
    (80, 4): (1024, 4),
    (90, 2): (2048, 8),
    (90, 4): (1024, 4),
}
# Of a tile with whole rows.
MOST_COLUMNS = 32768
MOST_WARPS = 16  # so that a thread has 128 registers


@triton.jit(do_not_specialize=["rows"])
def _silu_mul(
    gate_ptr, up_ptr, static_ptr, output_ptr, scale_ptr, rows, columns, gate_row, up_row,
    CODES: tl.constexpr, GROUP: tl.constexpr, IS_FP8: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile. output_ptr is of bytes where there are CODES."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    gate = load_rows(gate_ptr, row, gate_row, column, inside)
    up = load_rows(up_ptr, row, up_row, column, inside)
    output = rounded(gate / (1.0 + tl.exp(-gate)), dtype) * up
    to = row[:, None] * columns + column[None, :]
    if CODES:
        codes = encode_rows(
            rounded(output, dtype), static_ptr, scale_ptr, row, rows, first, columns, ROWS, BLOCK,
            GROUP, IS_FP8, dtype,
        )  # fmt: skip
        tl.store(output_ptr + to, codes, mask=inside)
    else:
        tl.store(output_ptr + to, output.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gradient(
    grad_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, rows, columns, grad_row, gate_row, up_row,
    of_row, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients, whose rows are `of_row` apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    grad = load_rows(grad_ptr, row, grad_row, column, inside)
    gate = load_rows(gate_ptr, row, gate_row, column, inside)
    up = load_rows(up_ptr, row, up_row, column, inside)
    share = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    to = row[:, None] * of_row + column[None, :]
    dtype: tl.constexpr = of_gate_ptr.dtype.element_ty
    tl.store(of_gate_ptr + to, of_gate.to(dtype), mask=inside)
    tl.store(of_up_ptr + to, (grad * gate * share).to(dtype), mask=inside)


def _tile(x: Tensor, columns: int, whole_rows: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile, warps."""
    numbers, of_thread = configured(CONFIGS, x)
    block = triton.next_power_of_2(columns)
    if not whole_rows:
        block = min(block, numbers)
    rows = max(1, numbers // block)
    return rows, block, min(MOST_WARPS, max(1, rows * block // (32 * of_thread)))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Views of both, of one tensor where it holds both."""
    if up is not None:
        return gate, up
    width = gate.shape[1] // 2
    return gate[:, :width], gate[:, width:]


def silu_mul(
    gate: Tensor, up: Tensor | None, group: int, static_scale: Tensor | None, output: Tensor,
    scale: Tensor,
) -> None:  # fmt: skip
    """Arguments as of the operator; no strides within a row.

    output  (T, F) to be filled: of gate's dtype, or int8 or e4m3 codes, whose scales go to `scale`;
            rows of which each has a scale of its own are no wider than MOST_COLUMNS
    """
    gates, ups = _halves(gate, up)
    rows, columns = output.shape
    codes, fp8 = output.dtype != gate.dtype, output.dtype == torch.float8_e4m3fn
    whole = codes and group == 0 and static_scale is None
    assert not whole or columns <= MOST_COLUMNS
    tile, block, warps = _tile(gate, columns, whole)
    if rows:
        with on_device(gate):
            _silu_mul[triton.cdiv(rows, tile), triton.cdiv(columns, block)](
                gates, ups, static_scale, output.view(torch.uint8) if fp8 else output, scale, rows,
                columns, gates.stride(0), ups.stride(0), CODES=codes, GROUP=group, IS_FP8=fp8,
                ROWS=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; arguments as of the operator."""
    gates, ups = _halves(gate, up)
    rows, columns = gates.shape
    tile, block, warps = _tile(gate, columns, False)
    of_gate = gate.new_empty(gate.shape)
    of_up = gate.new_empty(0 if up is None else up.shape)
    of_gates, of_ups = _halves(of_gate, None if up is None else of_up)
    if rows:
        with on_device(gate):
            _gradient[triton.cdiv(rows, tile), triton.cdiv(columns, block)](
                grad, gates, ups, of_gates, of_ups, rows, columns, grad.stride(0), gates.stride(0),
                ups.stride(0), of_gates.stride(0), ROWS=tile, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return of_gate, of_up
