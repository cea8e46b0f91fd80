"""job: one call of `slmperf eval`, read and checked before any weights are loaded; then run."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf import models
from slmperf.bench.evaluation import harness
from slmperf.bench.evaluation.layers import LayerError, check_layers, layer_errors
from slmperf.bench.evaluation.report import Figure, Found, to_json
from slmperf.calibrate.manifest import check_tokenizer
from slmperf.calibrate.texts import (
    CalibrationSet,
    Vocabulary,
    has_splits,
    holds_prompts,
    read_calibration,
)
from slmperf.check import InputError
from slmperf.command import EVAL_SPLIT
from slmperf.command.places import check_writable, load_model, model_config, written
from slmperf.command.texts import vocabulary_of
from slmperf.data.text import tokenizer_beside
from slmperf.engine.quality import Measure, read_measure
from slmperf.models.files import write_atomically
from slmperf.models.quantized import held_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from slmperf.command.terminal import Stages

_REPORTS = ("quantization.json", "pruning.json")  # what the commands leave beside a model


@dataclass(frozen=True)
class Asked:
    """The options; None or empty: not given."""

    text: Path | None
    prompts: Path | None
    tasks: tuple[str, ...]
    task_folder: Path | None
    layers: bool
    calibration: Path | None
    held_out: Path | None
    samples: int
    context: int | None
    eval_split: str
    out: Path | None

    def check(self) -> None:
        """InputError for options that are wrong, or of no use without another."""
        if not (self.text or self.prompts or self.tasks or self.layers):
            raise InputError(
                "wanted something to measure (--text, --prompts, --tasks or --layers), found none"
            )
        if self.layers and self.calibration is None:
            raise InputError("--layers: wanted --calibration, the text to take, found none")
        if self.samples < 1:
            raise InputError(f"--samples: wanted a number >= 1, found {self.samples}")
        split = [path for path in (self.text, self.held_out) if path is not None]
        for option, given, useful, wanted in (
            ("--calibration", self.calibration is not None, self.layers, "--layers"),
            ("--held-out", self.held_out is not None, self.layers, "--layers"),
            ("--task-folder", self.task_folder is not None, bool(self.tasks), "--tasks"),
            ("--eval-split", self.eval_split != EVAL_SPLIT, bool(split), "--text or --held-out"),
        ):
            if given and not useful:
                raise InputError(f"{option}: wanted {wanted} beside it, found none")
        if self.eval_split != EVAL_SPLIT and not any(map(has_splits, split)):
            raise InputError("--eval-split: wanted JSONL whose lines have splits, found none")


@dataclass(frozen=True)
class Job:
    """A call that passed all checks."""

    folder: Path
    base: Path
    asked: Asked
    configs: dict[Path, PretrainedConfig]
    vocabulary: Vocabulary
    measures: list[Measure]
    sets: list[CalibrationSet]  # of --layers: calibration and, where given, held out
    notes: list[str]

    @classmethod
    def read(cls, folder: Path, base: Path | None, asked: Asked) -> Job:
        """Check options, models and files; InputError in one line for the first thing wrong."""
        asked.check()
        if asked.out is not None:
            check_writable(asked.out)
        config = model_config(folder)
        base = base or _base_of(folder)
        configs = {base: model_config(base), folder: config}
        if configs[base].vocab_size != config.vocab_size:
            raise InputError(
                f"--base: wanted {config.vocab_size} tokens as in {folder}, "
                f"found {configs[base].vocab_size} in {base}"
            )
        if asked.layers:
            check_layers(configs[base], config)
        vocabulary = vocabulary_of(folder, config, asked.context)
        theirs = tokenizer_beside(base)
        if vocabulary.tokenizer is None:
            vocabulary = vocabulary._replace(tokenizer=theirs)
        elif theirs is not None:
            check_tokenizer(theirs, vocabulary.tokenizer)
        if asked.tasks:
            harness.check(asked.tasks, asked.task_folder, vocabulary.tokenizer)
        measures = []
        for option, path in (("--text", asked.text), ("--prompts", asked.prompts)):
            if path is None:
                continue
            if holds_prompts(path) != (option == "--prompts"):
                raise InputError(f"{option}: {path}: wanted {_KINDS[option]}, found the other kind")
            measures.append(read_measure(path, vocabulary, split=asked.eval_split))
        sets = []
        for path, held_out in ((asked.calibration, False), (asked.held_out, True)):
            if path is not None:
                sets.append(
                    read_calibration(
                        path,
                        "held out" if held_out else "calibration",
                        vocabulary,
                        samples=asked.samples,
                        split=asked.eval_split if held_out else None,
                        packed=True,
                        held_out=held_out,
                    )
                )
        notes = [note for measure in measures for one in sets[:1] if (note := measure.seen(one))]
        return cls(folder, base, asked, configs, vocabulary, measures, sets, notes)

    def measure(self, stage: Stages) -> Found:
        """Measure the base, then the model; `stage` is told how far each part of it is."""
        start = time.perf_counter()
        found: list[dict[str, Figure]] = []
        sizes: list[dict[str, float]] = []
        errors: list[LayerError] = []
        kept = None  # the base, where the errors of layers are asked for
        for place, folder in (("before", self.base), ("after", self.folder)):
            model = load_model(folder, self.configs[folder])
            sizes.append(
                {
                    "parameters": models.parameters(model),
                    "weights, MiB": models.weight_bytes(model) / 2**20,
                }
            )
            with held_weights(model):  # many batches in a row
                found.append(self._figures(model, place, stage))
            if kept is not None:
                texts = [one.batches for one in self.sets]
                errors = layer_errors(kept, model, texts, progress=stage("layers"))
            kept = model if self.asked.layers else None
            del model  # or the next is loaded beside it
        return Found(
            model=str(self.folder),
            base=str(self.base),
            sizes=(sizes[0], sizes[1]),
            figures=(found[0], found[1]),
            layers=errors,
            texts=[one.source for one in self.sets],
            seconds=time.perf_counter() - start,
        )

    def _figures(self, model: PreTrainedModel, place: str, stage: Stages) -> dict[str, Figure]:
        """All figures of a model, by name."""
        found: dict[str, Figure] = {}
        for measure in self.measures:
            values = measure.figures(model, stage(f"{measure.name} {place}"))
            found |= {name: Figure(value, measure.rises) for name, value in values.items()}
        if self.asked.tasks:
            tokenizer, folder = self.vocabulary.tokenizer, self.asked.task_folder
            found |= harness.scores(model, tokenizer, self.asked.tasks, folder)
        return found

    def write(self, found: Found) -> None:
        """Write the figures as JSON."""
        assert self.asked.out is not None  # the caller looked
        with written(self.asked.out):
            write_atomically(self.asked.out, to_json(found))


_KINDS = {"--text": "text", "--prompts": "ranking prompts"}


def _base_of(folder: Path) -> Path:
    """The model that `folder` was made from, as its report says."""
    for name in _REPORTS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            told: Any = json.loads(path.read_text(encoding="utf-8"))
            base = told["settings"].get("base")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: wanted the report of a command: {error!r}") from None
        if base is None:
            continue
        if not Path(base).is_dir():
            raise InputError(f"--base: wanted the folder that {path} names, found no {base}")
        return Path(base)
    raise InputError(
        f"{folder}: wanted --base, the model it was made from; no {' or '.join(_REPORTS)} names it"
    )
