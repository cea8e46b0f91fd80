"""engine: scores of candidates on one machine, the prefix computed once, and how long it takes.

`Engine` holds one member's prefix open and ranks candidates on it; `score_prompts` is the bulk path
of an evaluation, many members a batch; `measure` times both.
"""

from slmperf.engine.bulk import score_prompts
from slmperf.engine.engine import Engine, OpenPrefix
from slmperf.engine.measure import (
    Prefill,
    Rank,
    layer_split,
    prefill_latency,
    rank_latency,
)

__all__ = [
    "Engine",
    "OpenPrefix",
    "Prefill",
    "Rank",
    "layer_split",
    "prefill_latency",
    "rank_latency",
    "score_prompts",
]
