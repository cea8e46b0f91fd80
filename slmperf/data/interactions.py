"""Interactions (who rated what, how high, when), the two tasks on them, and the split by time.

Rows are sorted by (time, order in the file): "earlier" below always means earlier in this order,
and "strictly earlier" an earlier time. Facts and the history before a candidate are strictly
earlier; inside a training sequence, rows of equal time stand in the order of the file.
A member may rate an item more than once: every such row is kept, because each was true at its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmperf.check import InputError


@dataclass(frozen=True, eq=False)
class Interactions:
    """N rated interactions, sorted by (time, order in the file).

    member, item: int32 (N,), indices into member_names and item_texts. rating: float32 (N,), at
    most scale. time: int64 (N,), seconds, or the row number where the source has no time.
    scale: the highest rating there is (10 or 5). source: where the rows came from, for reports.
    """

    member: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    scale: int
    member_names: tuple[str, ...]
    item_texts: tuple[str, ...]
    synthetic: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        rows = len(self.member)
        wanted = {"member": np.int32, "item": np.int32, "rating": np.float32, "time": np.int64}
        for name, dtype in wanted.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != (rows,):
                raise ValueError(
                    f"interactions: {name} is {column.dtype} {column.shape}, "
                    f"expected {np.dtype(dtype)} ({rows},)"
                )
            # Shared by every stage of a run: nobody may change a row after the facts were counted.
            column.flags.writeable = False
        if rows and np.any(np.diff(self.time) < 0):
            raise ValueError("interactions: rows are not sorted by time (use from_rows)")
        for name, names in (("member", self.member_names), ("item", self.item_texts)):
            column = getattr(self, name)
            if rows and not (0 <= column.min() and column.max() < len(names)):
                raise ValueError(
                    f"interactions: {name} is in {column.min()}..{column.max()}, "
                    f"expected 0..{len(names) - 1}"
                )

    @classmethod
    def from_rows(
        cls,
        columns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        *,
        scale: int,
        member_names: Sequence[str],
        item_texts: Sequence[str],
        synthetic: bool = False,
        source: str = "",
    ) -> Interactions:
        """Interactions from unsorted columns (member, item, rating, time), each (N,).

        Equal times keep the order they are given in.
        """
        member, item, rating, time = columns
        time = np.asarray(time, np.int64)
        order = np.argsort(time, kind="stable")
        return cls(
            member=np.asarray(member, np.int32)[order],
            item=np.asarray(item, np.int32)[order],
            rating=np.asarray(rating, np.float32)[order],
            time=time[order],
            scale=scale,
            member_names=tuple(member_names),
            item_texts=tuple(item_texts),
            synthetic=synthetic,
            source=source,
        )

    def __len__(self) -> int:
        return len(self.member)


@dataclass(frozen=True)
class Task:
    """A yes/no question about a row: is its rating at least `threshold`?

    instruction: the one line of text that opens every prompt of the task.
    """

    name: str
    instruction: str
    threshold: float

    def labels(self, interactions: Interactions) -> np.ndarray:
        """1 where the rating reaches the threshold, else 0: int8 (N,)."""
        return (interactions.rating >= self.threshold).astype(np.int8)


LIKE_THRESHOLD = {10: 8.0, 5: 4.0}


def tasks_for(interactions: Interactions) -> tuple[Task, Task]:
    """The two tasks: like (at least 8 of 10, or 4 of 5) and top (the highest rating)."""
    scale = interactions.scale
    if scale not in LIKE_THRESHOLD:
        raise InputError(f"tasks: the highest rating is {scale}, expected one of 5, 10")
    like = LIKE_THRESHOLD[scale]
    return (
        Task("like", f"Will the member rate this at least {like:g} of {scale}?", like),
        Task("top", f"Will the member rate this {scale} of {scale}?", float(scale)),
    )


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows are history (known, trained on) and which are candidates (scored): bool (N,).

    The two never overlap; a row in neither is left out altogether.
    """

    history: np.ndarray
    candidate: np.ndarray


def order_within_member(member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row its place among the member's rows, and how many those are: int64 (N,) each."""
    order = np.argsort(member, kind="stable")
    counts = np.bincount(member) if len(member) else np.zeros(0, np.int64)
    starts = np.cumsum(counts) - counts
    position = np.empty(len(member), np.int64)
    position[order] = np.arange(len(member)) - starts[member[order]]
    return position, counts[member]


def split(
    interactions: Interactions,
    history: float = 0.8,
    minimum_rows: int = 10,
    validation: float = 0.0,
) -> Split:
    """Split each member's rows by order: the first int(history * n) are known, the rest are scored.

    A member with fewer than minimum_rows rows is history only: trained on, never scored. With
    validation = f > 0 the last f of each scored member's history rows become the candidates and
    the real candidates are left out altogether: settings are chosen on that split, so that the
    real candidates are looked at once. InputError when no member has minimum_rows rows.
    """
    if not 0.0 < history < 1.0:
        raise InputError(f"split: history is {history:g}, expected a share between 0 and 1")
    if not 0.0 <= validation < 1.0:
        raise InputError(f"split: validation is {validation:g}, expected a share from 0 up to 1")
    if minimum_rows < 2:
        raise InputError(f"split: minimum_rows is {minimum_rows}, expected at least 2")
    position, count = order_within_member(interactions.member)
    scored = count >= minimum_rows
    if not scored.any():
        most = int(count.max()) if len(count) else 0
        raise InputError(
            f"{interactions.source or 'data'}: no member has enough history, expected at least "
            f"{minimum_rows} rows of one member, found at most {most}"
        )
    # The small addend keeps 0.7 * 10 from becoming 6.999...; it cannot reach the next whole number.
    known = np.floor(history * count + 1e-9).astype(np.int64)
    if validation:
        seen = np.floor((1.0 - validation) * known + 1e-9).astype(np.int64)
        return Split(
            history=~scored | (position < seen),
            candidate=scored & (position >= seen) & (position < known),
        )
    return Split(history=~scored | (position < known), candidate=scored & (position >= known))
