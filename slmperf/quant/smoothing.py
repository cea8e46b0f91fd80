"""smooth: move the outliers of activations into the weights before both are quantised.

    s_j = max |x_j|^alpha / max |W_j|^(1 - alpha)        y = (x / s) (W s)'

per channel j (SmoothQuant, https://arxiv.org/abs/2211.10438). x / s is folded into the layer that x
comes from, so nothing is computed at run time and the model computes what it did. alpha is searched
fold by fold in every decoder block: the one that leaves the least error in the outputs of the whole
block when its layers are fake-quantised, or no smoothing where none does better.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate import BlockStream
from slmperf.calibrate.tokens import Tokens
from slmperf.calibrate.workers import sum_of_workers
from slmperf.check import InputError
from slmperf.models.quantized import LinearScheme
from slmperf.models.structure import block_name, check_finite, layer_name, linear_blocks
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Int8
from slmperf.quant.folds import Fold, folded, folds_of
from slmperf.quant.plan import LINEARS
from slmperf.quant.statistics import Peaks, input_peaks

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

W8A8 = LinearScheme(Int8(), ActivationSpec("int", "token"))
ALPHAS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))  # 0.3 to 0.95
SEARCH_TOKENS = 2048  # the errors of the search are taken on about so many, in whole batches
_ScaleOf = Callable[[float], Tensor]
_MARK = "slmperf_smoothed"
_SAME = 1e-10  # of the outputs' squares: what fp32 may lose where nothing is quantised
_LEAST = 1e-5  # of the largest: smaller peaks count as this


@dataclass(frozen=True)
class BlockSmoothing:
    """What was chosen for one decoder block. Errors are of its fake-quantised outputs, squared and
    over those of the outputs themselves.
    """

    index: int
    alphas: dict[str, float | None]  # by where the channels come from; None: not smoothed
    notes: dict[str, str]  # the same where inputs were not finite: these channels stay as they are
    relative_error: float
    relative_error_unsmoothed: float
    tokens: int  # that the errors were taken on
    seconds: float


@dataclass(frozen=True)
class SmoothReport:
    """The blocks in order, and the calibration's manifest."""

    blocks: tuple[BlockSmoothing, ...]
    seconds: float
    calibration: dict[str, Any]


@torch.no_grad()
def smooth(
    model: PreTrainedModel,
    calibration: Iterable[Mapping[str, Any]],
    *,
    scheme: LinearScheme | None = None,
    alphas: Sequence[float] = ALPHAS,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SmoothReport:
    """Smooth every decoder block of a model for quantisation by `scheme`.

    model: changed in place, in evaluation mode afterwards; what it computes stays.
    calibration: batches as `prune_model` takes them; padding does not count.
    scheme: None: int8 weights by channel, int8 activations by token.
    alphas: in 0..1, to choose from; no smoothing is always among the choices.
    source, tokenizer, spill: as in `prune_model`.
    progress: called as progress(blocks done, blocks).

    Raises InputError, before anything changes, where `check_smoothing` does, for weights that are
    not finite or not in memory, alphas out of range and batches without tokens; as it comes to
    them, for a group_size that does not divide. Channels that are not finite somewhere are not
    smoothed, and noted.
    """
    start = time.perf_counter()
    check_smoothing(model)
    check_finite("smooth", model)
    _check_alphas(alphas)
    model.eval()
    blocks = linear_blocks(model)
    stream = BlockStream(
        model, blocks, calibration, source=source, tokenizer=tokenizer, spill=spill
    )
    chosen = []
    for index in range(len(blocks)):
        chosen.append(smooth_block(stream, index, scheme or W8A8, alphas))
        if any(alpha is not None for alpha in chosen[-1].alphas.values()):
            mark_smoothed(model.config)
        stream.advance(index)
        if progress is not None:
            progress(index + 1, len(blocks))
    return SmoothReport(tuple(chosen), time.perf_counter() - start, dict(stream.manifest))


def check_smoothing(model: PreTrainedModel) -> None:
    """InputError, by name, for a model that cannot be smoothed: smoothed before, quantised, with a
    mixture of experts, with blocks, layers or norms that are not known or used in several places.

    Weights need not be in memory.
    """
    if is_smoothed(model.config):
        raise InputError(f"smooth: wanted a model not smoothed before, found {_MARK} in its config")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("smooth: wanted a model with floating weights, found a quantised one")
    for name, module in model.named_modules():
        if hasattr(module, "experts"):
            raise InputError(f"smooth: {name}: wanted one MLP, found a mixture of experts")
    blocks = linear_blocks(model)
    places: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = places.setdefault(parameter, name)
        if first != name and ".layers." in first + name:
            raise InputError(f"smooth: wanted {first} in one place, found it as {name}, too")
    for index, block in enumerate(blocks):
        folds_of(block, index)


def is_smoothed(config: PretrainedConfig) -> bool:
    """Whether the model was smoothed: scales on scales would not be those of its activations."""
    return bool(getattr(config, _MARK, False))


def mark_smoothed(config: PretrainedConfig) -> None:
    """Have the configuration, also of a checkpoint, say so."""
    setattr(config, _MARK, True)


@torch.no_grad()
def smooth_block(
    stream: BlockStream,
    index: int,
    schemes: LinearScheme | Mapping[str, LinearScheme],
    alphas: Sequence[float] = ALPHAS,
) -> BlockSmoothing:
    """Smooth block `index` of a stream, in place, for quantisation by `schemes`.

    schemes: of all its linear layers, or of each by its name within the block; those without one
        stay as they are.

    The errors are taken in fp32 against the block as it is, on batches of about SEARCH_TOKENS
    tokens spread over the text; the largest magnitudes over all of it. The configuration is not
    marked (`mark_smoothed`).
    Raises InputError where the block or its inputs do not allow it, by name.
    """
    start = time.perf_counter()
    block = stream.blocks[index]
    if isinstance(schemes, LinearScheme):
        schemes = dict.fromkeys(LINEARS, schemes)
    folds = [
        fold for fold in folds_of(block, index) if any(name in schemes for name in fold.consumers)
    ]
    peaks = input_peaks(stream, index, [fold.consumers[0] for fold in folds])
    trial = _Trial(stream, index, folds, schemes, peaks)
    notes = {fold.producer: peaks[fold.consumers[0]].note for fold in folds}
    notes = {producer: note for producer, note in notes.items() if note}
    chosen: dict[str, float | None] = dict.fromkeys(notes)
    scales: dict[str, Tensor] = {}
    least = unsmoothed = trial.error(scales)
    for fold in folds:
        if fold.producer in notes:
            continue
        scale_of = _scales(block, fold, peaks[fold.consumers[0]].largest)

        def error(alpha: float, fold: Fold = fold, scale_of: _ScaleOf = scale_of) -> float:
            return trial.error(scales | {fold.producer: scale_of(alpha)})

        best, alpha = _best(sorted(alphas), error)
        chosen[fold.producer] = alpha if best < least else None
        if best < least:
            least, scales[fold.producer] = best, scale_of(alpha)
    for name, value in folded(block, folds, scales).items():
        block.get_parameter(name).copy_(value)
    seconds = time.perf_counter() - start
    return BlockSmoothing(index, chosen, notes, least, unsmoothed, trial.tokens, seconds)


def _best(alphas: Sequence[float], error: Callable[[float], float]) -> tuple[float, float]:
    """(least error, its alpha) of ascending alphas: of every fourth, and of those about the best of
    them. Errors go up and down slowly along alphas.
    """
    tried: dict[int, float] = {}
    for step in (4, 2, 1):
        best = min(tried, key=lambda place: tried[place], default=0)
        places = range(0, len(alphas), 4) if step == 4 else (best - step, best + step)
        for place in places:
            if 0 <= place < len(alphas):
                tried[place] = error(alphas[place])
    return min((found, alphas[place]) for place, found in tried.items())


def _scales(block: nn.Module, fold: Fold, peaks: Tensor) -> _ScaleOf:
    """alpha -> s, fp32 (d,), of a fold whose consumers' inputs have `peaks` (in,).

    The middle of s is 1, so that no alpha moves all channels one way. A channel that is always 0,
    before or after the weights, stays: s would say nothing of it.
    """
    weights = [block.get_submodule(name).weight.abs().amax(0).float() for name in fold.consumers]
    inputs, columns = fold.channels(peaks), fold.channels(torch.stack(weights).amax(0))
    live = (inputs > 0) & (columns > 0)
    inputs, columns = (
        values.clamp(min=_LEAST * values.max()).where(live, 1.0) for values in (inputs, columns)
    )

    def scale_of(alpha: float) -> Tensor:
        scale = inputs**alpha / columns ** (1 - alpha)
        middle = (scale.where(live, 0.0).max() * scale.where(live, torch.inf).min()).sqrt()
        return (scale / middle).where(live, 1.0)

    return scale_of


class _Trial:
    """A copy of a block in fp32 whose layers are fake-quantised, and what that does to its outputs.

    peaks: of the inputs (in,) of every fold's first consumer.

    Outputs that are not finite without quantisation count for nothing.
    """

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        folds: Sequence[Fold],
        schemes: Mapping[str, LinearScheme],
        peaks: Mapping[str, Peaks],
    ) -> None:
        self._stream, self._index = stream, index
        self._folds, self._schemes, self._peaks = folds, schemes, peaks
        counts = stream.token_counts
        used = [batch for batch, count in enumerate(counts) if count]
        wanted = max(1, len(used) * SEARCH_TOKENS // max(1, sum(counts)))
        step = max(1, len(used) // wanted)
        self._batches = used[step // 2 :: step]
        self.tokens = sum(counts[batch] for batch in self._batches)
        self._copy = copy.deepcopy(stream.blocks[index]).float()
        self._wanted: list[Tensor] = []  # (n, D) fp32 of each batch: of the block as it is
        energy = 0.0
        for rows, tokens in self._outputs():
            self._wanted.append(rows)
            energy += _squares(rows.where(torch.isfinite(rows), 0), tokens)
        self._energy = _of_workers(energy) or 1.0
        self._check()
        self._input_peaks: dict[str, Tensor] = {}  # max |x| of each layer's inputs
        for name, scheme in schemes.items():
            layer = self._copy.get_submodule(name)
            self._check_groups(name, scheme, layer)
            if scheme.activations is not None:
                layer.register_forward_pre_hook(partial(self._round, name, scheme.activations))

    def error(self, scales: Mapping[str, Tensor]) -> float:
        """Relative, of the outputs when channels of folds are scaled and the layers quantised;
        infinite where that leaves the range of the weights' dtype, or scales that of theirs.
        """
        changed = folded(self._stream.blocks[self._index], self._folds, scales)
        if not all(bool(torch.isfinite(value).all()) for value in changed.values()):
            return math.inf
        parameters = dict(self._stream.blocks[self._index].named_parameters()) | changed
        for fold in self._folds:
            peaks, scale = self._peaks[fold.consumers[0]].largest, scales.get(fold.producer)
            peaks = peaks if scale is None else peaks / fold.columns(scale)
            for name in fold.consumers:
                if name in self._schemes:
                    weight, grid = f"{name}.weight", self._schemes[name].weights
                    try:
                        grid_scales = grid.scales(parameters[weight])
                    except InputError:  # they overflow
                        return math.inf
                    codes = grid.encode(parameters[weight], grid_scales)
                    parameters[weight] = grid.decode(codes, grid_scales)
                    self._input_peaks[name] = peaks.amax()
        return self._wrong(parameters)

    def _check(self) -> None:
        """InputError where the block is not what the names of its classes say."""
        scales = {}
        for fold in self._folds:
            peaks = self._peaks[fold.consumers[0]]
            if peaks.note:
                continue
            channels = fold.channels(peaks.largest)
            even = torch.arange(len(channels), device=channels.device) % 2 == 0
            scales[fold.producer] = torch.where(even, 2.0, 0.5)  # exact in every dtype
        wrong = self._wrong(folded(self._copy, self._folds, scales))
        if not wrong <= _SAME:
            raise InputError(
                f"smooth: {block_name(self._index)}: wanted the same outputs with its channels "
                f"scaled, found {wrong:.2g} of their squares: it computes something not known"
            )

    def _wrong(self, parameters: Mapping[str, Tensor]) -> float:
        """The squared error of the copy's outputs with these parameters, relative."""
        for name, value in parameters.items():
            self._copy.get_parameter(name).copy_(value)
        wrong = 0.0
        for wanted, (rows, tokens) in zip(self._wanted, self._outputs(), strict=True):
            wrong += _squares((rows - wanted).where(torch.isfinite(wanted), 0), tokens)
        return _of_workers(wrong) / self._energy

    def _check_groups(self, name: str, scheme: LinearScheme, layer: nn.Linear) -> None:
        """InputError where a group of weights does not divide the layer."""
        try:
            scheme.weights.scale_shape((layer.out_features, layer.in_features))
        except InputError as error:
            raise InputError(f"{layer_name(self._index, name)}: {error}") from error

    def _round(
        self, name: str, spec: ActivationSpec, layer: nn.Module, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """A forward pre-hook: a layer's inputs as their codes stand for them."""
        top = (spec.highest - spec.lowest) / 2
        scale = self._input_peaks[name] / top if spec.static else None
        return (spec.fake_quantized(arguments[0], scale), *arguments[1:])

    def _outputs(self) -> Iterator[tuple[Tensor, Tokens]]:
        """What the copy makes of each batch, fp32 (n, D) of its n tokens that count."""
        for hidden, tokens in self._stream.outputs(
            self._index, self._copy, batches=self._batches, dtype=torch.float32
        ):
            yield tokens.select(hidden.flatten(0, 1)), tokens


def _squares(rows: Tensor, tokens: Tokens) -> float:
    """The sum of the squares of rows (n, D), each times its token's weight."""
    squares = rows.square().sum(1).double()
    return float(squares.sum() if tokens.weight is None else squares @ tokens.weight.double())


def _of_workers(part: float) -> float:
    return float(sum_of_workers(torch.tensor([part], dtype=torch.float64)))


def _check_alphas(alphas: Sequence[float]) -> None:
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong or not alphas:
        found = wrong[0] if wrong else "none"
        raise InputError(f"smooth: alphas: wanted numbers in 0..1, found {found}")
