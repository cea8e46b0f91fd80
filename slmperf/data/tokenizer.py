"""A byte-level BPE for prompts, trained on the data and saved as a Transformers fast tokenizer.

Every template word (slmperf.data.template) is one token that nothing merges with, and a field of an
item's text begins a new token. Other spaces do not split: merges may run across the words of a
title, so that a frequent title becomes one or two tokens and a history row stays short.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slmperf.check import InputError
from slmperf.data.template import BEGIN, CONTROL_WORDS, END, FIELDS, PADDING, WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMALLEST_VOCABULARY = 256 + len(CONTROL_WORDS) + len(WORDS)
# Counting more texts than this takes time and changes no merge that matters.
MOST_TEXTS = 100_000

_TEMPLATE = re.compile("|".join(re.escape(word) for word in (*CONTROL_WORDS, *WORDS)))


def _repeated(texts: Mapping[str, int]) -> Iterable[str]:
    total = sum(texts.values())
    scale = min(1.0, MOST_TEXTS / max(1, total))
    # Sorted, because the order of first sight must not decide between equally frequent pairs.
    for text, count in sorted(texts.items()):
        for _ in range(max(1, round(count * scale))):
            yield text


def _pieces(texts: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    counted = texts.items() if isinstance(texts, Mapping) else ((text, 1) for text in texts)
    pieces: dict[str, int] = {}
    for text, count in counted:
        for piece in _TEMPLATE.split(text):
            if piece:
                pieces[piece] = pieces.get(piece, 0) + count
    return pieces


def train_tokenizer(
    texts: Iterable[str] | Mapping[str, int],
    vocab_size: int,
    folder: str | Path | None = None,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most vocab_size tokens; with a folder, save it there too.

    texts: texts, or texts with how often each occurs. The result depends on nothing else: training
    twice on the same counts gives the same tokenizer. A small data set may hold fewer merges than
    asked for; then the vocabulary is smaller. InputError when vocab_size has no room for the bytes
    and the template words.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"tokenizer: vocab_size is {vocab_size}, expected at least {SMALLEST_VOCABULARY} "
            "(256 bytes and the template's words)"
        )
    pieces = _pieces(texts)
    if not pieces:
        raise InputError("tokenizer: no text to train on, expected at least one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(map(re.escape, FIELDS))), "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [AddedToken(word, normalized=False) for word in (*CONTROL_WORDS, *WORDS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=words,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(pieces), trainer=trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_with_visible_words(tokenizer.to_str())),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    if folder is not None:
        _save(result, Path(folder))
    return result


def _with_visible_words(state: str) -> str:
    """The trainer marks all its words as special, and special ones vanish from a decoded text."""
    tokenizer = json.loads(state)
    for word in tokenizer["added_tokens"]:
        word["special"] = word["content"] in CONTROL_WORDS
    return json.dumps(tokenizer)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write each file aside on the same disk, then rename: a killed run leaves no half file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as aside:
        tokenizer.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, folder / file.name)
