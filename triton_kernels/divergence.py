"""divergence on GPU, and the row phases that kd_loss shares with it.

Formulas: slmperf/ops/divergence.py. A row is cut into SPLITS ranges of the vocabulary, one
program each, so that few rows still fill the device; a second, tiny kernel joins the ranges in a
fixed order (no atomics: the same bits from run to run). The KLs come out of that one reading of
the logits: with x the logits less their model's largest so far and the weights exp(x /
temperature), two sums run beside the two softmaxes: "gap", the student's weights less the
teacher's, exact where the models are close, and "cross", sum w (x_a - x_b) with a the model that
weights (teacher for the forward KL, student for the reverse). The kinds of SECOND have to know
both log-sums first and read the logits again.

    bytes per logit (e: bytes of an element)   forward 2e (SECOND 4e), backward 3e

All maths is fp32, but for the sums over lanes and ranges, which are fp64. Statistics per row as
in slmperf/ops/divergence.py: (T, 7).

kd_loss calls the launchers from `statistics` to `gradient` one by one. Its logits may also come as
differences, written by difference_logits (kd_loss.py) with `tile_refs` (C, tiles, 2) fp32: for
every DIFFERENCE_TILE entries of a row a reference r of the teacher's logits t, and one of s - t,

    teacher   t - r, -inf where t is
    student   (s - t) - second reference, -inf where s is; where t is -inf, r takes its place

so that what bf16 takes from s - t is relative to it, however large the logits are.

Over 400 lines because one set of kernels serves both ops, and its launchers belong beside them.
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
DIFFERENCE_TILE = 128  # entries of a row that share their references
SECOND = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")  # read logits twice

_TILE = tl.constexpr(DIFFERENCE_TILE)
_NO_LABEL = tl.constexpr(float("-inf"))
# Stands for a label's logit of minus infinity, which "no label" has taken: its cross entropy is
# infinite in fp32.
_IMPOSSIBLE = tl.constexpr(-1e300)


@triton.jit
def _restored(student, teacher, teacher_ref, gap_ref):
    """s, t and s - t from what is stored as differences."""
    dead = teacher == float("-inf")
    t, gap = teacher + teacher_ref, student + gap_ref
    return tl.where(dead, teacher_ref, t) + gap, t, tl.where(dead, float("inf"), gap)


@triton.jit
def _reference(refs_ptr, tile, V, BLOCK_V: tl.constexpr):
    """What each entry of a tile refers to. A thread reads one number for its eight logits."""
    first = tile * BLOCK_V + 8 * tl.arange(0, BLOCK_V // 8)
    found = tl.load(refs_ptr + 2 * (first // _TILE), mask=first < V, other=0.0)
    return tl.reshape(tl.broadcast_to(found[:, None], [BLOCK_V // 8, 8]), [BLOCK_V])


@triton.jit
def _load(student_ptr, teacher_ptr, refs_ptr, tile, V, BLOCK_V: tl.constexpr):
    """A tile of both models in fp32 and, where it is stored, s - t; beyond V both are -inf.

    Without a teacher t is s; where the difference is not stored it is 0, for nobody to read.
    """
    offsets = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offsets < V
    s = tl.load(student_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    t, gap = s, 0.0
    if teacher_ptr is not None:
        t = tl.load(teacher_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    if refs_ptr is not None:
        teacher_ref = _reference(refs_ptr, tile, V, BLOCK_V)
        s, t, gap = _restored(s, t, teacher_ref, _reference(refs_ptr + 1, tile, V, BLOCK_V))
    return s, t, gap


@triton.jit
def _load_one(student_ptr, teacher_ptr, refs_ptr, entry):
    """The student's logit of one entry."""
    s = tl.load(student_ptr + entry).to(tl.float32)
    if refs_ptr is not None:
        t = tl.load(teacher_ptr + entry).to(tl.float32)
        ref_ptr = refs_ptr + 2 * (entry // _TILE)
        s, _, _ = _restored(s, t, tl.load(ref_ptr), tl.load(ref_ptr + 1))
    return s


@triton.jit
def _centred(s, t, gap, s_top, t_top, DIFFERENCE: tl.constexpr):
    """Both models' logits less their row's largest, and the difference of the two."""
    x_s, x_t = s - s_top, t - t_top
    x_gap = x_s - x_t
    if DIFFERENCE:
        x_gap = gap - (s_top - t_top)
        x_s = tl.where(t == float("-inf"), x_s, x_t + x_gap)
    return x_s, x_t, x_gap


@triton.jit
def _normal(s, t, gap, row_ptr, scale, DIFFERENCE: tl.constexpr):
    """log q, log p, x_student, x_student - x_teacher, log q - log p by their row's statistics."""
    x_s, x_t, x_gap = _centred(s, t, gap, tl.load(row_ptr), tl.load(row_ptr + 2), DIFFERENCE)
    s_log_sum, log_sum_gap = tl.load(row_ptr + 1), tl.load(row_ptr + 3)
    log_q, log_p = x_s * scale - s_log_sum, x_t * scale - (s_log_sum - log_sum_gap)
    return log_q, log_p, x_s, x_gap, x_gap * scale - log_sum_gap


@triton.jit
def _to_mixture(log_ratio, weight, rest):
    """log(p / m), log(q / m) and (p - q) / m from l = log q - log p.

    No probability is there to underflow: m / p = weight + rest e^l and m / q = rest + weight e^-l;
    the one whose exponent is not positive is 1 + c (e^-|l| - 1), and the other differs by e^l.
    Taken as log1p of expm1, its logarithm is accurate near p = q, where the divergences cancel to
    the second order of l.
    """
    c = tl.where(log_ratio > 0.0, weight, rest)
    least = tl.where(log_ratio > 0.0, rest, weight)
    less = expm1_negative(-tl.abs(log_ratio))
    x = c * less
    total = tl.maximum(least, 1.0 + x)
    tail = tl.log(total) + (x - (total - 1.0))  # log1p(x), not below the least that it can be
    lean = tl.where(log_ratio > 0.0, less, -less) / total
    return -tl.maximum(log_ratio, 0.0) - tail, -tl.maximum(-log_ratio, 0.0) - tail, lean


@triton.jit
def _pull(log_ratio, weight, rest, KIND: tl.constexpr):
    """What the gradient of a kind of SECOND is linear in; its mean under q centres it."""
    if KIND == "total_variation":
        return tl.where(log_ratio > 0.0, 1.0, tl.where(log_ratio < 0.0, -1.0, 0.0))
    _, of_student, lean = _to_mixture(log_ratio, weight, rest)
    if KIND == "jsd":
        return of_student
    if KIND == "skew_forward_kl":
        return rest * lean  # p / m - 1
    # log(q / m) - rest (q / m - 1)
    return of_student + rest * weight * lean


@triton.jit
def _softmax_ranges(
    student_ptr, teacher_ptr, refs_ptr, labels_ptr, ranges_ptr, V, tiles, stride_s, stride_t,
    to_base_2, ENTROPY: tl.constexpr, KIND: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maxima, sums, gap, cross sum, and what the cross entropy needs, over one range of one row.

    -> ranges (T, 8, SPLITS). ENTROPY: "no", "same" (as the divergence's: temperature 1), "own".
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_ptr += row * stride_s
    if teacher_ptr is not None:
        teacher_ptr += row * stride_t
    if refs_ptr is not None:
        refs_ptr += row * (tl.cdiv(V, _TILE) * 2)
    s_max, t_max = tl.full([], LOWEST, tl.float32), tl.full([], LOWEST, tl.float32)
    s_sum = tl.zeros([BLOCK_V], tl.float32)
    t_sum = tl.zeros([BLOCK_V], tl.float32)
    gap = tl.zeros([BLOCK_V], tl.float32)
    cross = tl.zeros([BLOCK_V], tl.float32)
    own_sum = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        s, t, s_less_t = _load(student_ptr, teacher_ptr, refs_ptr, tile, V, BLOCK_V)
        s_top, t_top = tl.maximum(s_max, tl.max(s)), tl.maximum(t_max, tl.max(t))
        s_shift, t_shift = s_max - s_top, t_max - t_top
        x_s, x_t, x_gap = _centred(s, t, s_less_t, s_top, t_top, refs_ptr is not None)
        s_factor, s_weight = tl.exp2(s_shift * to_base_2), tl.exp2(x_s * to_base_2)
        if KIND != "none":
            t_factor, t_weight = tl.exp2(t_shift * to_base_2), tl.exp2(x_t * to_base_2)
            if KIND == "forward_kl":
                cross = moved_cross(cross, t_sum, t_factor, t_shift - s_shift)
                cross += t_weight * keep_where(t_weight, -x_gap)
            if KIND == "reverse_kl":
                cross = moved_cross(cross, s_sum, s_factor, s_shift - t_shift)
                cross += s_weight * keep_where(s_weight, x_gap)
            gap = moved_gap(gap, t_sum, s_factor, t_factor) + (s_weight - t_weight)
            t_sum = t_sum * t_factor + t_weight
        if ENTROPY == "own":
            own_sum = own_sum * tl.exp(s_shift) + tl.exp(x_s)
        s_sum = s_sum * s_factor + s_weight
        s_max, t_max = s_top, t_top
    ranges_ptr += row * (8 * SPLITS) + split
    if KIND == "none":
        t_max = 0.0
    tl.store(ranges_ptr, s_max)
    tl.store(ranges_ptr + SPLITS, t_max)
    sum_of_student = wide_sum(s_sum)
    tl.store(ranges_ptr + 2 * SPLITS, sum_of_student)
    tl.store(ranges_ptr + 3 * SPLITS, wide_sum(t_sum))
    tl.store(ranges_ptr + 4 * SPLITS, wide_sum(gap))
    tl.store(ranges_ptr + 5 * SPLITS, wide_sum(cross))
    if ENTROPY == "same":
        tl.store(ranges_ptr + 6 * SPLITS, sum_of_student)
    else:
        tl.store(ranges_ptr + 6 * SPLITS, wide_sum(own_sum))
    at_label = tl.full([], _NO_LABEL, tl.float64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        first = (split * tiles).to(tl.int64) * BLOCK_V
        here = (label >= first) & (label < first + tiles * BLOCK_V) & (label >= 0) & (label < V)
        at = _load_one(student_ptr, teacher_ptr, refs_ptr, tl.where(here, label, 0))
        at_label = tl.where(at == float("-inf"), _IMPOSSIBLE, at.to(tl.float64))
        at_label = tl.where(here, at_label, _NO_LABEL)
    tl.store(ranges_ptr + 7 * SPLITS, at_label)


@triton.jit
def _join_softmax(
    ranges_ptr, value_ptr, cross_entropy_ptr, statistics_ptr, n, inverse_temperature, to_base_2,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The n ranges of a row -> its statistics, cross entropy, and for the KLs its divergence."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    split = ranges_ptr + row * (8 * n) + column
    s_max = tl.load(split, mask=there, other=LOWEST)
    s_sum = tl.load(split + 2 * n, mask=there, other=0.0)
    s_top = tl.max(s_max)
    s_shift = s_max - s_top
    s_factor = tl.exp2(s_shift * to_base_2)
    s_total = tl.sum(s_factor * s_sum)
    s_log_sum = tl.log(s_total)
    statistics_ptr += row * 7
    tl.store(statistics_ptr, s_top)
    tl.store(statistics_ptr + 1, s_log_sum)
    own_total = tl.sum(tl.exp(s_shift) * tl.load(split + 6 * n, mask=there, other=0.0))
    own_log_sum = tl.where(own_total == 0.0, 0.0, tl.log(own_total))  # 0: it was not asked for
    at_label = tl.max(tl.load(split + 7 * n, mask=there, other=_NO_LABEL))
    cross_entropy = tl.where(at_label == _NO_LABEL, 0.0, own_log_sum - (at_label - s_top))
    tl.store(cross_entropy_ptr + row, cross_entropy)
    tl.store(statistics_ptr + 6, own_log_sum)
    value = tl.zeros([], tl.float64)
    centre = tl.zeros([], tl.float64)
    t_top = tl.zeros([], tl.float64)
    log_sum_gap = tl.zeros([], tl.float64)
    if KIND != "none":
        t_max = tl.load(split + n, mask=there, other=LOWEST)
        t_sum = tl.load(split + 3 * n, mask=there, other=0.0)
        gap = tl.load(split + 4 * n, mask=there, other=0.0)
        cross = tl.load(split + 5 * n, mask=there, other=0.0)
        t_top = tl.max(t_max)
        t_shift = t_max - t_top
        t_factor = tl.exp2(t_shift * to_base_2)
        t_total = tl.sum(t_factor * t_sum)
        gap_total = tl.sum(moved_gap(gap, t_sum, s_factor, t_factor))
        # log(s_total / t_total): by the gap where it is small, else as it stands
        log_sum_gap = tl.where(
            tl.abs(gap_total) < 0.5 * t_total,
            log1p(gap_total / t_total),
            s_log_sum - tl.log(t_total),
        )
        if KIND == "forward_kl":
            total = tl.sum(moved_cross(cross, t_sum, t_factor, t_shift - s_shift))
            value = total / t_total * inverse_temperature + log_sum_gap
        if KIND == "reverse_kl":
            total = tl.sum(moved_cross(cross, s_sum, s_factor, s_shift - t_shift))
            centre = total / s_total
            value = centre * inverse_temperature - log_sum_gap
    tl.store(value_ptr + row, value)
    tl.store(statistics_ptr + 2, t_top)
    tl.store(statistics_ptr + 3, log_sum_gap)
    rounded = centre.to(tl.float32)
    tl.store(statistics_ptr + 4, rounded)
    tl.store(statistics_ptr + 5, centre - rounded)


@triton.jit
def _mixture_ranges(
    student_ptr, teacher_ptr, refs_ptr, statistics_ptr, ranges_ptr, V, tiles, stride_s, stride_t,
    inverse_temperature, weight, rest, KIND: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What value and centre need of one range of one row, sum p, sum q -> ranges (T, 4, SPLITS)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_ptr += row * stride_s
    teacher_ptr += row * stride_t
    statistics_ptr += row * 7
    if refs_ptr is not None:
        refs_ptr += row * (tl.cdiv(V, _TILE) * 2)
    value = tl.zeros([BLOCK_V], tl.float32)
    pull = tl.zeros([BLOCK_V], tl.float32)
    p_sum = tl.zeros([BLOCK_V], tl.float32)
    q_sum = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        s, t, gap = _load(student_ptr, teacher_ptr, refs_ptr, tile, V, BLOCK_V)
        log_q, log_p, _, _, log_ratio = _normal(
            s, t, gap, statistics_ptr, inverse_temperature, refs_ptr is not None
        )
        p, q = tl.exp(log_p), tl.exp(log_q)
        pull += q * keep_where(q, _pull(log_ratio, weight, rest, KIND))
        if KIND == "total_variation":
            value += _apart(log_q, log_p, log_ratio)
        else:
            of_teacher, of_student, _ = _to_mixture(log_ratio, weight, rest)
            if KIND == "skew_reverse_kl":
                value += q * keep_where(q, of_student)
            else:
                value += p * keep_where(p, of_teacher)
        p_sum += p
        q_sum += q
    ranges_ptr += row * (4 * SPLITS) + split
    tl.store(ranges_ptr, wide_sum(value))
    tl.store(ranges_ptr + SPLITS, wide_sum(pull))
    tl.store(ranges_ptr + 2 * SPLITS, wide_sum(p_sum))
    tl.store(ranges_ptr + 3 * SPLITS, wide_sum(q_sum))


@triton.jit
def _apart(log_q, log_p, log_ratio):
    """|q - p| as the larger of them times 1 - e^-|l|: accurate where they are nearly equal."""
    more = tl.exp(tl.maximum(log_q, log_p))
    return -more * keep_where(more, expm1_negative(-tl.abs(log_ratio)))


@triton.jit
def _join_mixture(
    ranges_ptr, value_ptr, statistics_ptr, n, weight, rest,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The n ranges of a row -> its divergence, and the centre of its gradient.

    Sum p and sum q are 1 but for rounding. Divided by them the results are true means, so that
    the gradient's q (pull - centre) sums to 0 also where one q is nearly 1.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    split = ranges_ptr + row * (4 * n) + column
    value = tl.sum(tl.load(split, mask=column < n, other=0.0))
    centre = tl.sum(tl.load(split + n, mask=column < n, other=0.0))
    p_sum = tl.sum(tl.load(split + 2 * n, mask=column < n, other=0.0))
    q_sum = tl.sum(tl.load(split + 3 * n, mask=column < n, other=0.0))
    centre /= q_sum
    if KIND == "jsd":
        value = weight * (value / p_sum) + rest * centre
    if KIND == "skew_forward_kl":
        value /= p_sum
    if KIND == "skew_reverse_kl":
        value /= q_sum
    if KIND == "total_variation":
        value /= p_sum + q_sum
    tl.store(value_ptr + row, value)
    rounded = centre.to(tl.float32)
    tl.store(statistics_ptr + row * 7 + 4, rounded)
    tl.store(statistics_ptr + row * 7 + 5, centre - rounded)


@triton.jit
def _gradient(
    scale_ptr, entropy_scale_ptr, student_ptr, teacher_ptr, refs_ptr, labels_ptr, statistics_ptr,
    out_ptr, V, stride_g, stride_s, stride_t, stride_o, inverse_temperature, weight, rest,
    inverse_softcap, ENTROPY: tl.constexpr, CAPPED: tl.constexpr, KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of the student's gradient (T, V); it may lie where the student's logits are.

    Rows whose scales are 0 are not read.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    statistics_ptr += row * 7
    if teacher_ptr is not None:
        teacher_ptr += row * stride_t
    if refs_ptr is not None:
        refs_ptr += row * (tl.cdiv(V, _TILE) * 2)
    scale = tl.load(scale_ptr + row * stride_g)
    alive = scale != 0.0
    if ENTROPY != "no":
        entropy_scale = tl.load(entropy_scale_ptr + row)
        alive |= entropy_scale != 0.0
    offsets = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    read = tl.where(alive, V, 0)
    s, t, gap = _load(student_ptr + row * stride_s, teacher_ptr, refs_ptr, tile, read, BLOCK_V)
    log_q, log_p, x_s, x_gap, log_ratio = _normal(
        s, t, gap, statistics_ptr, inverse_temperature, refs_ptr is not None
    )
    q = tl.exp(log_q)
    centre, centre_rest = tl.load(statistics_ptr + 4), tl.load(statistics_ptr + 5)
    factor = scale * inverse_temperature
    if KIND == "none":
        gradient = factor * q
    elif KIND == "forward_kl":
        apart = _apart(log_q, log_p, log_ratio)
        gradient = factor * tl.where(log_ratio > 0.0, apart, -apart)
    elif KIND == "reverse_kl":
        gradient = factor * inverse_temperature * (q * keep_where(q, x_gap - centre - centre_rest))
    else:
        pull = _pull(log_ratio, weight, rest, KIND) - centre - centre_rest
        if KIND == "jsd":
            factor *= rest
        if KIND == "skew_forward_kl":
            factor *= -rest
        if KIND == "total_variation":
            factor *= 0.5
        gradient = factor * (q * keep_where(q, pull))
    if ENTROPY != "no":
        gradient = keep_where(scale, gradient)  # a divergence that has no share may be infinite
        if ENTROPY == "own":
            q = tl.exp(x_s - tl.load(statistics_ptr + 6))
        if labels_ptr is not None:
            q -= tl.where(offsets == tl.load(labels_ptr + row), 1.0, 0.0)
        gradient += entropy_scale * q
    if CAPPED:
        # Minus infinity is no softcap's result; as the end of its range it lets nothing through.
        capped = tl.maximum(s * inverse_softcap, -1.0)
        gradient *= (1.0 - capped) * (1.0 + capped)
    gradient = tl.where(alive, gradient, 0.0)
    out = out_ptr + row * stride_o + offsets
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=offsets < V)


def _entropy(asked: bool, same: bool) -> str:
    """Which of the student's sums the cross entropy takes: the divergence's, or its own."""
    return ("same" if same else "own") if asked else "no"


def _stride(logits: Tensor | None) -> int:
    return 0 if logits is None else logits.stride(0)


def _blocks(student: Tensor, tile_refs: Tensor | None) -> tuple[int, int]:
    """BLOCK_V and warps."""
    block, warps = configured(CONFIGS, student)
    return block if tile_refs is None else max(block, DIFFERENCE_TILE), warps


def _cuts(student: Tensor, block: int) -> tuple[int, int]:
    """How many ranges a row is cut into (a power of two), and the tiles of each."""
    rows, vocabulary = student.shape
    tiles = triton.cdiv(vocabulary, block)
    wanted = triton.next_power_of_2(triton.cdiv(WAVES * processors(student), rows))
    splits = min(wanted, triton.next_power_of_2(tiles), MAX_SPLITS)
    return splits, triton.cdiv(tiles, splits)


def statistics(
    student: Tensor, teacher: Tensor | None, tile_refs: Tensor | None, labels: Tensor | None,
    kind: str, temperature: float, cross_entropy: bool,
) -> Tensor:  # fmt: skip
    """Maxima and sums of the ranges of each row: (C, V) logits -> (C, 8, n) fp64.

    Columns: largest logit of student and teacher, sums of their weights exp(x / temperature), sum
    of the student's weights less the teacher's, cross sum, sum of the student's at temperature 1
    and its logit at the label (0 and -inf unless `cross_entropy`). Without a teacher (kind "none")
    the columns that name it are 0. Ranges of other shards of the vocabulary may be appended.
    """
    rows, vocabulary = student.shape
    if rows == 0:
        return student.new_empty(0, 8, 1, dtype=torch.float64)
    block, warps = _blocks(student, tile_refs)
    splits, tiles = _cuts(student, block)
    ranges = student.new_empty(rows, 8, splits, dtype=torch.float64)
    with on_device(student):
        _softmax_ranges[(rows, splits)](
            student, teacher, tile_refs, labels if cross_entropy else None, ranges, vocabulary,
            tiles, student.stride(0), _stride(teacher), LOG2_E / temperature,
            ENTROPY=_entropy(cross_entropy, temperature == 1.0), KIND=kind, SPLITS=splits,
            BLOCK_V=block, num_warps=warps,
        )  # fmt: skip
    return ranges


def join(ranges: Tensor, kind: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(C, 8, n) -> divergence (C,), 0 for a kind of SECOND; cross entropy (C,); statistics (C, 7).

    All fp32. The cross entropy is 0 where a row has no label.
    """
    rows, _, n = ranges.shape
    value = ranges.new_empty(rows, dtype=torch.float32)
    cross_entropy, kept = torch.empty_like(value), value.new_empty(rows, 7)
    if rows:
        block = triton.next_power_of_2(n)
        with on_device(ranges):
            _join_softmax[(rows,)](
                ranges, value, cross_entropy, kept, n, 1.0 / temperature, LOG2_E / temperature,
                KIND=kind, BLOCK=block, num_warps=1 if block <= MAX_SPLITS else 4,
            )  # fmt: skip
    return value, cross_entropy, kept


def second(
    student: Tensor, teacher: Tensor, tile_refs: Tensor | None, statistics: Tensor, kind: str,
    weight: float, temperature: float,
) -> Tensor:  # fmt: skip
    """The second reading, for a kind of SECOND: (C, V) logits -> ranges (C, 4, n) fp64.

    Columns: numerators of the value and of the centre, sum p, sum q.
    """
    rows, vocabulary = student.shape
    if rows == 0:
        return student.new_empty(0, 4, 1, dtype=torch.float64)
    block, warps = _blocks(student, tile_refs)
    splits, tiles = _cuts(student, block)
    ranges = student.new_empty(rows, 4, splits, dtype=torch.float64)
    with on_device(student):
        _mixture_ranges[(rows, splits)](
            student, teacher, tile_refs, statistics, ranges, vocabulary, tiles,
            student.stride(0), teacher.stride(0), 1.0 / temperature, weight, 1.0 - weight,
            KIND=kind, SPLITS=splits, BLOCK_V=block, num_warps=warps,
        )  # fmt: skip
    return ranges


def join_second(
    ranges: Tensor, kind: str, weight: float, divergence: Tensor, statistics: Tensor
) -> None:
    """(C, 4, n) -> the value into divergence (C,) and the centre into statistics (C, 7)."""
    rows, _, n = ranges.shape
    if rows:
        block = triton.next_power_of_2(n)
        with on_device(ranges):
            _join_mixture[(rows,)](
                ranges, divergence, statistics, n, weight, 1.0 - weight,
                KIND=kind, BLOCK=block, num_warps=1 if block <= MAX_SPLITS else 4,
            )  # fmt: skip


def gradient(
    student: Tensor, teacher: Tensor | None, tile_refs: Tensor | None, statistics: Tensor,
    labels: Tensor | None, divergence_scale: Tensor, cross_entropy_scale: Tensor | None, kind: str,
    weight: float, temperature: float, softcap: float, out: Tensor,
) -> None:  # fmt: skip
    """The student's gradient (C, V) into `out`, which may be the memory of `student` itself.

    divergence_scale times the divergence's gradient plus cross_entropy_scale times that of the
    cross entropy, both (C,) fp32, and times 1 - (student / softcap)^2 where softcap > 0. Zeros,
    whatever the logits hold, in rows whose scales are 0.
    """
    rows, vocabulary = student.shape
    if rows == 0:
        return
    block, warps = _blocks(student, tile_refs)
    asked = cross_entropy_scale is not None
    # Under a top-k teacher ("none") the two sums are over different tokens at any temperature.
    same = temperature == 1.0 and kind != "none"
    with on_device(student):
        _gradient[(rows, triton.cdiv(vocabulary, block))](
            divergence_scale, cross_entropy_scale, student, teacher, tile_refs,
            labels if asked else None, statistics, out, vocabulary, divergence_scale.stride(0),
            student.stride(0), _stride(teacher), out.stride(0), 1.0 / temperature, weight,
            1.0 - weight, 1.0 / softcap if softcap > 0.0 else 0.0,
            ENTROPY=_entropy(asked, same), CAPPED=softcap > 0.0, KIND=kind, BLOCK_V=block,
            num_warps=warps,
        )  # fmt: skip


def _packed_rows(logits: Tensor) -> Tensor:
    """Any row stride is read as it is; a vocabulary with gaps is copied first."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def divergence_forward(
    student: Tensor, teacher: Tensor, kind: str, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """(T, V) logits x 2 -> value (T,) and statistics (T, 7), both fp32."""
    student, teacher = _packed_rows(student), _packed_rows(teacher)
    ranges = statistics(student, teacher, None, None, kind, temperature, False)
    value, _, kept = join(ranges, kind, temperature)
    if kind in SECOND:
        ranges = second(student, teacher, None, kept, kind, weight, temperature)
        join_second(ranges, kind, weight, value, kept)
    return value, kept


def divergence_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, kind: str, weight: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Upstream (T,), and what the forward saw and kept -> the student's gradient (T, V)."""
    out = student.new_empty(student.shape)
    gradient(
        _packed_rows(student), _packed_rows(teacher), None, statistics.contiguous(), None, grad,
        None, kind, weight, temperature, 0.0, out,
    )  # fmt: skip
    return out
