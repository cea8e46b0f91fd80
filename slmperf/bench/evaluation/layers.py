"""layers: how far the weights of a quantised model are from those of its base, layer by layer.

    tr(E H E') / tr(W H W')      W of the base, E what the quantised weight lacks of it

with H of what flows into the layer in the base, on the text that calibrated and on other text. The
roundings of activations are not in it.

A smoothed model reads channels that were divided before they reach a layer. What they were divided
by is taken out of its weights again: of a norm it is the quotient of both norms' weights; of the
rows of a linear layer, which are rounded, the number that brings their outputs nearest the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate import BlockStream
from slmperf.check import InputError
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.structure import layer_name, linear_blocks
from slmperf.ops.weight_spec import WeightSpec
from slmperf.quant.folds import Fold, folds_of
from slmperf.quant.layer.errors import Layer
from slmperf.quant.plan import UNITS
from slmperf.quant.smoothing import is_smoothed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class LayerError:
    """One quantised layer."""

    name: str  # such as "model.layers.0.mlp.down_proj"
    weights: str  # how they are stored: "int4, groups of 128"
    error: float  # on the text that calibrated
    held_out_error: float | None  # on other text; None without


def check_layers(base: PretrainedConfig, model: PretrainedConfig) -> None:
    """InputError where the two models are not a quantised one and its base with full weights."""
    if getattr(base, "quantization_config", None) is not None:
        raise InputError("--layers: wanted a base with full weights, found a quantised model")
    if getattr(model, "quantization_config", None) is None:
        raise InputError("--layers: wanted a quantised model, found full weights")
    for name in _SIZES:
        sizes = [getattr(config, name, None) for config in (base, model)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"--layers: wanted a model of the base's sizes, {name} {sizes[0]}, found {sizes[1]}"
            )


@torch.no_grad()
def layer_errors(
    base: PreTrainedModel,
    model: PreTrainedModel,
    texts: Sequence[Sequence[Mapping[str, Any]]],
    *,
    progress: Callable[[int, int], None],
) -> list[LayerError]:
    """Errors of every quantised layer, on one text or two, the second held out.

    texts: of each the batches, as `BlockStream` takes them; the hidden states of all are held.
    Raises InputError for a base whose blocks are not Llama-like, or that is quantised itself.
    """
    blocks = linear_blocks(base)
    streams = [BlockStream(base, blocks, batches) for batches in texts]
    smoothed, found = is_smoothed(model.config), []
    for index, block in enumerate(blocks):
        other = model.model.layers[index]
        grams = [_grams(stream, index) for stream in streams]
        weights = _weights(block, other, folds_of(block, index) if smoothed else (), grams[0])
        for unit in UNITS:
            for name in unit:
                layer, weight = other.get_submodule(name), block.get_submodule(name).weight
                if not isinstance(layer, QuantizedLinear):
                    continue
                errors = [_relative(weight, weights[name], gram[unit[0]]) for gram in grams]
                held_out = errors[1] if len(errors) > 1 else None
                full = layer_name(index, name)
                found.append(LayerError(full, _format(layer.scheme.weights), errors[0], held_out))
        for stream in streams:
            stream.advance(index)
        progress(index + 1, len(blocks))
    return found


def _grams(stream: BlockStream, index: int) -> dict[str, Tensor]:
    """H over the number of tokens, (in, in) fp32, of each unit's inputs, by its first layer."""
    found = stream.grams(index, [unit[0] for unit in UNITS])
    return {name: (gram.matrix / max(gram.weight, 1.0)).float() for name, gram in found.items()}


def _weights(
    block: nn.Module, other: nn.Module, folds: Iterable[Fold], grams: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights (out, in) fp32 of the other block's layers, by name, for inputs of the first."""
    found = {name: _weight(other.get_submodule(name)) for unit in UNITS for name in unit}
    first = {name: unit[0] for unit in UNITS for name in unit}
    for fold in folds:  # in their order: the columns of a layer come before its rows
        producer, name = block.get_submodule(fold.producer), fold.producer
        before = producer.weight.detach().float()
        if fold.offset is not None:
            after = other.get_submodule(name).weight.detach().float()
            scale = (before + fold.offset) / (after + fold.offset)
        else:
            product = before @ grams[first[name]]
            scale = (product * before).sum(1) / (product * found[name]).sum(1)
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)  # or nothing flows
        if fold.offset is None:
            found[name] = found[name] * scale[:, None]
        for reader in fold.consumers:
            found[reader] = found[reader] / fold.columns(scale)
    return found


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.dequantized() if isinstance(layer, QuantizedLinear) else layer.weight
    return weight.detach().float()


def _relative(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    error, whole = (
        float(Layer(one, gram, WeightSpec()).energy().sum())
        for one in (weight.float() - other, weight.float())
    )
    return error / whole if whole > 0 else 0.0


def _format(spec: WeightSpec) -> str:
    """In words how weights are stored."""
    name = f"int{spec.bits}" if spec.kind == "int" else "fp8"
    if spec.block is not None:
        return f"{name}, blocks of {spec.block[0]} x {spec.block[1]}"
    if spec.group_size is None:
        return f"{name}, one scale"
    return f"{name}, by output" if spec.group_size == -1 else f"{name}, groups of {spec.group_size}"
