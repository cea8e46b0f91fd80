"""The loop: transformers.Trainer with packed batches, our loss, and checkpoints without pickle.

Trainer keeps the loop over steps, AdamW, the schedule, clipping, accumulation, devices, ranks and
callbacks. Replaced are the batches (slmperf.distill.packing), the loss (slmperf.distill.loss), what
a checkpoint is (slmperf.distill.checkpoint), and what is printed (slmperf.distill.progress).

The vocabulary head, most of the work of a small model, runs only at positions whose weight is not
zero, in fp32, and its logits never exist all at once (slmperf.ops.kd_loss).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from slmperf.check import InputError
from slmperf.distill import checkpoint
from slmperf.distill.config import DistillationConfig
from slmperf.distill.heads import student_head, teacher_head
from slmperf.distill.loss import DistillationLoss
from slmperf.distill.packing import PackedBatches
from slmperf.distill.progress import Bar, Clock, LogFile
from slmperf.ops import KDLoss


def training_arguments(config: DistillationConfig, folder: Path, steps: int) -> TrainingArguments:
    """Trainer's settings for `config`: nothing reported, printed or saved by Trainer itself."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of PackedBatches is a whole batch
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        optim="adamw_torch_fused",
        max_grad_norm=config.max_gradient_norm,
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


class DistillationTrainer(Trainer):
    """Trains `model` on `batches`, from `teacher` where there is one.

    Both are causal language models of Transformers with one vocabulary; the teacher is not changed.
    `train(resume_from_checkpoint=...)` takes our checkpoints.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: PackedBatches,
        *,
        teacher: PreTrainedModel | None = None,
        config: DistillationConfig,
        precision: str = "fp32",
        folder: Path,
        name: str = "train",
        bar: bool = True,
    ) -> None:
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=training_arguments(config, folder, batches.steps),
            train_dataset=batches,
            data_collator=_only,
        )
        # Trainer turns it off in what will be saved as config.json.
        model.config.use_cache = use_cache
        # compute_loss divides by the examples of the whole step, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.config, self.folder, self.name, self.precision = config, folder, name, precision
        self.teacher = teacher
        if teacher is not None:
            teacher.to(self.args.device).eval()
        self.losses: list[float] = []  # one per finished step
        self.clock = Clock(0.0, 0)
        self.add_callback(_Reporter(self, bar))

    # The batches.

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # the order is PackedBatches' own

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one step and the number of examples in them, over all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        examples = torch.stack([sample["examples"] for sample in samples]).sum().to(device)
        return samples, self.accelerator.gather(examples[None]).sum().clamp(min=1)

    # The loss.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """One batch's share of the step's loss: its weighted sum by the examples of the step."""
        loss = batch_loss(
            model, self.teacher, inputs, self.config, self.precision, num_items_in_batch
        ).loss
        self._step_loss += loss.detach()
        self.clock.tokens += int(inputs["tokens"])
        # Gradients are averaged over ranks, and the sum is wanted.
        ranks = self.accelerator.num_processes
        return loss * ranks if ranks > 1 else loss

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Not counted: Trainer would walk all parameters at every step."""
        return 0

    # Checkpoints.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if not self.is_world_process_zero():
            return
        trainer_state = json.dumps(asdict(self.state))  # what TrainerState.load_from_json reads
        clock = self.clock
        progress = checkpoint.Progress(self.state.global_step, clock.tokens, clock.seconds)
        checkpoint.write(
            self.folder, self.model, self.optimizer, trainer_state, progress, self.losses
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.load_model(path, self.model)
        progress, self.losses = checkpoint.read_progress(path)
        self.clock = Clock(progress.seconds, progress.tokens)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        path = Path(checkpoint_path)
        checkpoint.load_optimizer(path, self.model, self.optimizer)
        scheduler, step = self.lr_scheduler, checkpoint.read_progress(path)[0].step
        scheduler.last_epoch = step
        parts = scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas
        for group, rate, factor in zip(*parts, strict=True):
            group["lr"] = rate * factor(step)

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_random_states(Path(checkpoint_path))


class _Reporter(TrainerCallback):
    """After every step: the bar, the log file, and whether a checkpoint is due."""

    def __init__(self, trainer: DistillationTrainer, bar: bool) -> None:
        first_rank = trainer.is_world_process_zero()
        self.trainer, self.show = trainer, bar and first_rank
        self.log = LogFile(trainer.folder / "train.log" if first_rank else None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.first = state.global_step
        self.saved = time.perf_counter()
        self.bar = Bar(trainer.name, state.max_steps, self.first, self.show)
        trainer._step_loss = torch.zeros((), device=args.device)
        size = sum(value.numel() for value in trainer.model.parameters())
        batches = trainer.train_dataset
        self.log.line(
            f"{trainer.name}: from step {self.first} of {state.max_steps}, {size:,} parameters, "
            f"{len(batches.lengths):,} sequences with {len(batches.ids):,} tokens, "
            f"{trainer.precision}"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.losses.append(float(trainer._step_loss))
        if not math.isfinite(trainer.losses[-1]):
            raise InputError(
                f"{trainer.name}: the loss is {trainer.losses[-1]} at step {step}, expected a "
                "finite one: try a lower learning_rate"
            )
        trainer._step_loss.zero_()
        last = step == state.max_steps
        speed = trainer.clock.tokens_per_second
        recent = trainer.losses[-trainer.config.log_steps :]
        loss = sum(recent) / len(recent)
        self.bar.update(step, speed, loss)
        if last or step % trainer.config.log_steps == 0:
            left = trainer.clock.left(step - self.first, state.max_steps - step)
            self.log.line(
                f"{trainer.name}: step {step}/{state.max_steps} loss {loss:.5f} "
                f"{speed:,.0f} tokens/s left {left}"
            )
        every, now = trainer.config.checkpoint_steps, time.perf_counter()
        due = now - self.saved >= trainer.config.checkpoint_seconds
        if last or due or (every is not None and step % every == 0):
            control.should_save = True
            self.saved = now

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


def batch_loss(
    model: torch.nn.Module,
    teacher: torch.nn.Module | None,
    batch: dict[str, Tensor],
    config: DistillationConfig,
    precision: str,
    examples: Tensor | None = None,
) -> KDLoss:
    """The share of a batch of PackedBatches in the loss of a step with so many examples; None: its
    own. Layers run in `precision`, head and loss in fp32, and only where a position has a weight.
    """
    kd_weight, ce_weight = (0.0, 1.0) if teacher is None else (config.kd_weight, config.ce_weight)
    whole = kd_weight + ce_weight
    loss = DistillationLoss(
        config.divergence, cross_entropy=ce_weight / whole, temperature=config.temperature
    )
    names = ("input_ids", "position_ids", "attention_mask")
    inputs = {name: batch[name] for name in names if name in batch}
    taken: dict[str, Any] = {"positions": batch["positions"], "dtype": torch.float32}
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, precision == "bf16"):
        student = student_head(model, inputs, **taken)
        needed = teacher is not None and loss.needs_teacher
        from_teacher = teacher_head(teacher, inputs, **taken) if needed else None
    examples = batch["examples"] if examples is None else examples
    return loss(
        student,
        from_teacher,
        labels=batch["targets"],
        token_weight=batch["weights"] * whole if whole != 1.0 else batch["weights"],
        normalizer=examples,
    )


def choose_precision(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: PackedBatches,
    config: DistillationConfig,
) -> str:
    """Time the first batch forward and backward, three times each way; the precision of the best.

    Weights and the torch generator are left as they were.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: value.to(device) for name, value in batches[0].items()}
    model.to(device).train()
    if teacher is not None:
        teacher.to(device).eval()
    best = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.random.fork_rng():
        for _ in range(3):
            for precision in best:
                start = time.perf_counter()
                batch_loss(model, teacher, batch, config, precision).loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best[precision] = min(best[precision], time.perf_counter() - start)
    model.zero_grad()
    return min(best, key=best.__getitem__)


def check_models(model: PreTrainedModel, teacher: PreTrainedModel | None, context: int) -> None:
    """Refuse models that know fewer positions than `context`, or have different vocabularies."""
    for role, one in (("model", model), ("teacher", teacher)):
        if one is not None and one.config.max_position_embeddings < context:
            raise InputError(
                f"train: the {role} knows {one.config.max_position_embeddings} positions, "
                f"wanted at least context = {context}"
            )
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"train: the teacher has a vocabulary of {teacher.config.vocab_size}, "
            f"wanted the student's {model.config.vocab_size}"
        )


def fingerprint(model: PreTrainedModel, teacher: PreTrainedModel | None) -> dict[str, Any]:
    """What a resumed run must find unchanged about the models: their configurations."""

    def describe(one: PreTrainedModel | None) -> Any:
        if one is None:
            return None
        ignored = ("transformers_version", "use_cache", "_name_or_path", "dtype")
        return {
            key: value
            for key, value in json.loads(one.config.to_json_string()).items()
            if key not in ignored
        }

    return {"model": describe(model), "teacher": describe(teacher)}


def _only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (item,) = items
    return item
