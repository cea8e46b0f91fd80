"""kd_loss inside trainers that others wrote: TRL's, and subclasses of transformers.Trainer.

On the instance, `compute_loss` is replaced by one that runs both models up to their logits, takes
the positions whose label counts, and calls slmperf.distill.DistillationLoss. Everything else stays
the trainer's: batches, sampling of completions, accumulation, ranks, evaluation of the loss.

What the trainers of TRL 1.16 mean by their settings, and what is done here:

    beta          0 forward KL, 1 reverse KL, between them the JSD of slmperf.ops: the same
    temperature   divides the logits in the loss of GOLDTrainer and DistillationTrainer; GKDTrainer
                  samples with it and takes its loss at 1: the same
    reduction     sum over the labels that count, divided by num_items_in_batch where Trainer
                  counted them and else by their number in the batch; DistillationTrainer divides by
                  its own count of generated tokens: the same
    entropy       DistillationTrainer logs the student's: not logged

Of any other Trainer nothing is known but that batches hold `labels` which the model would shift:
divergence, weights and temperature are given, and the reduction is Trainer's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.heads import student_head, teacher_head
from slmperf.distill.loss import DistillationLoss
from slmperf.ops import JSD, ForwardKL, ReverseKL

_IGNORED = -100


def use_kd_loss(
    trainer: Any,
    loss: DistillationLoss | None = None,
    *,
    teacher: torch.nn.Module | None = None,
) -> None:
    """Make `trainer`, a transformers.Trainer, take its loss with slmperf.ops.kd_loss.

    trainer  TRL's GKDTrainer, GOLDTrainer or DistillationTrainer, or any other Trainer of a causal
             language model on batches with `labels`
    loss     what is minimised; None: the trainer's own `beta` and `temperature`, read at every
             step (TRL's trainers alone have them). `reduction` is the trainer's own in any case
    teacher  None: the trainer's `teacher_model`; or none, where `loss` is cross entropy alone

    No logits exist afterwards, so what would read them (compute_metrics) is refused, as is every
    setting that the loss would have to ignore; InputError names it.
    """
    kind = _kind_of(trainer)
    _check(trainer, kind, loss)
    if teacher is not None:
        teacher.to(trainer.args.device)
    else:
        teacher = getattr(trainer, "teacher_model", None)
    if teacher is None and (loss is None or loss.needs_teacher):
        raise InputError(
            "use_kd_loss: teacher is None, expected a model, or a loss with cross_entropy=1.0"
        )
    batch_of = _any_batch if kind is None else _BATCHES[kind]

    def compute_loss(
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = batch_of(trainer, inputs, num_items_in_batch)
        chosen = loss
        if chosen is None:
            temperature = 1.0 if kind == "GKDTrainer" else trainer.temperature
            chosen = DistillationLoss(_divergence(trainer.beta), temperature=temperature)
        labels = torch.nn.functional.pad(batch.labels, (0, 1), value=_IGNORED)[:, 1:].flatten()
        # On a GPU this waits for the batch, and saves the head's work for all other positions.
        (positions,) = (labels != _IGNORED).nonzero(as_tuple=True)
        student = student_head(model, batch.inputs, positions=positions)
        given = None
        if teacher is not None and chosen.needs_teacher:
            teacher.eval()
            given = teacher_head(teacher, batch.inputs, positions=positions)
        with torch.autocast(positions.device.type, enabled=False):
            found = chosen(student, given, labels=labels[positions], normalizer=batch.normalizer)
        value = found.loss if batch.factor == 1 else found.loss * batch.factor
        return (value, {}) if return_outputs else value

    trainer.compute_loss = compute_loss


class _Batch(NamedTuple):
    """What a trainer's batch comes to."""

    inputs: Mapping[str, Any]  # of both models
    labels: Tensor  # (B, L), as tokens stand: not shifted
    normalizer: Tensor | float | None  # None: the labels that count
    factor: int  # of the loss


def _kind_of(trainer: Any) -> str | None:
    """Name of the class of TRL that a trainer is, None for no class of TRL."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise InputError(
            f"use_kd_loss: trainer is {type(trainer).__name__}, expected a transformers.Trainer"
        )
    for cls in type(trainer).__mro__:
        if cls.__module__.split(".")[0] == "trl" and issubclass(cls, Trainer):
            return cls.__name__
    return None


def _check(trainer: Any, kind: str | None, loss: DistillationLoss | None) -> None:
    """InputError for a setting that the replaced loss would have to ignore."""

    def refuse(name: str, found: object, wanted: str) -> None:
        raise InputError(f"use_kd_loss: {name} is {found}, expected {wanted}")

    if kind is not None and kind not in _BATCHES:
        refuse("trainer", f"TRL's {kind}", " or ".join(_BATCHES))
    if kind is None and loss is None:
        refuse("loss", None, "a DistillationLoss: only TRL's trainers say what theirs is")
    if loss is not None and loss.settings["reduction"] != "mean":
        refuse("loss.reduction", repr(loss.settings["reduction"]), "'mean', the trainer's own")
    if loss is not None and loss.settings["ignore_index"] != _IGNORED:
        refuse("loss.ignore_index", loss.settings["ignore_index"], f"{_IGNORED}, the trainer's own")
    own = next((cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls)), None)
    if loss is None and own is not None and own.__name__ != kind:
        refuse("loss", None, f"a DistillationLoss: {own.__name__} has a compute_loss of its own")
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if getattr(trainer, name, None) is not None:
            refuse(f"trainer.{name}", "given", "None: there are no logits to give to it")
    args = trainer.args
    if args.label_smoothing_factor:
        refuse("args.label_smoothing_factor", args.label_smoothing_factor, "0")
    if args.n_gpu > 1:
        refuse("args.n_gpu", args.n_gpu, "1: one process for each GPU, as torchrun starts them")
    # TRL's trainers do not add it either.
    if kind is None and getattr(trainer.model.config, "output_router_logits", False):
        refuse("config.output_router_logits", True, "False: the routers' loss is not added")
    if getattr(trainer, "_is_vlm", False):
        refuse("model", "one that sees images", "a language model")
    if kind == "GOLDTrainer" and trainer.use_uld_loss:
        refuse("args.use_uld_loss", True, "False: models of one vocabulary")


def _divergence(beta: float) -> ForwardKL | ReverseKL | JSD:
    return ForwardKL() if beta == 0 else ReverseKL() if beta == 1 else JSD(beta)


def _gkd_batch(trainer: Any, inputs: dict[str, Any], items: Tensor | int | None) -> _Batch:
    names = ("input_ids", "attention_mask")
    return _Batch({name: inputs[name] for name in names}, inputs["labels"], items, 1)


def _gold_batch(trainer: Any, inputs: dict[str, Any], items: Tensor | int | None) -> _Batch:
    batch = _gkd_batch(trainer, inputs, items)
    more = trainer._get_model_forward_kwargs(inputs)
    return batch._replace(inputs={**more, **batch.inputs})


def _distillation_batch(trainer: Any, inputs: dict[str, Any], items: Tensor | int | None) -> _Batch:
    """Prompts and what the student wrote; the count of the latter is of all ranks."""
    prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
    mask = inputs["completion_mask"]
    counted = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
    labels = torch.cat(
        [torch.full_like(prompt, _IGNORED), completion.masked_fill(counted == 0, _IGNORED)], dim=1
    )
    given = {
        "input_ids": torch.cat([prompt, completion], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], dim=1),
    }
    counted_before = inputs.get("num_items_in_batch")
    if trainer.model.training and counted_before is not None:
        items = counted_before.clamp(min=1.0) / trainer.accelerator.num_processes
    return _Batch(given, labels, items, 1)


def _any_batch(trainer: Any, inputs: dict[str, Any], items: Tensor | int | None) -> _Batch:
    """As Trainer divides the loss of a model: over all ranks' labels where it counted them."""
    if "labels" not in inputs:
        raise InputError(f"use_kd_loss: a batch holds {sorted(inputs)}, expected labels among them")
    given = {name: value for name, value in inputs.items() if name != "labels"}
    together = trainer.args.average_tokens_across_devices and items is not None
    ranks = trainer.accelerator.num_processes if together else 1
    return _Batch(given, inputs["labels"], items, ranks)


_BATCHES: dict[str, Callable[[Any, dict[str, Any], Any], _Batch]] = {
    "GKDTrainer": _gkd_batch,
    "GOLDTrainer": _gold_batch,
    "DistillationTrainer": _distillation_batch,
}
