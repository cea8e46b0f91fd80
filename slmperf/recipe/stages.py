"""stages: how each kind of stage makes its model from what it reads.

Nothing is written here but the checkpoints of a training (slmperf.distill), into `folder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from slmperf import models
from slmperf.calibrate.texts import packed_batches
from slmperf.check import InputError
from slmperf.distill import DistillationConfig, train
from slmperf.models.files import write_atomically
from slmperf.models.stored import empty_model
from slmperf.prune.gradual import GradualSchedule, Step
from slmperf.prune.model import prune_model
from slmperf.prune.results import PruneReport
from slmperf.quant import quantize_model
from slmperf.quant.plan import plan_layers
from slmperf.recipe.material import DRAW, Material
from slmperf.recipe.plan import Job
from slmperf.recipe.schema import (
    PruneAttention,
    PruneAttentionStage,
    PruneGradualStage,
    PruneMlp,
    PruneMlpStage,
    QuantiseStage,
    Shape,
    Training,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CURVE = 50  # points of the loss curve in a manifest, each a mean over its part of the steps
HELD_OUT = 4  # for so many rows that calibrate a quantisation one is held out
CALIBRATION_BATCH = 16  # sequences of one batch whose inputs go into the Gram matrices


class Made(NamedTuple):
    """A stage's model, and what its manifest says about the making."""

    model: PreTrainedModel
    training: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None


def make(
    job: Job,
    material: Material,
    finished: Mapping[str, Path],
    folder: Path,
    progress: Callable[[int, int], None],
) -> Made:
    """Run one job. finished: the keys of job.parents -> folder of their checkpoint."""
    stage = job.stage
    if isinstance(stage, PruneMlpStage | PruneAttentionStage):
        source, sequences = _calibrated_on(stage, material)
        model = models.load(finished["from"])
        return prune(stage, model, sequences, progress, source=source, tokenizer=material.tokenizer)
    if isinstance(stage, PruneGradualStage):
        return prune_gradual(job, material, models.load(finished["from"]), folder, progress)
    if isinstance(stage, QuantiseStage):
        return quantise(job, material, models.load(finished["from"]), folder, progress)
    context = material.builder.context
    if "from" in finished:
        model = models.load(finished["from"])
    else:
        model = new_model(job.shape, len(material.tokenizer), context, job.seed)
    result = train(
        model,
        material.sequences(stage.subset),
        teacher=models.load(finished["teacher"]) if "teacher" in finished else None,
        config=training_config(stage.training, context, job.seed, folder, run_name=job.folder),
        precision=stage.training.precision or "auto",
    )
    return Made(model, training=_told([result._asdict()]))


def _told(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a manifest says of one training, or of several one after the other."""
    losses = np.concatenate([np.asarray(one["losses"]) for one in trainings])
    tokens, seconds = (sum(one[key] for one in trainings) for key in ("tokens", "seconds"))
    pieces = np.array_split(losses, min(CURVE, len(losses)))
    return {
        "steps": sum(one["steps"] for one in trainings),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "precision": trainings[-1]["precision"],
        "loss_curve": [round(float(piece.mean()), 6) for piece in pieces],
    }


def model_config(shape: Shape, vocabulary: int, context: int) -> PreTrainedConfig:
    """The Transformers configuration of a shape: Mixtral with experts, Llama without.

    ValueError, from Transformers, for a shape that it refuses.
    """
    from transformers import LlamaConfig, MixtralConfig

    common = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size or shape.hidden // shape.heads,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": shape.initializer_range,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.experts is None:
        return LlamaConfig(**common)
    return MixtralConfig(
        **common,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        sliding_window=None,
    )


def new_model(shape: Shape, vocabulary: int, context: int, seed: int) -> PreTrainedModel:
    """A model of this shape with weights drawn from `seed`."""
    from transformers import AutoModelForCausalLM

    config = model_config(shape, vocabulary, context)
    # The default implementation loops over the experts: 30 times slower on a CPU.
    experts = {} if shape.experts is None else {"experts_implementation": "grouped_mm"}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, **experts)


def training_config(
    training: Training, context: int, seed: int, folder: Path, **more: Any
) -> DistillationConfig:
    """The recipe's words -> the settings of slmperf.distill; InputError for a value it refuses.

    What a recipe leaves out is as the small models of the examples want it. 3e-3 suits a few
    hundred thousand parameters; above a million, prototypes learned nothing at it.
    """
    given = training.model_dump(exclude_none=True)
    warmup, tokens = given.pop("warmup", 0.03), given.pop("batch_tokens", 4096)
    names = {
        "steps": "max_steps",
        "epochs": "num_train_epochs",
        "schedule": "lr_scheduler_type",
        "accumulation": "gradient_accumulation_steps",
        "checkpoint_steps": "save_steps",
    }
    given = {names.get(name, name): value for name, value in given.items() if name != "precision"}
    defaults = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "normalization": "examples",
        "sequence_sample": 0.25,
        "warmup_steps": warmup,
        "per_device_train_batch_size": max(1, tokens // context),
        "checkpoint_seconds": 60.0,
        "save_steps": 10**9,
        "logging_steps": 20,
    }
    return DistillationConfig(
        str(folder), **{**defaults, **given, **more}, context=context, seed=seed
    )


def prune(
    stage: PruneMlp | PruneAttention,
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    progress: Callable[[int, int], None],
    *,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Made:
    """Prune the model as the stage says, calibrated on `sequences` (T,) of token ids.

    source, tokenizer: of the sequences, for the report (`prune_model`).
    """
    batches = list(calibration(sequences, stage.calibration_rows))
    sizes: dict[str, Any]
    if isinstance(stage, PruneMlp):
        sizes = {"intermediate_size": stage.intermediate}
    else:
        sizes = {
            "attention_heads": stage.heads,
            "key_value_heads": stage.kv_heads,
            "heads": stage.head_mode,
        }
    report = prune_model(
        model,
        batches,
        **sizes,
        **_pruning_settings(stage),
        source=source,
        tokenizer=tokenizer,
        progress=progress,
    )
    assert report.model is not None  # it was just pruned
    return Made(report.model, pruning=_pruned([report]))


def prune_gradual(
    job: Job,
    material: Material,
    model: PreTrainedModel,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Made:
    """Prune in steps; after each the unpruned model teaches what is left."""
    stage, context = job.stage, material.builder.context
    sequences = material.sequences(stage.subset)

    def recover(student: PreTrainedModel, teacher: PreTrainedModel, step: Step) -> None:
        name = f"{job.folder}-{step.number}"
        config = training_config(stage.training, context, job.seed, step.folder, run_name=name)
        precision = stage.training.precision or "auto"
        result = train(student, sequences, teacher=teacher, config=config, precision=precision)
        told = {**result._asdict(), "losses": result.losses.tolist()}
        # Beside the schedule, for a run that goes on after this step.
        write_atomically(folder / f"training-{step.number}.json", json.dumps(told))

    source, texts = _calibrated_on(stage, material)
    batches = list(calibration(texts, stage.calibration_rows))
    schedule = GradualSchedule(
        sizes=[{"intermediate_size": size} for size in stage.intermediate],
        recover=recover,
        folder=folder / "gradual",
        settings={**_pruning_settings(stage), "source": source},
        seed=job.seed,
    )
    reports = schedule.run(model, batches, tokenizer=material.tokenizer, progress=progress)
    steps = range(1, len(reports) + 1)
    trainings = [json.loads((folder / f"training-{step}.json").read_text()) for step in steps]
    assert reports[-1].model is not None  # of the last step there is one
    return Made(reports[-1].model, training=_told(trainings), pruning=_pruned(reports))


def quantise(
    job: Job,
    material: Material,
    model: PreTrainedModel,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Made:
    """Quantise the model as the stage says; finished blocks are kept in `folder`."""
    stage = job.stage
    source, sequences = _calibrated_on(stage, material)
    context, rows = material.builder.context, stage.calibration_rows
    # Of a prompt that is scored one candidate: most of its tokens calibrate nothing.
    late = [np.append(one.prefix, one.candidates[0]) for one in material.prompts]
    report = quantize_model(
        model,
        stage.scheme,
        packed_batches(sequences, rows, context),
        **_quantisation_settings(stage),
        smooth=stage.smooth,
        kv_cache=stage.kv_cache,
        held_out=packed_batches(late, max(1, rows // HELD_OUT), context),
        source=source,
        tokenizer=material.tokenizer,
        resume=folder / "blocks",
        progress=progress,
    )
    layers = report.layers
    schemes = dict.fromkeys(layer.scheme for layer in layers)  # more than one with overrides
    told = ("name", "scheme", "method", "bits", "alpha", "note")
    errors = ("relative_error", "relative_error_rtn", "held_out_error", "held_out_error_rtn")
    return Made(
        model,
        quantization={
            "scheme": ", ".join(schemes) + ", fp8 keys and values" * stage.kv_cache,
            "source": source,
            "tokens": report.tokens,
            "seconds": round(report.seconds, 3),
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "bits_mean": _mean([layer.bits for layer in layers]),
            "error_mean": _mean([layer.relative_error for layer in layers]),
            "error_mean_rtn": _mean([layer.relative_error_rtn for layer in layers]),
            "held_out_error_mean": _mean([layer.held_out_error for layer in layers]),
            "held_out_error_mean_rtn": _mean([layer.held_out_error_rtn for layer in layers]),
            "layers": [{name: getattr(one, name) for name in told + errors} for one in layers],
        },
    )


def _mean(values: Sequence[float | None]) -> float | None:
    taken = [value for value in values if value is not None]
    return sum(taken) / len(taken) if taken else None


def _quantisation_settings(stage: Any) -> dict[str, Any]:
    """What says which scheme each layer gets."""
    named = {one: None if it == "none" else it for one, it in stage.overrides.items()}
    return {"overrides": named, "method": stage.method, "group_size": stage.group_size}


def _pruning_settings(stage: Any) -> dict[str, Any]:
    return {"method": stage.method, "mode": stage.mode, "damping": stage.damping}


def _calibrated_on(stage: Any, material: Material) -> tuple[str, list[np.ndarray]]:
    """What a stage is calibrated on: where it is from, in words, and its token ids."""
    name = stage.calibration_text
    if name is not None:
        return f"generic: {name}", material.texts[name].sequences
    return (
        f"in-domain: {material.facts.source}",
        [one.input_ids for one in material.sequences(stage.subset)],
    )


def _pruned(reports: Sequence[PruneReport]) -> dict[str, Any]:
    """What a manifest says of a pruning in one step or several."""
    layers = [
        {
            "name": layer.name,
            "groups": layer.groups,
            "kept": len(layer.kept),
            "relative_error": layer.relative_error,
        }
        for report in reports
        for layer in report.layers
    ]
    seconds = round(sum(report.seconds for report in reports), 3)
    about = {key: reports[0].calibration[key] for key in ("source", "tokens")}
    return {**about, "seconds": seconds, "layers": layers}


def calibration(sequences: Sequence[np.ndarray], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """At most `count` sequences, drawn once, in padded batches of similar lengths."""
    drawn = np.random.default_rng(DRAW).permutation(len(sequences))[:count]
    chosen = sorted((sequences[i] for i in drawn.tolist()), key=len)
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        batch = chosen[start : start + CALIBRATION_BATCH]
        ids = np.zeros((len(batch), len(batch[-1])), np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        yield {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def check_training(jobs: list[Job], material: Material) -> None:
    """Everything about models and trainings that would only show once they are made."""
    for job in jobs:
        try:
            config = model_config(job.shape, len(material.tokenizer), material.builder.context)
        except Exception as error:  # Transformers has no one type for what it refuses
            reason = " ".join(str(error).split())
            raise InputError(f"stages ({job.stage.name}): Transformers refuses: {reason}") from None
        training, subset = getattr(job.stage, "training", None), getattr(job.stage, "subset", None)
        if training is not None:
            try:
                training_config(training, material.builder.context, job.seed, Path())
            except InputError as error:
                raise InputError(f"stages ({job.stage.name}).training: {error}") from None
        if isinstance(job.stage, QuantiseStage):
            try:
                empty = empty_model(config, torch.float32)
                plan_layers(empty, job.stage.scheme, **_quantisation_settings(job.stage))
            except InputError as error:
                raise InputError(f"stages ({job.stage.name}): {error}") from None
        if subset is not None:
            material.check_subset(subset, f"stages ({job.stage.name}).subset")
