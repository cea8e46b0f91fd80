"""texts: files as calibration sets and as what a pruned model is measured on.

.jsonl with task, history, candidate ...   ranking prompts (`slmperf.data.jsonl`): the earlier
              ones of every member calibrate, the later ones are scored: AUC
other .jsonl  text or token ids (`slmperf.data.text`), a sequence a line: perplexity
anything else plain text, cut into sequences as long as the context: perplexity
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slmperf.data import Prompt, PromptBuilder
    from slmperf.prune.model import Progress

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
    sequences: frozenset[bytes]  # the token ids (T,) of each, int64


class Measure(NamedTuple):
    """A figure of a model on a file."""

    name: str  # "perplexity", "AUC"
    rises: bool  # whether more is better
    of: Callable[[nn.Module, Progress | None], float]
    sequences: frozenset[bytes]  # the token ids (T,) of each that is measured, int64

    def seen(self, calibration: CalibrationSet) -> str:
        """In words how many of the measured sequences also calibrate; "" for none."""
        count = len(self.sequences & calibration.sequences)
        if not count:
            return ""
        return (
            f"{self.name}: {count:,} of {len(self.sequences):,} measured sequences are among those "
            f"of {calibration.source}, to which the pruned model is fitted"
        )


class _Example(NamedTuple):
    """A sequence of a file."""

    input_ids: np.ndarray  # (T,)
    answer: np.ndarray | None  # bool (T,), the tokens of answers; None: the file does not say


def read_calibration(
    path: Path,
    source: str,
    vocabulary: Vocabulary,
    *,
    samples: int,
    split: str | None = None,
    answers_only: bool = False,
) -> CalibrationSet:
    """At most `samples` sequences of a file, drawn once.

    split: only lines of this split; None: all but those of the split "eval".
    answers_only: only the tokens count from which those of an answer (ranking prompts) or a
        completion are predicted.
    Raises InputError for a file without a sequence, for ids that the model does not know, and for
    lines that do not say what their answer is where only answers count.
    """
    if _holds_prompts(path):
        builder, prompts = _prompts(path, vocabulary)
        training = builder.from_prompts(prompts, _HISTORY)[0]
        found = [_Example(one.input_ids, one.answer) for one in training]
    else:
        found = _examples(
            path, vocabulary, lambda one: one == split if split else one != "eval", answers_only
        )
    if answers_only:  # without a token before an answer nothing of a sequence would count
        found = [one for one in found if one.answer is not None and one.answer[1:].any()]
    if not found:
        raise InputError(f"{path}: wanted calibration sequences, found none")
    _check_ids(path, [one.input_ids for one in found], vocabulary)
    drawn = np.random.default_rng(_DRAW).permutation(len(found))[:samples]
    chosen = sorted((found[i] for i in drawn.tolist()), key=lambda one: len(one.input_ids))
    batches = list(_batches(chosen, answers_only))
    ids = _bytes(one.input_ids for one in chosen)
    return CalibrationSet(f"{source}: {path.name}", batches, ids)


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

    def of(model: nn.Module, progress: Progress | None = None) -> float:
        with _counted(model, sum(map(len, found)), progress):
            return perplexity(model, found)

    return Measure("perplexity", False, of, _bytes(found))


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


def has_splits(path: Path) -> bool:
    """Whether lines of the file may have splits: no plain text, no ranking prompts."""
    return path.suffix == ".jsonl" and not _holds_prompts(path)


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

    def of(model: nn.Module, progress: Progress | None = None) -> float:
        scores = score_prompts(model, ranking, builder.answer_ids, progress=progress)
        return evaluate_tasks(task_scores(ranking, scores)).auc_mean

    return Measure("AUC", True, of, frozenset())  # what calibrates comes before what is scored


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
    for prompt in prompts:
        shown = (prompt.task, prompt.member, prompt.candidate, *sum(prompt.history, ()))
        _check_unicode(str(path), shown)
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
    return [one.input_ids for one in _examples(path, vocabulary, wanted, False)]


def _examples(
    path: Path, vocabulary: Vocabulary, wanted: Callable[[str | None], bool], answers: bool
) -> list[_Example]:
    """See read_sequences. answers: every line must say what its answer is."""
    from slmperf.data.text import read_lines, tokenize

    context, tokenizer = vocabulary.context, vocabulary.tokenizer
    if path.suffix == ".jsonl":
        lines = [line for line in read_lines(path) if wanted(line.split)]
        given, texts = [], [line for line in lines if line.input_ids is None]
        for line in lines:
            if line.input_ids == ():
                raise InputError(f"{line.where}: wanted token ids in input_ids, found none")
            if answers and line.prompt is None and line.prompt_tokens is None:
                raise InputError(
                    f"{line.where}: wanted a completion or prompt_tokens, as only answers count, "
                    "found neither"
                )
            _check_unicode(line.where, line.texts)
            if line.input_ids is not None:
                ids = np.array(line.input_ids[:context])
                told = line.prompt_tokens
                given.append(_Example(ids, None if told is None else np.arange(len(ids)) >= told))
        if texts and tokenizer is None:
            raise InputError(f"{texts[0].where}: text wants a tokenizer beside the model")
        if texts and tokenizer is not None:
            made = tokenize(texts, tokenizer, context, 1)[0]
            given += [_Example(one.input_ids, one.answer) for one in made]
        return given
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: wanted a file of UTF-8 text, found none") from None
    if answers:
        raise InputError(f"{path}: plain text has no answers, wanted JSONL as only they count")
    if tokenizer is None:
        raise InputError(f"{path}: text wants a tokenizer beside the model")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    room = context - len(begin)
    pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
    return [_Example(np.array(begin + piece), None) for piece in pieces]


def _check_unicode(where: str, texts: Iterable[str]) -> None:
    """InputError for text that no tokenizer takes: JSON may spell halves of a letter."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise InputError(f"{where}: wanted Unicode text, found a lone {half!a}") from None


def _bytes(sequences: Iterable[np.ndarray]) -> frozenset[bytes]:
    return frozenset(np.asarray(one, np.int64).tobytes() for one in sequences)


def _check_ids(path: Path, sequences: Sequence[np.ndarray], vocabulary: Vocabulary) -> None:
    largest = max(int(one.max()) for one in sequences)
    if largest >= vocabulary.size:
        raise InputError(
            f"{path}: token id {largest}, wanted ids below {vocabulary.size}: is the tokenizer "
            "that of another model?"
        )


def _batches(sequences: Sequence[_Example], answers_only: bool) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of sequences that are in order of length."""
    lengths = [len(one.input_ids) for one in sequences]
    start = 0
    while start < len(sequences):
        stop = start + 1
        while stop < len(sequences) and lengths[stop] * (stop + 1 - start) <= _BATCH_TOKENS:
            stop += 1
        ids = torch.zeros(stop - start, lengths[stop - 1], dtype=torch.int64)
        mask, weights = torch.zeros_like(ids), torch.zeros(ids.shape)
        for row, one in enumerate(sequences[start:stop]):
            size = len(one.input_ids)
            ids[row, :size] = torch.from_numpy(one.input_ids.astype(np.int64))
            mask[row, :size] = 1
            if one.answer is not None:  # a token counts for what is predicted from it: the next
                weights[row, : size - 1] = torch.from_numpy(one.answer[1:].astype(np.float32))
        start = stop
        batch = {"input_ids": ids, "attention_mask": mask}
        yield {**batch, "token_weights": weights} if answers_only else batch
