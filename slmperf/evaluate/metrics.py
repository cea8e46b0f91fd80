"""metrics: AUC, AUC within members, log-loss, expected calibration error, per task and averaged
over tasks.

    AUC = P(score of a positive > score of a negative) + P(equal) / 2      (Mann-Whitney U / (P N))

Ties count one half, exactly. All arithmetic is float64; labels are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slmperf.check import InputError

if TYPE_CHECKING:
    from slmperf.data import RankingPrompt

# One model on the candidates: task -> (scores (n,), labels (n,), members (n,)).
Run = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

# Probabilities are kept this far from 0 and 1 in the log-loss, so that one confident miss stays
# finite.
PROBABILITY_FLOOR = 1e-7


class Metrics(NamedTuple):
    """One run. Means are over tasks, each task weighing the same."""

    auc: dict[str, float]  # by task, over all pairs
    auc_mean: float
    auc_within: float  # mean over members who have both labels, then over tasks
    log_loss: float  # nats per candidate
    calibration_error: float


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve over all pairs; scores (n,), labels (n,) of 0 and 1.

    InputError if a score is not finite, a label is not 0 or 1, or only one class is there.
    """
    scores, labels = _checked("auc", scores, labels)
    positive = int(labels.sum())
    if positive == 0 or positive == len(labels):
        raise InputError(
            f"auc: every one of the {len(labels)} labels is {int(positive > 0)}, "
            "expected both classes"
        )
    return float(_auc_by_group(scores, labels, np.zeros(len(labels), np.int64))[0])


def auc_within(scores: np.ndarray, labels: np.ndarray, members: np.ndarray) -> float:
    """Mean over members of the AUC of their own candidates; members with one class only are left
    out.

    NaN if no member has both classes.
    """
    scores, labels = _checked("auc_within", scores, labels)
    _, group = np.unique(members, return_inverse=True)
    by_member = _auc_by_group(scores, labels, group)
    defined = by_member[np.isfinite(by_member)]
    return float(defined.mean()) if len(defined) else float("nan")


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log P(label), in nats; probabilities of label 1, kept within [1e-7, 1 - 1e-7]."""
    probabilities, labels = _checked("log_loss", probabilities, labels, probability=True)
    kept = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return float(-np.mean(np.where(labels, np.log(kept), np.log1p(-kept))))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error: mean over candidates of |share of positives - mean probability|
    of their bin.

    Bins of equal width over [0, 1] (Naeini et al. 2015; Guo et al. 2017 with 15 bins).
    """
    probabilities, labels = _checked("calibration_error", probabilities, labels, probability=True)
    cell = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gap = np.bincount(cell, labels - probabilities, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def evaluate_tasks(run: Run) -> Metrics:
    """All metrics of one run: task -> (scores as probabilities (n,), labels (n,), members (n,))."""
    if not run:
        raise InputError("evaluate_tasks: no task, expected at least one")
    by_task = {task: auc(scores, labels) for task, (scores, labels, _) in run.items()}
    parts = list(run.values())
    return Metrics(
        auc=by_task,
        auc_mean=float(np.mean(list(by_task.values()))),
        auc_within=float(np.mean([auc_within(*part) for part in parts])),
        log_loss=float(np.mean([log_loss(scores, labels) for scores, labels, _ in parts])),
        calibration_error=float(
            np.mean([calibration_error(scores, labels) for scores, labels, _ in parts])
        ),
    )


def task_scores(prompts: Sequence[RankingPrompt], scores: Iterable[np.ndarray]) -> Run:
    """Prompts and the scores of their candidates (one array (k,) per prompt) -> a run.

    Candidates are ordered by their row in the interactions, so runs of different models,
    and of the floors, line up whatever the order of the prompts.
    """
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for prompt, values in zip(prompts, scores, strict=True):
        values = np.asarray(values, np.float64)
        if values.shape != (len(prompt.candidates),):
            raise InputError(
                f"task_scores: scores of member {prompt.member} are {values.shape}, "
                f"expected ({len(prompt.candidates)},)"
            )
        member = np.full(len(values), prompt.member, np.int64)
        parts.setdefault(prompt.task, []).append((values, prompt.labels, member, prompt.rows))
    run = {}
    for task, pieces in parts.items():
        columns = zip(*pieces, strict=True)
        values, labels, members, rows = (np.concatenate(column) for column in columns)
        order = np.argsort(rows, kind="stable")
        run[task] = (values[order], labels[order], members[order])
    return run


def _checked(
    name: str, scores: np.ndarray, labels: np.ndarray, *, probability: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float64 and (n,) bool, or InputError."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InputError(f"{name}: scores are {scores.shape}, labels {labels.shape}, expected (n,)")
    if len(scores) == 0:
        raise InputError(f"{name}: no candidates, expected at least one")
    if not np.isfinite(scores).all():
        raise InputError(f"{name}: {int((~np.isfinite(scores)).sum())} scores are not finite")
    if probability and (scores.min() < 0 or scores.max() > 1):
        raise InputError(
            f"{name}: probabilities lie in [{scores.min():g}, {scores.max():g}], expected [0, 1]"
        )
    if not np.isin(labels, (0, 1)).all():
        found = labels[~np.isin(labels, (0, 1))][0]
        raise InputError(f"{name}: a label is {found}, expected 0 or 1")
    return scores, labels.astype(bool)


def _auc_by_group(scores: np.ndarray, labels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """AUC of each group from mean ranks; NaN where a group has one class. group (n,) of 0..G-1."""
    order = np.lexsort((scores, group))
    scores, labels, group = scores[order], labels[order], group[order]
    count = np.bincount(group)
    positive = np.bincount(group, labels, minlength=len(count))
    rank = np.arange(len(scores)) - (np.cumsum(count) - count)[group]  # within the group, from 0
    new = np.ones(len(scores), bool)
    new[1:] = (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])
    tie = np.cumsum(new) - 1
    rank = (np.bincount(tie, rank) / np.bincount(tie))[tie]  # ties share their mean rank
    pairs = positive * (count - positive)
    wins = np.bincount(group, rank * labels, minlength=len(count)) - positive * (positive - 1) / 2
    return np.divide(wins, pairs, out=np.full(len(count), np.nan), where=pairs > 0)
