"""schema: what a recipe may say. YAML text -> Recipe, or one line that names the key.

    name: quickstart
    seeds: [0]
    data: {world: {...} | source: FOLDER, tasks: [like, top], context: 256, vocabulary: 2048, ...}
    stages:
      - {name: teacher, stage: teacher, shape: {layers: 3, ..., experts: 4}, training: {...}}
      - {name: student, stage: distil, teacher: teacher, shape: {...}, training: {...}}
      - {name: narrow, stage: prune_mlp, from: student, intermediate: 128}
      - {name: healed, stage: distil, from: narrow, teacher: student, training: {...}}
    tables:
      distillation: {baseline: teacher, kd: student}

`stage:` says what a stage does, `name:` what others call it and which folder it gets. A stage reads
the stages it names (`from:`, `teacher:`), wherever in the list they stand. Keys nobody knows are
refused. What a stage needs from another one (does it exist, has it so many heads) is for plan.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slmperf.recipe import reading
from slmperf.recipe.results import COMPARISONS

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# No dots: `<stage>.training` is the folder of a training, `results.json` a file of the run.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]


class Strict(BaseModel):
    """A section of a recipe: no unknown keys, no conversions, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class World(Strict):
    """The embedded world that stands in where no data is given (slmperf.data.world)."""

    members: Count = 1500
    items: Count = 400
    rows: Count = 40_000
    seed: int = 0


class Data(Strict):
    """Where the rows come from and how they become prompts."""

    source: str | None = None  # file or folder, seen from the recipe's folder; None: the world
    world: World = World()
    tasks: Annotated[list[str], Field(min_length=1)] | None = None  # None: all that the data has
    context: Count = 256  # tokens of a prompt and of a training sequence
    vocabulary: Count = 2048
    minimum_rows: Annotated[int, Field(ge=2)] = 10  # members with fewer are only trained on
    history: Share = 0.8  # of a member's rows, in order; the rest are candidates
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0  # see slmperf.data.split
    facts: bool = True  # state in the prompt what was known of item and member
    scored_members: Count | None = None  # score at most so many members (drawn once); None: all


class Shape(Strict):
    """Size of a new model: with `experts` a Mixtral-style mixture, without a dense Llama."""

    layers: Count
    hidden: Count
    intermediate: Count  # of the MLP, or of each expert
    heads: Count
    kv_heads: Count
    head_size: Count | None = None  # None: hidden / heads
    experts: Annotated[int, Field(ge=2)] | None = None
    experts_per_token: Count = 2
    # Standard deviation of the first weights. Narrow models on text alone want about 0.1.
    initializer_range: Annotated[float, Field(gt=0)] = 0.02

    @model_validator(mode="after")
    def _divides(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}, expected a multiple of kv_heads {self.kv_heads}"
            )
        if self.head_size is None and self.hidden % self.heads:
            raise ValueError(f"hidden is {self.hidden}, expected a multiple of heads {self.heads}")
        if (self.head_size or self.hidden // self.heads) % 2:
            raise ValueError("head size is odd, expected an even one (rotary positions)")
        if self.experts is not None and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, "
                f"expected at most experts = {self.experts}"
            )
        return self


class Subset(Strict):
    """The part of the members and tasks that a stage learns from; what is scored stays the same."""

    members: Annotated[float, Field(gt=0, le=1)] = 1.0  # smaller shares lie inside larger ones
    tasks: Annotated[list[str], Field(min_length=1)] | None = None  # None: all of the recipe's


class Training(Strict):
    """How a stage learns; what is left out is as in slmperf.distill.DistillationConfig."""

    steps: Count | None = None  # this or epochs
    epochs: Annotated[float, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["linear", "cosine", "constant_with_warmup"] | None = None
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    batch_tokens: Count | None = None
    accumulation: Count | None = None
    precision: Literal["auto", "fp32", "bf16"] | None = None
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
    ] = "forward_kl"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # of jsd; 0 is forward_kl, 1 is reverse_kl
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the skewed ones; 0 is without a skew
    temperature: Annotated[float, Field(gt=0)] | None = None
    kd_weight: Annotated[float, Field(ge=0)] | None = None
    ce_weight: Annotated[float, Field(ge=0)] | None = None
    answer_weight: Annotated[float, Field(ge=0)] | None = None
    sequence_weight: Annotated[float, Field(ge=0)] | None = None
    sequence_sample: Annotated[float, Field(gt=0, le=1)] | None = None
    checkpoint_steps: Count | None = None

    @model_validator(mode="after")
    def _length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            found = "both" if self.steps else "neither"
            raise ValueError(f"expected one of `steps` and `epochs`, found {found}")
        return self

    @model_validator(mode="after")
    def _divergence(self) -> Training:
        for key, kinds in (
            ("beta", ("jsd",)),
            ("alpha", ("skew_forward_kl", "skew_reverse_kl")),
        ):
            if key in self.model_fields_set and self.divergence not in kinds:
                raise ValueError(
                    f"{key} is given, expected divergence {' or '.join(kinds)} beside it, found "
                    f"{self.divergence}"
                )
        return self


class BaseStage(Strict):
    """What every stage of a recipe has."""

    stage: str  # what it does
    name: Name
    title: str | None = None  # in the tables; None: the name
    seeds: Annotated[list[int], Field(min_length=1)] | None = None  # None: the recipe's
    evaluate: bool = True  # score it and time it

    @property
    def source(self) -> str | None:
        """Name of the stage whose model this one starts from."""
        return getattr(self, "from_", None)

    @property
    def printed(self) -> str:
        """The title in the tables."""
        return self.title or self.name


class _Learning(BaseStage):
    training: Training
    subset: Subset = Subset()


class TeacherStage(_Learning):
    """A new model, trained on the answers alone."""

    stage: Literal["teacher"]
    shape: Shape


class FromShapeOrStage(BaseStage):
    """A stage that starts from new weights or from another stage's."""

    shape: Shape | None = None
    from_: Name | None = Field(None, alias="from")

    @model_validator(mode="after")
    def _one_start(self) -> FromShapeOrStage:
        if (self.shape is None) == (self.from_ is None):
            found = "both" if self.shape else "neither"
            raise ValueError(
                f"expected one of `shape` (a new model) and `from` (a stage), found {found}"
            )
        return self


class DistilStage(FromShapeOrStage, _Learning):
    """Knowledge distillation: a new or an earlier model learns the logits of `teacher`."""

    stage: Literal["distil"]
    teacher: Name


class SftStage(FromShapeOrStage, _Learning):
    """The same training without a teacher: cross entropy alone."""

    stage: Literal["sft"]


class _Pruning(BaseStage):
    from_: Name = Field(alias="from")
    method: Literal[
        "osscar", "osscar+swaps", "norm", "norm+refit", "magnitude", "magnitude+refit"
    ] = "osscar"
    mode: Literal["sequential", "one_pass", "dense_target"] = "sequential"
    damping: Annotated[float, Field(gt=0)] = 0.01  # of the mean of the Gram matrix's diagonal
    calibration_rows: Count = 512  # sequences the Gram matrices are taken from


class PruneMlp(_Pruning):
    """Neurons of the MLP leave, down to `intermediate`."""

    stage: Literal["prune_mlp"]
    intermediate: Count


class PruneAttention(_Pruning):
    """Attention heads leave: whole groups, down to `kv_heads` (or `heads` query heads), or in
    `head_mode` uniform query heads of every group, down to `heads`.
    """

    stage: Literal["prune_attention"]
    kv_heads: Count | None = None
    heads: Count | None = None
    head_mode: Literal["kv_group", "uniform"] = "kv_group"

    @model_validator(mode="after")
    def _sized(self) -> PruneAttention:
        if self.kv_heads is None and self.heads is None:
            raise ValueError("expected kv_heads or heads, found neither")
        return self


class _Calibrated(BaseStage):
    subset: Subset = Subset()  # calibrate on its training sequences
    calibration_text: str | None = None  # or on this file's text, seen from the recipe's folder

    @model_validator(mode="after")
    def _one_calibration(self) -> _Calibrated:
        trains = "training" in type(self).model_fields  # then on the subset
        if self.calibration_text and "subset" in self.model_fields_set and not trains:
            raise ValueError("expected one of `subset` and `calibration_text`, found both")
        return self


class PruneMlpStage(PruneMlp, _Calibrated):
    """The same where there are members and text of other kinds to calibrate on."""


class PruneAttentionStage(PruneAttention, _Calibrated):
    """The same where there are members and text of other kinds to calibrate on."""


class PruneGradualStage(_Pruning, _Calibrated):
    """Neurons leave in several steps, each healed by distillation from the unpruned model."""

    stage: Literal["prune_gradual"]
    intermediate: Annotated[list[Count], Field(min_length=1)]  # after each step
    training: Training  # of each step

    @model_validator(mode="after")
    def _falling(self) -> PruneGradualStage:
        if any(a <= b for a, b in itertools.pairwise(self.intermediate)):
            raise ValueError(f"intermediate is {self.intermediate}, expected falling numbers")
        return self


# Those of slmperf.quant.SCHEMES, whose import takes that of torch.
QuantisationScheme = Literal["fp8", "fp8-static", "fp8-block", "w8a8", "w4a16"]


class QuantiseStage(_Calibrated):
    """Weights and, but for w4a16, what they are multiplied with, in 8 or 4 bits.

    overrides   another scheme, or none, by shell patterns of full layer names, the last one that
                matches decides: {"*.down_proj": fp8, "model.layers.0.*": none}. q, k and v of a
                block, and gate and up, are run as one by engines and must agree.
    kv_cache    fp8 keys and values, with calibrated scales
    """

    stage: Literal["quantise"]
    from_: Name = Field(alias="from")
    scheme: QuantisationScheme
    overrides: dict[str, QuantisationScheme | Literal["none"]] = {}
    # Those of slmperf.quant.METHODS.
    method: Literal["rtn", "gptq", "quantease", "gptq+quantease"] | None = None  # None: its own
    group_size: int | None = None  # of w4a16: inputs that share a scale, -1 for all; None: 128
    smooth: bool | None = None  # None: w8a8 is, the others not
    kv_cache: bool = False
    calibration_rows: Count = 512  # pieces of data.context tokens, packed from sequences

    @model_validator(mode="after")
    def _fitting(self) -> QuantiseStage:
        if self.group_size is not None and self.group_size < 1 and self.group_size != -1:
            raise ValueError(f"group_size is {self.group_size}, expected -1 or at least 1")
        for key, given, schemes in (
            ("group_size", self.group_size is not None, ("w4a16",)),
            ("smooth", bool(self.smooth), ("fp8", "fp8-static", "fp8-block", "w8a8")),
        ):
            found = (self.scheme, *self.overrides.values())
            if given and not any(scheme in schemes for scheme in found):
                raise ValueError(
                    f"{key} is given, expected scheme {' or '.join(schemes)} beside it, found "
                    f"{', '.join(dict.fromkeys(found))}"
                )
        return self


Stage = Annotated[
    TeacherStage
    | DistilStage
    | SftStage
    | PruneMlpStage
    | PruneAttentionStage
    | PruneGradualStage
    | QuantiseStage,
    Field(discriminator="stage"),
]


class Timing(Strict):
    """How latency is measured: all stages in one pass, taking turns."""

    context: Annotated[int, Field(ge=8)] | None = None  # tokens of the prefill; None: data.context
    candidates: Annotated[int, Field(ge=1)] = 8  # k of the ranking
    repeats: Annotated[int, Field(ge=3)] = 9


class Recipe(Strict):
    """A whole run: the data, the stages and the tables that compare them."""

    name: Name
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    data: Data = Data()
    stages: Annotated[list[Stage], Field(min_length=1)]
    tables: dict[str, dict[str, Name]] = {}  # kind -> role -> stage: results.COMPARISONS
    timing: Timing = Timing()

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: the name {name!r} is given {names.count(name)} times")
        for kind, rows in self.tables.items():
            if kind not in COMPARISONS:
                raise ValueError(
                    f"tables.{kind}: unknown key, expected one of {', '.join(COMPARISONS)}"
                )
            for role, name in rows.items():
                where = f"tables.{kind}.{role}"
                if role not in COMPARISONS[kind]:
                    wanted = ", ".join(COMPARISONS[kind])
                    raise ValueError(f"{where}: unknown key, expected one of {wanted}")
                if name not in names:
                    raise ValueError(f"{where}: no stage is named {name!r}")
            if COMPARISONS[kind][0] not in rows:
                raise ValueError(
                    f"tables.{kind}: expected a row {COMPARISONS[kind][0]!r}, found none"
                )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a YAML file; InputError in one line for the first thing wrong with it."""
        return cls.parse(reading.read_text(path), source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe") -> Recipe:
        """YAML text -> Recipe; `source` opens the line of an InputError."""
        return reading.validate(cls, reading.parse_yaml(text, source), _STAGES, source)


_STAGES = reading.stages_of(Stage)
