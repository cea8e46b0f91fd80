"""HeadMap: which key/value head each query head of an attention layer reads.

Stock attention gives every key/value head the same number of query heads: query head h reads
key/value head h // (H / G). A layer that lost single query heads has them unequal, and says so with
a map. Query heads stand in the order of the key/value heads that they read, so one count per
key/value head says all.
"""

from __future__ import annotations

from dataclasses import dataclass

from slmperf.check import InputError


@dataclass(frozen=True)
class HeadMap:
    """`counts[g]` query heads read key/value head g; H = query_heads, G = kv_heads.

    Raises InputError where there is no count, or one below 1.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise InputError(
                "HeadMap: wanted one or more query heads for each key/value head, "
                f"found {list(self.counts)}"
            )

    @property
    def query_heads(self) -> int:
        return sum(self.counts)

    @property
    def kv_heads(self) -> int:
        return len(self.counts)

    @property
    def reads(self) -> tuple[int, ...]:
        """The key/value head of each query head, (H,)."""
        return tuple(head for head, count in enumerate(self.counts) for _ in range(count))

    @property
    def uniform(self) -> bool:
        """Whether stock attention computes the same without the map."""
        return len(set(self.counts)) == 1

    def over_ranks(self, ranks: int) -> tuple[tuple[int, ...], ...]:
        """The key/value heads that each of `ranks` tensor-parallel ranks owns, each ascending.

        Every rank gets the same number of key/value heads, or one less where they do not divide
        (the later ranks), and query heads as evenly as whole groups allow. Two beginnings, the
        heads in order and the heaviest group first to the lightest rank, are improved by swaps of
        two groups for as long as one evens two ranks; the better one is taken, and that in order
        where there is no difference.
        """
        room = [self.kv_heads // ranks + (r < self.kv_heads % ranks) for r in range(ranks)]
        starts = [sum(room[:rank]) for rank in range(ranks)]
        in_order = [
            list(range(start, start + size)) for start, size in zip(starts, room, strict=True)
        ]
        by_weight: list[list[int]] = [[] for _ in range(ranks)]
        for head in sorted(range(self.kv_heads), key=lambda head: -self.counts[head]):
            free = [rank for rank in range(ranks) if len(by_weight[rank]) < room[rank]]
            by_weight[min(free, key=lambda rank: self._load(by_weight[rank]))].append(head)
        for owned in (in_order, by_weight):
            while self._swap(owned):
                pass
        best = min(
            (in_order, by_weight),
            key=lambda owned: sorted((self._load(heads) for heads in owned), reverse=True),
        )
        return tuple(tuple(sorted(heads)) for heads in best)

    def _load(self, heads: list[int]) -> int:
        """Query heads that read these key/value heads."""
        return sum(self.counts[head] for head in heads)

    def _swap(self, owned: list[list[int]]) -> bool:
        """Make the first swap of two groups that evens two ranks' loads; False: there is none."""
        for one in owned:
            for other in owned:
                gap = self._load(one) - self._load(other)
                for i, mine in enumerate(one):
                    for j, theirs in enumerate(other):
                        if 0 < self.counts[mine] - self.counts[theirs] < gap:
                            one[i], other[j] = theirs, mine
                            return True
        return False
