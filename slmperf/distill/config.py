"""The settings of one training: what is learned, from how much, how fast, and when it is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slmperf.check import InputError
from slmperf.ops import ForwardKL
from slmperf.ops.divergence import Kind


@dataclass(frozen=True)
class DistillationConfig:
    """How a student is trained, with a teacher (KD) or without one (SFT).

    Exactly one of `steps` and `epochs` is given; a step is one update of the weights.
    """

    # The loss of one example, one history row: see slmperf.distill.loss.
    divergence: Kind = field(default_factory=ForwardKL)
    kd_weight: float = 0.9  # weight of the divergence from the teacher; without a teacher unused
    ce_weight: float = 0.1  # weight of the cross entropy; without a teacher cross entropy weighs 1
    temperature: float = 1.0  # divides the logits of both models in the divergence alone
    answer_weight: float = 0.95  # shared by the answer tokens of a row
    sequence_weight: float = 0.05  # shared by all tokens of a row
    # Share of the tokens other than answers that enter the loss, weighing 1 / sequence_sample as
    # much: the expected loss is the same, and the head, most of the work at D of 64 to 128, runs on
    # fewer positions. Drawn anew every epoch from `seed`. 1.0 keeps all.
    sequence_sample: float = 0.25

    # How much, and in which pieces.
    steps: int | None = None
    epochs: float | None = None
    context: int = 512  # tokens of a packed row; no sequence may be longer
    batch_tokens: int = 4096  # tokens, padding included, of one forward pass (at least one row)
    accumulation: int = 1  # forward passes per step

    # AdamW. 3e-3 suits a few hundred thousand parameters; above a million, prototypes learned
    # nothing at it.
    learning_rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0

    # The forward and backward passes of the layers; weights, optimizer, head and loss are always
    # fp32. "auto" times both on the first batches and keeps the faster one.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    checkpoint_seconds: float = 60.0  # longest time from one checkpoint to the next, give a step
    checkpoint_steps: int | None = None  # also one whenever this many steps are done
    log_steps: int = 20  # a line of the log file every so many steps

    def __post_init__(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise InputError(
                f"DistillationConfig: {name} is {getattr(self, name)!r}, wanted {wanted}"
            )

        if (self.steps is None) == (self.epochs is None):
            raise InputError(
                "DistillationConfig: wanted one of steps and epochs, "
                f"found steps={self.steps} and epochs={self.epochs}"
            )
        for name in ("steps", "epochs", "checkpoint_steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                refuse(name, "more than 0")
        for name in ("context", "batch_tokens", "accumulation", "log_steps"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("temperature", "learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                refuse(name, "more than 0")
        for name in ("kd_weight", "ce_weight", "answer_weight", "sequence_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                refuse(name, "at least 0")
        if self.kd_weight + self.ce_weight == 0:
            refuse("kd_weight", "more than 0 when ce_weight is 0")
        if not isinstance(self.divergence, Kind):
            refuse("divergence", "ForwardKL() or another divergence of slmperf.ops")
        if not 0 < self.sequence_sample <= 1:
            refuse("sequence_sample", "more than 0 and at most 1")
        if not 0 <= self.warmup <= 1:
            refuse("warmup", "0 to 1")
        if self.schedule not in ("linear", "cosine", "constant_with_warmup"):
            refuse("schedule", "linear, cosine or constant_with_warmup")
        if self.precision not in ("auto", "fp32", "bf16"):
            refuse("precision", "auto, fp32 or bf16")
