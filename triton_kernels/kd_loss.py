"""kd_loss on GPU: both heads in one matrix product, and what is done to logits and gradients.

Formulas and modes: slmperf/ops/kd_loss/. The row phases (statistics, join, second, join_second,
gradient) are those of divergence.py and part of this module's interface.

difference_logits makes the logits of student and teacher tile by tile in one program, in fp32, and
stores their difference, as divergence.py describes, before anything is rounded to bf16: two bf16
logits near 20 differ by multiples of 1/8, while a student is often nearer to its teacher. What is
stored refers to the tile's largest teacher logit and to the mean of its finite differences.

Where the student has no softcap, one accumulator serves both products: it holds the teacher's
logits after the first and, begun at their negative, the difference after the second. That leaves
registers for a tile of twice the rows: 64 flops per byte of operands against 43. With a softcap
both logits have to be known at once, and there are two accumulators.

    flops per logit   2 (D_student + D_teacher), as the two products would take
    bytes per logit   4 written, and 8 per DIFFERENCE_TILE of references
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import configured, on_device, processors, softcapped
from slmperf.triton_kernels.divergence import (
    CONFIGS,
    DIFFERENCE_TILE,
    WAVES,
    gradient,
    join,
    join_second,
    second,
    statistics,
)

__all__ = [
    "DIFFERENCE_TILE",
    "difference_logits",
    "gradient",
    "join",
    "join_second",
    "scale_",
    "second",
    "softcap_",
    "statistics",
]

# (capability, bytes per element) -> rows of a tile with one accumulator and with two, BLOCK_K,
# stages, warps. 0 is the interpreter. A stage holds (rows + 128) x BLOCK_K elements. 256 rows with
# one accumulator spill a little on sm_90, outside the loops over K. Not yet tuned on a device.
DIFFERENCE_CONFIGS = {
    (0, 2): (16, 16, 64, 1, 4),
    (80, 2): (128, 64, 32, 4, 8),
    (90, 2): (128, 64, 64, 4, 8),
}
# Tiles of rows that follow each other under the same columns, so that programs that run together
# read the same rows of the heads: of what is read, those are the most.
GROUP = 16


@triton.jit
def _product(
    total, hidden_ptr, weight_ptr, first_row, first_entry, row, entry, D, stride_h, stride_w,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + hidden[first_row + row] weight[first_entry + entry]' in fp32."""
    k = tl.arange(0, BLOCK_K)
    hidden_ptr += first_row.to(tl.int64) * stride_h
    weight_ptr += first_entry.to(tl.int64) * stride_w
    down, across = row[:, None] * stride_h + k[None, :], entry[None, :] * stride_w + k[:, None]
    for start in range(0, D, BLOCK_K):
        inside = k < D - start
        a = tl.load(hidden_ptr + start + down, mask=inside[None, :], other=0.0)
        b = tl.load(weight_ptr + start + across, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _bias(bias_ptr, entries, V):
    """A head's bias in fp32, minus infinity beyond the vocabulary; 0 where it has none."""
    bias = tl.zeros(entries.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + entries, mask=entries < V, other=float("-inf")).to(tl.float32)
    return bias


@triton.jit
def _finite(bias_ptr, entries, V, CAPPED: tl.constexpr):
    """Which logits of the vocabulary a bias leaves finite; a softcap makes all of them so."""
    finite = entries < V
    if not CAPPED:
        finite &= _bias(bias_ptr, entries, V) > float("-inf")
    return finite


@triton.jit
def _difference_logits(
    student_hidden_ptr, student_weight_ptr, student_bias_ptr,
    teacher_hidden_ptr, teacher_weight_ptr, teacher_bias_ptr, gap_ptr, teacher_ptr, refs_ptr,
    C, V, student_D, teacher_D, stride_sh, stride_sw, stride_th, stride_tw, stride_g, stride_t,
    student_scale, student_softcap, teacher_scale, teacher_softcap,
    STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows and BLOCK_N entries -> gap, teacher and their references."""
    high, wide = tl.cdiv(C, BLOCK_M), tl.cdiv(V, BLOCK_N)
    first = tl.program_id(0) // (GROUP * wide) * GROUP
    group = tl.minimum(high - first, GROUP)
    place = tl.program_id(0) % (GROUP * wide)
    m, n = first + place % group, place // group
    rows, entries = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edges the last row and column are made again: no maximum changes by that.
    row = tl.minimum(tl.arange(0, BLOCK_M), C - 1 - m * BLOCK_M)
    entry = tl.minimum(tl.arange(0, BLOCK_N), V - 1 - n * BLOCK_N)
    stored = (rows < C)[:, None] & (entries < V)[None, :]
    # Within a tile 32 bits are enough for an offset, and take half the registers.
    down, across = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    corner = (m * BLOCK_M).to(tl.int64)
    gap_ptr += corner * stride_g + n * BLOCK_N
    teacher_ptr += corner * stride_t + n * BLOCK_N

    t = tl.broadcast_to(_bias(teacher_bias_ptr, entries, V)[None, :], [BLOCK_M, BLOCK_N])
    t = teacher_scale * _product(
        t, teacher_hidden_ptr, teacher_weight_ptr, m * BLOCK_M, n * BLOCK_N, row, entry, teacher_D,
        stride_th, stride_tw, BLOCK_K,
    )  # fmt: skip
    if TEACHER_CAPPED:
        t = softcapped(t, teacher_softcap)
    teacher_ref = tl.max(t, axis=1)
    teacher_ref = tl.where(teacher_ref == float("-inf"), 0.0, teacher_ref)
    tl.store(
        teacher_ptr + (down * stride_t + across),
        (t - teacher_ref[:, None]).to(teacher_ptr.dtype.element_ty),
        mask=stored,
    )

    t = tl.where(t == float("-inf"), teacher_ref[:, None], t)
    gap = tl.broadcast_to(_bias(student_bias_ptr, entries, V)[None, :], [BLOCK_M, BLOCK_N])
    if not STUDENT_CAPPED:
        gap -= t / student_scale
    gap = student_scale * _product(
        gap, student_hidden_ptr, student_weight_ptr, m * BLOCK_M, n * BLOCK_N, row, entry,
        student_D, stride_sh, stride_sw, BLOCK_K,
    )  # fmt: skip
    if STUDENT_CAPPED:
        gap = softcapped(gap, student_softcap) - t

    # Only a bias makes a logit minus infinity, and so a whole column: it has no share in the mean,
    # but those of the teacher where they are all there is.
    counts = _finite(student_bias_ptr, entries, V, STUDENT_CAPPED)
    known = _finite(teacher_bias_ptr, entries, V, TEACHER_CAPPED)
    counts &= known | (tl.max(known.to(tl.int32)) == 0)
    count = tl.maximum(tl.sum(counts.to(tl.float32)), 1.0)
    gap_ref = tl.sum(tl.where(counts[None, :], gap, 0.0), axis=1) / count
    tl.store(
        gap_ptr + (down * stride_g + across),
        (gap - gap_ref[:, None]).to(gap_ptr.dtype.element_ty),
        mask=stored,
    )
    ref_ptr = refs_ptr + ((corner + tl.arange(0, BLOCK_M)) * wide + n) * 2
    tl.store(ref_ptr, teacher_ref, mask=rows < C)
    tl.store(ref_ptr + 1, gap_ref, mask=rows < C)


@triton.jit
def _softcap(logits_ptr, V, stride, cap, BLOCK: tl.constexpr):
    """One tile of one row."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + offsets
    logits = tl.load(at, mask=offsets < V, other=0.0).to(tl.float32)
    tl.store(at, softcapped(logits, cap).to(logits_ptr.dtype.element_ty), mask=offsets < V)


@triton.jit
def _scale(x_ptr, factor_ptr, size, tiles, BLOCK: tl.constexpr):
    """Tiles of a dense tensor, one in as many as there are programs; none where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            offsets = tile * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
            x = (x * factor).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + offsets, x, mask=offsets < size)


def difference_logits(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None,
    student_scale: float, student_softcap: float, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, teacher_scale: float, teacher_softcap: float, gap_out: Tensor,
    teacher_out: Tensor, tile_refs: Tensor,
) -> None:  # fmt: skip
    """z = softcap(scale (hidden weight' + bias)) of both models, stored as differences.

    student_hidden (C, D), student_weight (V, D), student_bias (V,); the teacher's with a D of its
    own; bf16 or fp16, any row stride, biases of any dtype, -inf in them where an entry is ruled
    out. A softcap of 0 means none; scales are not 0.
    gap_out, teacher_out   (C, V) bf16, any row stride
    tile_refs              (C, ceil(V / DIFFERENCE_TILE), 2) fp32, contiguous
    """
    rows, vocabulary = gap_out.shape
    if rows == 0:
        return
    one, two, block_k, stages, warps = configured(DIFFERENCE_CONFIGS, student_hidden)
    block_m = two if student_softcap else one
    operands = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    if any(x.shape[1] % 16 or x.stride(0) % 16 for x in operands):
        block_k //= 2  # read number by number, which takes registers and leaves no use for depth
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(vocabulary, DIFFERENCE_TILE)
    with on_device(gap_out):
        _difference_logits[(tiles,)](
            student_hidden, student_weight, student_bias,
            teacher_hidden, teacher_weight, teacher_bias, gap_out, teacher_out, tile_refs,
            rows, vocabulary, student_hidden.shape[1], teacher_hidden.shape[1],
            student_hidden.stride(0), student_weight.stride(0),
            teacher_hidden.stride(0), teacher_weight.stride(0),
            gap_out.stride(0), teacher_out.stride(0),
            student_scale, student_softcap, teacher_scale, teacher_softcap,
            STUDENT_CAPPED=student_softcap != 0.0, TEACHER_CAPPED=teacher_softcap != 0.0,
            BLOCK_M=block_m, BLOCK_N=DIFFERENCE_TILE, BLOCK_K=block_k, GROUP=GROUP,
            num_stages=stages, num_warps=warps,
        )  # fmt: skip


def softcap_(logits: Tensor, cap: float) -> None:
    """logits (C, V), any row stride, become cap tanh(logits / cap)."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    block, warps = configured(CONFIGS, logits)
    with on_device(logits):
        _softcap[(rows, triton.cdiv(vocabulary, block))](
            logits, vocabulary, logits.stride(0), cap, BLOCK=block, num_warps=warps
        )


def scale_(x: Tensor, factor: Tensor) -> None:
    """x, contiguous, times a factor () on its device; x is not read where that is 1."""
    assert x.is_contiguous()
    if x.numel() == 0:
        return
    block, warps = configured(CONFIGS, x)
    tiles = triton.cdiv(x.numel(), block)
    with on_device(x):
        _scale[(min(tiles, WAVES * processors(x)),)](
            x, factor, x.numel(), tiles, BLOCK=block, num_warps=warps
        )
