"""The settings of a training: those of transformers.TrainingArguments, and what we add.

Everything that TrainingArguments has keeps its name and meaning (learning_rate, max_steps or
num_train_epochs, gradient_accumulation_steps, bf16, gradient_checkpointing, optim, eval_strategy,
load_best_model_at_end, report_to, ...). Other defaults: see the fields that are repeated below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments

from slmperf.check import InputError
from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from slmperf.ops.divergence import Kind

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)
NORMALIZATIONS = ("tokens", "examples")


@dataclass
class DistillationConfig(TrainingArguments):
    """How a student is trained, with a teacher (KD) or without one (SFT).

    What is minimised stands in slmperf.distill.loss. Of a step's batch sizes, rows_per_step is the
    one that a run keeps on any number of machines.
    """

    # The loss: l = kd_weight D(teacher, student) + ce_weight CE for each token; without a teacher
    # CE alone.
    divergence: str = "forward_kl"  # one of DIVERGENCES
    beta: float = 0.5  # of jsd
    alpha: float = 0.1  # of the skewed ones
    temperature: float = 1.0  # divides the logits of both models in the divergence alone
    kd_weight: float = 0.9
    ce_weight: float = 0.1
    answer_weight: float = 0.95  # of the mean over answer tokens
    sequence_weight: float = 0.05  # of the mean over all tokens, answers among them
    # "tokens": both means are over the tokens of the whole step. "examples": over those of each
    # example, and then over the step's examples, so that a long one weighs no more than a short.
    normalization: str = "tokens"
    # Share of the tokens other than answers that enter the loss, weighing 1 / sequence_sample as
    # much: the expected loss is the same, and the head runs on fewer positions. Drawn anew every
    # epoch from `seed`. 1.0 keeps all.
    sequence_sample: float = 1.0

    # The batches.
    context: int = 512  # tokens of a row; no example may be longer
    packing: bool = True  # several examples in a row, none of which sees the others
    # Rows of one optimizer step, over accumulation and ranks. None: per_device_train_batch_size
    # for each rank and accumulated batch; else that size follows.
    rows_per_step: int | None = None

    # Evaluation. eval_loss is the cross entropy of the answers, whatever is minimised.
    early_stopping_patience: int | None = None  # evaluations without a better one; None: never
    # Token ids (no, yes) that answers are drawn from: evaluation reports the AUC of their logits'
    # difference as well.
    label_tokens: tuple[int, int] | None = None
    sample_generations: int = 0  # so many prompts are continued at each evaluation, and kept

    # AdamW's moments and fp32 weights live, and its step runs, in the host's memory.
    offload_optimizer: bool = False
    checkpoint_seconds: float | None = None  # longest time from one checkpoint to the next

    # Defaults that are not those of TrainingArguments.
    per_device_train_batch_size: int = 8
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False  # a NaN is never averaged away: it stops the training
    save_total_limit: int | None = 2  # and the best one
    remove_unused_columns: bool = False
    disable_tqdm: bool | None = True  # slmperf.distill.progress has a bar of its own
    report_to: None | str | list[str] = field(default="none")

    def __post_init__(self) -> None:
        self._check()
        own: Any = self
        own.use_cpu = own.use_cpu or not torch.accelerator.is_available()
        if self.early_stopping_patience is not None:
            own.load_best_model_at_end = True
        if own.load_best_model_at_end and own.metric_for_best_model is None:
            own.metric_for_best_model = "eval_loss"
        if str(own.metric_for_best_model).endswith("kd") and own.greater_is_better is None:
            own.greater_is_better = False
        super().__post_init__()
        own._n_gpu = min(own.n_gpu, 1)  # one process for each GPU, as torchrun starts them
        # The trainer opens bf16's autocast itself, around the layers and not the loss; accelerate
        # would replace the model's forward for good.
        self.mixed_precision = "no"

    @property
    def kind(self) -> Kind:
        """The divergence, as slmperf.ops takes it."""
        makes: dict[str, Callable[[], Kind]] = {
            "forward_kl": ForwardKL,
            "reverse_kl": ReverseKL,
            "jsd": partial(JSD, self.beta),
            "skew_forward_kl": partial(SkewForwardKL, self.alpha),
            "skew_reverse_kl": partial(SkewReverseKL, self.alpha),
            "total_variation": TotalVariation,
        }
        return makes[self.divergence]()

    def rows_per_batch(self, world_size: int) -> int:
        """Rows of one batch of one rank; InputError where rows_per_step does not divide."""
        if self.rows_per_step is None:
            return self.per_device_train_batch_size
        parts = world_size * self.gradient_accumulation_steps
        if self.rows_per_step % parts:
            raise InputError(
                f"DistillationConfig: rows_per_step is {self.rows_per_step}, wanted a multiple of "
                f"{parts} = {world_size} ranks * gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        return self.rows_per_step // parts

    def _check(self) -> None:
        def refuse(name: str, wanted: str) -> None:
            raise InputError(
                f"DistillationConfig: {name} is {getattr(self, name)!r}, wanted {wanted}"
            )

        def positive(name: str, least: float = 0.0) -> None:
            value = getattr(self, name)
            if value is not None and not value > least:
                refuse(name, f"more than {least:g}")

        if self.divergence not in DIVERGENCES:
            refuse("divergence", " or ".join(DIVERGENCES))
        if self.normalization not in NORMALIZATIONS:
            refuse("normalization", " or ".join(NORMALIZATIONS))
        for name in ("beta", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "0 to 1")
        if self.alpha == 1 and self.divergence.startswith("skew"):
            refuse("alpha", "less than 1, where the divergence is always 0")
        for name in ("temperature", "learning_rate", "checkpoint_seconds"):
            positive(name)
        for name in ("context", "rows_per_step", "per_device_train_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                refuse(name, "at least 1")
        if self.gradient_accumulation_steps < 1:
            refuse("gradient_accumulation_steps", "at least 1")
        pairs = (("kd_weight", "ce_weight"), ("answer_weight", "sequence_weight"))
        for first, second in pairs:
            for name in (first, second):
                if not getattr(self, name) >= 0:
                    refuse(name, "at least 0")
            if getattr(self, first) + getattr(self, second) == 0:
                refuse(first, f"more than 0 when {second} is 0")
        if not 0 < self.sequence_sample <= 1:
            refuse("sequence_sample", "more than 0 and at most 1")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            refuse("early_stopping_patience", "at least 1")
        best = self.early_stopping_patience is not None or self.load_best_model_at_end
        if best and getattr(self.eval_strategy, "value", self.eval_strategy) == "no":
            refuse("eval_strategy", "steps or epoch, where the best checkpoint is looked for")
        if self.offload_optimizer and "adamw" not in str(getattr(self.optim, "value", self.optim)):
            refuse("optim", "an adamw where offload_optimizer is True")
        if self.sample_generations < 0:
            refuse("sample_generations", "at least 0")
        if self.label_tokens is not None and len(set(self.label_tokens)) != 2:
            refuse("label_tokens", "two different token ids")
        if self.fp16:
            refuse("fp16", "False: bf16, which needs no loss scaling")
        if self.label_smoothing_factor:
            refuse("label_smoothing_factor", "0: the loss has no such term")
        for name in ("deepspeed", "fsdp"):
            if getattr(self, name):
                refuse(name, "none: checkpoints of sharded models are not written yet")
        for name in ("ignore_data_skip", "auto_find_batch_size", "save_only_model"):
            if getattr(self, name):
                refuse(name, "False: a resumed training would not be the same")
