"""Which tokens count and how much, and what is known of their rows over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.kd_loss.loss import Call

SECOND_PASS = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")


class Rows:
    """Which rows count, and how much.

    index   (n,) int64 of the rows that are computed, None for all T
    weight  (n,) fp32, 0 for those of them that do not count after all
    scale   () fp32, what the sum of weighed rows is multiplied by
    """

    def __init__(self, call: Call) -> None:
        hidden, self.tokens, self.reduction = call.hidden, call.hidden.shape[0], call.reduction
        weight = call.token_weight
        if weight is None:
            weight = hidden.new_ones(self.tokens, dtype=torch.float32)
        weight = weight.float()
        if call.labels is not None:
            weight = weight.masked_fill(call.labels == call.ignore_index, 0.0)
        self.index: Tensor | None = None
        self.all_count = False  # whether that is known without asking a device
        overflow = None
        if call.rows is not None:
            if call.rows.device.type == "cpu" and len(call.rows):
                low, high = (int(end) for end in call.rows.aminmax())
                if low < 0 or high >= self.tokens:
                    raise InputError(
                        f"kd_loss: rows holds {low} to {high}, expected 0 to {self.tokens - 1}"
                    )
                if int(call.rows.bincount().max()) > 1:
                    twice = int(call.rows.bincount().argmax())
                    raise InputError(f"kd_loss: rows holds {twice} twice, expected each once")
            self.index = call.rows.to(hidden.device, non_blocking=True)
        elif hidden.device.type == "cpu":
            (counting,) = weight.nonzero(as_tuple=True)
            self.index = None if len(counting) == self.tokens else counting
            self.all_count = True
        elif 0 < call.capacity < self.tokens:
            # Those that count come first, in their order.
            order = torch.argsort((weight == 0.0).to(torch.int8), stable=True)
            self.index = order[: call.capacity]
            overflow = weight[order[call.capacity :]].ne(0.0).any()
        self.weight = weight if self.index is None else weight.index_select(0, self.index)
        self.count = len(self.weight)
        total = self.weight.double().sum() if call.normalizer is None else call.normalizer
        self.scale = torch.ones_like(total, dtype=torch.float32)
        if self.reduction == "mean":
            self.scale = torch.where(total == 0, 0.0, 1.0 / total).float()
        if overflow is not None:
            self.scale = self.scale.masked_fill(overflow, torch.nan)

    def of(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """Computed rows begin..end of a tensor that has T; a view where all are computed."""
        if self.index is None:
            return tensor[begin:end]
        return tensor.index_select(0, self.index[begin:end])

    def cleared(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """The same of (T, D), 0 where a row does not count: 0 times NaN would not be 0."""
        found = self.of(tensor, begin, end)
        if self.all_count:
            return found
        return found.masked_fill((self.weight[begin:end] == 0.0)[:, None], 0.0)

    def gradient_scale(self, upstream: Tensor | None) -> Tensor:
        """d result / d row value (n,) under an upstream () or (T,); None is 1."""
        scale = self.weight * self.scale
        if upstream is None:
            return scale
        given = upstream.float()
        if given.dim() and self.index is not None:
            given = given.index_select(0, self.index)
        return torch.where(self.weight == 0.0, 0.0, scale * given)

    def reduced(self, value: Tensor) -> Tensor:
        """Values of the computed rows (n,) -> (), or (T,) with reduction="none"."""
        weighed = torch.where(self.weight == 0.0, 0.0, self.weight * value)
        if self.reduction != "none":
            return (weighed.double().sum() * self.scale).float()
        weighed = weighed * self.scale
        if self.index is None:
            return weighed
        return weighed.new_zeros(self.tokens).index_copy(0, self.index, weighed)


class Shards:
    """The vocabulary over the ranks of a group; without one, the whole of it here.

    Sizes stay on the device: ranks may hold unequal parts, and nobody waits to learn them.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.group, self.vocabulary = call, None, call.weight.shape[0]
        self.first: Tensor | int = 0  # token id of this rank's first row
        self.total: Tensor | int = self.vocabulary
        if call.group:
            from torch.distributed.distributed_c10d import _resolve_process_group

            self.group = _resolve_process_group(call.group)
            mine = torch.full((1,), self.vocabulary, dtype=torch.int64, device=call.hidden.device)
            sizes = self._all_gather(mine)
            self.first = sizes[: dist.get_rank(self.group)].sum()
            self.total = sizes.sum()

    def local(self, ids: Tensor) -> Tensor:
        """Token ids -> rows of this rank's weight; outside [0, V) where another rank has them."""
        return ids if self.group is None else ids - self.first

    def lost(self, ids: Tensor) -> Tensor:
        """Where ids are no tokens of the vocabulary."""
        return (ids < 0) | (ids >= self.total)

    def gathered(self, ranges: Tensor, kind: str, temperature: float) -> Tensor:
        """Ranges of the statistics (C, 8, n) of this rank -> (C, 8, ranks)."""
        if self.group is None:
            return ranges
        if ranges.shape[2] > 1:
            ranges = _one_range(ranges, kind, temperature)
        every = self._all_gather(ranges.permute(2, 0, 1).contiguous())
        return every.permute(1, 2, 0).contiguous()

    def added(self, sums: Tensor) -> Tensor:
        """Ranges of the second pass (C, 4, n) of this rank -> (C, 4, 1) over all."""
        if self.group is None:
            return sums
        found = sums.sum(dim=2, keepdim=True)
        dist.all_reduce(found, group=self.group)
        return found

    def largest(self, values: Tensor) -> Tensor:
        """Element by element over the ranks: how a value that one rank has reaches all."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def add_up_(self, gradient: Tensor) -> None:
        """The sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(gradient, group=self.group)

    def _all_gather(self, mine: Tensor) -> Tensor:
        """(n, ...) of every rank -> (ranks n, ...)."""
        ranks = dist.get_world_size(self.group)
        every = mine.new_empty(ranks * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(every, mine, group=self.group)
        return every


def _one_range(ranges: Tensor, kind: str, temperature: float) -> Tensor:
    """The ranges of a rank's part of a row as one (C, 8, 1), so that ranks exchange equal numbers.

    Sums move to the largest logit of all; see the kernels for the cross sum.
    """
    s_max, t_max, s_sum, t_sum, gap, cross, s_sum_1, label = ranges.unbind(dim=1)
    s_top, t_top = (x.amax(dim=1, keepdim=True) for x in (s_max, t_max))
    s_shift, t_shift = s_max - s_top, t_max - t_top
    s_factor, t_factor = (torch.exp(x / temperature) for x in (s_shift, t_shift))
    if kind == "forward_kl":
        moved = t_factor * (cross + (t_shift - s_shift) * t_sum)
        cross = torch.where(t_factor == 0.0, 0.0, moved)
    elif kind == "reverse_kl":
        moved = s_factor * (cross + (s_shift - t_shift) * s_sum)
        cross = torch.where(s_factor == 0.0, 0.0, moved)
    gap = s_factor * gap + (s_factor - t_factor) * t_sum
    sums = (s_factor * s_sum, t_factor * t_sum, gap, cross, s_shift.exp() * s_sum_1)
    columns = [s_top, t_top, *(x.sum(dim=1, keepdim=True) for x in sums)]
    return torch.stack([*columns, label.amax(dim=1, keepdim=True)], dim=1)


def statistics_of(
    phases: Any,
    call: Call,
    shards: Shards | None,
    student: Tensor,
    teacher: Tensor | None,
    tile_refs: Tensor | None,
    labels: Tensor | None,
    kind: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (C,), cross entropy (C,) and statistics (C, 7) of whole rows of logits (C, V)."""
    ranges = phases.statistics(
        student, teacher, tile_refs, labels, kind, temperature, labels is not None
    )
    if shards is not None:
        ranges = shards.gathered(ranges, kind, temperature)
    divergence, cross_entropy, statistics = phases.join(ranges, kind, temperature)
    if kind in SECOND_PASS:
        sums = phases.second(
            student, teacher, tile_refs, statistics, kind, call.mixture, temperature
        )
        sums = sums if shards is None else shards.added(sums)
        phases.join_second(sums, kind, call.mixture, divergence, statistics)
    return divergence, cross_entropy, statistics
