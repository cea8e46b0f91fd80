"""scoring: a finished stage on the candidates; scores in its folder, metrics in its manifest.

The scores are kept, one per candidate row, because intervals of differences need the rows of both
sides, and so that another metric needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from slmperf import arch, models
from slmperf.engine import score_prompts
from slmperf.evaluate import Run, evaluate_tasks, perplexity, task_scores
from slmperf.models.files import write_atomically
from slmperf.recipe.manifest import SCORES, Manifest, files_of
from slmperf.recipe.material import Material
from slmperf.recipe.results import SeedMetrics

PERPLEXITY_PROMPTS = 400  # of each task; the mean over their tokens is steady well before


def score(
    folder: Path, manifest: Manifest, material: Material, progress: Callable[[int, int], None]
) -> None:
    """Score the checkpoint in `folder` and complete its manifest."""
    model = models.load(folder).to("cuda" if arch.cuda_name() else "cpu")
    scores = score_prompts(model, material.prompts, material.builder.answer_ids, progress=progress)
    run = task_scores(material.prompts, scores)
    write_run(run, folder / SCORES)
    found = metrics(run, seed=manifest.seed)
    texts = []
    for task in material.facts.tasks:
        prompts = [prompt for prompt in material.prompts if prompt.task == task]
        texts += [
            np.concatenate([prompt.prefix, prompt.candidates[0]])
            for prompt in prompts[:PERPLEXITY_PROMPTS]
        ]
    found.perplexity = perplexity(model, texts)
    manifest.metrics = vars(found)
    manifest.files = files_of(folder)
    manifest.write(folder)


def metrics(run: Run, *, seed: int) -> SeedMetrics:
    """The metrics of one run as the results hold them: what is undefined is None."""
    found = evaluate_tasks(run)
    return SeedMetrics(
        seed=seed,
        auc=found.auc,
        auc_mean=found.auc_mean,
        auc_within=found.auc_within if math.isfinite(found.auc_within) else None,
        log_loss=found.log_loss,
        calibration_error=found.calibration_error,
    )


def write_run(run: Run, path: Path) -> None:
    """Scores (n,) float64, labels (n,) int8 and members (n,) int64 of each task, as safetensors."""
    tensors = {}
    for task, (scores, labels, members) in run.items():
        tensors[f"{task}/scores"] = np.ascontiguousarray(scores, np.float64)
        tensors[f"{task}/labels"] = np.ascontiguousarray(labels, np.int8)
        tensors[f"{task}/members"] = np.ascontiguousarray(members, np.int64)
    write_atomically(path, lambda aside: save_file(tensors, aside))


def read_run(path: Path) -> Run:
    """The inverse of write_run."""
    tensors = load_file(path)
    tasks = sorted(name.removesuffix("/scores") for name in tensors if name.endswith("/scores"))
    return {
        task: tuple(tensors[f"{task}/{part}"] for part in ("scores", "labels", "members"))
        for task in tasks
    }
