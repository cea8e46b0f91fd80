"""bootstrap: intervals of AUC and of differences of AUC, over members drawn with replacement.

Members, not candidates, are drawn, because the candidates of one member depend on each other. A
draw gives each member a multiplicity; the AUC of the draw is the weighted AUC with those
multiplicities:

    AUC_b = sum_i w_i (C(lo_i) + C(hi_i)) / 2 / (sum of positive w * sum of negative w)

over positives i, where C(j) is the weight of the j lowest negatives, lo_i and hi_i the number of
negatives below, and not above, the score of i. The sort happens once, a draw is one gather and one
cumulative sum. Runs that are compared see the same draws (paired), and the runs of several seeds
are averaged inside each draw; so the interval covers members, not seeds.

Percentile intervals (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmperf.check import InputError
from slmperf.evaluate.metrics import Run, auc

DRAWS = 1000
CHUNK = 64  # draws computed together: 64 x 15k floats stay near the cache


class Estimate(NamedTuple):
    """A figure and its percentile interval; standard_error is the spread of the draws."""

    value: float
    low: float
    high: float
    level: float
    standard_error: float


def auc_interval(
    runs: Sequence[Run], *, draws: int = DRAWS, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean AUC over tasks and runs (one run per seed of a stage), with its interval over
    members.
    """
    drawn = _draw(_same_rows("auc_interval", runs), runs, draws, seed)
    return _estimate(_mean_auc(runs), drawn, level)


def difference(
    runs: Sequence[Run],
    base: Sequence[Run],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean AUC of `runs` minus mean AUC of `base`, paired: both see the same draws of members."""
    rows = _same_rows("difference", [*runs, *base])
    drawn = _draw(rows, runs, draws, seed) - _draw(rows, base, draws, seed)
    return _estimate(_mean_auc(runs) - _mean_auc(base), drawn, level)


def delta(
    runs: Sequence[Run],
    base: Sequence[Run],
    *,
    draws: int = DRAWS,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """100 (AUC / AUC of `base` - 1), in percent, of mean AUCs; paired like `difference`."""
    rows = _same_rows("delta", [*runs, *base])
    drawn = _draw(rows, runs, draws, seed) / _draw(rows, base, draws, seed)
    return _estimate(100 * (_mean_auc(runs) / _mean_auc(base) - 1), 100 * (drawn - 1), level)


def _mean_auc(runs: Sequence[Run]) -> float:
    return float(
        np.mean([auc(scores, labels) for run in runs for scores, labels, _ in run.values()])
    )


def _same_rows(name: str, runs: Sequence[Run]) -> Run:
    """The first run, once every other is seen to hold the same tasks, labels and members."""
    if not runs or not runs[0]:
        raise InputError(f"{name}: no run, expected one per seed")
    first = runs[0]
    for run in runs[1:]:
        if set(run) != set(first):
            raise InputError(f"{name}: tasks are {sorted(run)}, expected {sorted(first)}")
        for task, (scores, labels, members) in run.items():
            _, want_labels, want_members = first[task]
            if len(scores) != len(want_labels):
                raise InputError(
                    f"{name}: task {task} has {len(scores)} candidates, expected {len(want_labels)}"
                )
            if not (np.array_equal(labels, want_labels) and np.array_equal(members, want_members)):
                raise InputError(f"{name}: task {task} lies on other candidates than the first run")
    return first


def _draw(rows: Run, runs: Sequence[Run], draws: int, seed: int) -> np.ndarray:
    """(draws,): mean AUC over tasks and runs in each draw; NaN where a draw has one class only."""
    known = np.unique(np.concatenate([members for _, _, members in rows.values()]))
    plans = []
    for run in runs:
        for task in rows:
            scores, labels, members = run[task]
            scores, member = np.asarray(scores, np.float64), np.searchsorted(known, members)
            order = np.argsort(scores, kind="stable")
            labels = np.asarray(labels, bool)[order]
            scores, member = scores[order], member[order]
            negative = scores[~labels]
            low = np.searchsorted(negative, scores[labels], "left")
            high = np.searchsorted(negative, scores[labels], "right")
            plans.append((member[labels], member[~labels], low, high))
    generator = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        # Draws are the last axis: a gather then copies whole lines. Multiplicities and their sums
        # are whole numbers, exact in float32 up to 2^24 rows.
        picked = generator.integers(len(known), size=(len(known), size)) * size + np.arange(size)
        weight = np.bincount(picked.ravel(), minlength=len(known) * size).astype(np.float32)
        weight = weight.reshape(len(known), size)
        for positive_member, negative_member, low, high in plans:
            below = np.zeros((len(negative_member) + 1, size), np.float32)
            np.cumsum(weight[negative_member], axis=0, out=below[1:])
            positive = weight[positive_member]
            wins = below[low]
            wins += below[high]
            wins *= positive
            pairs = positive.sum(axis=0, dtype=np.float64) * below[-1]
            drawn[start : start + size] += np.divide(
                wins.sum(axis=0, dtype=np.float64) / 2,
                pairs,
                out=np.full(size, np.nan),
                where=pairs > 0,
            )
    return drawn / len(plans)


def _estimate(value: float, drawn: np.ndarray, level: float) -> Estimate:
    """Percentiles over the draws that are defined."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        raise InputError("bootstrap: no draw of members holds both classes, expected more members")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), level, float(drawn.std(ddof=1)))
