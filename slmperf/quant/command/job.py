"""job: one call of `slmperf quantize`, read and checked before any weights are loaded; then run."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slmperf.calibrate.texts import CalibrationSet, read_calibration
from slmperf.check import InputError
from slmperf.command.places import (
    check_places,
    device,
    full_config,
    load_model,
    write_checkpoint,
    written,
)
from slmperf.command.texts import Texts, vocabulary_of
from slmperf.engine.quality import Measure
from slmperf.models.files import write_atomically
from slmperf.models.quantized import held_weights
from slmperf.models.stored import empty_model
from slmperf.quant.artefacts import MANIFEST, difference
from slmperf.quant.checkpoint import quantize_checkpoint
from slmperf.quant.command.report import plot_layers
from slmperf.quant.driver import Checked
from slmperf.quant.model import quantize_model
from slmperf.quant.results import QuantReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slmperf.command.terminal import Move, Stages

_LOG = logging.getLogger("slmperf")
_REPORT = "quantization.json"
_NONE = "none"  # the word for "leave these layers" in an override


class Done(NamedTuple):
    """A model that was quantised and written; figures by name."""

    report: QuantReport
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """The options that say what to quantise and how; None: not given."""

    scheme: str
    override: tuple[str, ...]
    method: str | None
    group_size: int | None
    damping: float | None
    kv_cache: bool
    no_smooth: bool
    held_out: Path | None
    spill: Path | None
    stream: bool

    @property
    def overrides(self) -> dict[str, str | None]:
        """Scheme or None by pattern, the last one given last."""
        found: dict[str, str | None] = {}
        for text in self.override:
            pattern, equals, scheme = text.rpartition("=")
            if not (pattern.strip() and equals and scheme.strip()):
                raise InputError(f"--override: wanted PATTERN=SCHEME or PATTERN=none, found {text}")
            found.pop(pattern.strip(), None)
            found[pattern.strip()] = None if scheme.strip() == _NONE else scheme.strip()
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What `quantize_model` and `quantize_checkpoint` are given of this."""
        return {
            "overrides": self.overrides,
            "method": self.method,
            "group_size": self.group_size,
            "damping": self.damping,
            "smooth": False if self.no_smooth else None,
            "kv_cache": self.kv_cache,
        }

    def check(self, texts: Texts) -> None:
        """InputError for options that are wrong for any model, or of no use without another."""
        texts.check()
        if len(texts.files) > 1:
            raise InputError("wanted one of --calibration and --generic, found both")
        if texts.split is not None and not texts.files:
            raise InputError("--split: wanted --calibration or --generic beside it, found none")
        if self.held_out is not None and not texts.files:
            raise InputError("--held-out: wanted --calibration or --generic beside it, found none")
        if self.stream and texts.evaluate is not None:
            raise InputError("--stream: wanted without --eval; slmperf eval measures what it wrote")

    def check_model(self, config: PretrainedConfig, *, text: bool) -> Checked:
        """What the model is to become, of which only shapes are made; InputError for what does not
        fit it, or needs text.
        """
        model = empty_model(config, config.dtype or torch.float32)
        checked = Checked.of(model, self.scheme, calibrated=text, **self.settings)
        plan = checked.plan
        if self.no_smooth and not any(scheme.smooth for scheme in plan.schemes.values()):
            names = ", ".join(plan.schemes)
            raise InputError(f"--no-smooth: wanted a scheme that smooths, found {names}")
        needs = plan.needs_calibration() or ("--kv-cache" if self.kv_cache else "")
        if needs and not text:
            raise InputError(f"wanted --calibration or --generic, text for {needs}, found neither")
        return checked


@dataclass(frozen=True)
class Job:
    """A call that passed all checks."""

    folder: Path
    out: Path
    asked: Asked
    config: PretrainedConfig
    notes: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    text: CalibrationSet | None
    held_out: CalibrationSet | None
    measure: Measure | None

    @classmethod
    def read(cls, folder: Path, out: Path, asked: Asked, texts: Texts) -> Job:
        """Check options, model and files; InputError in one line for the first thing wrong."""
        parts = _parts(out)
        if parts.exists() and (out / _REPORT).is_file():
            raise InputError(
                f"{out}: wanted a new or empty folder, found a finished quantisation, which needs "
                f"{parts} no more: delete that"
            )
        check_places(out, asked.spill)
        asked.check(texts)
        config = full_config(folder, "quantise")
        checked = asked.check_model(config, text=bool(texts.files))
        read = texts.read(folder, config)
        held_out = None
        if asked.held_out is not None:
            held_out = read_calibration(
                asked.held_out,
                "held out",
                vocabulary_of(folder, config, texts.context),
                samples=texts.samples,
                split=texts.eval_split,
                packed=True,
                held_out=True,
            )
        notes = list(read.notes)
        text = read.sets[0] if read.sets else None
        if (parts / MANIFEST).is_file():
            batches = (None if one is None else one.batches for one in (text, held_out))
            if told := difference(parts, checked.made_with(*batches)):
                raise InputError(f"{parts}: wanted blocks of {told}; delete {parts} to begin anew")
            notes.append(f"going on with the blocks in {parts}; delete it to begin anew")
        return cls(folder, out, asked, config, notes, read.tokenizer, text, held_out, read.measure)

    def quantize(self, stage: Stages) -> Done:
        """Measure, quantise, measure again, write; `stage` is told how far each part of it is."""
        if self.asked.stream:
            return self._stream(stage("quantise"))
        model = load_model(self.folder, self.config)
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        if self.measure is not None:
            before = self.measure.figures(model, stage("measure"))
        report = quantize_model(
            model, self.asked.scheme, **self._arguments(), progress=stage("quantise")
        )
        if self.measure is not None:
            after = self._measured_again(model, before, stage("measure again"))
        report = self._told(report, before, after)
        write_checkpoint(
            self.out, model, self.tokenizer, lambda aside: _write_report(report, aside)
        )
        shutil.rmtree(_parts(self.out))
        return Done(report, before, after)

    def _measured_again(
        self, model: PreTrainedModel, before: Mapping[str, float], progress: Move
    ) -> dict[str, float]:
        """The figures of the quantised model; NaN where it has none, such as AUC of scores that are
        not finite: what was made is written all the same.
        """
        assert self.measure is not None  # the caller looked
        try:
            with held_weights(model):
                return self.measure.figures(model, progress)
        except InputError as error:
            _LOG.warning(f"measured again: {error}")
            return dict.fromkeys(before, math.nan)

    def _stream(self, progress: Move) -> Done:
        """Quantise from folder to folder, a block in memory at a time."""
        with written(self.out):
            report = quantize_checkpoint(
                self.folder,
                self.out,
                self.asked.scheme,
                **self._arguments(),
                device=device(),
                progress=progress,
                finish=lambda aside, report: _write_report(self._told(report, {}, {}), aside),
            )
        shutil.rmtree(_parts(self.out))
        return Done(self._told(report, {}, {}), {}, {})

    def _arguments(self) -> dict[str, Any]:
        """What both ways to quantise are given."""
        return {
            "calibration": None if self.text is None else self.text.batches,
            **self.asked.settings,
            "held_out": None if self.held_out is None else self.held_out.batches,
            "source": "" if self.text is None else self.text.source,
            "tokenizer": self.tokenizer,
            "spill": self.asked.spill,
            "resume": _parts(self.out),
        }

    def _told(
        self, report: QuantReport, before: Mapping[str, float], after: Mapping[str, float]
    ) -> QuantReport:
        """The report with what the command knows beside it."""
        more = {name: {"before": before[name], "after": after[name]} for name in before}
        return replace(report, settings={**report.settings, "base": str(self.folder), **more})


def _parts(out: Path) -> Path:
    """Where finished blocks are kept until all are."""
    return out.with_name(f"{out.name}.parts")


def _write_report(report: QuantReport, folder: Path) -> None:
    write_atomically(folder / _REPORT, report.to_json())
    plot_layers(report.layers, folder / "quantization.svg")
