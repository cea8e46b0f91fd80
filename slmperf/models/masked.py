"""Reading a masked model: one whose pruned neurons and heads are zeros, not gone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slmperf.models.checkpoint import load, read_config
from slmperf.models.resize import shrink
from slmperf.models.structure import decoder_blocks, experts_of, heads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def from_masked(
    model: PreTrainedModel | str | os.PathLike[str], *, alike: bool = False
) -> PreTrainedModel:
    """The model, or that in a folder (in its own dtype), without what is zero; logits stay.

    A model that is given is changed in place, as by `shrink`.

    A neuron is gone where its down_proj column is zero in every element, or its gate or up row and
    bias are; a query head where its o_proj columns are, or the value rows and bias of the key/value
    head that it reads; a key/value head where all query heads that read it are. Of everything one
    stays. Zeros count, not sums: weights that cancel are kept.

    alike   give all layers the sizes of the largest, with zeros among what they keep, so that stock
            Transformers loads the result. Neurons that were zero before pruning often make the
            counts of a masked checkpoint differ. The experts of one layer always get one size.

    Raises InputError for a model that cannot be pruned and a folder that `load` refuses.
    """
    if not isinstance(model, nn.Module):
        dtype = read_config(Path(model)).dtype
        model = load(model, dtype=dtype or torch.float32)
    blocks = decoder_blocks(model)
    neurons = [_live_neurons(block) for block in blocks]
    widest = max(_count(live) for live in neurons)
    mlp: list[list[int] | list[list[int]]] = []
    for live in neurons:
        size = widest if alike else _count(live)
        rows = [_filled(row, size) for row in live]
        mlp.append(rows[0] if experts_of(blocks[0]) is None else rows)
    heads = [_live_heads(block) for block in blocks]
    groups = max(sum(map(any, live)) for live in heads) if alike else 1
    group = max(sum(row) for live in heads for row in live) if alike else 1
    kept = [_filled([any(row) for row in live], groups) for live in heads]
    queries = []
    for live, kv_heads in zip(heads, kept, strict=True):
        starts = [sum(len(row) for row in live[:head]) for head in kv_heads]
        queries.append(
            [
                start + place
                for start, head in zip(starts, kv_heads, strict=True)
                for place in _filled(live[head], group)
            ]
        )
    return shrink(model, mlp=mlp, kv_groups=kept, query_heads=queries)


def _live_neurons(block: nn.Module) -> list[list[bool]]:
    """(1, F), or (E, F) for a block of experts: which neurons put something out."""
    experts, mlp = experts_of(block), block.mlp
    if experts is not None:
        gate_rows, up_rows = experts.gate_up_proj.chunk(2, dim=1)
        gate, live = _any(gate_rows, 2), _any(up_rows, 2) & _any(experts.down_proj, 1)
    else:
        gate = _live_rows(mlp.gate_proj)[None]
        live = (_any(mlp.down_proj.weight, 0) & _live_rows(mlp.up_proj))[None]
    act_fn = (experts or mlp).act_fn
    if act_fn(torch.zeros(1)) == 0:  # else a gate of zeros lets something through
        live = live & gate
    return live.tolist()


def _live_heads(block: nn.Module) -> list[list[bool]]:
    """For each key/value head, which of the query heads that read it put something out."""
    attention, heads = block.self_attn, heads_of(block)
    columns = _any(attention.o_proj.weight, 0).reshape(heads.query_heads, -1).any(dim=1)
    values = _live_rows(attention.v_proj).reshape(heads.kv_heads, -1).any(dim=1)
    live = (columns & values[list(heads.reads)]).tolist()
    ends = [sum(heads.counts[: head + 1]) for head in range(heads.kv_heads)]
    return [live[end - count : end] for end, count in zip(ends, heads.counts, strict=True)]


def _live_rows(layer: nn.Linear) -> Tensor:
    live = _any(layer.weight, 1)
    return live if layer.bias is None else live | (layer.bias != 0)


def _any(tensor: Tensor, dimension: int) -> Tensor:
    return (tensor != 0).any(dim=dimension)


def _count(live: Sequence[Sequence[bool]]) -> int:
    return max(1, *(sum(row) for row in live))


def _filled(live: Sequence[bool], count: int) -> list[int]:
    """Indices of what is live, and of the first of the rest up to `count`, at least one."""
    order = sorted(range(len(live)), key=lambda index: not live[index])
    return sorted(order[: max(1, count, sum(live))])
