"""texts: the options that say what to calibrate and measure on, and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from slmperf.calibrate.texts import CalibrationSet, Vocabulary, has_splits, read_calibration
from slmperf.check import InputError
from slmperf.command import EVAL_SPLIT
from slmperf.data.text import tokenizer_beside
from slmperf.engine.quality import Measure, read_measure

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LONGEST = 2048  # tokens of a calibration sequence where nothing else is said


class TextsRead(NamedTuple):
    """What the files hold, as one model reads them."""

    tokenizer: PreTrainedTokenizerBase | None  # the model's own; None: files hold token ids
    sets: list[CalibrationSet]
    measure: Measure | None
    notes: list[str]  # what is measured and calibrates, too


@dataclass(frozen=True)
class Texts:
    """The options, as they were given."""

    files: Mapping[str, Path]  # "in-domain" and "generic", what is given of them
    split: str | None
    samples: int
    context: int | None
    evaluate: Path | None
    eval_split: str
    generic_samples: int | None = None  # None: as `samples`
    answers_only: bool = False
    packed: bool = False  # see `read_calibration`

    def samples_of(self, source: str) -> int:
        """Calibration sequences of a file, at most."""
        own = self.generic_samples if source == "generic" else None
        return self.samples if own is None else own

    def check(self) -> None:
        """InputError for what is wrong without a look at the files."""
        for option, count in (
            ("--samples", self.samples),
            ("--generic-samples", self.samples_of("generic")),
        ):
            if count < 1:
                raise InputError(f"{option}: wanted a number >= 1, found {count}")
        if self.eval_split != EVAL_SPLIT and self.evaluate is None:
            raise InputError("--eval-split: wanted --eval beside it, found none")

    def read(self, folder: Path, config: PretrainedConfig) -> TextsRead:
        """Read the files in token ids of the model in `folder`; InputError for the first thing
        wrong with one.
        """
        vocabulary = vocabulary_of(folder, config, self.context)
        for option, given, paths in (
            ("--split", self.split is not None, self.files.values()),
            ("--eval-split", self.eval_split != EVAL_SPLIT, filter(None, [self.evaluate])),
        ):
            if given and not any(map(has_splits, paths)):
                raise InputError(f"{option}: wanted JSONL whose lines have splits, found none")
        sets = [
            read_calibration(
                path,
                source,
                vocabulary,
                samples=self.samples_of(source),
                split=self.split,
                answers_only=self.answers_only,
                packed=self.packed,
            )
            for source, path in self.files.items()
        ]
        measure = None
        notes: list[str] = []
        if self.evaluate is not None:
            measure = read_measure(self.evaluate, vocabulary, split=self.eval_split)
            notes += filter(None, map(measure.seen, sets))
        return TextsRead(vocabulary.tokenizer, sets, measure, notes)


def vocabulary_of(folder: Path, config: PretrainedConfig, context: int | None) -> Vocabulary:
    """How the model in `folder` reads text, `context` tokens at a time; None: as trained, at most
    2048.
    """
    longest = int(getattr(config, "max_position_embeddings", _LONGEST))
    if context is not None and not 2 <= context <= longest:
        raise InputError(f"--context: wanted 2 to {longest} tokens, found {context}")
    tokenizer = tokenizer_beside(folder)
    return Vocabulary(tokenizer, config.vocab_size, context or min(longest, _LONGEST))
