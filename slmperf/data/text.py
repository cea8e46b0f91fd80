"""Text to learn from: prompts with completions as token ids, from JSONL. One object a line:

    {"prompt": "Two and two make", "completion": " four.", "split": "train"}
    {"text": "Once upon a time there was a fox."}
    {"input_ids": [1, 403, 407, 261], "prompt_tokens": 2, "split": "eval"}

prompt, completion   both texts; they are tokenised by themselves and joined
text                 plain text; its first prompt_tokens tokens are the prompt
input_ids            token ids of prompt and completion, taken as they are
prompt_tokens        how many ids of text or input_ids are the prompt; or one number for all lines
                     that have none. At least 1 and less than all
split                "train" or "eval"; other words leave a line out. All lines have one, or none

Texts open with the tokenizer's beginning token and end with its end token, where it has them. What
goes beyond the context is cut off at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmperf.check import InputError
from slmperf.data.jsonl import read_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
SMALLEST_VOCABULARY = 256 + 3
TRAIN, EVAL = "train", "eval"
_FORMS = (("prompt", "completion"), ("text",), ("input_ids",))
# A word with the space before it, a single digit, a run of other signs, a run of spaces.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class Line:
    """One line of a file: texts, or ids. prompt_tokens: None where the line does not say."""

    where: str  # file and line, for errors
    prompt: str | None  # None: completion is plain text
    completion: str
    input_ids: tuple[int, ...] | None
    prompt_tokens: int | None
    split: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """What a tokenizer may be trained on."""
        if self.input_ids is not None:
            return ()
        return (self.completion,) if self.prompt is None else (self.prompt, self.completion)


@dataclass(frozen=True, eq=False)
class TextExample:
    """Token ids of a prompt and its completion. input_ids: int32 (T,). answer: bool (T,), True at
    the completion's tokens. key: the example's number in the data, the same under every cut.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    key: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first of the completion."""
        return int(self.answer.argmax())


def read_lines(path: str | Path) -> list[Line]:
    """Read a JSONL file, in order; blank lines are skipped.

    InputError with the line for anything the format above does not allow, and for an empty file.
    """
    lines = read_each(path, _line, "lines")
    without = next((line for line in lines if line.split is None), None)
    if without is not None and any(line.split is not None for line in lines):
        raise InputError(f"{without.where}: no key split, which other lines have")
    return lines


def _line(where: str, text: str) -> Line:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected one JSON object, found {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected one JSON object, found {type(value).__name__}")
    forms = [form for form in _FORMS if any(key in value for key in form)]
    if len(forms) != 1 or any(key not in value for key in forms[0]):
        raise InputError(
            f"{where}: expected prompt and completion, or text, or input_ids, "
            f"found {', '.join(map(str, value)) or 'nothing'}"
        )
    split, count = value.get("split"), value.get("prompt_tokens")
    if split is not None and not isinstance(split, str):
        raise InputError(f"{where}: split is {split!r}, expected a text")
    if count is not None and (type(count) is not int or count < 1):
        raise InputError(f"{where}: prompt_tokens is {count!r}, expected a whole number above 0")
    if "input_ids" in value:
        ids = value["input_ids"]
        if not isinstance(ids, list) or any(type(one) is not int or one < 0 for one in ids):
            raise InputError(f"{where}: input_ids is no list of token ids")
        return Line(where, None, "", tuple(ids), count, split)
    for key in forms[0]:
        if not isinstance(value[key], str):
            raise InputError(f"{where}: {key} is {value[key]!r}, expected a text")
    if "prompt" in value:
        if count is not None:
            raise InputError(f"{where}: prompt_tokens is given, expected none beside a prompt")
        return Line(where, value["prompt"], value["completion"], None, None, split)
    return Line(where, None, value["text"], None, count, split)


def tokenize(
    lines: Sequence[Line],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    prompt_tokens: int | None = None,
) -> tuple[list[TextExample], int]:
    """The lines as examples of at most `context` tokens, and how many had to be cut.

    prompt_tokens: of lines that are plain text or ids and do not say it themselves. InputError for
    a line without a completion, a prompt that leaves it no room, or an id the tokenizer has not.
    """
    examples, cut, vocabulary = [], 0, len(tokenizer)
    for key, line in enumerate(lines):
        ids, prompt = _ids(line, tokenizer, prompt_tokens)
        if max(ids, default=0) >= vocabulary:
            raise InputError(
                f"{line.where}: token id {max(ids)}, expected less than the tokenizer's "
                f"{vocabulary:,}"
            )
        if prompt >= context:
            raise InputError(
                f"{line.where}: the prompt has {prompt} tokens, expected less than the context "
                f"of {context}"
            )
        if len(ids) <= prompt:
            raise InputError(
                f"{line.where}: {len(ids)} tokens, {prompt} of them the prompt, expected a "
                "completion of at least 1"
            )
        cut += len(ids) > context
        ids = ids[:context]
        answer = np.arange(len(ids)) >= prompt
        examples.append(TextExample(np.array(ids, np.int32), answer, key))
    return examples, cut


def _ids(
    line: Line, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None
) -> tuple[list[int], int]:
    """Token ids of a line, and how many of them are the prompt."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if line.prompt is not None:
        prompt = begin + encode(line.prompt)
        if not prompt:
            raise InputError(f"{line.where}: the prompt is empty, expected at least one token")
        return prompt + encode(line.completion) + end, len(prompt)
    count = prompt_tokens if line.prompt_tokens is None else line.prompt_tokens
    if count is None:
        raise InputError(
            f"{line.where}: no completion, expected prompt and completion, or prompt_tokens "
            "in the line or in the recipe"
        )
    if line.input_ids is not None:
        return list(line.input_ids), count
    return begin + encode(line.completion) + end, count


def train_text_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens: words with the space before them, each digit
    by itself. The same texts give the same tokenizer.

    InputError when there is no room for the bytes, or no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST_VOCABULARY:
        raise InputError(
            f"tokenizer: vocabulary is {vocabulary}, expected at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 3 control tokens)"
        )
    ordered = sorted(texts)  # the order of first sight must not decide between equal pairs
    if not ordered:
        raise InputError("tokenizer: no text to train on, expected at least one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PADDING, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ordered, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; InputError in one line where there is none to be read."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with a tokenizer, found none")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: expected a tokenizer, {reason}") from None


def tokenizer_beside(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint's folder, None where it has none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    there = any((Path(folder) / name).is_file() for name in names)
    return load_tokenizer(folder) if there else None
