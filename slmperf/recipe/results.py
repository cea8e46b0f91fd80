"""results: what a run leaves behind, as plain data. The recipe fills it, the report and the console
table read it.

Everything here is a dataclass of strings, numbers, lists and dicts, so that `Results.to_json` and
`Results.from_json` are exact inverses and a report can be written again without running anything.
A figure that was not taken is None (or an empty list or dict), never a zero; the report prints a
dash.

How a run fills it, stage by stage:

    results = Results(recipe="quickstart", data=DataFacts(...), date="2026-01-31", ...)
    stage = StageResult(name="student_kd", title="student, KD", kind="kd", parent="teacher",
                        parameters=..., size_mib=...)
    stage.seeds.append(SeedMetrics(seed=0, auc={"like": 0.79, "top": 0.75}, auc_mean=0.77, ...))
    stage.delta_pct, stage.delta_interval = ...     # slmperf.evaluate.delta against the teacher
    results.stages.append(stage)

The order of `stages` is the order of the table. Floors are stages of kind "floor" without size or
latency. `Comparison` rows are the tables of the paper: the kind picks the table, the role of a row
picks the paper's figure that stands beside it (slmperf.recipe.paper).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from slmperf.check import InputError
from slmperf.models.files import finite

# The kinds of a stage; the plots colour by them.
KINDS = (
    "floor",
    "teacher",
    "sft",
    "kd",
    "prune_mlp",
    "prune_attention",
    "prune_gradual",
    "quantise",
)

# The comparisons laid out like the paper's tables, with the roles their rows may have, in order.
# The first role is the row that every delta of the table is taken against.
COMPARISONS = {
    "distillation": ("baseline", "kd", "sft"),  # Figure 2: the teacher, the students from it
    "after_pruning": ("baseline", "sft", "kd"),  # Table 1: training after MLP pruning
    "one_shot": ("baseline", "cut_1", "cut_2", "cut_3"),  # Table 2: smallest cut first, no training
    "gradual": ("baseline", "one_step", "gradual"),  # the same size in one step and in two
    "attention": ("baseline", "one_shot", "kd"),  # half of the heads, before and after KD
    # One cut, calibrated on few and more training sequences and on few and more of generic text.
    "calibration": ("baseline", "in_domain", "in_domain_more", "generic", "generic_more"),
}


@dataclass
class Interval:
    """A bootstrap interval, in the units of the figure it belongs to."""

    low: float
    high: float
    level: float = 0.95


@dataclass
class SeedMetrics:
    """One stage under one seed, on the candidate rows."""

    seed: int
    auc: dict[str, float]  # by task
    auc_mean: float  # mean over tasks
    auc_within: float | None = None  # mean over members with both labels, then over tasks
    log_loss: float | None = None  # nats per candidate, mean over tasks
    calibration_error: float | None = None  # expected calibration error, mean over tasks
    perplexity: float | None = None


@dataclass
class StageLatency:
    """Medians on the machine of the run. Times in milliseconds."""

    context: int  # tokens of the prefill
    prefill_ms: float
    prefill_p90_ms: float
    candidates: int  # k
    rank_uncached_ms: float | None = None  # k whole prompts, the prefix computed k times
    rank_cached_ms: float | None = None  # k candidates on an open prefix
    layer_ms: dict[str, float] = field(
        default_factory=dict
    )  # part -> ms, one layer (engine.measure)


@dataclass
class StageResult:
    """One row of the main table."""

    name: str  # key, unique in the run: "student_kd"
    title: str  # as printed: "student, KD"
    kind: str  # one of KINDS
    parent: str | None = None  # the stage it was made from
    parameters: int | None = None  # tied weights counted once
    size_mib: float | None = None  # of the weights as stored
    seeds: list[SeedMetrics] = field(default_factory=list)
    auc_interval: Interval | None = None  # of the mean AUC, bootstrap over members
    delta_pct: float | None = None  # 100 (AUC / AUC of the teacher - 1), mean over seeds
    delta_interval: Interval | None = None  # paired bootstrap over members
    latency: StageLatency | None = None
    shape: dict[str, int] = field(
        default_factory=dict
    )  # layers, hidden, intermediate, heads, kv_heads
    quantization: dict[str, Any] = field(
        default_factory=dict
    )  # scheme, tokens, bits_mean and means of errors (see stages.quantise); {} for full weights
    train_seconds: float | None = None
    train_tokens_per_second: float | None = None

    def mean(self, metric: str) -> float | None:
        """Mean over seeds of one field of SeedMetrics ("auc_mean", "log_loss", ...); None if not
        taken.
        """
        return _mean([getattr(seed, metric) for seed in self.seeds])

    def auc(self, task: str) -> float | None:
        """Mean over seeds of the AUC of one task; None if not taken."""
        return _mean([seed.auc.get(task) for seed in self.seeds])


@dataclass
class ComparisonRow:
    """One row of a table like the paper's."""

    stage: (
        str  # name of a StageResult, or a label of its own where the stage is not in the main table
    )
    role: str  # one of COMPARISONS[kind]
    title: str  # as printed
    parameters: int | None = None
    delta_pct: float | None = None  # against the row with the role "baseline"
    delta_interval: Interval | None = None
    auc_mean: float | None = None
    auc_by_seed: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """One table like the paper's: the rows in the order in which they are printed."""

    kind: str  # a key of COMPARISONS
    rows: list[ComparisonRow] = field(default_factory=list)


@dataclass
class ParityResult:
    """Two neighbouring stages on the same candidates, averaged over tasks
    (slmperf.evaluate.parity).
    """

    stage_a: str
    stage_b: str
    top10_overlap: float | None
    spearman: float | None
    largest_shift: float
    log_loss_a: float
    log_loss_b: float
    calibration_error_a: float
    calibration_error_b: float


@dataclass
class DataFacts:
    """Where the numbers come from."""

    source: str  # "movietweetings-100k (ratings.dat)" or how the world was made
    synthetic: bool
    members: int
    items: int
    interactions: int
    scored_members: int  # members with candidates
    candidates: int  # scored rows of one task
    tasks: list[str] = field(default_factory=list)


@dataclass
class Results:
    """A whole run."""

    recipe: str
    data: DataFacts
    date: str  # ISO date
    stages: list[StageResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    parities: list[ParityResult] = field(default_factory=list)
    machine: dict[str, str] = field(
        default_factory=dict
    )  # processor, cores, threads, memory, device
    versions: dict[str, str] = field(
        default_factory=dict
    )  # python, torch, transformers, slmperf, ...
    settings: dict[str, Any] = field(default_factory=dict)  # the recipe as validated
    command: str = ""
    seconds: float | None = None  # whole run
    notes: list[str] = field(default_factory=list)  # sentences printed under the main table

    def stage(self, name: str) -> StageResult | None:
        """The stage of that name, None where the recipe did not run it."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def to_json(self) -> str:
        """Indented JSON; NaN and infinity, which JSON has no word for, become null: not taken."""
        plain = finite(dataclasses.asdict(self))
        return json.dumps(plain, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of to_json; InputError names a field that is missing or unknown."""
        return _build(cls, json.loads(text), "results")


def _mean(values: list[float | None]) -> float | None:
    taken = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(taken) / len(taken) if taken else None


def _build(cls: Any, value: Any, where: str) -> Any:
    """JSON value -> dataclass, list, dict or plain value, following the annotations."""
    origin, arguments = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _build(inner[0], value, where)
    if origin is list:
        return [_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if not dataclasses.is_dataclass(cls):
        return value
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}, expected one of {', '.join(hints)}")
    assert isinstance(cls, type)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in value]
    if missing:
        raise InputError(f"{where}: missing key {missing[0]!r}")
    return cls(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
