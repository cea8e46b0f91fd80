"""What happens around every step of a DistillationTrainer, beside what is shown of it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from slmperf.distill.trainer import DistillationTrainer


class Steps(TrainerCallback):
    """Around every step: whether loss and gradient are finite, and whether a checkpoint is due."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.saved = time.perf_counter()
        self.trainer.step_loss.zero_()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the weights change, with one wait for the device."""
        trainer = self.trainer
        norm = trainer.gradient_norm
        if norm is None:  # nothing was clipped
            gradients = [one.grad for one in trainer.model.parameters() if one.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        trainer.gradient_norm = None
        loss = trainer.accelerator.reduce(trainer.step_loss.clone(), reduction="sum")
        found = torch.stack([loss.double(), norm.double(), trainer.step_tokens.double()])
        value, size, tokens = found.tolist()
        trainer.step_loss.zero_()
        if not math.isfinite(value):
            trainer.stop_at(f"the loss is {value}")
        if not math.isfinite(size):
            trainer.stop_at(f"the gradient's norm is {size}")
        trainer.losses.append(value)
        trainer.clock.tokens += int(tokens)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, every = self.trainer, args.checkpoint_seconds
        # Of an epoch of the examples: to Trainer the whole training is one.
        state.epoch = state.global_step / trainer.batches.steps_per_epoch
        due = every is not None and time.perf_counter() - trainer.saved >= every
        if trainer.accelerator.num_processes > 1 and every is not None:
            due = bool(trainer.accelerator.reduce(torch.tensor(float(due), device=args.device)))
        if due or (state.global_step == state.max_steps and args.save_strategy != "no"):
            control.should_save = True
