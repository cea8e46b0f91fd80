"""job: one call of `slmperf prune`, read and checked before any weights are loaded; then run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from slmperf.calibrate.texts import CalibrationSet
from slmperf.check import InputError
from slmperf.command.places import (
    check_places,
    device,
    full_config,
    load_model,
    write_checkpoint,
    written,
)
from slmperf.command.texts import Texts
from slmperf.engine.quality import Measure
from slmperf.models.files import write_atomically, write_folder
from slmperf.models.structure import FAMILIES, family_of
from slmperf.prune.command.asked import Asked
from slmperf.prune.command.report import plot_comparison, plot_curves
from slmperf.prune.compare import Comparison, compare_methods
from slmperf.prune.curves import error_curves
from slmperf.prune.model import Mode, Progress, prune_model
from slmperf.prune.results import PruneReport

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slmperf.command.terminal import Stages


class Done(NamedTuple):
    """A model that was pruned and written."""

    report: PruneReport
    before: float | None  # the measure of the model
    after: float | None
    notes: list[str]  # what else there is to say


@dataclass(frozen=True)
class Job:
    """A call that passed all checks."""

    folder: Path
    out: Path
    asked: Asked
    config: PretrainedConfig
    sizes: list[dict[str, Any]]
    notes: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    sets: list[CalibrationSet]
    measure: Measure | None

    @property
    def measure_name(self) -> str:
        """What is measured before and after, "" for nothing."""
        return self.measure.name if self.measure is not None else ""

    @classmethod
    def read(cls, folder: Path, out: Path, asked: Asked, texts: Texts) -> Job:
        """Check options, model and files; InputError in one line for the first thing wrong."""
        check_places(out, asked.spill)
        asked.check(texts)
        config = _config(folder)
        sizes, notes = asked.sizes(config)
        read = texts.read(folder, config)
        notes += read.notes
        return cls(
            folder, out, asked, config, sizes, notes, read.tokenizer, read.sets, read.measure
        )

    def prune(self, stage: Stages) -> Done:
        """Prune, measure, write; `stage` is told how far each part of it is."""
        if self.asked.stream:
            return self._stream(stage("prune"))
        model, batches = load_model(self.folder, self.config), self.sets[0].batches
        before = self.measure.of(model, stage("measure")) if self.measure is not None else None
        sizes, notes = self._sizes(model, stage)
        report = prune_model(model, batches, **sizes, **self._settings(), progress=stage("prune"))
        pruned = report.model
        assert pruned is not None  # it was just pruned
        more: dict[str, Any] = self._told()
        after = None
        if self.measure is not None:
            after = self.measure.of(pruned, stage("measure again"))
            more[self.measure.name] = {"before": before, "after": after}
        report = replace(report, settings={**report.settings, **more})
        write_checkpoint(
            self.out, pruned, self.tokenizer, lambda aside: _write_report(report, aside)
        )
        return Done(report, before, after, notes)

    def _sizes(self, model: PreTrainedModel, stage: Stages) -> tuple[dict[str, Any], list[str]]:
        """The sizes to prune to, and what bound the choice where it is made here, by layer."""
        if not self.asked.per_layer:
            return self.sizes[0], []
        curves = error_curves(
            model,
            self.sets[0].batches,
            prune=self.asked.moves,
            heads=self.asked.head_mode,
            damping=self.asked.damping,
            source=self.sets[0].source,
            tokenizer=self.tokenizer,
            spill=self.asked.spill,
            progress=stage("error curves"),
        )
        target = self.asked.targets[0]
        budget = self.asked.budget(self.config, target, curves)
        sizes = self.asked.sizes_of(budget)
        self.asked.check_smaller(self.config, sizes)
        return sizes, [f"{target}: {note}" for note in budget.notes]

    def _stream(self, progress: Progress) -> Done:
        """Prune from folder to folder, a block in memory at a time."""
        from slmperf.prune.checkpoint import prune_checkpoint

        def told(report: PruneReport) -> PruneReport:
            return replace(report, settings={**report.settings, **self._told()})

        with written(self.out):
            report = prune_checkpoint(
                self.folder,
                self.out,
                self.sets[0].batches,
                **self.sizes[0],
                **self._settings(),
                device=device(),
                progress=progress,
                finish=lambda aside, report: _write_report(told(report), aside),
            )
        return Done(told(report), None, None, [])

    def _settings(self) -> dict[str, Any]:
        """What prune_model and prune_checkpoint are given beside sizes and batches."""
        return {
            "heads": self.asked.head_mode,
            "mode": self.asked.mode,
            "method": self.asked.methods[0],
            "damping": self.asked.damping,
            "swaps": self.asked.swaps,
            "source": self.sets[0].source,
            "tokenizer": self.tokenizer,
            "spill": self.asked.spill,
        }

    def _told(self) -> dict[str, Any]:
        """What the report's settings say beside those of prune_model."""
        base = {"base": str(self.folder)}
        return base | {"target": str(self.asked.targets[0])} if self.asked.targets else base

    def compare(self, stage: Stages) -> Comparison:
        """Prune copies, measure, write the comparison."""
        measure = self.measure
        found = compare_methods(
            load_model(self.folder, self.config),
            {one.source: one.batches for one in self.sets},
            self.sizes,
            methods=self.asked.methods,
            mode=cast(Mode, self.asked.mode),  # checked: one of MODES
            settings={
                "heads": self.asked.head_mode,
                "damping": self.asked.damping,
                "swaps": self.asked.swaps,
                "tokenizer": self.tokenizer,
                "spill": self.asked.spill,
            },
            measure=self.measure_name,
            rises=measure is not None and measure.rises,
            score=None if measure is None else lambda model: measure.of(model, None),
            progress=stage("compare"),
        )
        with written(self.out), write_folder(self.out) as aside:
            write_atomically(aside / "comparison.json", found.to_json())
            plot_comparison(found, aside / "comparison.svg")
        return found


def _write_report(report: PruneReport, folder: Path) -> None:
    write_atomically(folder / "pruning.json", report.to_json())
    if any(layer.curve for layer in report.layers):
        plot_curves(report.layers, folder / "pruning.svg")


def _config(folder: Path) -> PretrainedConfig:
    config = full_config(folder, "prune")
    if family_of(config) not in FAMILIES:
        names = ", ".join(FAMILIES.values())
        raise InputError(f"{folder}: {config.model_type} cannot be pruned; wanted {names}")
    return config
