"""prune_model: prune and refit the decoder blocks of a Llama-like model, one after the other.

    sequential     every layer is fitted to inputs that come from the layers pruned before it: of a
                   block first the heads, then, with what attention now gives, the neurons
    dense_target   the same inputs, but the outputs wanted are those that make the hidden states the
                   unpruned model's, so that a layer makes good what the layers before it lost
    one_pass       all inputs come from the unpruned model, in one pass over any number of tokens

Whatever the mode, a layer is a Gram matrix of its inputs and a weight, solved by one of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from slmperf.calibrate import BlockStream, Calibration
from slmperf.calibrate.usage import begin, device_peak_mib, now, peak_mib
from slmperf.check import InputError
from slmperf.models.checkpoint import parameters
from slmperf.models.resize import apply_sizes
from slmperf.models.structure import check_finite, decoder_blocks, fit_experts, layer_name
from slmperf.prune.block import ATTENTION, BlockSizes, Groups, layer_weight, remove
from slmperf.prune.layer.solve import Solver
from slmperf.prune.results import LayerPruned, PruneReport
from slmperf.prune.sources import Batches, OnePass, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mode = Literal["sequential", "one_pass", "dense_target"]
MODES: tuple[Mode, ...] = get_args(Mode)
Progress = Callable[[int, int], object]


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    calibration: Batches | Calibration,
    *,
    intermediate_size: int | Sequence[int] | None = None,
    attention_heads: int | Sequence[int] | None = None,
    key_value_heads: int | Sequence[int] | None = None,
    heads: str = "kv_group",
    mode: Mode = "sequential",
    method: str = "osscar",
    damping: float = 0.01,
    swaps: int = 0,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Take MLP neurons and attention heads out of every decoder block and refit what stays.

    model: changed in place, in evaluation mode afterwards; use `report.model`, which is another
        object where another class must hold the result (`slmperf.models.resize.apply_sizes`).
    calibration: batches of the model's arguments (input_ids (B, T), attention_mask (B, T), ...),
        each optionally with `token_weights` (B, T) >= 0; padding does not count. In mode one_pass
        also a `Calibration` of the same model.
    intermediate_size: neurons that stay, a number or one per layer; of each expert where there are
        several. None: all.
    attention_heads, key_value_heads, heads: see `plan_heads`.
    mode: see above. sequential and dense_target hold the hidden states of all batches, B * T * D
        values each (twice for dense_target), one_pass the Gram matrices of all layers; in files
        under the folder `spill` if one is given.
    method: one of METHODS. swaps: at most so many in each layer (`osscar`).
    source, tokenizer: of the text, for the report: "in-domain: FILE" or "generic: FILE", and what
        made its ids.
    progress: called as progress(steps done, steps) after each block; where mode one_pass reads a
        list of batches, after each of them before.

    Layers that keep everything are not touched, whatever the mode, and not reported. Of an expert
    that no token reached the neurons with the largest weights stay. Biases of the shrunk
    projections are sliced, those of o_proj and down_proj stay.

    Raises InputError, before anything changes, for impossible sizes, weights that are not finite or
    not in memory, batches without tokens, and a Calibration of another model or tokenizer. A layer
    whose inputs are not finite raises it too, by name; where layers before it are pruned already,
    the message says so.
    """
    start = begin(model.device)
    blocks = decoder_blocks(model)
    wanted: dict[str, Any] = {
        "intermediate_size": intermediate_size,
        "attention_heads": attention_heads,
        "key_value_heads": key_value_heads,
        "heads": heads,
    }
    sizes = BlockSizes.of(model.config, **wanted)
    solver = Solver(method, damping, swaps)
    check_mode(mode, calibration)
    check_finite("prune_model", model)
    model.eval()
    made: Source
    text: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "spill": spill}
    if mode == "one_pass":
        text["progress"], progress = over_batches(progress, calibration, len(blocks))
        made = OnePass.of(model, calibration, sizes.all_layers(blocks), method, **text)
    else:
        batches = cast(Batches, calibration)
        made = BlockStream(model, blocks, batches, dense_target=mode == "dense_target", **text)
    settings = {**wanted, "mode": mode, "method": method, "damping": damping, "swaps": swaps}
    return prune_with(model, made, sizes, solver, settings, start, progress)


def over_batches(
    progress: Progress | None, calibration: Batches | Calibration, rest: int
) -> tuple[Callable[[int], object] | None, Progress | None]:
    """`progress` over a list of batches and `rest` steps after them, as two: what `calibrate` calls
    and what the rest calls. Where the number of batches is not known, the rest is all there is.
    """
    if progress is None or not isinstance(calibration, Sequence):
        return None, progress
    first = len(calibration)
    return (
        lambda done: progress(done, first + rest),
        lambda done, of: progress(first + done, first + of),
    )


def check_mode(mode: str, calibration: Batches | Calibration) -> None:
    """InputError for an unknown mode, and one that the calibration does not serve."""
    if mode not in MODES:
        raise InputError(f"mode: wanted one of {', '.join(MODES)}, found {mode!r}")
    if mode != "one_pass" and isinstance(calibration, Calibration):
        raise InputError(f"calibration: wanted batches in mode {mode}, found Gram matrices")


def prune_with(
    model: PreTrainedModel,
    made: Source,
    sizes: BlockSizes,
    solver: Solver,
    settings: dict[str, Any],
    start: float,
    progress: Progress | None = None,
) -> PruneReport:
    """Prune all blocks of a checked model; `start` is when its calibration began (`begin`)."""
    under_way = Pruning(model, made, sizes, solver, start)
    blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        try:
            under_way.prune(index, block)
        except InputError as error:
            verb = "layer before it is" if len(under_way.layers) == 1 else "layers before it are"
            pruned = f"; {len(under_way.layers)} {verb} pruned already" if under_way.layers else ""
            raise InputError(f"{error}{pruned}") from error
        if progress is not None:
            progress(index + 1, len(blocks))
    return under_way.report(apply_sizes(model), settings)


class Pruning:
    """A pruning on its way through the blocks: what is done, and the time and memory it takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        made: Source,
        sizes: BlockSizes,
        solver: Solver,
        start: float,
        device: torch.device | None = None,
    ) -> None:
        """Begins where the calibration, begun at `start`, has ended. device: the model's, or that
        of its blocks when they are in memory.
        """
        self.layers: list[LayerPruned] = []
        self._made, self._sizes, self._solver = made, sizes, solver
        self._before = parameters(model)
        self._device = device or next(model.parameters()).device
        self._start, self._began, self._advance = start, now(self._device), 0.0
        self._model = model

    def prune(self, index: int, block: nn.Module) -> None:
        """Prune block `index`, its heads and then its neurons, and go on to the next."""
        wanted = self._sizes.layers(block, index)
        for names in ([ATTENTION], [name for name in wanted if name != ATTENTION]):
            groups = {name: wanted[name] for name in names if name in wanted}
            if groups:
                self._prune_layers(index, block, groups)
        fit_experts(self._model)  # the block is run by `advance`
        start = now(self._device)
        self._made.advance(index)
        self._advance += now(self._device) - start

    def report(self, model: PreTrainedModel, settings: dict[str, Any]) -> PruneReport:
        """What became of the model, now `model`."""
        return PruneReport(
            model=model,
            layers=tuple(self.layers),
            tokens=self._made.manifest["tokens"],
            parameters_before=self._before,
            parameters_after=parameters(model),
            calibration_seconds=self._began - self._start,
            advance_seconds=self._advance,
            seconds=now(self._device) - self._start,
            peak_mib=peak_mib(),
            device_peak_mib=device_peak_mib(self._device),
            settings=settings,
            calibration=dict(self._made.manifest),
        )

    def _prune_layers(self, index: int, block: nn.Module, groups: Mapping[str, Groups]) -> None:
        start = now(self._device)
        sizes = {name: one.group_size for name, one in groups.items()}
        grams = self._made.grams(index, groups, sizes)
        seconds = (now(self._device) - start) / len(groups)
        results, layers = {}, []
        for name, one in groups.items():
            full, weight = layer_name(index, name), layer_weight(block, name)
            results[name], layer = self._solver(full, grams.pop(name), weight, one, seconds)
            layers.append(layer)
        remove(block, results, self._sizes.heads, index)
        self.layers += layers
