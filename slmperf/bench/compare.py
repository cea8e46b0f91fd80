"""Compare: two result files of one bench, row by row.

A row's ratio is its time in B by its time in A. Where both files hold the row's yardstick (plain
torch on the same case in the same run), times are taken in yardsticks: the machine may have been
slower. A change counts when it is over THRESHOLD and the quartiles of the two do not overlap.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slmperf.bench.results import read_results
from slmperf.check import InputError

if TYPE_CHECKING:
    from rich.table import Table

THRESHOLD = 0.05
UNSTEADY = 1.25
VERDICTS = ("faster", "slower", "same", "only in A", "only in B")

Row = Mapping[str, Any]
Key = tuple[str, str]  # section ("" where the file has none), name


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    middle: float
    high: float


class Change(NamedTuple):
    """One row in the two files.

    ratio     B's time by A's; None where one of the files lacks the row
    relative  the same in yardsticks; None where there is none
    """

    name: str
    before_us: float | None
    after_us: float | None
    ratio: float | None
    relative: float | None
    verdict: str
    is_yardstick: bool

    @property
    def decisive(self) -> float:
        """The ratio that the verdict rests on; 1 where a file lacks the row."""
        return self.relative or self.ratio or 1.0


class Comparison(NamedTuple):
    """All rows, A's first, and what to know when reading them, a line each."""

    changes: list[Change]
    warnings: list[str]

    def worse_than(self, limit: float) -> list[Change]:
        """Rows slower by more than `limit` (1.25: a quarter more time); yardsticks are left out."""
        return [
            one
            for one in self.changes
            if one.verdict == "slower" and not one.is_yardstick and one.decisive > limit
        ]

    @property
    def missing(self) -> list[Change]:
        """Rows of A that have no time in B: lost, or no longer able to run."""
        return [one for one in self.changes if one.verdict == "only in A"]

    def summary(self) -> str:
        """How many rows had which verdict."""
        counts = Counter(one.verdict for one in self.changes)
        return ", ".join(f"{counts[one]} {one}" for one in VERDICTS if counts[one])


def compare(before: str | Path, after: str | Path) -> Comparison:
    """Compare the result files A and B; InputError for other schemas or benches of two kinds."""
    a, b = read_results(before), read_results(after)
    if a.get("kind") != b.get("kind"):
        raise InputError(
            f"compare: {after} is of kind {b.get('kind')}, {before} of {a.get('kind')}"
        )
    changes = _changes(_timed(a["rows"], before), _timed(b["rows"], after))
    return Comparison(changes, _warnings(a, b, changes))


def _warnings(a: Mapping[str, Any], b: Mapping[str, Any], changes: Sequence[Change]) -> list[str]:
    """What differs between the two machines and bears on times."""
    found = []
    for fact in ("device", "threads", "torch", "triton"):
        left, right = ((one.get("machine") or {}).get(fact) for one in (a, b))
        if left != right:
            found.append(f"warning: {fact} is {left} in A and {right} in B")
    speeds = [one.ratio for one in changes if one.is_yardstick and one.ratio]
    speed = statistics.median(speeds) if speeds else 1.0
    if not 1 / UNSTEADY < speed < UNSTEADY:
        found.append(
            f"warning: yardsticks took {speed:.3g} x as long in B, so one of the runs had another "
            "machine or a busy one; not all slows down alike, measure both again"
        )
    return found


def _timed(rows: Sequence[Row], path: str | Path) -> dict[Key, Row]:
    """Rows that have a time, by section and name."""
    found: dict[Key, Row] = {}
    for row in rows:
        key = (str(row.get("section", "")), row["name"])
        if key in found:
            raise InputError(f"{path}: two rows are named {row['name']}")
        time_us = row.get("time_us")
        if isinstance(time_us, int | float) and time_us > 0:
            found[key] = row
    return found


def _changes(a: Mapping[Key, Row], b: Mapping[Key, Row]) -> list[Change]:
    yardsticks = {
        (section, row["yardstick"])
        for rows in (a, b)
        for (section, _), row in rows.items()
        if row.get("yardstick")
    }
    changes = []
    for key in dict.fromkeys([*a, *b]):
        before, after = a.get(key), b.get(key)
        ratio = relative = None
        if before is None or after is None:
            verdict = "only in B" if before is None else "only in A"
        else:
            spreads = _spread(before), _spread(after)
            ratio = spreads[1].middle / spreads[0].middle
            yardstick = (key[0], before.get("yardstick") or "")
            if yardstick != key and yardstick in a and yardstick in b:
                spreads = _by(spreads[0], a[yardstick]), _by(spreads[1], b[yardstick])
                relative = spreads[1].middle / spreads[0].middle
            verdict = _verdict(*spreads)
        changes.append(
            Change(
                name=key[1],
                before_us=before["time_us"] if before else None,
                after_us=after["time_us"] if after else None,
                ratio=ratio,
                relative=relative,
                verdict=verdict,
                is_yardstick=key in yardsticks,
            )
        )
    return changes


def _spread(row: Row) -> Spread:
    """Median and quartiles in us; a row without quartiles has none to be noisy in."""
    middle = float(row["time_us"])
    return Spread(float(row.get("low_us") or middle), middle, float(row.get("high_us") or middle))


def _by(spread: Spread, yardstick: Row) -> Spread:
    """Times in yardsticks; what is unsure of either is unsure of the quotient."""
    unit = _spread(yardstick)
    return Spread(spread.low / unit.high, spread.middle / unit.middle, spread.high / unit.low)


def _verdict(a: Spread, b: Spread) -> str:
    if b.middle > a.middle * (1 + THRESHOLD) and b.low > a.high:
        return "slower"
    if a.middle > b.middle * (1 + THRESHOLD) and a.low > b.high:
        return "faster"
    return "same"


def changes_table(comparison: Comparison) -> Table:
    """The changes as a rich table."""
    from rich.table import Table

    shown = Table(caption=comparison.summary(), caption_justify="left")
    shown.add_column("row", overflow="fold")
    for column in ("A, us", "B, us", "B / A", "in yardsticks"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    colours = {"faster": "green", "slower": "red"}
    for one in comparison.changes:
        numbers = [
            "-" if value is None else f"{value:.{digits}f}"
            for value, digits in (
                (one.before_us, 1), (one.after_us, 1), (one.ratio, 3), (one.relative, 3)
            )
        ]  # fmt: skip
        style = colours.get(one.verdict)
        shown.add_row(one.name, *numbers, one.verdict, style=style)
    return shown
