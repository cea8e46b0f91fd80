"""prune_model: prune and refit the decoder blocks of a Llama-like model, one after the other.

Block by block: run the calibration batches through the block as it is, collecting the Gram matrices
of the inputs of o_proj and down_proj in the same pass; choose and refit with `osscar`; shrink the
block; run it again to make the inputs of the next. So every block is fitted to inputs that come
from the pruned blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate import BlockStream, Gram
from slmperf.check import InputError
from slmperf.models.checkpoint import parameters
from slmperf.models.structure import (
    check_sizes,
    decoder_blocks,
    head_size,
    keep_head_groups,
    keep_neurons,
    set_sizes,
)
from slmperf.prune.elimination import Pruned, osscar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerPruned:
    """What happened to one linear layer: `kept` of `groups` groups, and at what error."""

    name: str  # such as "model.layers.0.mlp.down_proj"
    groups: int
    kept: tuple[int, ...]
    relative_error: float  # share of the output's energy on the calibration tokens
    curve: tuple[float, ...]  # relative error (damping included) after each removal


@dataclass(frozen=True)
class PruneReport:
    """The layers in the order in which they were pruned, and the sizes before and after."""

    layers: tuple[LayerPruned, ...]
    tokens: int  # calibration tokens seen by each layer
    parameters_before: int
    parameters_after: int


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    mlp: int | None = None,
    kv_heads: int | None = None,
    damping: float = 0.01,
    progress: Callable[[int, int], object] | None = None,
) -> PruneReport:
    """Shrink every decoder block to `mlp` neurons and `kv_heads` key/value heads, in place.

    batches: the model's arguments (input_ids (B, T), attention_mask (B, T), ...), each optionally
        with `token_weights` (B, T) >= 0; padding does not count. Their hidden states are held once,
        B * T * D values a batch.
    mlp: the new intermediate_size, at most the old one. None leaves the MLP alone.
    kv_heads: the new number of key/value heads; a head leaves with all query heads that read it.
        None: no change.
    damping: see `osscar`.
    progress: called as progress(blocks done, blocks) after each block.

    Biases of the shrunk projections are sliced, those of o_proj and down_proj stay. The model ends
    in evaluation mode.
    Raises InputError before anything changes: for counts larger than the model has, for head counts
    that the model's configuration refuses, and for batches without tokens. A layer whose inputs
    are not finite raises it too, with the blocks before it already pruned.
    """
    if mlp is None and kv_heads is None:
        raise InputError("prune_model: wanted mlp or kv_heads, found neither")
    blocks = decoder_blocks(model)
    check_sizes(model.config, mlp=mlp, kv_heads=kv_heads)
    before = parameters(model)
    model.eval()
    stream = BlockStream(model, blocks, batches)
    config = model.config
    span = head_size(config) * (config.num_attention_heads // config.num_key_value_heads)
    layers: list[LayerPruned] = []
    tokens = 0
    for index, block in enumerate(blocks):
        watched: dict[str, nn.Linear] = {}
        if kv_heads is not None:
            watched["self_attn.o_proj"] = block.self_attn.o_proj
        if mlp is not None:
            watched["mlp.down_proj"] = block.mlp.down_proj
        for name, gram in stream.grams(index, watched).items():
            heads = name == "self_attn.o_proj"
            weight = watched[name].weight
            full_name = f"model.layers.{index}.{name}"
            try:
                result = osscar(
                    gram.matrix,
                    weight,
                    group_size=span if heads else 1,
                    keep=kv_heads if heads else mlp,
                    damping=damping,
                )
            except InputError as error:
                raise InputError(f"prune_model: {full_name}: {error}") from error
            layers.append(_record(full_name, gram, weight, result))
            if heads:
                keep_head_groups(block, result.kept, config)
            else:
                keep_neurons(block, result.kept)
            watched[name].weight.copy_(result.weight)
            tokens = gram.tokens
        stream.advance(index)
        if progress is not None:
            progress(index + 1, len(blocks))
    set_sizes(config, mlp=mlp, kv_heads=kv_heads)
    return PruneReport(tuple(layers), tokens, before, parameters(model))


def _record(name: str, gram: Gram, weight: Tensor, result: Pruned) -> LayerPruned:
    energy = float(((weight.double() @ gram.matrix) * weight.double()).sum() / 2)
    curve = result.curve / energy if energy > 0 else torch.zeros_like(result.curve)
    return LayerPruned(
        name=name,
        groups=len(result.kept) + len(result.order),
        kept=tuple(result.kept.tolist()),
        relative_error=result.relative_error,
        curve=tuple(curve.tolist()),
    )
