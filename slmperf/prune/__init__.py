"""Structured pruning: whole MLP neurons and groups of attention heads, refitted.

osscar, keep_groups    one linear layer: exact greedy elimination; the refit of a choice made before
prune_model            a whole model, by OSSCAR or one of its rivals (METHODS)
prune_checkpoint       the same from folder to folder, a block in memory at a time
prune_sizes            copies of it in several sizes, from one elimination per layer
error_curves           the error of every layer at every size
solve_budget           the sizes that meet a number of parameters, KV bytes or milliseconds
plan_heads             which heads a model may have
GradualSchedule        prune in steps, with a recovery after each
compare_methods        methods, sizes and calibration sets side by side

layer/ holds the solver and its rivals for one layer, command/ `slmperf prune`; block, sources and
results are what a whole model's pruning is made of; heads, counts, targets and latency what a
budget is.

Names are loaded on first use, so that the command line costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.prune.budget import Budget as Budget
    from slmperf.prune.budget import solve_budget as solve_budget
    from slmperf.prune.checkpoint import prune_checkpoint as prune_checkpoint
    from slmperf.prune.compare import Comparison as Comparison
    from slmperf.prune.compare import compare_methods as compare_methods
    from slmperf.prune.curves import error_curves as error_curves
    from slmperf.prune.curves import prune_sizes as prune_sizes
    from slmperf.prune.gradual import GradualSchedule as GradualSchedule
    from slmperf.prune.heads import plan_heads as plan_heads
    from slmperf.prune.layer.elimination import osscar as osscar
    from slmperf.prune.layer.methods import METHODS as METHODS
    from slmperf.prune.layer.refit import Pruned as Pruned
    from slmperf.prune.layer.refit import keep_groups as keep_groups
    from slmperf.prune.model import prune_model as prune_model
    from slmperf.prune.results import LayerPruned as LayerPruned
    from slmperf.prune.results import PruneReport as PruneReport

__all__ = ["GradualSchedule", "osscar", "prune_model", "solve_budget"]

_HOMES = {
    "Budget": "budget",
    "Comparison": "compare",
    "GradualSchedule": "gradual",
    "LayerPruned": "results",
    "METHODS": "layer.methods",
    "PruneReport": "results",
    "Pruned": "layer.refit",
    "compare_methods": "compare",
    "error_curves": "curves",
    "keep_groups": "layer.refit",
    "osscar": "layer.elimination",
    "plan_heads": "heads",
    "prune_checkpoint": "checkpoint",
    "prune_model": "model",
    "prune_sizes": "curves",
    "solve_budget": "budget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
