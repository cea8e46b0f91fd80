"""floors: what a model must beat before it has learned anything about ranking.

    item mean                P(label) = (likes of the item + s m) / (rows of the item + s),
                             m the overall share
    member mean              the same over the rows of the member
    logistic member + item   P(label) = sigmoid(a + b_member + c_item),
                             minimising log-loss + l2/2 (|b|^2 + |c|^2) over the history rows

All statistics come from history rows only, of every member, those who are never scored included.
The strengths s and l2 are chosen by AUC on a validation split inside the history (the last fifth of
the history rows of each scored member, predicted from the rest); candidate rows are never looked
at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slmperf.check import InputError
from slmperf.data.interactions import order_within_member
from slmperf.evaluate.metrics import Run, auc

if TYPE_CHECKING:
    from slmperf.data import Interactions, Split, Task

MEAN_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LOGISTIC_L2 = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
VALIDATION_SHARE = 0.2

# (rows to learn from, rows to predict, strength) -> P(label) of the rows to predict
_Predictor = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def floors(interactions: Interactions, split: Split, task: Task) -> dict[str, np.ndarray]:
    """Floor name -> P(label 1) of the candidate rows, float64 (n,), in the order of the rows.

    Names: "item mean", "member mean", "logistic member + item". InputError if there are no history
    or candidate rows.
    """
    history, candidate = np.flatnonzero(split.history), np.flatnonzero(split.candidate)
    if not len(history) or not len(candidate):
        raise InputError(
            f"floors: {len(history)} history rows and {len(candidate)} candidate rows, "
            "expected some of both"
        )
    label = task.labels(interactions).astype(np.float64)
    member, item = interactions.member.astype(np.int64), interactions.item.astype(np.int64)
    learn, held_out = _validation(history, candidate, member)

    def mean_of(group: np.ndarray) -> _Predictor:
        return lambda fit, ask, strength: _shrunk_mean(group, label, fit, ask, strength)

    def logistic(fit: np.ndarray, ask: np.ndarray, strength: float) -> np.ndarray:
        return _logistic(member, item, label, fit, ask, strength)

    chosen: dict[str, tuple[_Predictor, Sequence[float]]] = {
        "item mean": (mean_of(item), MEAN_STRENGTHS),
        "member mean": (mean_of(member), MEAN_STRENGTHS),
        "logistic member + item": (logistic, LOGISTIC_L2),
    }
    scores = {}
    for name, (predict, strengths) in chosen.items():
        best = _best(predict, strengths, learn, held_out, label)
        scores[name] = predict(history, candidate, best)
    return scores


def floor_runs(interactions: Interactions, split: Split, tasks: Sequence[Task]) -> dict[str, Run]:
    """Floor name -> run over all tasks, on the rows and in the order of `task_scores`."""
    rows = np.flatnonzero(split.candidate)
    members = interactions.member[rows].astype(np.int64)
    runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for task in tasks:
        labels = task.labels(interactions)[rows]
        for name, scores in floors(interactions, split, task).items():
            runs.setdefault(name, {})[task.name] = (scores, labels, members)
    return dict(runs)


def _validation(
    history: np.ndarray, candidate: np.ndarray, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """History rows -> (rows to learn from, rows held out: the last fifth of each scored member)."""
    position, count = order_within_member(member[history])
    scored = np.isin(member[history], member[candidate])
    held = scored & (position >= ((1 - VALIDATION_SHARE) * count).astype(np.int64))
    return history[~held], history[held]


def _best(
    predict: _Predictor,
    strengths: Sequence[float],
    learn: np.ndarray,
    held_out: np.ndarray,
    label: np.ndarray,
) -> float:
    """The strength with the highest AUC on the held-out rows; the middle one where AUC is
    undefined.
    """
    if not len(learn) or len(np.unique(label[held_out])) < 2:
        return strengths[len(strengths) // 2]
    return max(strengths, key=lambda one: auc(predict(learn, held_out, one), label[held_out]))


def _shrunk_mean(
    group: np.ndarray, label: np.ndarray, fit: np.ndarray, ask: np.ndarray, strength: float
) -> np.ndarray:
    size = int(group.max()) + 1
    likes = np.bincount(group[fit], label[fit], minlength=size)
    count = np.bincount(group[fit], minlength=size)
    mean = (likes + strength * label[fit].mean()) / (count + strength)
    return mean[group[ask]]


def _logistic(
    member: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    fit: np.ndarray,
    ask: np.ndarray,
    l2: float,
) -> np.ndarray:
    """Fit by Newton steps; each step solved by conjugate gradients with a diagonal preconditioner.

    The unknowns are [a, b (members), c (items)]; a product with the Hessian is two gathers and two
    bincounts, so no matrix is ever formed. The objective is convex and smooth; full Newton steps
    from the overall share converge here, and a halving guards them.
    """
    members, items = int(member.max()) + 1, int(item.max()) + 1
    u, v, y = member[fit], item[fit], label[fit]
    penalty = np.full(1 + members + items, l2)
    penalty[0] = 1e-6  # the intercept is free; the trace of a penalty bounds it on one-class data

    def spread(x: np.ndarray) -> np.ndarray:
        return x[0] + x[1 : 1 + members][u] + x[1 + members :][v]

    def gather(row: np.ndarray) -> np.ndarray:
        by_member = np.bincount(u, row, minlength=members)
        return np.concatenate([[row.sum()], by_member, np.bincount(v, row, minlength=items)])

    def loss(x: np.ndarray) -> float:
        z = spread(x)
        return float(np.logaddexp(0, z).sum() - y @ z + penalty @ (x * x) / 2)

    x = np.zeros(1 + members + items)
    value = loss(x)
    for _ in range(20):
        p = 1 / (1 + np.exp(-spread(x)))
        gradient = gather(p - y) + penalty * x
        if np.abs(gradient).max() < 1e-4:
            break
        curvature = p * (1 - p)
        diagonal = gather(curvature) + penalty
        step, residual = np.zeros_like(x), -gradient
        ready = residual / diagonal
        direction, size = ready, residual @ ready
        target = 1e-4 * size
        for _ in range(50):
            product = gather(curvature * spread(direction)) + penalty * direction
            length = size / (direction @ product)
            step = step + length * direction
            residual = residual - length * product
            ready = residual / diagonal
            before, size = size, residual @ ready
            if size < target:
                break
            direction = ready + size / before * direction
        scale = 1.0
        while (tried := loss(x + scale * step)) > value and scale > 1e-6:
            scale /= 2
        x, value = x + scale * step, tried
    z = x[0] + x[1 : 1 + members][member[ask]] + x[1 + members :][item[ask]]
    return 1 / (1 + np.exp(-z))
