"""harness: tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), through its API.

It is an extra, `pip install slmperf[eval]`. Its own tasks fetch their data from a hub or a cache;
those of a folder may read local files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.bench.evaluation.report import Figure
from slmperf.check import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FALLING = ("perplexity", "bits_per_byte", "brier_score")  # parts of names: less is better
_BATCH = 16  # sequences


def check(
    tasks: Sequence[str], folder: Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """InputError where lm-eval is not installed, knows no such task or would have no tokenizer."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks: wanted lm-eval, found none; install it: slmperf[eval]")
    if tokenizer is None:
        raise InputError("--tasks: wanted a tokenizer beside the model, found none")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--task-folder: {folder}: wanted a folder of tasks, found none")
    known = _manager(folder).all_tasks
    for task in tasks:
        if task not in known:
            raise InputError(f"--tasks: lm-eval knows no task {task!r}")


def scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    folder: Path | None,
) -> dict[str, Figure]:
    """What lm-eval finds for each task and metric: "arc_easy acc".

    Raises InputError where a task cannot be read, such as one whose data are not on this machine.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    try:
        found: Any = simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=_manager(folder), log_samples=False
        )
    except (OSError, ValueError, KeyError) as error:  # of the task's data, its YAML, its templates
        raise InputError(f"--tasks: {', '.join(tasks)}: {one_line(error)}") from error
    figures = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen_by = key.partition(",")
            if not chosen_by or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            spread = metrics.get(f"{metric}_stderr,{chosen_by}")
            name = f"{task} {metric}" + (f", {chosen_by}" if chosen_by != "none" else "")
            rises = not any(part in metric for part in _FALLING)
            known = spread if isinstance(spread, int | float) else None
            figures[name] = Figure(float(value), rises, known)
    return figures


def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))
