"""curves: what one elimination per layer says of every size.

Greedy removals are nested: the order that leads to the smallest size holds all larger ones, and the
error after each removal. All of it is of the unpruned model's inputs (mode one_pass).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate import Calibration
from slmperf.calibrate.usage import begin
from slmperf.check import InputError
from slmperf.models.structure import check_finite, decoder_blocks, layer_name
from slmperf.prune.block import ATTENTION, BlockSizes, Groups, layer_weight, neuron_layers
from slmperf.prune.budget import DIMENSIONS
from slmperf.prune.heads import head_maps, plan_heads
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import Progress, over_batches, prune_with
from slmperf.prune.results import LayerPruned, PruneReport
from slmperf.prune.sources import Batches, OnePass

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def error_curves(
    model: PreTrainedModel,
    calibration: Batches | Calibration,
    *,
    prune: Collection[str] = ("mlp",),
    heads: str = "kv_group",
    damping: float = 0.01,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, ...]]:
    """Relative error of every layer after each removal by `osscar`, for `solve_budget`.

    Of "mlp" and "attention" the layers in `prune`, by names such as "model.layers.0.mlp.down_proj";
    the experts of a mixture count as one layer of that name, each of them losing one neuron a
    step. The other arguments are those of `prune_model`; the model is not changed.

    progress: called as progress(steps done, steps) after each batch, where they are a list, and
        each layer.
    """
    blocks = decoder_blocks(model)
    unknown = [name for name in prune if name not in DIMENSIONS]
    if unknown or not prune:
        found = repr(unknown[0]) if unknown else "none"
        raise InputError(f"prune: wanted some of {', '.join(DIMENSIONS)}, found {found}")
    plan = plan_heads(model.config, heads=heads)
    if "attention" in prune and any(head_maps(model.config)):
        mapped = head_maps(model.config).index(True)
        raise InputError(
            f"prune: wanted layers without a head map for 'attention', found one in layer {mapped}"
        )
    wanted: dict[tuple[int, str], Groups] = {}
    for index, block in enumerate(blocks):
        if "attention" in prune:
            groups = plan.groups(index)
            wanted[index, ATTENTION] = Groups(None, groups.group_size, groups.families)
        if "mlp" in prune:
            wanted |= {(index, name): Groups(None) for name in neuron_layers(block)}
    check_finite("error_curves", model)
    each_batch, progress = over_batches(progress, calibration, len(wanted))
    text: dict[str, Any] = {
        "source": source,
        "tokenizer": tokenizer,
        "spill": spill,
        "progress": each_batch,
    }
    made = OnePass.of(model, calibration, wanted, "osscar", **text)
    parts: dict[str, list[LayerPruned]] = {}
    solved = _solved(model, made, wanted, Solver("osscar", damping, 0))
    for done, layer in enumerate(solved, start=1):
        if progress is not None:
            progress(done, len(wanted))
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
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
) -> Iterator[PruneReport]:
    """A copy of the model pruned to each of these numbers of neurons, in the order given.

    One elimination per layer, to the smallest of them; of the others only the refit is done again.
    Arguments as in `prune_model`. A report's `seconds` are of its own refit; those of the pass and
    the eliminations are in the first.
    """
    if not intermediate_sizes:
        raise InputError("intermediate_sizes: wanted at least one number of neurons, found none")
    start = begin(model.device)
    blocks = decoder_blocks(model)
    asked = [BlockSizes.of(model.config, intermediate_size=size) for size in intermediate_sizes]
    solver = Solver("osscar", damping, 0)
    check_finite("prune_sizes", model)
    smallest = BlockSizes.of(model.config, intermediate_size=min(intermediate_sizes))
    wanted = smallest.all_layers(blocks)
    text: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "spill": spill}
    made = OnePass.of(model, calibration, wanted, "osscar", **text)
    known = {layer.name: layer for layer in _solved(model, made, wanted, solver)}
    for size, sizes in zip(intermediate_sizes, asked, strict=True):
        settings = {"intermediate_size": size, "mode": "one_pass", "method": "osscar",
                    "damping": damping}  # fmt: skip
        prefixes = Solver("osscar", damping, 0, known)
        yield prune_with(copy.deepcopy(model), made, sizes, prefixes, settings, start)
        start = begin(model.device)


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
