"""quality: files as what a model is measured on, as `slmperf.calibrate.texts` reads them.

Ranking prompts give AUC (the later prompts of every member; the earlier ones calibrate), all other
files perplexity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from slmperf.calibrate.texts import (
    HISTORY,
    CalibrationSet,
    Vocabulary,
    check_ids,
    holds_prompts,
    ids_of,
    measured,
    ranking_prompts,
    read_sequences,
)
from slmperf.check import InputError

Progress = Callable[[int, int], object]  # of tokens done and all tokens


class Measure(NamedTuple):
    """What a model is measured on."""

    name: str  # of the first figure: "perplexity", "AUC"
    rises: bool  # whether more is better
    figures: Callable[[nn.Module, Progress | None], dict[str, float]]  # by name, the first above
    sequences: frozenset[bytes]  # the token ids (T,) of each that is measured, int64

    def of(self, model: nn.Module, progress: Progress | None = None) -> float:
        """The first figure of a model."""
        return self.figures(model, progress)[self.name]

    def seen(self, calibration: CalibrationSet) -> str:
        """In words how many of the measured sequences also calibrate; "" for none."""
        count = len(self.sequences & calibration.sequences)
        if not count:
            return ""
        return (
            f"{self.name}: {count:,} of {len(self.sequences):,} measured sequences are among those "
            f"of {calibration.source}, to which the model is fitted"
        )


def read_measure(path: Path, vocabulary: Vocabulary, *, split: str | None = None) -> Measure:
    """AUC on a file of ranking prompts (its mean and that of each task), perplexity on any other.

    split: only lines of this split; None: those of the split "eval" where lines have splits.
    Raises InputError for a file without a sequence, for ids that the model does not know, and for
    prompts whose labels are all the same.
    """
    if holds_prompts(path):
        return _auc(path, vocabulary)
    from slmperf.evaluate import perplexity

    found = read_sequences(path, vocabulary, measured(split))
    if not any(len(one) > 1 for one in found):
        raise InputError(f"{path}: wanted sequences of two tokens to predict, found none")
    check_ids(path, found, vocabulary)

    def figures(model: nn.Module, progress: Progress | None) -> dict[str, float]:
        with _counted(model, sum(map(len, found)), progress):
            return {"perplexity": perplexity(model, found)}

    return Measure("perplexity", False, figures, ids_of(found))


def _auc(path: Path, vocabulary: Vocabulary) -> Measure:
    from slmperf.engine.bulk import score_prompts
    from slmperf.evaluate import evaluate_tasks, task_scores

    builder, prompts = ranking_prompts(path, vocabulary)
    ranking = builder.from_prompts(prompts, HISTORY)[1]
    for task in builder.tasks:
        labels = {int(x) for one in ranking if one.task == task.name for x in one.labels}
        if labels != {0, 1}:
            raise InputError(
                f"{path}: task {task.name}: wanted late prompts with label 0 and 1, found "
                f"{sorted(labels) or 'none'}"
            )

    def figures(model: nn.Module, progress: Progress | None) -> dict[str, float]:
        scores = score_prompts(model, ranking, builder.answer_ids, progress=progress)
        found = evaluate_tasks(task_scores(ranking, scores))
        each = {f"AUC, {task}": value for task, value in found.auc.items()}
        return {"AUC": found.auc_mean, **(each if len(each) > 1 else {})}

    return Measure("AUC", True, figures, frozenset())  # what calibrates is before what is scored


@contextlib.contextmanager
def _counted(model: nn.Module, total: int, progress: Progress | None) -> Iterator[None]:
    """Tell progress(tokens done, total) after each of the model's forward passes."""
    done = 0

    def count(module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        nonlocal done
        done = min(total, done + arguments[0].numel())  # padding too: it cannot pass the total
        if progress is not None:
            progress(done, total)

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
