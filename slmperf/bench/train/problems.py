"""problems: what one step works on. Plain values alone, so that another process can be told of one.

All ways of a problem have the same models, batch and loss, the mean over the answer tokens of

    KD_WEIGHT * forward KL (teacher || student) + CE_WEIGHT * cross entropy

Gradients are clipped at MAX_NORM, and AdamW (fused) takes the step. bf16 is what
transformers.Trainer's bf16=True is: the student's weights in fp32, its layers under autocast; the
teacher's weights in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slmperf.bench.random_model import random_model
from slmperf.check import InputError
from slmperf.models.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KD_WEIGHT, CE_WEIGHT = 0.9, 0.1
MAX_NORM = 1.0
# Names of ways that others are compared with, or stand for what is ours (ways.py).
EAGER, OURS, TRAINER = "eager", "kd_loss", "DistillationTrainer"
IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """A step on `rows` sequences of `context` random tokens each; models with random weights.

    every          one token in so many is an answer; 1: all that can be predicted
    checkpointing  the student's layers run again in the backward
    """

    student: Shape
    teacher: Shape
    rows: int
    context: int
    dtype: str
    device: str
    every: int = 1
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("context", 2), ("every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}, expected {' or '.join(DTYPES)}")
        if self.every > self.context:
            raise InputError(
                f"answers is one in {self.every}, expected at most one in context = {self.context}"
            )
        if self.teacher.vocabulary != self.student.vocabulary:
            raise InputError(
                f"teacher has a vocabulary of {self.teacher.vocabulary}, expected the student's "
                f"{self.student.vocabulary}"
            )

    @property
    def models(self) -> str:
        """The two models, without what is done to them: what a family of rows shares."""
        return f"train {self.student}<-{self.teacher}"

    def __str__(self) -> str:
        answers = "" if self.every == 1 else f", an answer in {self.every}"
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.models}, {self.tokens} tokens{answers}, {self.dtype}{again}"

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.rows * self.context

    @property
    def answers(self) -> int:
        """Positions that enter the loss: a sequence's first token is not predicted."""
        return self.rows * len(range(self._first, self.context, self.every))

    @property
    def _first(self) -> int:
        return max(1, self.every - 1)

    def of_context(self, context: int, vocabulary: int) -> Problem:
        """A small one of the same kind, which warms up what runs."""
        return replace(
            self,
            student=replace(self.student, vocabulary=vocabulary, layers=1),
            teacher=replace(self.teacher, vocabulary=vocabulary, layers=1),
            rows=1,
            context=context,
            every=min(self.every, context),
        )

    def examples(self) -> list[dict[str, list[int]]]:
        """The rows of the batch, input_ids and labels, as trainers take them."""
        batch = self.batch("cpu")
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[:, 1:] = batch.labels[:, :-1]
        rows = zip(batch.input_ids.tolist(), labels.tolist(), strict=True)
        return [{"input_ids": ids, "labels": label} for ids, label in rows]

    def batch(self, device: str | None = None) -> Batch:
        """The batch, on the problem's device if no other is named."""
        generator = torch.Generator().manual_seed(self.tokens)
        shape = (self.rows, self.context)
        ids = torch.randint(self.student.vocabulary, shape, generator=generator)
        labels = torch.full_like(ids, IGNORED)
        places = torch.arange(self._first, self.context, self.every)
        labels[:, places - 1] = ids[:, places]
        (positions,) = (labels.flatten() != IGNORED).nonzero(as_tuple=True)
        found = Batch(ids, labels, positions, labels.flatten()[positions])
        return Batch(*(one.to(device or self.device) for one in found))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return asdict(self)

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> Problem:
        """What `as_json` was made of."""
        shapes = {name: Shape(**values[name]) for name in ("student", "teacher")}
        return Problem(**{**values, **shapes})


class Batch(NamedTuple):
    """B rows, L tokens, n answers.

    input_ids  (B, L) int64
    labels     (B, L) int64, the token that comes next where it is an answer, else IGNORED
    positions  (n,) int64 of the B L tokens: where answers are predicted
    targets    (n,) int64, those answers
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    targets: Tensor


class Models(NamedTuple):
    """What a step needs besides the batch. The teacher has no gradients and is in eval()."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    optimizer: torch.optim.Optimizer


def models_of(problem: Problem) -> Models:
    """Both models on the device, the same on every call."""
    student = _model(problem.student, problem, torch.float32).train()
    if problem.checkpointing:
        # Its name from Transformers 5.22 on, and the one before.
        name = "activation_checkpointing_enable"
        enable = getattr(student, name, None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    teacher = _model(problem.teacher, problem, DTYPES[problem.dtype])
    teacher.requires_grad_(False)
    # As small as rates at the end of a training: weights stay those of the start to some digits.
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    return Models(student, teacher, optimizer)


def _model(shape: Shape, problem: Problem, dtype: torch.dtype) -> PreTrainedModel:
    seed = shape.layers * shape.hidden  # not the same weights in both
    model = random_model(shape, problem.context, problem.device, dtype=dtype, seed=seed)
    model.config.use_cache = False
    return model


# Student, teacher, tokens, context if none are asked for.
SIZES = {
    "cpu": (
        Shape(8, 512, 8, 8, 64, 1408, 32000, name="8x512"),
        Shape(12, 1024, 16, 16, 64, 2816, 32000, name="12x1024"),
        2048,
        512,
    ),
    "cuda": (SHAPES["1b"], SHAPES["8b"], 4096, 1024),
}
# The student of examples/recipes/quickstart.yaml and a teacher as its own, but dense: a step so
# small that what a trainer does around it shows.
TOY = Problem(
    Shape(2, 48, 4, 2, 12, 192, 2048, name="quickstart 2x48"),
    Shape(2, 64, 4, 2, 16, 128, 2048, name="2x64"),
    rows=12, context=256, dtype="fp32", device="cpu", every=4,
)  # fmt: skip
