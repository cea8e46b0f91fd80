"""asked: the options of `slmperf prune`, and what of them can be checked without a file of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.check import InputError, parse_tokens
from slmperf.plan import LatencyModel
from slmperf.prune.block import BlockSizes
from slmperf.prune.budget import Budget, check_target, solve_budget
from slmperf.prune.command.commands import GPU, GRANULARITY, PROMPT, TENSOR_PARALLEL
from slmperf.prune.layer.methods import METHODS
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import MODES
from slmperf.prune.targets import Target, parse_target

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from slmperf.command.texts import Texts


@dataclass(frozen=True)
class Asked:
    """The options that say what to prune and how; empty or None: not given."""

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
        }
        found = []
        for kind, words in texts.items():
            for target in map(parse_target, words):
                if target.kind != kind:
                    raise InputError(f"target: wanted {kind}, found {target}")
                found.append(target)
        if self.milliseconds is not None:
            if not 0 < self.milliseconds < float("inf"):
                raise InputError(f"--milliseconds: wanted a number > 0, found {self.milliseconds}")
            found.append(Target("milliseconds", self.milliseconds))
        return found

    @property
    def moves(self) -> tuple[str, ...]:
        """The dimensions that a target may shrink."""
        return tuple(_words(self.dimensions)) or (("attention",) if self.kv_bytes else ("mlp",))

    def budget(self, config: PretrainedConfig, target: Target, curves: Any = None) -> Budget:
        """The sizes that meet a target."""
        return solve_budget(config, target, curves=curves, **self._budget_settings())

    def sizes_of(self, budget: Budget) -> dict[str, Any]:
        """The arguments of `prune_model` for a budget."""
        found: dict[str, Any] = {}
        if "mlp" in self.moves:
            found["intermediate_size"] = budget.intermediate_size
        if "attention" in self.moves:
            found["attention_heads"] = budget.attention_heads
            found["key_value_heads"] = budget.key_value_heads
        return found

    def sizes(self, config: PretrainedConfig) -> tuple[list[dict[str, Any]], list[str]]:
        """The sizes to prune to, as `prune_model` takes them, and what bound the choice.

        With per_layer they are not known before the error curves are: there are none yet.
        """
        if self.per_layer:
            check_target(config, self.targets[0], **self._budget_settings())
            return [], []
        notes: list[str] = []
        sizes = [] if self.targets else self._explicit()
        for target in self.targets:
            budget = self.budget(config, target)
            notes += [f"{target}: {note}" for note in budget.notes]
            if self.sizes_of(budget) not in sizes:  # targets close by have one shape
                sizes.append(self.sizes_of(budget))
        for one in sizes:
            self.check_smaller(config, one)
        return sizes, notes

    def check_smaller(self, config: PretrainedConfig, sizes: Mapping[str, Any]) -> None:
        """InputError for impossible sizes, and for those that the model has already."""
        found = BlockSizes.of(config, **sizes, heads=self.head_mode)
        layers = range(len(found.neurons))
        if found.neurons == found.neurons_before and not any(map(found.heads.prunes, layers)):
            told = ", ".join(f"{name} {value}" for name, value in sizes.items())
            raise InputError(f"nothing to prune: the model has {told} already")

    def check(self, texts: Texts) -> None:
        """InputError for options that are wrong, or of no use without another."""
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"--method: wanted one of {', '.join(METHODS)}, found {method!r}")
            Solver(method, self.damping, self.swaps)
        if self.mode not in MODES:
            raise InputError(f"--mode: wanted one of {', '.join(MODES)}, found {self.mode!r}")
        if not self.compare and len(self.methods) > 1:
            raise InputError("--method: wanted one method without --compare, found several")
        texts.check()
        if not texts.files:
            raise InputError(
                "wanted --calibration or --generic, text to calibrate on, found neither"
            )
        if not self.compare and len(texts.files) > 1:
            raise InputError(
                "wanted one of --calibration and --generic without --compare, found both"
            )
        sizes = bool(self.intermediate) or self.heads is not None or self.kv_heads is not None
        given = [bool(self.params), bool(self.kv_bytes), self.milliseconds is not None, sizes]
        if sum(given) != 1:
            raise InputError(
                "wanted one target (--params, --kv-bytes or --milliseconds) or sizes "
                "(--intermediate, --heads, --kv-heads), found "
                f"{'more' if sum(given) else 'none'}"
            )
        if not self.compare and len(self.targets) > 1:
            raise InputError("wanted one target without --compare, found several")
        self._check_use(sizes, texts)
        if self.per_layer and (sizes or self.compare):
            raise InputError("--per-layer: wanted with a target and without --compare")
        if self.stream and (self.per_layer or self.compare or texts.evaluate):
            raise InputError("--stream: wanted without --per-layer, --compare and --eval")

    def _check_use(self, sizes: bool, texts: Texts) -> None:
        """InputError for an option that nothing would come of."""
        swapped = any(method.startswith("osscar") for method in self.methods)
        timed = self.milliseconds is not None
        generic = "generic" in texts.files
        for option, given, useful, wanted in (
            ("--prune", bool(self.dimensions), not sizes, "a target"),
            ("--granularity", self.granularity != GRANULARITY, not sizes, "a target"),
            ("--gpu", self.gpu != GPU, timed, "--milliseconds"),
            ("--prompt", self.prompt != PROMPT, timed, "--milliseconds"),
            ("--tp", self.tp != TENSOR_PARALLEL, timed, "--milliseconds"),
            ("--swaps", self.swaps != 0, swapped, "--method osscar"),
            ("--generic-samples", texts.generic_samples is not None, generic, "--generic"),
        ):
            if given and not useful:
                raise InputError(f"{option}: wanted {wanted} beside it, found none")

    def _explicit(self) -> list[dict[str, Any]]:
        """The sizes that were given as numbers."""
        widths = _words(self.intermediate)
        wrong = [width for width in widths if not (width.isascii() and width.isdigit())]
        if wrong or (len(widths) > 1 and not self.compare):
            found = repr(wrong[0]) if wrong else "several without --compare"
            raise InputError(f"--intermediate: wanted a number of neurons, found {found}")
        given = {"attention_heads": self.heads, "key_value_heads": self.kv_heads}
        heads: dict[str, Any] = {name: count for name, count in given.items() if count is not None}
        return [{"intermediate_size": int(width), **heads} for width in widths] or [heads]

    def _budget_settings(self) -> dict[str, Any]:
        """Arguments of `solve_budget`."""
        is_file = self.gpu.endswith(".json") or Path(self.gpu).is_file()
        return {
            "prune": self.moves,
            "granularity": self.granularity,
            "heads": self.head_mode,
            "gpu": LatencyModel.load(self.gpu) if is_file else LatencyModel.preset(self.gpu),
            "context": parse_tokens(self.prompt, "prompt"),
            "tensor_parallel": self.tp,
        }


def _numbers(text: str) -> list[str]:
    """Words between commas, once each; one between digits of which three follow belongs to a
    number, as in 2,420,026,368.
    """
    parts = re.split(r"(?<!\d),|,(?!\d{3}(?!\d))", text)
    return list(dict.fromkeys(word.strip() for word in parts if word.strip()))


def _words(text: str) -> list[str]:
    """Words between commas, once each."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
