"""report_cells: what a table of a report is, and figures as its text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from slmperf.recipe.results import StageResult

DASH = "–"


@dataclass
class Table:
    """One table as printed: rows of text cells; `apart` are rows in another type, `paper` columns
    theirs.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    apart: set[int] = field(default_factory=set)
    paper: set[int] = field(default_factory=set)


def decimals(value: float | None, digits: int) -> str:
    """So many digits behind the point; a dash for a figure that was not taken."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def thousands(value: int | None) -> str:
    """A whole number; a dash for none."""
    return DASH if value is None else f"{value:,}"


def metric(stage: StageResult, name: str, digits: int) -> str:
    """A metric's mean over seeds as text."""
    return decimals(stage.mean(name), digits)
