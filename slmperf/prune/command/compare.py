"""compare: methods, sizes and calibration sets side by side, each on a copy of the same model.

In mode one_pass all layers see the inputs of the unpruned model, so that errors of a layer compare
between methods; in the other modes each method sees what its own pruned layers let through.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from slmperf.check import InputError
from slmperf.models.checkpoint import parameters
from slmperf.prune.layer.methods import METHODS
from slmperf.prune.model import Mode, prune_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Row:
    """One model pruned by one method to one size."""

    method: str
    calibration: str  # a key of the calibration sets
    sizes: dict[str, Any]  # as `prune_model` takes them
    parameters: int
    error: float  # mean over the layers pruned of the relative error
    layers: dict[str, float]  # relative error by layer
    seconds: float  # of pruning; in mode one_pass without the pass, which all share
    score: float | None  # of the pruned model


@dataclass(frozen=True)
class Comparison:
    """The rows, size after size, and what they have in common."""

    rows: tuple[Row, ...]
    mode: str
    parameters: int  # of the model before
    measure: str  # what `score` is, "" for nothing
    before: float | None  # score of the model before
    pass_seconds: dict[str, float]  # mode one_pass: of the pass over each calibration set
    tokens: dict[str, int]  # of each calibration set

    def best(self, calibration: str, sizes: Mapping[str, Any], key: str) -> Row:
        """The row of least "error" or "score" among the methods at one point."""
        at = [row for row in self.rows if (row.calibration, row.sizes) == (calibration, sizes)]
        return min(at, key=lambda row: getattr(row, key))

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=1) + "\n"


def compare_methods(
    model: PreTrainedModel,
    calibrations: Mapping[str, Iterable[Mapping[str, Tensor]]],
    sizes: Sequence[Mapping[str, Any]],
    *,
    methods: Sequence[str] = tuple(METHODS),
    mode: Mode = "sequential",
    settings: Mapping[str, Any] | None = None,
    measure: str = "",
    score: Callable[[nn.Module], float] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Prune copies of the model by every method, to every size, on every calibration set.

    calibrations: name, such as "in-domain: FILE", -> batches as `prune_model` takes them, which are
        read more than once.
    sizes: each the sizes of `prune_model`, such as {"intermediate_size": 6656}.
    settings: more of its arguments: heads, damping, swaps.
    score: of a model, called `measure`; it is taken before and after. None: only errors.
    progress: called as progress(blocks done, blocks) over all of it.

    The model stays as it is. Raises InputError as `prune_model`, before anything is computed for
    what is wrong with methods and sizes.
    """
    from slmperf.models.structure import decoder_blocks
    from slmperf.prune.block import BlockSizes

    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        found = repr(unknown[0]) if unknown else "none"
        raise InputError(f"method: wanted some of {', '.join(METHODS)}, found {found}")
    if not sizes or not calibrations:
        raise InputError("compare: wanted at least one size and one calibration set, found none")
    more = dict(settings or {})
    heads = {"heads": more["heads"]} if "heads" in more else {}
    for one in sizes:
        BlockSizes.of(model.config, **one, **heads)
    blocks = len(decoder_blocks(model))
    total = len(calibrations) * len(sizes) * len(methods) * blocks
    rows: list[Row] = []
    tokens: dict[str, int] = {}
    pass_seconds: dict[str, float] = {}
    for name, batches in calibrations.items():
        source: Any = batches
        if mode == "one_pass":
            start = time.perf_counter()
            source = _pass(model, batches, sizes, heads, name)
            pass_seconds[name] = time.perf_counter() - start
        for one in sizes:
            for method in methods:
                done = len(rows) * blocks
                report = prune_model(
                    copy.deepcopy(model),
                    source,
                    **one,
                    **more,
                    mode=mode,
                    method=method,
                    source=name,
                    progress=lambda block, _, done=done: progress and progress(done + block, total),
                )
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
    return Comparison(
        rows=tuple(rows),
        mode=mode,
        parameters=parameters(model),
        measure=measure,
        before=score(model) if score is not None else None,
        pass_seconds=pass_seconds,
        tokens=tokens,
    )


def _pass(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    sizes: Sequence[Mapping[str, Any]],
    heads: Mapping[str, Any],
    source: str,
) -> Any:
    """The Gram matrices of every layer that any of the sizes prunes."""
    from slmperf.calibrate import calibrate
    from slmperf.models.structure import decoder_blocks
    from slmperf.prune.block import BlockSizes, layer_name

    blocks = decoder_blocks(model)
    wanted: dict[tuple[int, str], Any] = {}
    for one in sizes:
        wanted |= BlockSizes.of(model.config, **one, **heads).all_layers(blocks)
    names = {layer_name(*key): groups.group_size for key, groups in wanted.items()}
    return calibrate(model, batches, list(names), group_sizes=names, source=source)
