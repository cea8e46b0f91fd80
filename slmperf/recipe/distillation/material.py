"""material: the text of a run as token ids. What every stage learns from and is measured on.

It is made anew at every start of a run, in memory, as a function of the data and the recipe's
`data` section: bad data is found before anything is written, and a resumed run goes on with the
very same tokens (`Material.sha256` says so).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slmperf.check import InputError
from slmperf.data.problems import problems
from slmperf.data.text import (
    EVAL,
    TRAIN,
    Line,
    TextExample,
    load_tokenizer,
    read_lines,
    tokenize,
    train_text_tokenizer,
)
from slmperf.distill import hash_of_tokenizer
from slmperf.recipe.distillation.results import TextFacts
from slmperf.recipe.distillation.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORDER = 0  # seed of the order in which a share of the examples is taken


@dataclass(frozen=True, eq=False)
class Material:
    """Tokenizer and examples of a run."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    training: list[TextExample]
    validation: list[TextExample]
    facts: TextFacts
    sha256: str  # of everything that a stage can see

    def share(self, share: float) -> list[TextExample]:
        """That share of the training examples, in their order; smaller ones lie inside larger."""
        count = max(1, round(share * len(self.training)))
        drawn = np.random.default_rng(_ORDER).permutation(len(self.training))[:count]
        return [self.training[place] for place in sorted(drawn.tolist())]

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end a text."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]


def prepare(settings: Data, source: Path | None, folder: Path) -> Material:
    """Read, cut and tokenize. folder: what a tokenizer's path is seen from.

    InputError for a file that cannot be read, a line without a completion, no examples.
    """
    if source is None:
        lines, name = _problems(settings), "worked sums in words, generated"
    else:
        lines, name = read_lines(source), source.name
    training, validation = _split(settings, lines, name)
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(folder / settings.tokenizer)
    else:
        texts = [text for line in training for text in line.texts]
        if not texts:
            raise InputError("data.tokenizer: expected a folder, for lines that are token ids")
        tokenizer = train_text_tokenizer(texts, settings.vocabulary)
    examples, cut = tokenize(
        [*training, *validation], tokenizer, settings.context, settings.prompt_tokens
    )
    learned, measured = examples[: len(training)], examples[len(training) :]
    facts = TextFacts(
        source=name,
        synthetic=source is None,
        training=len(learned),
        validation=len(measured),
        training_tokens=sum(len(one.input_ids) for one in learned),
        validation_tokens=sum(int(one.answer.sum()) for one in measured),
        longest_prompt=max(one.prompt_tokens for one in learned),
        context=settings.context,
        cut=cut,
        vocabulary=len(tokenizer),
    )
    whole = _sha256(tokenizer, settings.context, learned, measured)
    return Material(tokenizer, settings.context, learned, measured, facts, whole)


def _problems(settings: Data) -> list[Line]:
    wanted = settings.problems
    count = wanted.train + wanted.validation
    made = problems(count, steps=(wanted.steps[0], wanted.steps[1]), seed=wanted.seed)
    return [
        Line(
            f"problem {number}",
            one.prompt,
            one.completion,
            None,
            None,
            TRAIN if number < wanted.train else EVAL,
        )
        for number, one in enumerate(made)
    ]


def _split(settings: Data, lines: list[Line], name: str) -> tuple[list[Line], list[Line]]:
    """Training and validation lines, each in their order."""
    if lines[0].split is None:
        count = max(1, round(settings.validation * len(lines)))
        drawn = np.random.default_rng(settings.seed).permutation(len(lines))[:count]
        chosen = set(drawn.tolist())
        marked = [EVAL if place in chosen else TRAIN for place in range(len(lines))]
    else:
        marked = [str(line.split) for line in lines]
    parts = []
    for wanted in (TRAIN, EVAL):
        part = [line for line, split in zip(lines, marked, strict=True) if split == wanted]
        if not part:
            found = ", ".join(sorted(set(marked)))
            raise InputError(f"{name}: no line is of split {wanted}, found {found}")
        parts.append(part)
    return parts[0], parts[1]


def _sha256(
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    training: Sequence[TextExample],
    validation: Sequence[TextExample],
) -> str:
    whole = hashlib.sha256(hash_of_tokenizer(tokenizer).encode())
    for part in (training, validation):
        whole.update(f"{context} {len(part)}\n".encode())
        for one in part:
            whole.update(f"{len(one.input_ids)} {one.prompt_tokens}\n".encode())
            whole.update(one.input_ids.tobytes())
    return whole.hexdigest()
