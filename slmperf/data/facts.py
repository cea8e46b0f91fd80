"""What was known at the time of a row, in words that the prompt can state.

For a row at time t, over HISTORY rows with time < t (rows of equal time are excluded), n rows of
the row's item and m rows of its member among them, ratings r on a scale of ten:

    prior          = (yes before t + 1) / (rows before t + 2)
    mean           = (sum of the ratings before t + 5) / (rows before t + 1)
    item share     = (yes for the item + 5 * prior) / (n + 5)
    member share   = (yes by the member + 3 * prior) / (m + 3)
    item surplus   = sum over the item's rows of (r - the rater's mean so far) / (n + 5)
    member surplus = sum over the member's rows of (r - the item's mean so far) / (m + 3)

with means so far shrunk the same way (5 or 3 times `mean`). The surplus tells a liked item from one
that met generous raters, which a share cannot. Each value goes to the nearest step of SHARES (in
percent) or SURPLUSES, and each step is one word, such as " [item 62%]" or " [member +0.3]": one
token of the vocabulary. Candidate rows, of whichever member, are never counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slmperf.data.interactions import Interactions, Split, Task

# Finer where many rows lie: the shares of a rare label are low, most surpluses are small.
_LOW = (1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 22, 26, 30, 34, 38, 42, 46)
SHARES = (*_LOW, 50, 54, 58, 62, 66, 70, 75, 80, 85, 90, 95, 98)
_ABOVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8, 2.3, 3.0)
SURPLUSES = (*(-value for value in reversed(_ABOVE)), 0.0, *_ABOVE)
ITEM_STRENGTH, MEMBER_STRENGTH = 5, 3  # rows that a shrunk value counts its prior for

# In the order of a row's text: the columns of `facts`.
COLUMNS = (
    tuple(f" [item {value:+.1f}]" for value in SURPLUSES),
    tuple(f" [item {value}%]" for value in SHARES),
    tuple(f" [member {value:+.1f}]" for value in SURPLUSES),
    tuple(f" [member {value}%]" for value in SHARES),
)
FACT_WORDS = tuple(word for column in COLUMNS for word in column)

_ONE = 1 << 20  # ratings and surpluses are summed as integers: exact, whatever else is summed


def earlier(group: np.ndarray, time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of values over rows of the same group with a strictly smaller time, for every row.

    group int (N,), time int64 (N,) in ascending order, values int64 (N,) -> int64 (N,).
    """
    if not len(group):
        return np.zeros(0, np.int64)
    order = np.argsort(group, kind="stable")  # keeps the order of time within a group
    group, time = group[order], time[order]
    new_group = np.append(True, group[1:] != group[:-1])
    new_tie = new_group | np.append(True, time[1:] != time[:-1])
    before = np.cumsum(values[order]) - values[order]  # exclusive sums, over all groups
    at_tie = np.flatnonzero(new_tie)[np.cumsum(new_tie) - 1]
    at_group = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    result = np.empty(len(group), np.int64)
    result[order] = before[at_tie] - before[at_group]
    return result


def _nearest(steps: Sequence[float], values: np.ndarray) -> np.ndarray:
    edges = (np.array(steps[1:]) + np.array(steps[:-1])) / 2.0
    return np.searchsorted(edges, values, side="right")


def facts(interactions: Interactions, split: Split, task: Task) -> np.ndarray:
    """The words that are true just before each row: int32 (N, 4), indices into FACT_WORDS.

    One column for each of COLUMNS.
    """
    time = interactions.time
    known = split.history.astype(np.int64)
    yes = known * task.labels(interactions)
    rating = np.rint(interactions.rating * (10 * _ONE / interactions.scale)).astype(np.int64)
    groups = (interactions.item, interactions.member)
    strengths = (ITEM_STRENGTH, MEMBER_STRENGTH)

    everybody = np.zeros(len(time), np.int32)
    rows = earlier(everybody, time, known)
    prior = (earlier(everybody, time, yes) + 1.0) / (rows + 2.0)
    middle = (earlier(everybody, time, known * rating) + 5 * _ONE) / (rows + 1.0)

    counts, means = [], []
    for group, strength in zip(groups, strengths, strict=True):
        count = earlier(group, time, known)
        total = earlier(group, time, known * rating)
        counts.append(count)
        means.append((total + strength * middle) / (count + strength))
    columns = []
    for side, (group, strength) in enumerate(zip(groups, strengths, strict=True)):
        weight = counts[side] + strength
        surplus = known * np.rint(rating - means[1 - side]).astype(np.int64)
        columns.append(_nearest(SURPLUSES, earlier(group, time, surplus) / (weight * float(_ONE))))
        share = (earlier(group, time, yes) + strength * prior) / weight
        columns.append(_nearest(SHARES, 100.0 * share))
    starts = np.cumsum([0, *map(len, COLUMNS[:-1])])
    return (np.stack(columns, axis=1) + starts).astype(np.int32)
