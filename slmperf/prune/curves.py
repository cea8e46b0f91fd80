"""curves: what one elimination per layer says of every size.

Greedy removals are nested: the order that leads to the smallest size holds all larger ones, and the
error after each removal. All of it is of the unpruned model's inputs (mode one_pass).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import torch

from slmperf.calibrate import Calibration
from slmperf.check import InputError
from slmperf.models.structure import decoder_blocks
from slmperf.prune.block import (
    ATTENTION,
    BlockSizes,
    Groups,
    layer_name,
    layer_weight,
    neuron_layers,
)
from slmperf.prune.heads import plan_heads
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import check_finite, prune_with
from slmperf.prune.results import LayerPruned, PruneReport
from slmperf.prune.sources import Batches, OnePass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def error_curves(
    model: PreTrainedModel,
    calibration: Batches | Calibration,
    *,
    prune: Collection[str] = ("mlp",),
    heads: str = "kv_group",
    damping: float = 0.01,
    source: str = "",
    spill: str | PathLike[str] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Relative error of every layer after each removal by `osscar`, for `solve_budget`.

    Of "mlp" and "attention" the layers in `prune`, by names such as "model.layers.0.mlp.down_proj";
    the experts of a mixture count as one layer of that name, each of them losing one neuron a
    step. The other arguments are those of `prune_model`; the model is not changed.
    """
    blocks = decoder_blocks(model)
    plan = plan_heads(model.config, heads=heads)
    wanted: dict[tuple[int, str], Groups] = {}
    for index, block in enumerate(blocks):
        if "attention" in prune:
            groups = plan.groups(index)
            wanted[index, ATTENTION] = Groups(None, groups.group_size, groups.families)
        if "mlp" in prune:
            wanted |= {(index, name): Groups(None) for name in neuron_layers(block)}
    check_finite(model)
    made = OnePass.of(model, calibration, wanted, "osscar", source=source, spill=spill)
    parts: dict[str, list[LayerPruned]] = {}
    for layer in _solved(model, made, wanted, Solver("osscar", damping, 0)):
        experts, _, one = layer.name.partition(".experts.")
        parts.setdefault(f"{experts}.down_proj" if one else layer.name, []).append(layer)
    return {name: _sum(layers) for name, layers in parts.items()}


@torch.no_grad()
def prune_sizes(
    model: PreTrainedModel,
    calibration: Batches | Calibration,
    intermediate_sizes: Sequence[int],
    *,
    damping: float = 0.01,
    source: str = "",
    spill: str | PathLike[str] | None = None,
) -> Iterator[PruneReport]:
    """A copy of the model pruned to each of these numbers of neurons, in the order given.

    One elimination per layer, to the smallest of them; of the others only the refit is done again.
    Arguments as in `prune_model`. A report's `seconds` are of its own refit; those of the pass and
    the eliminations are in the first.
    """
    if not intermediate_sizes:
        raise InputError("intermediate_sizes: wanted at least one number of neurons, found none")
    start = time.perf_counter()
    blocks = decoder_blocks(model)
    asked = [BlockSizes.of(model.config, intermediate_size=size) for size in intermediate_sizes]
    solver = Solver("osscar", damping, 0)
    check_finite(model)
    smallest = BlockSizes.of(model.config, intermediate_size=min(intermediate_sizes))
    wanted = smallest.all_layers(blocks)
    made = OnePass.of(model, calibration, wanted, "osscar", source=source, spill=spill)
    known = {layer.name: layer for layer in _solved(model, made, wanted, solver)}
    for size, sizes in zip(intermediate_sizes, asked, strict=True):
        settings = {"intermediate_size": size, "mode": "one_pass", "method": "osscar",
                    "damping": damping}  # fmt: skip
        prefixes = Solver("osscar", damping, 0, known)
        yield prune_with(copy.deepcopy(model), made, sizes, prefixes, settings, start)
        start = time.perf_counter()


def _solved(
    model: PreTrainedModel, made: OnePass, wanted: Mapping[tuple[int, str], Groups], solver: Solver
) -> Iterator[LayerPruned]:
    """What each layer wanted would lose; nothing changes."""
    blocks = decoder_blocks(model)
    for (index, name), groups in wanted.items():
        full = layer_name(index, name)
        gram, weight = made.calibration[full], layer_weight(blocks[index], name)
        yield solver(full, gram, weight, groups, 0.0)[1]


def _sum(layers: Sequence[LayerPruned]) -> tuple[float, ...]:
    """The relative error of layers of one size whose outputs are added up."""
    energy = sum(layer.energy for layer in layers)
    if energy == 0:
        return (0.0,) * len(layers[0].curve)
    errors = zip(*([e * layer.energy for e in layer.curve] for layer in layers), strict=True)
    return tuple(sum(step) / energy for step in errors)
