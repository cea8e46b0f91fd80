"""A covering sample: few combinations of the parameters that still meet every pair of values."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Axes = Mapping[str, Sequence[Any]]


def cross(axes: Axes) -> list[dict[str, Any]]:
    """Every combination of the axes' values."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def pairwise(axes: Axes, seed: int, tries: int = 20) -> list[dict[str, Any]]:
    """Combinations in which every two values of two different axes stand together at least once.

    Greedy: each row is the best of `tries` random ones, started from a pair that is still missing.
    """
    chance = random.Random(seed)
    sizes = {name: len(values) for name, values in axes.items()}
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in combinations(axes, 2)
        for i, j in product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while missing:
        start = dict(min(missing, key=sorted))
        candidates = [
            {name: chance.randrange(size) for name, size in sizes.items()} | start
            for _ in range(tries)
        ]
        covered = [missing & {frozenset(pair) for pair in combinations(row.items(), 2)}
                   for row in candidates]  # fmt: skip
        best = max(range(tries), key=[len(pairs) for pairs in covered].__getitem__)
        missing -= covered[best]
        rows.append({name: axes[name][index] for name, index in candidates[best].items()})
    return rows
