"""train: one call that trains a model and goes on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slmperf.check import InputError
from slmperf.distill import checkpoint
from slmperf.distill.config import DistillationConfig
from slmperf.distill.packing import PackedBatches
from slmperf.distill.trainer import (
    DistillationTrainer,
    check_models,
    choose_precision,
    fingerprint,
)
from slmperf.models.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slmperf.data import TrainingSequence


class TrainResult(NamedTuple):
    """What a training came to, over all its runs; of a killed one, up to its last checkpoint."""

    losses: np.ndarray  # (steps,) fp64
    steps: int
    tokens: int  # through the student, without padding
    seconds: float
    tokens_per_second: float
    precision: str  # "fp32" or "bf16"
    resumed_from: int  # step at which this call went on; 0 for a fresh start


def train(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    *,
    teacher: PreTrainedModel | None = None,
    config: DistillationConfig,
    folder: str | os.PathLike[str],
    name: str = "train",
    bar: bool = True,
) -> TrainResult:
    """Train `model` in place: from the teacher's logits (KD) or, without one, the tokens (SFT).

    `folder` holds the checkpoints, `train.log` and `settings.json`; one of another training is
    refused with an InputError. The same call again goes on from the last checkpoint or, where the
    training had ended, just loads its weights. In one process with the same number of threads the
    final weights are bit for bit those of an undisturbed run; ranks started by torchrun resume too,
    but all with the generators of the first, so that dropout differs. The caller saves the model
    and may then delete the folder.
    """
    folder = Path(folder)
    check_models(model, teacher, config.context)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batches = PackedBatches(sequences, config, ranks)
    precision = _settle(folder, model, teacher, batches, config, ranks)
    checkpoint.remove_unfinished(folder)
    found = checkpoint.checkpoints(folder)
    last = found[-1] if found else None
    if last is not None:
        progress, losses = checkpoint.read_progress(last)
        if progress.step == batches.steps:
            checkpoint.load_model(last, model)
            return _result(progress, losses, precision, progress.step)
    trainer = DistillationTrainer(
        model,
        batches,
        teacher=teacher,
        config=config,
        precision=precision,
        folder=folder,
        name=name,
        bar=bar,
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.eval()
    model.zero_grad()
    clock = trainer.clock
    end = checkpoint.Progress(trainer.state.global_step, clock.tokens, clock.seconds)
    return _result(end, trainer.losses, precision, 0 if last is None else progress.step)


def _result(
    progress: checkpoint.Progress, losses: list[float], precision: str, resumed_from: int
) -> TrainResult:
    speed = progress.tokens / max(progress.seconds, 1e-9)
    return TrainResult(
        np.array(losses, dtype=np.float64),
        progress.step,
        progress.tokens,
        progress.seconds,
        speed,
        precision,
        resumed_from,
    )


def _settle(
    folder: Path,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: PackedBatches,
    config: DistillationConfig,
    ranks: int,
) -> str:
    """Check that `folder` is new or of this very training; the precision, settled once.

    How often checkpoints and log lines are written may change between two runs; nothing else may.
    """
    settings: dict[str, Any] = {
        f"config.{key}": value
        for key, value in asdict(config).items()
        if key not in ("checkpoint_seconds", "checkpoint_steps", "log_steps", "divergence")
    }
    settings["config.divergence"] = repr(config.divergence)
    for role, described in fingerprint(model, teacher).items():
        if described is None:
            settings[role] = None
        else:
            settings.update({f"{role}.{key}": value for key, value in described.items()})
    digest = hashlib.sha256()
    for array in (batches.ids, batches.starts, batches.weights, batches.answers):
        digest.update(np.ascontiguousarray(array).tobytes())
    settings["sequences"] = digest.hexdigest()
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
    path = folder / "settings.json"
    if path.is_file():
        stored = json.loads(path.read_text())
        precision = stored.pop("precision")
        for key in sorted(settings.keys() | stored.keys()):
            if settings.get(key) != stored.get(key):
                raise InputError(
                    f"{folder}: holds another training, its {key} is {stored.get(key)!r}, "
                    f"wanted {settings.get(key)!r}"
                )
        return precision
    precision = config.precision
    if precision == "auto":
        if ranks > 1:  # each rank would time for itself
            raise InputError(f"train: precision is 'auto' on {ranks} ranks, wanted fp32 or bf16")
        precision = choose_precision(model, teacher, batches, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**settings, "precision": precision}, indent=1))
    return precision
