"""Where a tensor-parallel engine has a layer's heads, and the tensors that belong there.

Engines give every rank a slice of neighbouring key/value heads with the query heads that read them.
Which of a pruned layer's heads come to which rank is chosen here, so that the ranks have about as
many query heads each; heads of zeros, which change no output, fill up what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.head_map import HeadMap


class HeadLayout(NamedTuple):
    """Heads in the order in which an engine has them; None: a head of zeros."""

    kv_heads: tuple[int | None, ...]  # (G',) which of the layer's key/value heads
    query_heads: tuple[int | None, ...]  # (H',) which of its query heads

    @classmethod
    def in_order(cls, heads: HeadMap) -> HeadLayout:
        """The heads as they stand in the layer, none added."""
        return cls(tuple(range(heads.kv_heads)), tuple(range(heads.query_heads)))

    def keeps(self, heads: HeadMap) -> bool:
        """Whether the heads stand here as they stand in the layer, none added."""
        return self == HeadLayout.in_order(heads)


class RankHeads(NamedTuple):
    """What one rank computes of a layer, and how it stands in an attention with even groups."""

    heads: HeadMap
    taken: list[int]  # see `Spread`
    kept: list[int]
    real: list[bool]  # of each query head, whether it is the layer's; others must not count


class RankLayout(NamedTuple):
    """A layer's heads over tensor-parallel ranks, each with as many query heads as the others."""

    layout: HeadLayout  # all ranks, one after the other
    ranks: tuple[HeadMap, ...]  # what each of them computes, heads of zeros among it

    @property
    def group(self) -> int:
        """The most query heads that any key/value head has on any rank."""
        return max(max(heads.counts) for heads in self.ranks)

    def of_rank(self, rank: int, kv_heads: int) -> RankHeads:
        """The heads of one rank, whose attention has `kv_heads` groups of `group` query heads."""
        heads = self.ranks[rank]
        first = rank * heads.query_heads
        own = self.layout.query_heads[first : first + heads.query_heads]
        real = [head is not None for head in own]
        return RankHeads(heads, *spread(heads, self.group, kv_heads), real)


def over_ranks(heads: HeadMap, ranks: int) -> RankLayout:
    """A layer's heads over `ranks` tensor-parallel ranks by whole key/value heads.

    With fewer key/value heads than ranks every rank has one of them, repeated by the engine, and
    its share of that head's query heads. Raises InputError, naming the ranks that could be, where
    key/value heads or query heads do not divide, and for less than one rank.
    """
    if ranks < 1:
        raise InputError(f"ranks is {ranks}, wanted at least 1")
    if heads.kv_heads % ranks == 0:
        owned = heads.over_ranks(ranks)
        width = max(sum(heads.counts[kv] for kv in each) for each in owned)
        layouts, maps = zip(*(_of_rank(heads, each, width) for each in owned), strict=True)
        kv_heads = tuple(kv for layout in layouts for kv in layout.kv_heads)
        queries = tuple(query for layout in layouts for query in layout.query_heads)
        return RankLayout(HeadLayout(kv_heads, queries), maps)
    if ranks % heads.kv_heads == 0 and heads.uniform and heads.query_heads % ranks == 0:
        rank = HeadMap((heads.query_heads // ranks,))
        return RankLayout(HeadLayout.in_order(heads), (rank,) * ranks)
    raise InputError(
        f"{heads.query_heads} query heads over {heads.kv_heads} key/value heads do not divide by "
        f"{ranks} tensor-parallel ranks, wanted {either(possible_ranks(heads))}"
    )


class Spread(NamedTuple):
    """A rank's query heads among those of an attention with groups of one size, and back."""

    taken: list[int]  # of each head of the attention, the query head that stands there
    kept: list[int]  # of each query head, where its output stands


def spread(heads: HeadMap, group: int, kv_heads: int) -> Spread:
    """Query heads over `kv_heads` groups of `group`, as backends without a head map want them.

    A smaller group is filled up with its last head once more, groups that the rank does not have
    with its first: their outputs are dropped.
    """
    taken: list[int] = []
    kept: list[int] = []
    for kv_head in range(heads.kv_heads):
        members = queries_of(heads, kv_head)
        kept += range(len(taken), len(taken) + len(members))
        taken += members + members[-1:] * (group - len(members))
    return Spread(taken + [0] * (group * kv_heads - len(taken)), kept)


def possible_ranks(heads: HeadMap) -> list[int]:
    """The numbers of tensor-parallel ranks over which `over_ranks` divides a layer."""
    divisors = [n for n in range(1, heads.kv_heads + 1) if heads.kv_heads % n == 0]
    if heads.uniform:  # more ranks than key/value heads share them
        group = heads.query_heads // heads.kv_heads
        divisors += [heads.kv_heads * n for n in range(2, group + 1) if group % n == 0]
    return divisors


def queries_of(heads: HeadMap, kv_head: int) -> list[int]:
    """The query heads that read one key/value head."""
    first = sum(heads.counts[:kv_head])
    return list(range(first, first + heads.counts[kv_head]))


def place(tensor: Tensor, groups: Sequence[int | None], size: int) -> Tensor:
    """Rows of `tensor` (m * size, ...) in groups of `size`, in the order of `groups`; None: zeros.

    -> (len(groups) * size, ...)
    """
    whole = tensor.reshape(-1, size, *tensor.shape[1:])
    placed = whole.new_zeros(len(groups), *whole.shape[1:])
    real = [at for at, group in enumerate(groups) if group is not None]
    placed[real] = whole[[group for group in groups if group is not None]]
    return placed.reshape(-1, *tensor.shape[1:])


def _of_rank(heads: HeadMap, owned: Sequence[int], width: int) -> tuple[HeadLayout, HeadMap]:
    """One rank's heads, its query heads filled up to `width` where its groups have fewest."""
    counts = [heads.counts[kv] for kv in owned]
    for _ in range(width - sum(counts)):
        counts[counts.index(min(counts))] += 1
    queries: list[int | None] = []
    for kv, count in zip(owned, counts, strict=True):
        own = queries_of(heads, kv)
        queries += [*own, *[None] * (count - len(own))]
    return HeadLayout(tuple(owned), tuple(queries)), HeadMap(tuple(counts))


def either(numbers: Sequence[int]) -> str:
    """Numbers to choose from, in words: "1, 2 or 4"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
