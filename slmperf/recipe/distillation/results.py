"""results: what a run on text leaves behind, as plain data: results.json is this, field by field.

A figure that was not taken is None.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmperf.recipe.results import Interval

LEVEL = 0.95
# Two-sided 95% points of Student's t for 1, 2, ... degrees of freedom.
# fmt: off
_T: tuple[float, ...] = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def t_interval(values: Sequence[float]) -> Interval | None:
    """95% interval of the mean of values that are normally distributed; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    # Beyond the table, the first terms of the expansion in 1/n (Abramowitz and Stegun, 26.7.5).
    point = _T[count - 2] if count - 2 < len(_T) else 1.96 + 2.372 / (count - 1)
    half = point * math.sqrt(variance / count)
    return Interval(mean - half, mean + half, LEVEL)


@dataclass
class TextFacts:
    """Where the numbers come from. Tokens of validation are those of the completions."""

    source: str
    synthetic: bool
    training: int  # examples
    validation: int
    training_tokens: int
    validation_tokens: int
    longest_prompt: int  # tokens, of the training examples
    context: int
    cut: int  # examples that were longer than the context
    vocabulary: int


@dataclass
class SeedResult:
    """One stage under one seed."""

    seed: int
    loss: float  # mean cross entropy over the validation completions' tokens, nats
    steps: int | None = None
    best_step: int | None = None  # whose weights the stage has; None: those of the last step
    train_seconds: float | None = None


@dataclass
class StageResult:
    """One row of the table: a stage over its seeds."""

    name: str
    title: str
    kind: str
    source: str | None  # the stage it starts from
    teacher: str | None
    parameters: int
    seeds: list[SeedResult]
    loss: float  # mean over seeds
    interval: Interval | None  # of that mean, Student's t over seeds
    # This less the reference (paper.REFERENCE) of the same seed, mean over the seeds of both.
    difference: float | None = None
    difference_interval: Interval | None = None
    role: str | None = None  # a row of paper.VALIDATION_LOSSES
    paper_loss: float | None = None


@dataclass
class Results:
    """A whole run."""

    recipe: str
    data: TextFacts
    date: str  # ISO
    groups: dict[str, list[StageResult]]  # of the table: group -> rows; "stages": all of the rest
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, Any]  # the recipe as validated, grids expanded
    command: str = ""
    seconds: float | None = None  # of a run in one piece
    notes: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, StageResult]:
        """Every stage once, by name."""
        return {row.name: row for rows in self.groups.values() for row in rows}

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"


def summarise(
    losses: Mapping[str, Mapping[int, float]], reference: str | None
) -> dict[str, tuple[float, Interval | None, float | None, Interval | None]]:
    """stage -> seed -> loss, as stage -> mean, interval, difference to the reference, interval.

    Differences are taken seed by seed over the seeds that both have: what the seeds share (order
    and first weights) cancels. None for the reference itself, or where no seed is shared.
    """
    found = {}
    for name, by_seed in losses.items():
        values = list(by_seed.values())
        mean, difference, interval = math.fsum(values) / len(values), None, None
        if reference is not None and name != reference:
            base = losses[reference]
            gaps = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
            if gaps:
                difference, interval = math.fsum(gaps) / len(gaps), t_interval(gaps)
        found[name] = mean, t_interval(values), difference, interval
    return found
