"""texts: files as calibration sets.

.jsonl with task, history, candidate ...   ranking prompts (`slmperf.data.jsonl`): the earlier
              ones of every member calibrate, the later ones are for measuring
other .jsonl  text or token ids (`slmperf.data.text`), a sequence a line
anything else plain text, cut into sequences as long as the context

What a model is measured on is read from the same kinds of files: `slmperf.engine.quality`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slmperf.data import Prompt, PromptBuilder

_BATCH_TOKENS = 8192  # padded tokens of a batch, at least one sequence
_DRAW = 0  # seed of the draw of sequences: the same file gives the same calibration set
_WHOLE = 2**40  # tokens: no line has more
HISTORY = 0.8  # share of a member's prompts, in order of time, that calibrate


class Vocabulary(NamedTuple):
    """How text becomes token ids of one model."""

    tokenizer: PreTrainedTokenizerBase | None  # None: files hold token ids
    size: int  # ids the model knows
    context: int  # tokens of a sequence


class CalibrationSet(NamedTuple):
    """Batches of a file, as `prune_model` and `quantize_model` take them, in order of length."""

    source: str  # "in-domain: FILE" or "generic: FILE"
    batches: list[dict[str, Tensor]]
    sequences: frozenset[bytes]  # the token ids (T,) of each sequence of the file, int64


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
    packed: bool = False,
    held_out: bool = False,
) -> CalibrationSet:
    """At most `samples` sequences of a file, drawn once.

    split: only lines of this split; None: all but those of the split "eval".
    held_out: the other way round: lines of the split `split` or "eval" and those without a split,
        late prompts instead of early ones; for errors on text that calibrates nothing.
    answers_only: only the tokens count from which those of an answer (ranking prompts) or a
        completion are predicted.
    packed: `samples` are pieces of `vocabulary.context` tokens, put together from sequences
        (`pack`); all tokens count.
    Raises InputError for a file without a sequence, for ids that the model does not know, and for
    lines that do not say what their answer is where only answers count.
    """
    if holds_prompts(path):
        builder, prompts = ranking_prompts(path, vocabulary)
        training, ranking = builder.from_prompts(prompts, HISTORY)
        found = [_Example(one.input_ids, one.answer) for one in training]
        if held_out:  # of a prompt's candidates the first
            found = [_Example(np.append(one.prefix, one.candidates[0]), None) for one in ranking]
    else:
        found = _examples(
            path,
            vocabulary,
            measured(split) if held_out else lambda one: one == split if split else one != "eval",
            answers=answers_only,
            whole=packed,
        )
    if answers_only:  # without a token before an answer nothing of a sequence would count
        found = [one for one in found if one.answer is not None and one.answer[1:].any()]
    if not found:
        raise InputError(f"{path}: wanted calibration sequences, found none")
    check_ids(path, [one.input_ids for one in found], vocabulary)
    if packed:
        pieces, used = pack([one.input_ids for one in found], samples, vocabulary.context)
        chosen = sorted((_Example(piece, None) for piece in pieces), key=_length)
        ids = ids_of(found[i].input_ids[: vocabulary.context] for i in used)
    else:
        drawn = np.random.default_rng(_DRAW).permutation(len(found))[:samples]
        chosen = sorted((found[i] for i in drawn.tolist()), key=_length)
        ids = ids_of(one.input_ids for one in chosen)
    return CalibrationSet(f"{source}: {path.name}", list(_batches(chosen, answers_only)), ids)


def pack(
    sequences: Sequence[np.ndarray], samples: int, context: int
) -> tuple[list[np.ndarray], list[int]]:
    """At most `samples` pieces of `context` tokens from sequences (T,) drawn once and put one
    behind the other, and the numbers of those that were used. Where they are too few for all
    pieces the last one is shorter: nothing is padded and nothing lost.
    """
    used, pieces = [], []
    room = samples * context
    for number in np.random.default_rng(_DRAW).permutation(len(sequences)).tolist():
        if room <= 0:
            break
        used.append(number)
        pieces.append(sequences[number][:room])
        room -= len(pieces[-1])
    whole = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    return [whole[start : start + context] for start in range(0, len(whole), context)], used


def packed_batches(
    sequences: Sequence[np.ndarray], samples: int, context: int
) -> list[dict[str, Tensor]]:
    """Batches of the pieces that `pack` makes of sequences (T,) of token ids."""
    pieces, _ = pack(sequences, samples, context)
    chosen = sorted((_Example(piece, None) for piece in pieces), key=_length)
    return list(_batches(chosen, answers_only=False))


def measured(split: str | None) -> Callable[[str | None], bool]:
    """Whether a line's split is to be measured: it is `split`, or "eval" for None, or not said."""
    return lambda one: one in (split or "eval", None)


def has_splits(path: Path) -> bool:
    """Whether lines of the file may have splits: no plain text, no ranking prompts."""
    return path.suffix == ".jsonl" and not holds_prompts(path)


def holds_prompts(path: Path) -> bool:
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


def ranking_prompts(path: Path, vocabulary: Vocabulary) -> tuple[PromptBuilder, list[Prompt]]:
    """The ranking prompts of a file, and what makes token ids of them; InputError without a
    tokenizer.
    """
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
    return [one.input_ids for one in _examples(path, vocabulary, wanted)]


def _examples(
    path: Path,
    vocabulary: Vocabulary,
    wanted: Callable[[str | None], bool],
    *,
    answers: bool = False,
    whole: bool = False,
) -> list[_Example]:
    """See read_sequences. answers: every line must say what its answer is. whole: lines are not cut
    to the context.
    """
    from slmperf.data.text import read_lines, tokenize

    context, tokenizer = vocabulary.context, vocabulary.tokenizer
    if path.suffix == ".jsonl":
        context = _WHOLE if whole else context
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


def ids_of(sequences: Iterable[np.ndarray]) -> frozenset[bytes]:
    """The token ids (T,) of each, int64, as bytes: what two files have in common."""
    return frozenset(np.asarray(one, np.int64).tobytes() for one in sequences)


def check_ids(path: Path, sequences: Sequence[np.ndarray], vocabulary: Vocabulary) -> None:
    """InputError for token ids (T,) that the model does not know."""
    largest = max(int(one.max()) for one in sequences)
    if largest >= vocabulary.size:
        raise InputError(
            f"{path}: token id {largest}, wanted ids below {vocabulary.size}: is the tokenizer "
            "that of another model?"
        )


def _length(example: _Example) -> int:
    return len(example.input_ids)


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
