"""texts: files as calibration sets and as what a pruned model is measured on.

.jsonl with task, history, candidate ...   ranking prompts (`slmperf.data.jsonl`): the earlier
              ones of every member calibrate, the later ones are scored: AUC
other .jsonl  text or token ids (`slmperf.data.text`), a sequence a line: perplexity
anything else plain text, cut into sequences as long as the context: perplexity
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slmperf.data import Prompt, PromptBuilder

_BATCH_TOKENS = 8192  # padded tokens of a batch, at least one sequence
_DRAW = 0  # seed of the draw of sequences: the same file gives the same calibration set
_HISTORY = 0.8  # share of a member's prompts, in order of time, that calibrate


class Vocabulary(NamedTuple):
    """How text becomes token ids of one model."""

    tokenizer: PreTrainedTokenizerBase | None  # None: files hold token ids
    size: int  # ids the model knows
    context: int  # tokens of a sequence


class CalibrationSet(NamedTuple):
    """Batches of a file, as `prune_model` takes them, in order of length."""

    source: str  # "in-domain: FILE" or "generic: FILE"
    batches: list[dict[str, Tensor]]
    sequences: int
    tokens: int


class Measure(NamedTuple):
    """A figure of a model on a file."""

    name: str  # "perplexity", "AUC"
    rises: bool  # whether more is better
    of: Callable[[nn.Module], float]


def read_calibration(
    path: Path, source: str, vocabulary: Vocabulary, *, samples: int, split: str | None = None
) -> CalibrationSet:
    """At most `samples` sequences of a file, drawn once.

    split: only lines of this split; None: all but those of the split "eval".
    Raises InputError for a file without a sequence and for ids that the model does not know.
    """
    if _holds_prompts(path):
        builder, prompts = _prompts(path, vocabulary)
        found = [one.input_ids for one in builder.from_prompts(prompts, _HISTORY)[0]]
    else:
        found = read_sequences(
            path, vocabulary, lambda one: one == split if split else one != "eval"
        )
    if not found:
        raise InputError(f"{path}: wanted calibration sequences, found none")
    _check_ids(path, found, vocabulary)
    drawn = np.random.default_rng(_DRAW).permutation(len(found))[:samples]
    chosen = sorted((found[i] for i in drawn.tolist()), key=len)
    tokens = sum(map(len, chosen))
    return CalibrationSet(f"{source}: {path.name}", list(_batches(chosen)), len(chosen), tokens)


def read_measure(path: Path, vocabulary: Vocabulary, *, split: str | None = None) -> Measure:
    """AUC on a file of ranking prompts, perplexity on any other.

    split: only lines of this split; None: those of the split "eval" where lines have splits.
    Raises InputError as `read_calibration`, and for prompts whose labels are all the same.
    """
    if _holds_prompts(path):
        return _auc(path, vocabulary)
    from slmperf.evaluate import perplexity

    found = read_sequences(path, vocabulary, lambda one: one in ((split or "eval"), None))
    if not any(len(one) > 1 for one in found):
        raise InputError(f"{path}: wanted sequences of two tokens to predict, found none")
    _check_ids(path, found, vocabulary)
    return Measure("perplexity", False, lambda model: perplexity(model, found))


def _auc(path: Path, vocabulary: Vocabulary) -> Measure:
    from slmperf.engine import score_prompts
    from slmperf.evaluate import evaluate_tasks, task_scores

    builder, prompts = _prompts(path, vocabulary)
    ranking = builder.from_prompts(prompts, _HISTORY)[1]
    for task in builder.tasks:
        labels = {int(x) for one in ranking if one.task == task.name for x in one.labels}
        if labels != {0, 1}:
            raise InputError(
                f"{path}: task {task.name}: wanted late prompts with label 0 and 1, found "
                f"{sorted(labels) or 'none'}"
            )

    def of(model: nn.Module) -> float:
        scores = score_prompts(model, ranking, builder.answer_ids)
        return evaluate_tasks(task_scores(ranking, scores)).auc_mean

    return Measure("AUC", True, of)


def _holds_prompts(path: Path) -> bool:
    """Whether the first line is a ranking prompt; InputError where the file cannot be read."""
    if path.suffix != ".jsonl":
        return False
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
        value = json.loads(first or "null")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: wanted a file of UTF-8 text, found none") from None
    except ValueError:
        return False  # the reader of lines says what is wrong
    return isinstance(value, dict) and {"task", "candidate"} <= value.keys()


def _prompts(path: Path, vocabulary: Vocabulary) -> tuple[PromptBuilder, list[Prompt]]:
    from slmperf.data import PromptBuilder, Task, read_prompts

    prompts = read_prompts(path)
    if vocabulary.tokenizer is None:
        raise InputError(f"{path}: ranking prompts want a tokenizer beside the model, found none")
    names = dict.fromkeys(prompt.task for prompt in prompts)
    tasks = [Task(name, name, 1.0) for name in names]
    builder = PromptBuilder(vocabulary.tokenizer, tasks, vocabulary.context, facts=False)
    return builder, prompts


def read_sequences(
    path: Path,
    vocabulary: Vocabulary,
    wanted: Callable[[str | None], bool] = lambda split: split != "eval",
) -> list[np.ndarray]:
    """Token ids (T,) of the lines whose split is wanted, or of the pieces of a plain text, in
    order. InputError for a file that cannot be read, and text without a tokenizer.
    """
    from slmperf.data.text import read_lines, tokenize

    context, tokenizer = vocabulary.context, vocabulary.tokenizer
    if path.suffix == ".jsonl":
        lines = [line for line in read_lines(path) if wanted(line.split)]
        given = [np.array(line.input_ids[:context]) for line in lines if line.input_ids is not None]
        texts = [line for line in lines if line.input_ids is None]
        if texts and tokenizer is None:
            raise InputError(f"{texts[0].where}: text wants a tokenizer beside the model")
        if texts and tokenizer is not None:
            given += [one.input_ids for one in tokenize(texts, tokenizer, context, 1)[0]]
        return given
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: wanted a file of UTF-8 text, found none") from None
    if tokenizer is None:
        raise InputError(f"{path}: text wants a tokenizer beside the model")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    room = context - len(begin)
    return [np.array(begin + ids[start : start + room]) for start in range(0, len(ids), room)]


def _check_ids(path: Path, sequences: Sequence[np.ndarray], vocabulary: Vocabulary) -> None:
    largest = max(int(one.max()) for one in sequences)
    if largest >= vocabulary.size:
        raise InputError(
            f"{path}: token id {largest}, wanted ids below {vocabulary.size}: is the tokenizer "
            "that of another model?"
        )


def _batches(sequences: Sequence[np.ndarray]) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of sequences that are in order of length."""
    start = 0
    while start < len(sequences):
        stop = start + 1
        while stop < len(sequences) and len(sequences[stop]) * (stop + 1 - start) <= _BATCH_TOKENS:
            stop += 1
        part, start = sequences[start:stop], stop
        ids = torch.zeros(len(part), len(part[-1]), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(part):
            ids[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
            mask[row, : len(one)] = 1
        yield {"input_ids": ids, "attention_mask": mask}
