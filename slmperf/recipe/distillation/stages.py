"""stages: how each kind of stage makes its model from what it reads, and how a model is measured.

Nothing is written here but the checkpoints of a training (slmperf.distill), into `folder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmperf import models
from slmperf.check import InputError
from slmperf.data.text import load_tokenizer
from slmperf.distill import (
    DistillationConfig,
    OnPolicySampler,
    PackedBatches,
    hash_of_tokenizer,
    train,
)
from slmperf.distill.evaluation import validation
from slmperf.recipe import stages as recipe_stages
from slmperf.recipe.distillation.material import Material
from slmperf.recipe.distillation.schema import CheckpointStage, OnPolicy, Recipe, TextTraining
from slmperf.recipe.plan import Job
from slmperf.recipe.schema import PruneAttention, PruneMlp, Shape, Training
from slmperf.recipe.stages import CURVE, Made

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 16  # of one batch that is measured


def make(
    job: Job,
    material: Material,
    base: Path,
    finished: Mapping[str, Path],
    folder: Path,
    progress: Callable[[int, int], None],
) -> Made:
    """Run one job. base: the recipe's folder. finished: keys of job.parents -> checkpoint."""
    stage = job.stage
    if isinstance(stage, CheckpointStage):
        return Made(models.load(base / stage.checkpoint))
    if isinstance(stage, PruneMlp | PruneAttention):
        sequences = [one.input_ids for one in material.training]
        return recipe_stages.prune(
            stage,
            models.load(finished["from"]),
            sequences,
            progress,
            source="in-domain: the recipe's text",
            tokenizer=material.tokenizer,
        )
    config = training_config(stage.training, material.context, job.seed, folder, job.folder)
    model = start(job, material, finished)
    result = train(
        model,
        material.share(stage.share),
        config=config,
        teacher=models.load(finished["teacher"]) if "teacher" in finished else None,
        validation=material.validation if stage.training.evaluate_steps else None,
        on_policy=sampler(getattr(stage, "on_policy", None), material, job.seed),
        precision=stage.training.precision or "fp32",
        processing_class=material.tokenizer,
    )
    pieces = np.array_split(result.losses, min(CURVE, len(result.losses)))
    return Made(
        model,
        training={
            "steps": result.steps,
            "best_step": result.best_step,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 3),
            "tokens_per_second": round(result.tokens_per_second, 1),
            "precision": result.precision,
            "loss_curve": [round(float(piece.mean()), 6) for piece in pieces],
            "evaluations": result.evaluations,
        },
    )


def start(job: Job, material: Material, finished: Mapping[str, Path]) -> PreTrainedModel:
    """The model a training begins with, its control tokens those of the run's tokenizer."""
    tokenizer = material.tokenizer
    if "from" in finished:
        model = models.load(finished["from"])
    else:
        model = recipe_stages.new_model(job.shape, len(tokenizer), material.context, job.seed)
    # Else Trainer does the same, and warns of it.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))
    return model


def training_config(
    training: TextTraining, context: int, seed: int, folder: Path, name: str = "train"
) -> DistillationConfig:
    """The recipe's words -> the settings of slmperf.distill; InputError for a value it refuses."""
    given = training.model_dump(include=set(Training.model_fields), exclude_unset=True)
    more: dict[str, Any] = {
        "normalization": training.normalization,
        "packing": training.packing,
        "sequence_sample": training.sequence_sample or 1.0,
        "per_device_eval_batch_size": _ROWS,
        "run_name": name,
        "report_to": training.report_to,
        "gradient_checkpointing": training.gradient_checkpointing,
        "offload_optimizer": training.offload_optimizer,
    }
    if training.evaluate_steps is not None:
        more |= {
            "eval_strategy": "steps",
            "eval_steps": training.evaluate_steps,
            "save_strategy": "steps",
            "save_steps": training.evaluate_steps,
            "load_best_model_at_end": True,
            "early_stopping_patience": training.patience,
            "sample_generations": training.samples or 0,
        }
    return recipe_stages.training_config(Training(**given), context, seed, folder, **more)


def sampler(settings: OnPolicy | None, material: Material, seed: int) -> OnPolicySampler | None:
    """What puts the student's own text into a training; None where the recipe wants none."""
    if settings is None:
        return None
    return OnPolicySampler(**settings.model_dump(), seed=seed, stop=material.end_tokens)


def validation_loss(folder: Path, material: Material) -> dict[str, float]:
    """Mean cross entropy over the completions' tokens of the validation examples, in fp32."""
    config = DistillationConfig(
        str(folder), context=material.context, per_device_eval_batch_size=_ROWS
    )
    batches = PackedBatches(material.validation, config, once=True)
    return validation(models.load(folder), batches, config=config)


def given_shapes(recipe: Recipe, base: Path) -> dict[str, Shape]:
    """Shapes of the models that are there before the run; InputError where one cannot be read."""
    found = {}
    for number, stage in enumerate(recipe.stages):
        if isinstance(stage, CheckpointStage):
            where = f"stages[{number}] ({stage.name}).checkpoint"
            found[stage.name] = _shape_of(base / stage.checkpoint, where)
    return found


def _shape_of(folder: Path, where: str) -> Shape:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: {folder}: expected a Transformers checkpoint, found none")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        heads = config.num_attention_heads
        return Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            experts=getattr(config, "num_local_experts", None),
        )
    except Exception as error:  # Transformers has no one type for what it refuses
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: {folder}: expected a language model: {reason}") from None


def check(recipe: Recipe, jobs: list[Job], material: Material, base: Path) -> None:
    """Everything about models, trainings and their text that would only show once they run."""
    position = {stage.name: number for number, stage in enumerate(recipe.stages)}
    for job in jobs:
        stage = job.stage
        where = f"stages[{position[stage.name]}] ({stage.name})"
        if isinstance(stage, CheckpointStage):
            _check_checkpoint(base / stage.checkpoint, material, f"{where}.checkpoint")
            continue
        vocabulary = len(material.tokenizer)
        try:
            recipe_stages.model_config(job.shape, vocabulary, material.context)
        except Exception as error:  # as above
            reason = " ".join(str(error).split())
            raise InputError(f"{where}: Transformers refuses: {reason}") from None
        training = getattr(stage, "training", None)
        if training is None:
            continue
        try:
            training_config(training, material.context, job.seed, Path())
        except InputError as error:
            raise InputError(f"{where}.training: {error}") from None
        settings: OnPolicy | None = getattr(stage, "on_policy", None)
        if settings is not None:
            _check_room(settings, material, f"{where}.on_policy.new_tokens")


def _check_room(settings: OnPolicy, material: Material, where: str) -> None:
    longest = material.facts.longest_prompt
    if longest + settings.new_tokens > material.context:
        raise InputError(
            f"{where}: {settings.new_tokens} after the longest prompt of {longest} are more than "
            f"the context of {material.context}, expected at most {material.context - longest}"
        )


def _check_checkpoint(folder: Path, material: Material, where: str) -> None:
    """Its tokenizer is the run's, and its positions reach over the context."""
    from transformers import AutoConfig

    found, wanted = load_tokenizer(folder), material.tokenizer
    if hash_of_tokenizer(found) != hash_of_tokenizer(wanted):
        told = f"{len(found):,} tokens" if len(found) != len(wanted) else "other ones"
        raise InputError(
            f"{where}: {folder} has another tokenizer than the run, expected its "
            f"{len(wanted):,} tokens, found {told}"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    reach = getattr(config, "max_position_embeddings", None)
    if reach is not None and reach < material.context:
        raise InputError(
            f"{where}: {folder} has {reach} positions, expected at least the context of "
            f"{material.context}"
        )
