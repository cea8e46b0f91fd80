"""Small data that the tests of slmperf.data are made of."""

import numpy as np

from slmperf.data import Interactions


def build(rows, scale=10, members=None, items=None):
    """Interactions from (member, item, rating, time) rows in any order."""
    columns = tuple(np.array(column) for column in zip(*rows, strict=True))
    return Interactions.from_rows(
        columns,
        scale=scale,
        member_names=[f"m{i}" for i in range(members or int(columns[0].max()) + 1)],
        item_texts=[f"Film {i} (19{i:02d}) | Drama" for i in range(items or columns[1].max() + 1)],
        source="small",
    )


def some(members=6, items=30, rows=240, seed=0):
    generator = np.random.default_rng(seed)
    return build(
        [
            (generator.integers(members), generator.integers(items), generator.integers(1, 11), t)
            for t in generator.permutation(rows).tolist()
        ],
        members=members,
        items=items,
    )
