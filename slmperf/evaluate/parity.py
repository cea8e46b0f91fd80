"""parity: how far two models agree on the same candidates, which AUC alone hides.

Whoever consumes the scores (a ranker above, an auction) feels shifts of probability and of order
that leave the AUC where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slmperf.check import InputError
from slmperf.evaluate.metrics import Run, calibration_error, log_loss

TOP = 10


class Parity(NamedTuple):
    """Model a against model b."""

    top10_overlap: float  # mean over members of the shared part of both top lists
    spearman: float  # rank correlation over all candidates, ties at their mean rank
    largest_shift: float  # max |P_a - P_b|
    log_loss_a: float
    log_loss_b: float
    calibration_error_a: float
    calibration_error_b: float


def parity(
    scores_a: np.ndarray, scores_b: np.ndarray, members: np.ndarray, labels: np.ndarray
) -> Parity:
    """Agreement of two sets of probabilities (n,) on the same candidates; members (n,), labels
    (n,).

    The top list of a member with k candidates has min(10, k // 2) entries: the top 10 from 20
    candidates on, the better half below that, since the top 10 of 10 candidates always agree.
    Members with one candidate have no list; top10_overlap is NaN if nobody has two. Equal scores
    keep the order of the rows, in both lists.
    """
    scores_a, scores_b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    members, labels = np.asarray(members), np.asarray(labels)
    if not scores_a.shape == scores_b.shape == members.shape == labels.shape:
        raise InputError(
            f"parity: shapes are a {scores_a.shape}, b {scores_b.shape}, members {members.shape}, "
            f"labels {labels.shape}, expected the same (n,)"
        )
    return Parity(
        top10_overlap=_top_overlap(scores_a, scores_b, members),
        spearman=_spearman(scores_a, scores_b),
        largest_shift=float(np.abs(scores_a - scores_b).max()),
        log_loss_a=log_loss(scores_a, labels),
        log_loss_b=log_loss(scores_b, labels),
        calibration_error_a=calibration_error(scores_a, labels),
        calibration_error_b=calibration_error(scores_b, labels),
    )


def parity_tasks(run_a: Run, run_b: Run) -> Parity:
    """Parity of two runs: mean over tasks, except largest_shift, which is the largest of all."""
    if set(run_a) != set(run_b):
        raise InputError(
            f"parity: tasks are {sorted(run_a)} and {sorted(run_b)}, expected the same"
        )
    each = []
    for task, (scores, labels, members) in run_a.items():
        other, other_labels, other_members = run_b[task]
        if not (np.array_equal(labels, other_labels) and np.array_equal(members, other_members)):
            raise InputError(f"parity: the two runs of task {task} lie on other candidates")
        each.append(parity(scores, other, members, labels))
    mean = Parity(*np.mean(np.array(each), axis=0).tolist())
    return mean._replace(largest_shift=max(one.largest_shift for one in each))


def _top_overlap(a: np.ndarray, b: np.ndarray, members: np.ndarray) -> float:
    _, group, count = np.unique(members, return_inverse=True, return_counts=True)
    length = np.minimum(TOP, count // 2)
    in_both = _in_top(a, group, length) & _in_top(b, group, length)
    shared = np.bincount(group[in_both], minlength=len(count))
    listed = length > 0
    return float(np.mean(shared[listed] / length[listed])) if listed.any() else float("nan")


def _in_top(scores: np.ndarray, group: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(n,) bool: is the candidate among the first length[group] of its group?"""
    order = np.lexsort((-scores, group))  # stable: equal scores keep the order of the rows
    count = np.bincount(group)
    place = np.empty(len(scores), np.int64)
    place[order] = np.arange(len(scores)) - (np.cumsum(count) - count)[group[order]]
    return place < length[group]


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of mean ranks; NaN if one side is constant."""
    rank_a, rank_b = _mean_ranks(a), _mean_ranks(b)
    rank_a, rank_b = rank_a - rank_a.mean(), rank_b - rank_b.mean()
    scale = np.sqrt((rank_a @ rank_a) * (rank_b @ rank_b))
    return float(rank_a @ rank_b / scale) if scale > 0 else float("nan")


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2 - 1)[inverse]
