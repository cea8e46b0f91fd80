"""compare: methods, sizes and calibration sets side by side, each on a copy of the same model.

In mode one_pass all layers see the inputs of the unpruned model, so that errors of a layer compare
between methods; in the other modes each method sees what its own pruned layers let through.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate import Calibration, calibrate
from slmperf.calibrate.usage import begin
from slmperf.check import InputError
from slmperf.models.checkpoint import parameters
from slmperf.models.structure import decoder_blocks, layer_name
from slmperf.prune.block import BlockSizes, layer_weight
from slmperf.prune.layer.methods import METHODS
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import Mode, Progress, prune_model, prune_with
from slmperf.prune.results import LayerPruned, PruneReport
from slmperf.prune.sources import OnePass

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_SETTINGS = ("heads", "damping", "swaps", "tokenizer", "spill")
_DAMPING = 0.01  # where the settings say none, as in prune_model


@dataclass(frozen=True)
class Row:
    """One model pruned by one method to one size."""

    method: str
    calibration: str  # a key of the calibration sets
    sizes: dict[str, Any]  # as `prune_model` takes them
    parameters: int
    error: float  # mean over the layers pruned of the relative error
    layers: dict[str, float]  # relative error by layer
    seconds: float  # of pruning, without what mode one_pass shares (see Comparison)
    score: float | None  # of the pruned model


@dataclass(frozen=True)
class Comparison:
    """The rows, size after size, and what they have in common."""

    rows: tuple[Row, ...]
    mode: str
    parameters: int  # of the model before
    measure: str  # what `score` is, "" for nothing
    rises: bool  # whether more of it is better
    before: float | None  # score of the model before
    pass_seconds: dict[str, float]  # mode one_pass: of the pass over each calibration set
    elimination_seconds: dict[str, float]  # the same: of osscar's one elimination for all sizes
    tokens: dict[str, int]  # of each calibration set

    def best(self, point: Row) -> tuple[float, float | None]:
        """The least error and the best score of all methods at the point of one of the rows."""
        at = [
            row
            for row in self.rows
            if (row.calibration, row.sizes) == (point.calibration, point.sizes)
        ]
        scores = [row.score for row in at if row.score is not None]
        best = (max if self.rises else min)(scores, default=None)
        return min(row.error for row in at), best

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1) + "\n"


@torch.no_grad()
def compare_methods(
    model: PreTrainedModel,
    calibrations: Mapping[str, Iterable[Mapping[str, Tensor]]],
    sizes: Sequence[Mapping[str, Any]],
    *,
    methods: Sequence[str] = tuple(METHODS),
    mode: Mode = "sequential",
    settings: Mapping[str, Any] | None = None,
    measure: str = "",
    rises: bool = False,
    score: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Prune copies of the model by every method, to every size, on every calibration set.

    calibrations: name, such as "in-domain: FILE", -> batches as `prune_model` takes them, which are
        read more than once.
    sizes: each the sizes of `prune_model`, such as {"intermediate_size": 6656}.
    settings: more of its arguments: any of heads, damping, swaps, tokenizer, spill.
    score: of a model, called `measure`; `rises` where more is better. It is taken before and after.
        None: only errors.
    progress: called as progress(steps done, steps). A step is what goes through all blocks once: a
        pruning, a score, and in mode one_pass the pass over a calibration set.

    In mode one_pass osscar eliminates once in each layer for all sizes, as greedy removals are
    nested; only the refit is of the size. The model stays as it is. Raises InputError as
    `prune_model`, before anything is computed for what is wrong with methods and sizes.
    """
    methods = tuple(dict.fromkeys(methods))
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        found = repr(unknown[0]) if unknown else "none"
        raise InputError(f"method: wanted some of {', '.join(METHODS)}, found {found}")
    if not sizes or not calibrations:
        raise InputError("compare: wanted at least one size and one calibration set, found none")
    for name, batches in calibrations.items():
        if isinstance(batches, Iterator):
            raise InputError(f"compare: {name}: wanted batches that can be read again, such as a "
                             "list, found a generator")  # fmt: skip
    more = dict(settings or {})
    if more.keys() - set(_SETTINGS):
        raise InputError(
            f"compare: wanted settings of {', '.join(_SETTINGS)}, found "
            f"{', '.join(sorted(more.keys() - set(_SETTINGS)))}"
        )
    heads = {"heads": more["heads"]} if "heads" in more else {}
    asked = [BlockSizes.of(model.config, **one, **heads) for one in sizes]
    scores, passes = int(score is not None), int(mode == "one_pass")
    points = len(sizes) * len(methods)
    steps = _Steps(len(calibrations) * (passes + points * (1 + scores)) + scores, progress)
    before = score(model) if score is not None else None
    steps.done += scores
    rows: list[Row] = []
    tokens: dict[str, int] = {}
    pass_seconds: dict[str, float] = {}
    elimination_seconds: dict[str, float] = {}
    for name, batches in calibrations.items():
        source: Any = batches
        known: dict[str, LayerPruned] = {}
        if mode == "one_pass":
            start = time.perf_counter()
            source = _pass(model, batches, asked, name, more, steps.part)
            pass_seconds[name] = time.perf_counter() - start
            steps.done += 1
            if "osscar" in methods and len(sizes) > 1 and not more.get("swaps"):
                start = time.perf_counter()
                known = _orders(model, source, asked, more)
                elimination_seconds[name] = time.perf_counter() - start
        for one, checked in zip(sizes, asked, strict=True):
            for method in methods:
                copied = copy.deepcopy(model)
                if method == "osscar" and known:
                    report = _of_orders(copied, source, checked, known, more, steps.part)
                else:
                    report = prune_model(
                        copied,
                        source,
                        **one,
                        **more,
                        mode=mode,
                        method=method,
                        source=name,
                        progress=steps.part,
                    )
                steps.done += 1
                tokens[name] = report.tokens
                errors = {layer.name: layer.relative_error for layer in report.layers}
                assert report.model is not None  # it was just pruned
                rows.append(
                    Row(
                        method=method,
                        calibration=name,
                        sizes=dict(one),
                        parameters=report.parameters_after,
                        error=sum(errors.values()) / max(1, len(errors)),
                        layers=errors,
                        seconds=report.seconds,
                        score=score(report.model) if score is not None else None,
                    )
                )
                steps.done += scores
                steps.part(0, 1)
    return Comparison(
        rows=tuple(rows),
        mode=mode,
        parameters=parameters(model),
        measure=measure,
        rises=rises,
        before=before,
        pass_seconds=pass_seconds,
        elimination_seconds=elimination_seconds,
        tokens=tokens,
    )


class _Steps:
    """Steps of a long work, each of which tells how far it is."""

    def __init__(self, steps: int, progress: Progress | None) -> None:
        self.done = 0
        self._steps, self._progress = steps, progress

    def part(self, done: int, total: int) -> None:
        """So much of the step that is under way is done."""
        if self._progress is not None:
            self._progress(round(1000 * (self.done + done / total)), 1000 * self._steps)


def _pass(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    sizes: Sequence[BlockSizes],
    source: str,
    settings: Mapping[str, Any],
    progress: Progress,
) -> Calibration:
    """The Gram matrices of every layer that any of the sizes prunes."""
    blocks = decoder_blocks(model)
    wanted: dict[tuple[int, str], Any] = {}
    for one in sizes:
        wanted |= one.all_layers(blocks)
    names = {layer_name(*key): groups.group_size for key, groups in wanted.items()}
    text = {name: settings.get(name) for name in ("tokenizer", "spill")}
    count = len(batches) if isinstance(batches, Sequence) else 0
    return calibrate(
        model,
        batches,
        list(names),
        group_sizes=names,
        source=source,
        progress=(lambda done: progress(done, count)) if count else None,
        **text,
    )


def _orders(
    model: PreTrainedModel,
    calibration: Calibration,
    sizes: Sequence[BlockSizes],
    settings: Mapping[str, Any],
) -> dict[str, LayerPruned]:
    """osscar's order in every layer, to the smallest of the sizes.

    Not of layers where the sizes remove unlike groups or the same number of each family, whose
    removals are not nested, and not of experts that no token reached.
    """
    blocks = decoder_blocks(model)
    wanted: dict[tuple[int, str], list[Any]] = {}
    for one in sizes:
        for key, groups in one.all_layers(blocks).items():
            wanted.setdefault(key, []).append(groups)
    solver = Solver("osscar", settings.get("damping", _DAMPING), 0)
    found = {}
    for (index, layer), asked in wanted.items():
        name = layer_name(index, layer)
        alike = len({groups.group_size for groups in asked}) == 1
        if alike and all(groups.families is None for groups in asked) and calibration[name].tokens:
            smallest = min(asked, key=lambda groups: groups.keep)
            weight = layer_weight(blocks[index], layer)
            found[name] = solver(name, calibration[name], weight, smallest, 0.0)[1]
    return found


def _of_orders(
    model: PreTrainedModel,
    calibration: Calibration,
    sizes: BlockSizes,
    orders: Mapping[str, LayerPruned],
    settings: Mapping[str, Any],
    progress: Progress,
) -> PruneReport:
    """The model pruned by osscar, whose orders are known."""
    start = begin(model.device)
    solver = Solver("osscar", settings.get("damping", _DAMPING), 0, orders)
    made = OnePass.of(model, calibration, sizes.all_layers(decoder_blocks(model)), "osscar")
    return prune_with(model, made, sizes, solver, {}, start, progress)
