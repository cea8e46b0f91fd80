"""evaluate: how good a ranking model is. AUC and its bootstrap, parity between two models, floors,
perplexity.

numpy only, except `perplexity`, which takes a torch model and imports torch when it is called.

A *run* is what one model said about the candidates: a dict task -> (scores (n,), labels (n,),
members (n,)). Runs that are compared lie on the same candidates in the same order; `task_scores`
and `floor_runs` build them so. One stage has one run per seed, and functions that take `runs` take
that list.
"""

from slmperf.evaluate.bootstrap import Estimate, auc_interval, delta, difference
from slmperf.evaluate.floors import floor_runs, floors
from slmperf.evaluate.metrics import (
    Metrics,
    Run,
    auc,
    auc_within,
    calibration_error,
    evaluate_tasks,
    log_loss,
    task_scores,
)
from slmperf.evaluate.parity import Parity, parity, parity_tasks
from slmperf.evaluate.perplexity import perplexity

__all__ = [
    "Estimate",
    "Metrics",
    "Parity",
    "Run",
    "auc",
    "auc_interval",
    "auc_within",
    "calibration_error",
    "delta",
    "difference",
    "evaluate_tasks",
    "floor_runs",
    "floors",
    "log_loss",
    "parity",
    "parity_tasks",
    "perplexity",
    "task_scores",
]
