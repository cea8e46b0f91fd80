"""Structured pruning: whole MLP neurons and groups of attention heads, refitted."""

from slmperf.prune.elimination import Pruned as Pruned
from slmperf.prune.elimination import osscar
from slmperf.prune.model import LayerPruned as LayerPruned
from slmperf.prune.model import PruneReport as PruneReport
from slmperf.prune.model import prune_model

__all__ = ["osscar", "prune_model"]
