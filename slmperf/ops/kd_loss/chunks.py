"""kd_loss, chunk by chunk: what its implementations share.

A chunk of C rows goes through

    products     student and teacher logits into two buffers, which all chunks reuse
    phases       statistics -> join -> (second -> join_second) -> gradient, in place of the logits
    products     gradient of the hidden states (C, D), and of the head (V, D), added up in fp32

The phases are an implementation's own: torch.ops.slmperf.kd_* in C++, the functions of
slmperf.triton_kernels.kd_loss on a GPU. Nothing of size T x V exists, and what is held does not
depend on T.

Vocabulary shards: what a rank knows of a row is eight numbers, which are joined with those of the
other ranks as the ranges of one row are; the second pass adds up four sums. Every rank then holds
the statistics of whole rows, and its part of the gradient needs no further exchange; hidden states
get the sum over the ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.half_products import (
    has_bf16_units,
    hidden_gradient,
    project,
    weight_gradient,
)
from slmperf.ops.kd_loss.loss import GRADIENTS, Call
from slmperf.ops.kd_loss.rows import Rows, Shards, statistics_of
from slmperf.ops.kd_loss.top_k import TopK

# On a CPU as little as keeps the products within a tenth of their speed at a thousand rows: 176
# rows of 32,000 fp32 logits of two models.
CHUNK_BYTES = {"cuda": 2**30, "cpu": 44 * 2**20}
# With fewer rows a matrix product waits for the weights: on a GPU the two are even at about 370
# rows of bf16, on a CPU core of AVX-512 at about 40.
LEAST_ROWS = {"cuda": 512, "cpu": 64}
# Shards of the vocabulary may be unequal, but all ranks must cut the rows alike.
SHARD_ROWS = {"cuda": 1024, "cpu": 128}


class Native:
    """The phases in C++ under the names and arguments of slmperf.triton_kernels.kd_loss.

    Their gradients may be written over the logits that they come from, also where they are half as
    wide. They take two logits of one dtype.
    """

    def statistics(self, student: Any, teacher: Any, _: Any, *rest: Any) -> Tensor:
        return torch.ops.slmperf.kd_statistics.cpu(student, teacher, *rest)

    def join(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.slmperf.kd_join.cpu(*arguments)

    def second(self, student: Any, teacher: Any, _: Any, *rest: Any) -> Tensor:
        return torch.ops.slmperf.kd_second.cpu(student, teacher, *rest)

    def join_second(self, *arguments: Any) -> None:
        torch.ops.slmperf.kd_join_second.cpu(*arguments)

    def gradient(self, student: Any, teacher: Any, _: Any, *rest: Any) -> None:
        torch.ops.slmperf.kd_gradient.cpu(student, teacher, *rest)

    def softcap_(self, logits: Tensor, cap: float) -> None:
        torch.ops.slmperf.kd_softcap_.cpu(logits, cap)


def forward(phases: Any, call: Call, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Loss, divergence, cross entropy, and the gradients of hidden, weight and bias.

    Gradients that nobody needs are (0,); so are all with reduction="none", which are made when it
    is known what they are multiplied by.
    """
    rows = Rows(call)
    run = _Run(phases, call, rows, (False,) * 3 if call.reduction == "none" else needs, None)
    divergence, cross_entropy = run.values()
    divergence, share = divergence * call.divergence_factor, call.cross_entropy
    loss = cross_entropy if share == 1.0 else (1.0 - share) * divergence
    if 0.0 < share < 1.0:
        loss = loss + share * cross_entropy
    return (*(rows.reduced(one) for one in (loss, divergence, cross_entropy)), *run.gradients())


def gradient(
    phases: Any, call: Call, needs: tuple[bool, ...], upstream: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias under an upstream (), or (T,) with reduction="none"."""
    run = _Run(phases, call, Rows(call), needs, upstream)
    run.values()
    return tuple(run.gradients())


class _Buffers(NamedTuple):
    """What all chunks are worked in; None where a call has no use for it."""

    student: Tensor  # (C, V) logits
    teacher: Tensor | None  # (C, V) logits
    gradient: Tensor  # (C, V), the student's memory where it can be
    # What follows the gradient in its rows, where those are the student's. A bf16 product may read
    # on to the end of its tile, and multiply that by 0: it must be finite.
    beyond: Tensor | None
    tile_refs: Tensor | None  # (C, tiles, 2) fp32, with logits="difference"


class _Run:
    """One pass over the rows that count; `upstream` as of `gradient`, None in the forward."""

    def __init__(
        self, phases: Any, call: Call, rows: Rows, needs: tuple[bool, ...], upstream: Tensor | None
    ) -> None:
        if call.logits == "difference":
            names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
            call = call._replace(**{name: _packed(getattr(call, name)) for name in names})
        self.phases, self.call, self.rows, self.needs = phases, call, rows, needs
        self.native = isinstance(phases, Native)
        self.shards = Shards(call)
        self.labels = self._labels()
        # What a row's gradient is multiplied by; the scale of the student's logits is part of it.
        scale = rows.gradient_scale(upstream) * call.scale
        share = call.cross_entropy
        self.divergence_scale = scale * ((1.0 - share) * call.divergence_factor)
        self.cross_entropy_scale = scale * share if share else None
        if self.cross_entropy_scale is not None:
            # A label that is no token makes the loss NaN, and its gradients too.
            lost = rows.of(self.lost, 0, rows.count) & (rows.weight != 0.0)
            self.cross_entropy_scale = self.cross_entropy_scale.masked_fill(lost, torch.nan)
        self.chunks = self._chunks()
        self.buffers = self._new_buffers()
        hidden, weight, bias = self.needs
        self.hidden_gradient = _zeros(call.hidden, _kept(call.hidden)) if hidden else None
        self.weight_gradient = self._new_weight_gradient() if weight else None
        vocabulary, float32 = call.weight.shape[:1], torch.float32
        self.bias_gradient = call.weight.new_zeros(vocabulary, dtype=float32) if bias else None

    def _labels(self) -> Tensor | None:
        """Of the cross entropy (T,), as rows of this rank's weight; None without it."""
        call = self.call
        if not call.cross_entropy:
            return None
        assert call.labels is not None
        self.lost = self.shards.lost(call.labels) & (call.labels != call.ignore_index)
        if call.hidden.device.type == "cpu":
            bad = self.rows.of(self.lost, 0, self.rows.count) & (self.rows.weight != 0.0)
            if bad.any():
                label = self.rows.of(call.labels, 0, self.rows.count)[bad][0]
                raise InputError(
                    f"kd_loss: labels holds {int(label)}, expected 0 to "
                    f"{int(self.shards.total) - 1} or ignore_index = {call.ignore_index}"
                )
        return self.shards.local(call.labels).contiguous()

    # What is allocated.

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the logits, and of their gradient."""
        call = self.call
        logits = torch.float32 if call.logits == "fp32" else torch.bfloat16
        # fp16 has no room for gradients of a mean: they stay fp32, and weights are widened.
        half = call.hidden.dtype == torch.bfloat16 and has_bf16_units(call.hidden.device)
        return logits, torch.bfloat16 if half else logits

    def _chunks(self) -> list[tuple[int, int]]:
        """Ranges of rows, of nearly equal length, whose logits fit the budget."""
        call, count, device = self.call, self.rows.count, self.call.hidden.device.type
        if count == 0:
            return []
        logits, gradient = self._dtypes()
        both = 1 if call.teacher_hidden is None and call.teacher_logits is None else 2
        each = both * logits.itemsize
        each += gradient.itemsize if gradient != logits and not self.native else 0
        budget = call.chunk_bytes or CHUNK_BYTES[device]
        least = 1 if call.chunk_bytes else LEAST_ROWS[device]
        most = max(least, budget // (each * call.weight.shape[0]))
        most = SHARD_ROWS[device] if call.group else most
        size = -(-count // -(-count // most))
        if 16 <= size < count:  # whole vectors and tiles of rows
            size = min(most, -(-size // 16) * 16)
        return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def _new_buffers(self) -> _Buffers:
        call = self.call
        size, vocabulary = self.chunks[0][1] if self.chunks else 0, call.weight.shape[0]
        logits, gradient = self._dtypes()
        student = self._fresh(call.hidden.new_empty(size, vocabulary, dtype=logits))
        given = call.teacher_logits
        copied = given is not None and given.dtype != logits and self.native
        both = call.teacher_hidden is not None or copied
        teacher = self._fresh(torch.empty_like(student)) if both else None
        out, beyond = student, None
        if gradient != logits and self.native:
            row = student.view(gradient)
            out, beyond = row[:, :vocabulary], row[:, vocabulary : vocabulary + 64]
        elif gradient != logits:
            out = torch.empty_like(student, dtype=gradient)
        refs = None
        if call.logits == "difference":
            tiles = -(-vocabulary // self.phases.DIFFERENCE_TILE)
            refs = call.hidden.new_empty(size, tiles, 2, dtype=torch.float32)
        return _Buffers(student, teacher, out, beyond, refs)

    def _new_weight_gradient(self) -> Tensor:
        """fp32, but for a single chunk, whose product rounds once in any case."""
        weight = self.call.weight
        if not self.chunks:
            return _zeros(weight, torch.float32)
        once = len(self.chunks) == 1 and weight.device.type == "cuda"
        plain = self.buffers.gradient.dtype == weight.dtype
        dtype = weight.dtype if once and plain else torch.float32
        like = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        return self._fresh(like)

    def _fresh(self, memory: Tensor) -> Tensor:
        """The same, not yet written to, in large pages where the system has them."""
        if self.native:
            torch.ops.slmperf.kd_huge_pages_.cpu(memory)
        return memory

    # The passes.

    def values(self) -> tuple[Tensor, Tensor]:
        """Divergence and cross entropy of every computed row (n,) fp32; gradients on the way."""
        count = self.rows.count
        found = [self.call.hidden.new_zeros(count, dtype=torch.float32) for _ in range(2)]
        for begin, end in self.chunks:
            for kept, value in zip(found, self._chunk(begin, end), strict=True):
                kept[begin:end] = value
        if self.labels is not None:
            found[1] = found[1].masked_fill(self.rows.of(self.lost, 0, count), torch.nan)
        return found[0], found[1]

    def _chunk(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        call, phases = self.call, self.phases
        hidden = self.rows.cleared(call.hidden, begin, end)
        student, teacher, refs = self._logits(hidden, begin, end)
        labels = None if self.labels is None else self.rows.of(self.labels, begin, end)
        scales = (
            self.divergence_scale[begin:end],
            None if self.cross_entropy_scale is None else self.cross_entropy_scale[begin:end],
        )
        out = self.buffers.gradient[: end - begin] if any(self.needs) else None
        if call.indices is not None:
            top = TopK(phases, call, self.rows, self.shards, student, begin, end)
            divergence, cross_entropy = top.values(labels)
            if out is not None:
                top.gradient(labels, *scales, out)
        else:
            divergence, cross_entropy, statistics = statistics_of(
                phases, call, self.shards, student, teacher, refs, labels, call.kind,
                call.temperature,
            )  # fmt: skip
            if out is not None:
                phases.gradient(
                    student, teacher, refs, statistics, labels, *scales,
                    call.kind, call.mixture, call.temperature, call.softcap, out,
                )  # fmt: skip
        if out is not None:
            if self.buffers.beyond is not None:
                self.buffers.beyond.zero_()
            self._gradients(hidden, out, begin, end)
        return divergence, cross_entropy

    def _logits(
        self, hidden: Tensor, begin: int, end: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Student and teacher logits of a chunk, or their differences with what they refer to."""
        call, buffers, rows = self.call, self.buffers, end - begin
        student = buffers.student[:rows]
        teacher = None if buffers.teacher is None else buffers.teacher[:rows]
        if buffers.tile_refs is not None:
            refs = buffers.tile_refs[:rows]
            self.phases.difference_logits(
                hidden, call.weight, call.bias, call.scale, call.softcap,
                self.rows.cleared(call.teacher_hidden, begin, end), call.teacher_weight,
                call.teacher_bias, call.teacher_scale, call.teacher_softcap, student, teacher, refs,
            )  # fmt: skip
            return student, teacher, refs
        project(hidden, call.weight, call.bias, call.scale, student)
        if call.softcap:
            self.phases.softcap_(student, call.softcap)
        if call.teacher_hidden is not None:
            given = self.rows.cleared(call.teacher_hidden, begin, end)
            project(given, call.teacher_weight, call.teacher_bias, call.teacher_scale, teacher)
            if call.teacher_softcap:
                self.phases.softcap_(teacher, call.teacher_softcap)
        elif call.teacher_logits is not None:
            given = self.rows.of(call.teacher_logits, begin, end)
            given = given if given.stride(1) == 1 else given.contiguous()
            teacher = given if teacher is None else teacher.copy_(given)
        return student, teacher, None

    def _gradients(self, hidden: Tensor, out: Tensor, begin: int, end: int) -> None:
        """From the gradient of the logits to those of hidden states, head and bias."""
        if self.hidden_gradient is not None:
            if self.rows.index is None:
                hidden_gradient(out, self.call.weight, self.hidden_gradient[begin:end])
            else:
                part = torch.empty_like(hidden, dtype=self.hidden_gradient.dtype)
                hidden_gradient(out, self.call.weight, part)
                self.hidden_gradient.index_copy_(0, self.rows.index[begin:end], part)
        if self.weight_gradient is not None:
            weight_gradient(out, hidden, self.weight_gradient, first=begin == 0)
        if self.bias_gradient is not None:
            self.bias_gradient += out.sum(dim=0, dtype=torch.float32)

    def gradients(self) -> list[Tensor]:
        """Of hidden, weight and bias in the dtypes of GRADIENTS; (0,) where not needed."""
        call = self.call
        del self.buffers  # before casts need room
        if self.hidden_gradient is not None:
            self.shards.add_up_(self.hidden_gradient)
        found = (self.hidden_gradient, self.weight_gradient, self.bias_gradient)
        likes = (call.hidden, call.weight, call.bias)
        return [
            call.hidden.new_empty(0) if one is None else one.to(_kept(like))
            for one, like in zip(found, likes, strict=True)
        ]


def _zeros(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _kept(like: Tensor) -> torch.dtype:
    """What the gradient of a tensor is kept in until it is multiplied by what comes in."""
    return GRADIENTS.get(like.dtype, like.dtype)


def _packed(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
