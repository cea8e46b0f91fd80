"""The loop: transformers.Trainer with packed batches, our loss, and checkpoints without pickle.

Trainer keeps the loop over steps, the optimizer, the schedule, clipping, accumulation, devices,
ranks and callbacks. Replaced are the batches (slmperf.distill.packing), the loss
(slmperf.distill.loss), evaluation (slmperf.distill.evaluation), what a checkpoint is
(slmperf.distill.checkpoint), and what is printed (slmperf.distill.progress).

The vocabulary head runs only at positions whose weight is not zero, and its logits never exist all
at once (slmperf.ops.kd_loss). The routers' loss of a mixture of experts is not added.

Over 400 lines: one class, whose methods are Trainer's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from slmperf import models
from slmperf.check import InputError
from slmperf.distill import checkpoint
from slmperf.distill.callbacks import Steps
from slmperf.distill.checks import check_best, check_packing, check_start, evaluation_sets
from slmperf.distill.config import DistillationConfig
from slmperf.distill.estimate import TrainingPlan, plan_of
from slmperf.distill.evaluation import sample, validation
from slmperf.distill.offload import OffloadedAdamW
from slmperf.distill.packing import Batch, PackedBatches
from slmperf.distill.progress import Clock, Reporter
from slmperf.distill.step import autocast, batch_loss
from slmperf.distill.teachers import Teacher, as_teacher
from slmperf.models.files import remove_unfinished, write_folder

if TYPE_CHECKING:
    from slmperf.distill.on_policy import OnPolicySampler


class DistillationTrainer(Trainer):
    """Trains `model` on examples, from `teacher` where there is one; a transformers.Trainer.

    model             a causal language model of Transformers, trained in place
    args              DistillationConfig
    train_dataset     examples, see slmperf.distill.examples; anything with a length and an index
    eval_dataset      of the same; or a dict of several
    teacher           a model with the student's tokenizer, a TeacherCache, a ServerTeacher; None:
                      cross entropy alone (SFT)
    processing_class  the tokenizer, saved with each checkpoint and compared with the teacher's
    on_policy         OnPolicySampler: batches of the student's own text
    peft_config       of peft: trains adapters

    `train(resume_from_checkpoint=True)` goes on from the newest checkpoint in args.output_dir as if
    nothing had happened. InputError, before anything is trained, for whatever can be known then.
    """

    args: DistillationConfig
    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: DistillationConfig,
        train_dataset: Sequence[Any] | PackedBatches,
        eval_dataset: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
        *,
        teacher: Any = None,
        processing_class: Any = None,
        on_policy: OnPolicySampler | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, DistillationConfig):
            raise InputError(
                f"DistillationTrainer: args is {type(args).__name__}, expected DistillationConfig"
            )
        batches = train_dataset
        if not isinstance(batches, PackedBatches):
            batches = PackedBatches(train_dataset, args, args.world_size)
        self.teacher: Teacher | None = as_teacher(teacher)
        self.on_policy = on_policy
        check_start(model, self.teacher, on_policy, batches, processing_class)
        self.evaluated = evaluation_sets(eval_dataset, args)
        check_best(args, self.evaluated, self.teacher)
        for name in ("eval", "save", "logging"):
            _in_steps(args, name, batches)
        if peft_config is not None:
            from peft import LoraConfig, get_peft_model

            from slmperf.models.lora import on_quantized

            if isinstance(peft_config, LoraConfig):
                on_quantized(peft_config)
            model = get_peft_model(model, peft_config)
        use_cache = model.config.use_cache
        offloaded = None
        if args.offload_optimizer:
            betas = (args.adam_beta1, args.adam_beta2)
            kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
            offloaded = (OffloadedAdamW, kwargs)
        callbacks = list(callbacks or [])
        if args.early_stopping_patience is not None:
            args.restore_callback_states_from_checkpoint = True
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        super().__init__(
            model=model,
            args=args,
            train_dataset=batches,
            eval_dataset=self.evaluated or None,
            processing_class=processing_class,
            data_collator=_only,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=offloaded,
        )
        # Trainer turns it off in what will be saved as config.json.
        model.config.use_cache = use_cache
        # compute_loss divides by the totals of the whole step, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.batches, self.folder = batches, Path(args.output_dir)
        self.name = args.run_name or self.folder.name
        if self.teacher is not None:
            self.teacher.to(args.device)
        self.losses: list[float] = []  # one per finished step
        self.clock = Clock(0.0, 0)
        self.window: list[Batch] = []  # the batches of the step under way
        self.step_loss = torch.zeros((), device=args.device)
        self.gradient_norm: Tensor | None = None  # of the step under way
        self.step_tokens = torch.zeros((), device=args.device)
        self.saved = time.perf_counter()
        self.add_callback(Steps(self))
        self.add_callback(Reporter(self))

    def plan(self) -> TrainingPlan:
        """Sizes, steps, memory and flops of this training, nothing of which is run."""
        own = self.on_policy is not None and self.on_policy.fraction > 0
        new_tokens = self.on_policy.new_tokens if self.on_policy is not None and own else None
        return plan_of(self.model, self.teacher, self.batches, self.args, new_tokens=new_tokens)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train to the end; see transformers.Trainer.train.

        resume_from_checkpoint: True for the newest checkpoint in output_dir, a fresh start where
        there is none; or the folder of one.
        """
        if self.is_world_process_zero():
            remove_unfinished(self.folder)
        if resume_from_checkpoint is True:  # the first rank looks for all
            newest = [None, *checkpoint.checkpoints(self.folder)][-1]
            resume_from_checkpoint = broadcast_object_list([newest])[0]
        if resume_from_checkpoint:
            path = Path(resume_from_checkpoint)
            resume_from_checkpoint = str(path)
            self._check_resumed(path)
            if self._stopped_early(path):
                self._load_from_checkpoint(str(path))
                self._load_best_model()
                return TrainOutput(self.state.global_step, sum(self.losses) / len(self.losses), {})
        if self.args.packing:
            own = self.on_policy is not None and self.on_policy.fraction > 0
            taught = getattr(self.teacher, "model", None)
            for one in (self.accelerator.unwrap_model(self.model), taught):
                if one is not None:
                    check_packing(one, self.batches, own)
        # The batches are those of all epochs: left to itself, Trainer would repeat them.
        given, self.args.max_steps = self.args.max_steps, self.batches.steps
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.max_steps = given

    def _stopped_early(self, path: Path) -> bool:
        """Whether early stopping ended the training at this checkpoint; its state is then ours."""
        state = TrainerState.load_from_json(str(path / "trainer_state.json"))
        stopping: Any = state.stateful_callbacks.get("EarlyStoppingCallback", {})
        patience = self.args.early_stopping_patience
        count = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if patience is None or count < patience:
            return False
        self.state = state
        return True

    # The batches.

    def get_train_dataloader(self) -> DataLoader:
        """Batches in their own order; each is an item of the data set, and not a number of them."""
        workers = self.args.dataloader_num_workers
        loader: DataLoader = DataLoader(
            self.batches,
            batch_size=1,
            collate_fn=_only,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of one step, and what the two means of its loss are divided by (2,), over all
        ranks; the student's own text where the sampler says so.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.on_policy is not None:
            with autocast(self.args, device):
                samples = [self._replace(batch, device) for batch in samples]
        self.window = samples
        counts = torch.stack(
            [torch.cat([one["totals"], one["tokens"][None].float()]) for one in samples]
        )
        counts = self.accelerator.reduce(counts.to(device).double().sum(0), reduction="sum")
        self.step_tokens = counts[2]
        return samples, counts[:2].float()

    def _replace(self, batch: Batch, device: torch.device) -> Batch:
        assert self.on_policy is not None
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step
        drawn = self.on_policy.replace(batch, self.batches, model, step)
        return {name: value.to(device) for name, value in drawn.items()}

    # The loss.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """One batch's share of the step's loss."""
        loss = batch_loss(model, self.teacher, inputs, self.args, num_items_in_batch).loss
        self.step_loss += loss.detach()
        # Gradients are averaged over ranks, and the sum is wanted.
        ranks = self.accelerator.num_processes
        return loss * ranks if ranks > 1 else loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: Trainer would walk all parameters at every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens/s, MFU and what the sampler did to what Trainer logs of a step."""
        if "loss" in logs and self.losses:
            # Of all steps since the last entry, also where this run began in between.
            last = max((one["step"] for one in self.state.log_history if "loss" in one), default=0)
            recent = self.losses[last : self.state.global_step] or self.losses[-1:]
            logs = {**logs, "loss": sum(recent) / len(recent), **self.clock.logs()}
            if self.on_policy is not None:
                logs |= self.on_policy.logs()
        super().log(logs, start_time)

    # Evaluation.

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """eval_loss, the cross entropy of the answers in nats per token, and what else
        slmperf.distill.evaluation.validation measures; logged, and given to callbacks.
        """
        given = self.evaluated if eval_dataset is None else evaluation_sets(eval_dataset, self.args)
        if not given:
            raise InputError("DistillationTrainer: evaluate: found no eval_dataset, wanted one")
        metrics: dict[str, float] = {}
        for name, batches in given.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            start = time.perf_counter()
            found = validation(
                self.model,
                batches,
                config=self.args,
                teacher=None if self.teacher is None else self.teacher.of(batches),
                label_tokens=self.args.label_tokens,
            )
            found["runtime"] = time.perf_counter() - start
            metrics |= {f"{prefix}_{key}": value for key, value in found.items()}
            if self.args.sample_generations and self.is_world_process_zero():
                with autocast(self.args, self.args.device):
                    sample(
                        self.model,
                        batches,
                        count=self.args.sample_generations,
                        path=self.folder / (f"samples-{name}.jsonl" if name else "samples.jsonl"),
                        step=self.state.global_step,
                        tokenizer=self.processing_class,
                    )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # Checkpoints.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        sampler = {} if self.on_policy is None else self.on_policy.state()
        ranks = [checkpoint.random_states(sampler)]
        if self.accelerator.num_processes > 1:
            ranks = gather_object(ranks)
        self.saved = time.perf_counter()
        state = self.state
        best = self.folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step in (state.global_step, None) or best.is_dir():
            state.best_model_checkpoint = str(best) if state.best_global_step else None
        failed: list[str | None] = [None]
        if self.is_world_process_zero():
            try:
                self._write_checkpoint(ranks)
            except (InputError, OSError) as error:
                failed = [" ".join(str(error).split())]
        if self.accelerator.num_processes > 1:  # and nobody goes on before it is whole
            failed = gather_object(failed)
        if failed[0] is not None:
            raise InputError(failed[0])

    def _write_checkpoint(self, ranks: list[dict[str, Tensor]]) -> None:
        state = self.state
        for one in [*self.callback_handler.callbacks, self.control]:
            if isinstance(one, ExportableState):
                state.stateful_callbacks[type(one).__name__] = one.state()
        progress = checkpoint.Progress(
            state.global_step,
            self.clock.tokens,
            self.clock.seconds,
            self._data(),
            checkpoint.scheduler_state(self.lr_scheduler),
        )
        checkpoint.write(
            self.folder,
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.optimizer,
            json.dumps(asdict(state)),  # what TrainerState.load_from_json reads
            progress,
            self.losses,
            ranks,
        )
        kept = state.best_model_checkpoint
        checkpoint.drop_old(self.folder, self.args.save_total_limit, Path(kept) if kept else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.load_model(path, self.model)
        if self.on_policy is not None:
            sampler = checkpoint.sampler_state(path, self.accelerator.process_index)
            if sampler is not None:
                self.on_policy.load_state(sampler)
        progress, self.losses = checkpoint.read_progress(path)
        self.clock = Clock(progress.seconds, progress.tokens)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """save_model: without the pickled arguments that Trainer puts beside the weights."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            models.save(model, self.processing_class, output_dir or self.args.output_dir)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        # The best one is kept whenever it comes, and so is the step at which early stopping ends
        # the training: a later call must find it ended.
        stops = self.control.should_training_stop and self.args.early_stopping_patience is not None
        if (better and self.args.load_best_model_at_end) or stops:
            self.control.should_save = True
        return better

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Keeps the norm before clipping, for Steps: one that is inf clips to zero, or to NaN."""
        self.gradient_norm = super()._clip_grad_norm(model)
        return self.gradient_norm

    def _load_best_model(self) -> None:
        # By its name: the folder may have been moved since.
        best = self.folder / Path(self.state.best_model_checkpoint).name
        checkpoint.load_model(best, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        path = Path(checkpoint_path)
        checkpoint.load_optimizer(path, self.model, self.optimizer)
        checkpoint.load_scheduler(path, self.lr_scheduler, self.optimizer)

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            rank = self.accelerator.process_index
            checkpoint.load_random_states(Path(checkpoint_path), rank)

    def _data(self) -> str:
        """A digest of what a resumed run must find unchanged: the examples and how they are cut."""
        batches, args = self.batches, self.args
        rows = batches.rows_per_batch * args.gradient_accumulation_steps * args.world_size
        cut = (rows, args.context, args.packing, args.seed, args.sequence_sample)
        return hashlib.sha256(f"{batches.digest} {cut!r}".encode()).hexdigest()

    def _check_resumed(self, path: Path) -> None:
        if checkpoint.read_progress(path)[0].data != self._data():
            raise InputError(
                f"{path}: was written with other examples, rows of a step, context, packing, seed "
                "or sequence_sample, wanted those of this training"
            )

    def stop_at(self, reason: str) -> None:
        """Keep the batches of the step under way for inspection, and end with an InputError."""
        step, rank = self.state.global_step + 1, self.accelerator.process_index
        folder = self.folder / f"failed-step-{step}-rank-{rank}"
        told = {"step": step, "reason": reason, "losses": self.losses[-100:]}
        where = f"its batches are in {folder}"
        try:
            with write_folder(folder) as aside:
                for number, batch in enumerate(self.window):
                    tensors = {name: value.cpu().contiguous() for name, value in batch.items()}
                    save_file(tensors, aside / f"batch-{number}.safetensors")
                (aside / "failure.json").write_text(json.dumps(told, indent=1))
        except (OSError, SafetensorError) as error:
            where = f"its batches could not be written ({error})"
        last = checkpoint.checkpoints(self.folder)
        kept = f"the last checkpoint is {last[-1].name}" if last else "no checkpoint was written"
        raise InputError(
            f"{self.name}: {reason} at step {step}, expected a finite one: {where}, {kept}; "
            "try a lower learning_rate"
        )


def _in_steps(args: DistillationConfig, name: str, batches: PackedBatches) -> None:
    """Turn "every epoch" into steps: to Trainer the whole training is one epoch."""
    if getattr(args, f"{name}_strategy") == "epoch":
        kind = type(getattr(args, f"{name}_strategy"))
        setattr(args, f"{name}_strategy", kind("steps"))
        setattr(args, f"{name}_steps", max(1, round(batches.steps_per_epoch)))


def _only(items: list[Batch]) -> Batch:
    (item,) = items
    return item
