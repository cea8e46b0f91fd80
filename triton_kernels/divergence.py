"""divergence on GPU: row statistics in the forward, one elementwise pass in the backward.

Formulas: slmperf/ops/divergence.py. A row is cut into SPLITS ranges of the vocabulary, one
program each, so that few rows still fill the device; a second, tiny kernel joins the ranges in a
fixed order (no atomics: the same bits from run to run). The KLs come out of that one reading of
the logits: with x the logits less their model's largest so far and the weights exp(x /
temperature), two sums run beside the two softmaxes: "gap", the student's weights less the
teacher's, exact where the models are close, and "cross", sum w (x_a - x_b) with a the model that
weights (teacher for the forward KL, student for the reverse). The JSD has to know both log-sums
first and reads the logits again.

    bytes per logit (e: bytes of an element)   forward 2e (JSD 4e), backward 3e

All maths is fp32, but for the sums over lanes and ranges, which are fp64. Statistics per row as
in slmperf/ops/divergence.py: (T, 6).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import (
    LOG2_E,
    LOWEST,
    configured,
    expm1_negative,
    keep_where,
    log1p,
    moved_cross,
    moved_gap,
    on_device,
    processors,
    wide_sum,
)

# (capability, bytes per element) -> (BLOCK_V, warps). 0 is the interpreter. A thread holds 8 logits
# of each model, in 128-bit loads and at most 64 registers, so that 1024 threads share a
# multiprocessor (16 logits take up to 120, and spill in triton 3.6). Not yet tuned on a device.
CONFIGS = {
    (0, 2): (64, 4),
    (0, 4): (64, 4),
    (80, 2): (1024, 4),
    (80, 4): (1024, 4),
    (90, 2): (1024, 4),
    (90, 4): (1024, 4),
}
WAVES = 16  # programs per multiprocessor that the forward aims at before it stops splitting rows
MAX_SPLITS = 64


@triton.jit
def _load(pointer, tile, V, BLOCK_V: tl.constexpr):
    """One tile of a row in fp32; minus infinity, of weight 0, beyond the vocabulary."""
    offsets = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    return tl.load(pointer + offsets, mask=offsets < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _normal(student, teacher, row_ptr, scale):
    """log q, log p and x_student - x_teacher under the statistics of their row."""
    s, t = student - tl.load(row_ptr), teacher - tl.load(row_ptr + 2)
    s_log_sum = tl.load(row_ptr + 1)
    t_log_sum = s_log_sum - tl.load(row_ptr + 3)
    return s * scale - s_log_sum, t * scale - t_log_sum, s - t


@triton.jit
def _to_mixture(log_ratio, beta, rest):
    """log(p / m) and log(q / m) from l = log q - log p: no probability is there to underflow.

    m / p = beta + (1 - beta) e^l and m / q = (1 - beta) + beta e^-l; the one whose exponent is not
    positive is 1 + c (e^-|l| - 1), and the other differs by e^l. Taken as log1p of expm1, its
    logarithm is accurate near p = q, where both divergences cancel to the second order of l.
    """
    c = tl.where(log_ratio > 0.0, beta, rest)
    least = tl.where(log_ratio > 0.0, rest, beta)
    x = c * expm1_negative(-tl.abs(log_ratio))
    total = tl.maximum(least, 1.0 + x)
    tail = tl.log(total) + (x - (total - 1.0))  # log1p(x), not below the least that it can be
    return -tl.maximum(log_ratio, 0.0) - tail, -tl.maximum(-log_ratio, 0.0) - tail


@triton.jit
def _softmax_ranges(
    student_ptr, teacher_ptr, ranges_ptr, V, tiles, stride_s, stride_t, to_base_2,
    KIND: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maxima, sums, gap and cross sum over one range of one row -> ranges (T, 6, SPLITS)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_ptr += row * stride_s
    teacher_ptr += row * stride_t
    s_max, t_max = tl.full([], LOWEST, tl.float32), tl.full([], LOWEST, tl.float32)
    s_sum = tl.zeros([BLOCK_V], tl.float32)
    t_sum = tl.zeros([BLOCK_V], tl.float32)
    gap = tl.zeros([BLOCK_V], tl.float32)
    cross = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        s, t = _load(student_ptr, tile, V, BLOCK_V), _load(teacher_ptr, tile, V, BLOCK_V)
        s_top, t_top = tl.maximum(s_max, tl.max(s)), tl.maximum(t_max, tl.max(t))
        s_shift, t_shift = s_max - s_top, t_max - t_top
        s_factor, t_factor = tl.exp2(s_shift * to_base_2), tl.exp2(t_shift * to_base_2)
        s, t = s - s_top, t - t_top
        s_weight, t_weight = tl.exp2(s * to_base_2), tl.exp2(t * to_base_2)
        if KIND == "forward_kl":
            cross = moved_cross(cross, t_sum, t_factor, t_shift - s_shift)
            cross += t_weight * keep_where(t_weight, t - s)
        if KIND == "reverse_kl":
            cross = moved_cross(cross, s_sum, s_factor, s_shift - t_shift)
            cross += s_weight * keep_where(s_weight, s - t)
        gap = moved_gap(gap, t_sum, s_factor, t_factor) + (s_weight - t_weight)
        s_sum = s_sum * s_factor + s_weight
        t_sum = t_sum * t_factor + t_weight
        s_max, t_max = s_top, t_top
    ranges_ptr += row * (6 * SPLITS) + split
    tl.store(ranges_ptr, s_max)
    tl.store(ranges_ptr + SPLITS, t_max)
    tl.store(ranges_ptr + 2 * SPLITS, wide_sum(s_sum))
    tl.store(ranges_ptr + 3 * SPLITS, wide_sum(t_sum))
    tl.store(ranges_ptr + 4 * SPLITS, wide_sum(gap))
    tl.store(ranges_ptr + 5 * SPLITS, wide_sum(cross))


@triton.jit
def _join_softmax(
    ranges_ptr, value_ptr, statistics_ptr, inverse_temperature, to_base_2,
    KIND: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The ranges of a row -> its statistics, and for the KLs its value."""
    row = tl.program_id(0).to(tl.int64)
    split = ranges_ptr + row * (6 * SPLITS) + tl.arange(0, SPLITS)
    s_max, t_max = tl.load(split), tl.load(split + SPLITS)
    s_sum, t_sum = tl.load(split + 2 * SPLITS), tl.load(split + 3 * SPLITS)
    gap, cross = tl.load(split + 4 * SPLITS), tl.load(split + 5 * SPLITS)
    s_top, t_top = tl.max(s_max), tl.max(t_max)
    s_shift, t_shift = s_max - s_top, t_max - t_top
    s_factor, t_factor = tl.exp2(s_shift * to_base_2), tl.exp2(t_shift * to_base_2)
    s_total, t_total = tl.sum(s_factor * s_sum), tl.sum(t_factor * t_sum)
    gap_total = tl.sum(moved_gap(gap, t_sum, s_factor, t_factor))
    s_log_sum = tl.log(s_total)
    # log(s_total / t_total): by the gap where it is small, else as it stands
    log_sum_gap = tl.where(
        tl.abs(gap_total) < 0.5 * t_total, log1p(gap_total / t_total), s_log_sum - tl.log(t_total)
    )
    centre = tl.zeros([], tl.float64)
    if KIND == "forward_kl":
        total = tl.sum(moved_cross(cross, t_sum, t_factor, t_shift - s_shift))
        tl.store(value_ptr + row, total / t_total * inverse_temperature + log_sum_gap)
    if KIND == "reverse_kl":
        total = tl.sum(moved_cross(cross, s_sum, s_factor, s_shift - t_shift))
        centre = total / s_total
        tl.store(value_ptr + row, centre * inverse_temperature - log_sum_gap)
    statistics_ptr += row * 6
    tl.store(statistics_ptr, s_top)
    tl.store(statistics_ptr + 1, s_log_sum)
    tl.store(statistics_ptr + 2, t_top)
    tl.store(statistics_ptr + 3, log_sum_gap)
    rounded = centre.to(tl.float32)
    tl.store(statistics_ptr + 4, rounded)
    tl.store(statistics_ptr + 5, centre - rounded)


@triton.jit
def _mixture_ranges(
    student_ptr, teacher_ptr, statistics_ptr, ranges_ptr, V, tiles, stride_s, stride_t,
    inverse_temperature, beta, rest, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """KL(p || m), KL(q || m), sum p, sum q over one range of one row -> ranges (T, 4, SPLITS)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_ptr += row * stride_s
    teacher_ptr += row * stride_t
    teacher_kl = tl.zeros([BLOCK_V], tl.float32)
    student_kl = tl.zeros([BLOCK_V], tl.float32)
    p_sum = tl.zeros([BLOCK_V], tl.float32)
    q_sum = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        s, t = _load(student_ptr, tile, V, BLOCK_V), _load(teacher_ptr, tile, V, BLOCK_V)
        log_q, log_p, x_gap = _normal(s, t, statistics_ptr + row * 6, inverse_temperature)
        log_ratio = x_gap * inverse_temperature - tl.load(statistics_ptr + row * 6 + 3)
        of_teacher, of_student = _to_mixture(log_ratio, beta, rest)
        p, q = tl.exp(log_p), tl.exp(log_q)
        teacher_kl += p * keep_where(p, of_teacher)
        student_kl += q * keep_where(q, of_student)
        p_sum += p
        q_sum += q
    ranges_ptr += row * (4 * SPLITS) + split
    tl.store(ranges_ptr, wide_sum(teacher_kl))
    tl.store(ranges_ptr + SPLITS, wide_sum(student_kl))
    tl.store(ranges_ptr + 2 * SPLITS, wide_sum(p_sum))
    tl.store(ranges_ptr + 3 * SPLITS, wide_sum(q_sum))


@triton.jit
def _join_mixture(ranges_ptr, value_ptr, statistics_ptr, beta, rest, SPLITS: tl.constexpr):
    """The ranges of a row -> the JSD, and the centre of its gradient.

    Sum p and sum q are 1 but for rounding. Divided by them the divergences are true means, so that
    the gradient's q (log(q / m) - centre) sums to 0 also where one q is nearly 1.
    """
    row = tl.program_id(0).to(tl.int64)
    split = ranges_ptr + row * (4 * SPLITS) + tl.arange(0, SPLITS)
    teacher_kl, student_kl = tl.sum(tl.load(split)), tl.sum(tl.load(split + SPLITS))
    teacher_kl /= tl.sum(tl.load(split + 2 * SPLITS))
    student_kl /= tl.sum(tl.load(split + 3 * SPLITS))
    tl.store(value_ptr + row, beta * teacher_kl + rest * student_kl)
    rounded = student_kl.to(tl.float32)
    tl.store(statistics_ptr + row * 6 + 4, rounded)
    tl.store(statistics_ptr + row * 6 + 5, student_kl - rounded)


@triton.jit
def _gradient(
    grad_ptr, student_ptr, teacher_ptr, statistics_ptr, out_ptr, V, stride_g, stride_s, stride_t,
    inverse_temperature, beta, rest, KIND: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of the student's gradient (T, V), contiguous."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = _load(student_ptr + row * stride_s, tile, V, BLOCK_V)
    t = _load(teacher_ptr + row * stride_t, tile, V, BLOCK_V)
    statistics_ptr += row * 6
    log_q, log_p, x_gap = _normal(s, t, statistics_ptr, inverse_temperature)
    log_ratio = x_gap * inverse_temperature - tl.load(statistics_ptr + 3)
    q, centre = tl.exp(log_q), tl.load(statistics_ptr + 4)
    centre_rest = tl.load(statistics_ptr + 5)
    factor = tl.load(grad_ptr + row * stride_g) * inverse_temperature
    if KIND == "forward_kl":
        # q - p as the larger of them times 1 - e^-|l|: accurate where they are nearly equal
        more = tl.exp(tl.maximum(log_q, log_p))
        gap = more * keep_where(more, expm1_negative(-tl.abs(log_ratio)))
        gradient = factor * tl.where(log_ratio > 0.0, -gap, gap)
    if KIND == "reverse_kl":
        gradient = factor * inverse_temperature * (q * keep_where(q, x_gap - centre - centre_rest))
    if KIND == "jsd":
        _, of_student = _to_mixture(log_ratio, beta, rest)
        gradient = factor * rest * (q * keep_where(q, of_student - centre - centre_rest))
    offsets = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    out = out_ptr + row * V + offsets
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=offsets < V)


def _packed_rows(logits: Tensor) -> Tensor:
    """Any row stride is read as it is; a vocabulary with gaps is copied first."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def divergence_forward(
    student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(T, V) logits x 2 -> value (T,) and statistics (T, 6), both fp32."""
    rows, vocabulary = student.shape
    value = student.new_empty(rows, dtype=torch.float32)
    statistics = student.new_empty(rows, 6, dtype=torch.float32)
    if rows == 0:
        return value, statistics
    student, teacher = _packed_rows(student), _packed_rows(teacher)
    block, warps = configured(CONFIGS, student)
    tiles = triton.cdiv(vocabulary, block)
    wanted = triton.next_power_of_2(triton.cdiv(WAVES * processors(student), rows))
    splits = min(wanted, triton.next_power_of_2(tiles), MAX_SPLITS)
    tiles_each = triton.cdiv(tiles, splits)
    ranges = student.new_empty(rows, 6, splits, dtype=torch.float64)
    strides = (student.stride(0), teacher.stride(0))
    inverse, grid = 1.0 / temperature, (rows, splits)
    with on_device(student):
        _softmax_ranges[grid](
            student, teacher, ranges, vocabulary, tiles_each, *strides, inverse * LOG2_E,
            KIND=kind, SPLITS=splits, BLOCK_V=block, num_warps=warps,
        )  # fmt: skip
        _join_softmax[(rows,)](
            ranges, value, statistics, inverse, inverse * LOG2_E,
            KIND=kind, SPLITS=splits, num_warps=1,
        )  # fmt: skip
        if kind == "jsd":
            _mixture_ranges[grid](
                student, teacher, statistics, ranges, vocabulary, tiles_each, *strides, inverse,
                beta, 1.0 - beta, SPLITS=splits, BLOCK_V=block, num_warps=warps,
            )  # fmt: skip
            _join_mixture[(rows,)](
                ranges, value, statistics, beta, 1.0 - beta, SPLITS=splits, num_warps=1
            )
    return value, statistics


def divergence_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, kind: str, beta: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Upstream (T,), and what the forward saw and kept -> the student's gradient (T, V)."""
    rows, vocabulary = student.shape
    gradient = student.new_empty(rows, vocabulary)
    if rows == 0:
        return gradient
    student, teacher = _packed_rows(student), _packed_rows(teacher)
    block, warps = configured(CONFIGS, student)
    with on_device(student):
        _gradient[(rows, triton.cdiv(vocabulary, block))](
            grad, student, teacher, statistics.contiguous(), gradient, vocabulary,
            grad.stride(0), student.stride(0), teacher.stride(0), 1.0 / temperature,
            beta, 1.0 - beta, KIND=kind, BLOCK_V=block, num_warps=warps,
        )  # fmt: skip
    return gradient
