"""schema: what a recipe on text may say. YAML text -> Recipe, or one line that names the key.

    name: table5
    seeds: [0, 1, 2]
    data: {problems: {train: 4000, ...} | source: FILE.jsonl, context: 96, vocabulary: 400, ...}
    stages:
      - {name: teacher, stage: sft, shape: {...}, training: {...}, seeds: [0]}
      - {name: pretrained, stage: checkpoint, checkpoint: FOLDER}
      - {name: fkl, stage: distil, shape: {...}, teacher: teacher, training: {...}}
      - name: fkl-ofkl-{tokens}
        stage: distil
        from: fkl
        teacher: teacher
        on_policy: {fraction: 1.0, new_tokens: "{tokens}", temperature: 0.9}
        training: {...}
        grid: {tokens: [16, 24, 32]}
    tables:
      single_stage: {fkl: fkl}

A stage that evaluates while it trains (`evaluate_steps`) ends as its best checkpoint by validation
loss, and that is what a stage with `from:` it starts from. Files are seen from the recipe's folder.
Numbers in the paths of messages count the stages after the grids are expanded (grid.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slmperf.recipe import reading
from slmperf.recipe.distillation.grid import expand
from slmperf.recipe.distillation.paper import VALIDATION_LOSSES
from slmperf.recipe.schema import (
    BaseStage,
    Count,
    FromShapeOrStage,
    Name,
    PruneAttention,
    PruneMlp,
    Share,
    Strict,
    Training,
)


class Problems(Strict):
    """The embedded problems that stand in where no data is given (slmperf.data.problems)."""

    train: Count = 8000
    validation: Count = 300
    steps: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(min_length=2, max_length=2)] = [
        2,
        3,
    ]
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> Problems:
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"steps is {self.steps}, expected the smaller number first")
        return self


class Data(Strict):
    """Where the text comes from and how it becomes prompts with completions."""

    source: str | None = None  # a JSONL file (slmperf.data.text); None: the problems
    problems: Problems = Problems()
    tokenizer: str | None = None  # a folder; None: trained on the training texts
    vocabulary: Count = 512  # of a tokenizer that is trained
    context: Count = 256  # tokens of an example; longer ones are cut
    prompt_tokens: Count | None = None  # of lines that are plain text
    validation: Share = 0.1  # of lines that name no split, drawn by `seed`
    seed: Annotated[int, Field(ge=0)] = 0


class TextTraining(Training):
    """How a stage learns from text; what is left out is as in DistillationConfig.

    precision: fp32 if left out; "auto" is timed, so that two runs of one seed may differ.
    """

    normalization: Literal["tokens", "examples"] = "tokens"
    packing: bool = True
    evaluate_steps: Count | None = None  # validation loss every so many steps; None: at the end
    patience: Count | None = None  # evaluations without a better one that end the training
    samples: Count | None = None  # prompts continued at each evaluation, into samples.jsonl
    report_to: str | list[str] = "none"  # tensorboard, wandb, ... as Transformers knows them
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False

    @model_validator(mode="after")
    def _evaluations(self) -> TextTraining:
        for key in ("patience", "samples"):
            if getattr(self, key) is not None and self.evaluate_steps is None:
                raise ValueError(f"{key} is given, expected evaluate_steps beside it")
        if self.evaluate_steps is not None and self.checkpoint_steps is not None:
            raise ValueError(
                "checkpoint_steps is given, expected none beside evaluate_steps: every evaluation "
                "writes a checkpoint"
            )
        return self


class OnPolicy(Strict):
    """The share of batches that hold what the student itself wrote, and how it wrote it."""

    fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    new_tokens: Count = 300
    temperature: Annotated[float, Field(gt=0)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    refresh_steps: Count = 1  # steps whose text is written at once


class CheckpointStage(BaseStage):
    """A model that is there: a folder as Transformers writes it, with this run's tokenizer."""

    stage: Literal["checkpoint"]
    checkpoint: str


class _Learning(FromShapeOrStage):
    training: TextTraining
    # Of the training examples, what this stage sees. Smaller shares lie inside larger ones.
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class SftStage(_Learning):
    """Cross entropy alone."""

    stage: Literal["sft"]


class DistilStage(_Learning):
    """Knowledge distillation from the logits of `teacher`, on the data or the student's text."""

    stage: Literal["distil"]
    teacher: Name
    on_policy: OnPolicy | None = None


Stage = Annotated[
    CheckpointStage | SftStage | DistilStage | PruneMlp | PruneAttention,
    Field(discriminator="stage"),
]


class Recipe(Strict):
    """A whole run: the data, the stages and the table that compares them."""

    name: Name
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    data: Data = Data()
    stages: Annotated[list[Stage], Field(min_length=1)]
    tables: dict[str, dict[str, Name]] = {}  # group -> role -> stage: paper.VALIDATION_LOSSES

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: the name {name!r} is given {names.count(name)} times")
        for group, rows in self.tables.items():
            if group not in VALIDATION_LOSSES:
                known = ", ".join(VALIDATION_LOSSES)
                raise ValueError(f"tables.{group}: unknown key, expected one of {known}")
            for role, name in rows.items():
                if role not in VALIDATION_LOSSES[group]:
                    known = ", ".join(VALIDATION_LOSSES[group])
                    raise ValueError(f"tables.{group}.{role}: unknown key, expected one of {known}")
                if name not in names:
                    raise ValueError(f"tables.{group}.{role}: no stage is named {name!r}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a YAML file; InputError in one line for the first thing wrong with it."""
        return cls.parse(reading.read_text(path), source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe") -> Recipe:
        """YAML text -> Recipe, its grids expanded; `source` opens the line of an InputError."""
        value = expand(reading.parse_yaml(text, source), source)
        return reading.validate(cls, value, _STAGES, source)


_STAGES = reading.stages_of(Stage)
