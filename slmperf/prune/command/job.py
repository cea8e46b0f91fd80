"""job: one call of `slmperf prune`, read and checked before any weights are loaded; then run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from slmperf import arch, models
from slmperf.check import InputError, parse_tokens
from slmperf.data.text import load_tokenizer
from slmperf.models.checkpoint import read_config
from slmperf.models.files import write_atomically, write_folder
from slmperf.plan import LatencyModel
from slmperf.prune.block import BlockSizes
from slmperf.prune.budget import Budget, solve_budget
from slmperf.prune.command.commands import EVAL_SPLIT, GPU, GRANULARITY, PROMPT, TENSOR_PARALLEL
from slmperf.prune.command.compare import Comparison, compare_methods
from slmperf.prune.command.report import plot_comparison, plot_curves
from slmperf.prune.command.texts import (
    CalibrationSet,
    Measure,
    Vocabulary,
    read_calibration,
    read_measure,
)
from slmperf.prune.curves import error_curves
from slmperf.prune.heads import layer_sizes
from slmperf.prune.layer.methods import METHODS
from slmperf.prune.model import MODES, Mode, prune_model
from slmperf.prune.results import PruneReport
from slmperf.prune.targets import Target, parse_target

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LONGEST = 2048  # tokens of a calibration sequence where nothing else is said
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SIZES = {
    "intermediate_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
}
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Asked:
    """The options of the command that say what to prune and how; empty or None: not given."""

    params: str
    kv_bytes: str
    milliseconds: float | None
    intermediate: str
    heads: int | None
    kv_heads: int | None
    head_mode: str
    dimensions: str
    granularity: int
    per_layer: bool
    gpu: str
    prompt: str
    tp: int
    mode: str
    method: str
    damping: float
    swaps: int
    compare: bool
    spill: Path | None
    stream: bool

    @property
    def methods(self) -> list[str]:
        """What `method` names; without it OSSCAR, or all to compare."""
        named = _words(self.method)
        return named or (list(METHODS) if self.compare else ["osscar"])

    @property
    def targets(self) -> list[Target]:
        """What is to be met, in parameters, bytes or milliseconds."""
        texts = {
            "parameters": _numbers(self.params),
            "KV bytes per token": [
                f"{one} bytes" if one.replace(",", "").isdigit() else one
                for one in _numbers(self.kv_bytes)
            ],
            "milliseconds": [] if self.milliseconds is None else [f"{self.milliseconds} ms"],
        }
        found = []
        for kind, words in texts.items():
            for target in map(parse_target, words):
                if target.kind != kind:
                    raise InputError(f"target: wanted {kind}, found {target}")
                found.append(target)
        return found

    @property
    def moves(self) -> tuple[str, ...]:
        """The dimensions that a target may shrink."""
        return tuple(_words(self.dimensions)) or (("attention",) if self.kv_bytes else ("mlp",))

    def budget(self, config: PretrainedConfig, target: Target, curves: Any = None) -> Budget:
        """The sizes that meet a target."""
        is_file = self.gpu.endswith(".json") or Path(self.gpu).is_file()
        return solve_budget(
            config,
            target,
            prune=self.moves,
            granularity=self.granularity,
            heads=self.head_mode,
            curves=curves,
            gpu=LatencyModel.load(self.gpu) if is_file else LatencyModel.preset(self.gpu),
            context=parse_tokens(self.prompt, "prompt"),
            tensor_parallel=self.tp,
        )

    def sizes_of(self, budget: Budget) -> dict[str, Any]:
        """The arguments of `prune_model` for a budget."""
        found: dict[str, Any] = {}
        if "mlp" in self.moves:
            found["intermediate_size"] = budget.intermediate_size
        if "attention" in self.moves:
            found["attention_heads"] = budget.attention_heads
            found["key_value_heads"] = budget.key_value_heads
        return found


class Done(NamedTuple):
    """A model that was pruned and written."""

    report: PruneReport
    before: float | None  # the measure of the model
    after: float | None


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
    def read(
        cls,
        folder: Path,
        out: Path,
        asked: Asked,
        files: Mapping[str, Path],
        *,
        split: str | None,
        samples: int,
        context: int | None,
        evaluate: Path | None,
        eval_split: str,
    ) -> Job:
        """Check options, model and files; InputError in one line for the first thing wrong.

        files: "in-domain" and "generic", what to calibrate on.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: wanted a new or empty folder, found files")
        _check_settings(asked, samples, files, evaluate, eval_split)
        config = _config(folder)
        sizes, notes = _sizes(asked, config)
        tokenizer = None
        if any((folder / name).is_file() for name in _TOKENIZER):
            tokenizer = load_tokenizer(folder)
        longest = int(getattr(config, "max_position_embeddings", _LONGEST))
        if context is not None and not 2 <= context <= longest:
            raise InputError(f"--context: wanted 2 to {longest} tokens, found {context}")
        vocabulary = Vocabulary(tokenizer, config.vocab_size, context or min(longest, _LONGEST))
        sets = [
            read_calibration(path, source, vocabulary, samples=samples, split=split)
            for source, path in files.items()
        ]
        measure = None
        if evaluate is not None:
            measure = read_measure(evaluate, vocabulary, split=eval_split)
        return cls(folder, out, asked, config, sizes, notes, tokenizer, sets, measure)

    def prune(self, progress: Progress) -> Done:
        """Prune, measure, write."""
        if self.asked.stream:
            return self._stream(progress)
        model, batches, sizes = self._load(), self.sets[0].batches, self.sizes[0]
        before = self.measure.of(model) if self.measure is not None else None
        if self.asked.per_layer:
            curves = error_curves(
                model,
                batches,
                prune=self.asked.moves,
                heads=self.asked.head_mode,
                damping=self.asked.damping,
                source=self.sets[0].source,
                spill=self.asked.spill,
            )
            budget = self.asked.budget(self.config, self.asked.targets[0], curves)
            sizes = self.asked.sizes_of(budget)
        report = prune_model(model, batches, **sizes, **self._settings(), progress=progress)
        assert report.model is not None  # it was just pruned
        after = self.measure.of(report.model) if self.measure is not None else None
        more: dict[str, Any] = self._told()
        if self.measure is not None:
            more[self.measure.name] = {"before": before, "after": after}
        report = replace(report, settings={**report.settings, **more})
        with write_folder(self.out) as aside:
            models.write_pretrained(report.model, self.tokenizer, aside)
            _write_report(report, aside)
        return Done(report, before, after)

    def _stream(self, progress: Progress) -> Done:
        """Prune from folder to folder, a block in memory at a time."""
        from slmperf.prune.checkpoint import prune_checkpoint

        report = prune_checkpoint(
            self.folder,
            self.out,
            self.sets[0].batches,
            **self.sizes[0],
            **self._settings(),
            device=_device(),
            progress=progress,
        )
        report = replace(report, settings={**report.settings, **self._told()})
        _write_report(report, self.out)
        return Done(report, None, None)

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
        return {"target": str(self.asked.targets[0])} if self.asked.targets else {}

    def compare(self, progress: Progress) -> Comparison:
        """Prune copies, measure, write the comparison."""
        found = compare_methods(
            self._load(),
            {one.source: one.batches for one in self.sets},
            self.sizes,
            methods=self.asked.methods,
            mode=cast(Mode, self.asked.mode),  # checked: one of MODES
            settings={
                "heads": self.asked.head_mode,
                "damping": self.asked.damping,
                "swaps": self.asked.swaps,
                "spill": self.asked.spill,
            },
            measure=self.measure_name,
            score=self.measure.of if self.measure is not None else None,
            progress=progress,
        )
        with write_folder(self.out) as aside:
            write_atomically(aside / "comparison.json", found.to_json())
            plot_comparison(found, aside / "comparison.svg")
        return found

    def _load(self) -> PreTrainedModel:
        """The model in its own precision, where it is to run."""
        import torch

        dtype = getattr(self.config, "dtype", None) or torch.float32
        return models.load(self.folder, dtype=dtype).to(_device())


def _device() -> str:
    return "cuda" if arch.cuda_name() else "cpu"


def _write_report(report: PruneReport, folder: Path) -> None:
    write_atomically(folder / "pruning.json", report.to_json())
    if any(layer.curve for layer in report.layers):
        plot_curves(report.layers, folder / "pruning.svg")


def _numbers(text: str) -> list[str]:
    """Words between commas; one before three digits belongs to a number, as in 2,420,026,368."""
    return [word.strip() for word in re.split(r",(?!\d{3}(?!\d))", text) if word.strip()]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _check_use(asked: Asked, explicit: bool, evaluate: Path | None, eval_split: str) -> None:
    """InputError for an option that nothing would come of."""
    swapped = any(method.startswith("osscar") for method in asked.methods)
    timed = asked.milliseconds is not None
    for option, given, useful, wanted in (
        ("--prune", bool(asked.dimensions), not explicit, "a target"),
        ("--granularity", asked.granularity != GRANULARITY, not explicit, "a target"),
        ("--gpu", asked.gpu != GPU, timed, "--milliseconds"),
        ("--prompt", asked.prompt != PROMPT, timed, "--milliseconds"),
        ("--tp", asked.tp != TENSOR_PARALLEL, timed, "--milliseconds"),
        ("--swaps", asked.swaps != 0, swapped, "--method osscar"),
        ("--eval-split", eval_split != EVAL_SPLIT, evaluate is not None, "--eval"),
    ):
        if given and not useful:
            raise InputError(f"{option}: wanted {wanted} beside it, found none")


def _check_settings(
    asked: Asked,
    samples: int,
    files: Mapping[str, Path],
    evaluate: Path | None,
    eval_split: str,
) -> None:
    for method in asked.methods:
        if method not in METHODS:
            raise InputError(f"--method: wanted one of {', '.join(METHODS)}, found {method!r}")
    if asked.mode not in MODES:
        raise InputError(f"--mode: wanted one of {', '.join(MODES)}, found {asked.mode!r}")
    if not asked.compare and len(asked.methods) > 1:
        raise InputError("--method: wanted one method without --compare, found several")
    if samples < 1:
        raise InputError(f"--samples: wanted a number >= 1, found {samples}")
    if not files:
        raise InputError("wanted --calibration or --generic, text to calibrate on, found neither")
    if not asked.compare and len(files) > 1:
        raise InputError("wanted one of --calibration and --generic without --compare, found both")
    explicit = bool(asked.intermediate) or asked.heads is not None or asked.kv_heads is not None
    given = [bool(asked.params), bool(asked.kv_bytes), asked.milliseconds is not None]
    if sum(given) + explicit != 1:
        raise InputError(
            "wanted one target (--params, --kv-bytes or --milliseconds) or sizes (--intermediate, "
            f"--heads, --kv-heads), found {'more' if sum(given) + explicit else 'none'}"
        )
    if not asked.compare and len(asked.targets) > 1:
        raise InputError("wanted one target without --compare, found several")
    _check_use(asked, bool(explicit), evaluate, eval_split)
    if asked.per_layer and (explicit or asked.compare):
        raise InputError("--per-layer: wanted with a target and without --compare")
    if asked.stream and (asked.per_layer or asked.compare or evaluate):
        raise InputError("--stream: wanted without --per-layer, --compare and --eval")


def _config(folder: Path) -> PretrainedConfig:
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a checkpoint folder, found none")
    config = read_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder}: wanted full weights to prune, found a quantised model")
    return config


def _sizes(asked: Asked, config: PretrainedConfig) -> tuple[list[dict[str, Any]], list[str]]:
    """The sizes to prune to, as `prune_model` takes them, and what bound the choice."""
    notes: list[str] = []
    sizes: list[dict[str, Any]] = []
    for target in asked.targets:
        budget = asked.budget(config, target)
        notes += [f"{target}: {note}" for note in budget.notes if not asked.per_layer]
        sizes.append(asked.sizes_of(budget))
    if not asked.targets:
        widths = _words(asked.intermediate)
        wrong = [width for width in widths if not width.isdigit()]
        if wrong or (len(widths) > 1 and not asked.compare):
            found = repr(wrong[0]) if wrong else "several without --compare"
            raise InputError(f"--intermediate: wanted a number of neurons, found {found}")
        heads = {"attention_heads": asked.heads, "key_value_heads": asked.kv_heads}
        heads = {name: count for name, count in heads.items() if count is not None}
        sizes = [{"intermediate_size": int(width), **heads} for width in widths] or [heads]
    before = {name: layer_sizes(config, key) for name, key in _SIZES.items()}
    for one in sizes:
        BlockSizes.of(config, **one, heads=asked.head_mode)
        if all(set(before[name]) == {value} for name, value in one.items()):
            raise InputError(f"nothing to prune: the model has {_told(one)} already")
    return sizes, notes


def _told(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
