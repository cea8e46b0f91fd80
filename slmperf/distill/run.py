"""train: one call that trains a model and goes on where a killed run stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from slmperf.check import InputError
from slmperf.distill import checkpoint
from slmperf.distill.config import DistillationConfig
from slmperf.distill.step import batch_loss
from slmperf.distill.trainer import DistillationTrainer
from slmperf.models.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slmperf.distill.on_policy import OnPolicySampler

SETTINGS, ENDED = "settings.json", "ended.json"
# Of the configuration, what a later run of one training must find unchanged.
_FIXED = (
    *("divergence", "beta", "alpha", "temperature", "kd_weight", "ce_weight", "answer_weight"),
    *("sequence_weight", "normalization", "sequence_sample", "context", "packing"),
    *("rows_per_step", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs", "seed", "optim", "offload_optimizer", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim_args"),
    "max_grad_norm",
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)


class TrainResult(NamedTuple):
    """What a training came to, over all its runs; of a killed one, up to its last checkpoint."""

    losses: np.ndarray  # (steps,) fp64
    steps: int
    tokens: int  # through the student, without padding
    seconds: float
    tokens_per_second: float
    precision: str  # "fp32" or "bf16"
    resumed_from: int  # step at which this call went on; 0 for a fresh start
    best_step: int | None  # of the evaluation whose weights the model has; None: those of the end
    best_loss: float | None  # its eval_loss
    evaluations: list[dict[str, float]]  # what each one found, and its step


def train(
    model: PreTrainedModel,
    examples: Sequence[Any],
    *,
    config: DistillationConfig,
    teacher: Any = None,
    validation: Sequence[Any] | None = None,
    on_policy: OnPolicySampler | None = None,
    processing_class: Any = None,
    precision: str | None = None,
) -> TrainResult:
    """Train `model` in place: from the teacher's logits (KD) or, without one, the tokens (SFT).

    config.output_dir holds the checkpoints, `train.log` and `settings.json`; one of another
    training is refused with an InputError. The same call again goes on from the last checkpoint or,
    where the training had ended, just loads its weights. With the same number of ranks and threads
    the final weights are bit for bit those of an undisturbed run. The caller saves the model and
    may then delete the folder.

    precision: "fp32", "bf16", or "auto": both are timed on the first batch, and the faster one is
    kept; None: as config.bf16 says.
    """
    folder = Path(config.output_dir)
    if precision not in (None, "auto", "fp32", "bf16"):
        raise InputError(f"train: precision is {precision!r}, wanted auto, fp32 or bf16")
    settings = _settings(model, teacher, config, on_policy)
    trainer = DistillationTrainer(
        model,
        config,
        examples,
        validation,
        teacher=teacher,
        processing_class=processing_class,
        on_policy=on_policy,
    )
    precision = _settle(folder, settings, trainer, precision)
    config.bf16 = precision == "bf16"
    found = checkpoint.checkpoints(folder)
    first = checkpoint.step_of(found[-1]) if found else 0
    ended = folder / ENDED
    if ended.is_file():
        return _load_end(ended, trainer, precision)
    trainer.train(resume_from_checkpoint=True)
    model.eval()
    model.zero_grad()
    state = trainer.state
    best = state.best_model_checkpoint if config.load_best_model_at_end else None
    evaluations = [
        {"step": entry["step"], **_evaluation(entry)}
        for entry in state.log_history
        if _evaluation(entry)
    ]
    result = TrainResult(
        np.array(trainer.losses, dtype=np.float64),
        state.global_step,
        trainer.clock.tokens,
        trainer.clock.seconds,
        trainer.clock.tokens / max(trainer.clock.seconds, 1e-9),
        precision,
        first,
        None if best is None else checkpoint.step_of(Path(best)),
        None if best is None else state.best_metric,
        evaluations,
    )
    kept = Path(best or folder / f"checkpoint-{state.global_step}")
    if trainer.is_world_process_zero() and kept.is_dir():  # not with save_strategy="no"
        told = {**result._asdict(), "losses": trainer.losses, "checkpoint": kept.name}
        write_atomically(ended, json.dumps(told, indent=1))
    return result


def _load_end(ended: Path, trainer: DistillationTrainer, precision: str) -> TrainResult:
    """The weights and the result of a training that had ended."""
    told = json.loads(ended.read_text())
    folder = ended.parent
    checkpoint.load_model(folder / told.pop("checkpoint"), trainer.model)
    trainer.model.eval()
    losses = np.array(told["losses"], dtype=np.float64)
    told |= {"losses": losses, "resumed_from": told["steps"], "precision": precision}
    return TrainResult(**told)


def _evaluation(entry: dict[str, float]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and name != "eval_runtime"
    }


def _settings(
    model: PreTrainedModel,
    teacher: Any,
    config: DistillationConfig,
    on_policy: OnPolicySampler | None,
) -> dict[str, Any]:
    """What a later run must find unchanged, beside the examples (the checkpoints' own business)."""
    given = config.to_dict()
    settings: dict[str, Any] = {f"config.{name}": given[name] for name in _FIXED}
    for role, one in (("model", model), ("teacher", teacher)):
        described = _describe(one)
        if isinstance(described, dict):
            settings.update({f"{role}.{key}": value for key, value in described.items()})
        else:
            settings[role] = described
    if on_policy is not None:
        settings |= {f"on_policy.{key}": value for key, value in on_policy.settings().items()}
    return json.loads(json.dumps(settings))  # as it will be read back: tuples are lists


def _describe(one: Any) -> Any:
    """A model's configuration; another teacher's class."""
    if one is None or not hasattr(one, "config"):
        return None if one is None else type(one).__name__
    ignored = ("transformers_version", "use_cache", "_name_or_path", "dtype")
    found = json.loads(one.config.to_json_string())
    return {key: value for key, value in found.items() if key not in ignored}


def _settle(
    folder: Path, settings: dict[str, Any], trainer: DistillationTrainer, precision: str | None
) -> str:
    """Check that `folder` is new or of this very training; the precision, settled once."""
    config, path = trainer.args, folder / SETTINGS
    if path.is_file():
        stored = json.loads(path.read_text())
        settled = stored.pop("precision")
        for key in sorted(settings.keys() | stored.keys()):
            if settings.get(key) != stored.get(key):
                raise InputError(
                    f"{folder}: holds another training, its {key} is {stored.get(key)!r}, "
                    f"wanted {settings.get(key)!r}"
                )
        return settled
    if precision is None:
        precision = "bf16" if config.bf16 else "fp32"
    if precision == "auto":
        if config.world_size > 1:  # each rank would time for itself
            raise InputError(
                f"train: precision is 'auto' on {config.world_size} ranks, wanted fp32 or bf16"
            )
        precision = _faster(trainer)
    if trainer.is_world_process_zero():
        write_atomically(path, json.dumps({**settings, "precision": precision}, indent=1))
    return precision


def _faster(trainer: DistillationTrainer) -> str:
    """Time the first batch forward and backward, three times each way; the precision of the best.

    Weights and the torch generator are left as they were.
    """
    config, model, device = trainer.args, trainer.model, trainer.args.device
    batch = {name: value.to(device) for name, value in trainer.batches[0].items()}
    model.train()
    best = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.random.fork_rng():
        for _ in range(3):
            for precision in best:
                config.bf16 = precision == "bf16"
                start = time.perf_counter()
                batch_loss(model, trainer.teacher, batch, config).loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best[precision] = min(best[precision], time.perf_counter() - start)
    model.zero_grad()
    return min(best, key=best.__getitem__)
