"""A checkpoint's tensors on their way into an engine's layers: heads where the ranks want them.

Quantised layers hold their weight in several tensors. In each of them heads lie along the outputs
of q, k and v and along the inputs of o, as many rows or columns for every head: codes, packed
codes, scales of channels, groups or blocks, packed zero points. Scales that all heads share stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.models.engines.layout import RankLayout, place
from slmperf.models.layer_sizes import LayerSizes
from slmperf.models.structure import FUSED, block_of

# Projections that engines run as one layer: (its name, the part of it).
STACKED: dict[str, tuple[str, str | int]] = {
    part: (whole, part[0] if whole == "qkv_proj" else index)
    for whole, parts in FUSED.items()
    for index, part in enumerate(parts)
}
_PROJECTIONS = (*STACKED, "o_proj", "down_proj")
_NEEDED = ("weight", "bias", "weight_packed", "weight_scale")


def sources(parameters: Iterable[str]) -> set[str]:
    """The names of the tensors that a checkpoint must have for these parameters of an engine's
    model, as far as both name them alike."""
    names = set()
    for parameter in parameters:
        *block, layer, kind = ["", *parameter.split(".")]
        if kind in _NEEDED:
            names |= {".".join([*block[1:], part, kind]) for part in FUSED.get(layer, (layer,))}
    return names


def placed(
    weights: Iterable[tuple[str, Tensor]],
    layers: Sequence[LayerSizes],
    layouts: Sequence[RankLayout],
    *,
    hidden_size: int,
    head_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name, heads in the order of `layouts`, one for each layer.

    Raises InputError for a tensor of another shape than its layer's sizes give it, and for scales
    that several heads share where heads would be parted or added.
    """
    for name, tensor in weights:
        index = block_of(name)
        if index is not None and index >= len(layers):
            raise InputError(f"{name}: wanted layers 0 to {len(layers) - 1}, as config.json has")
        parts = name.split(".")
        if index is None or len(parts) < 2 or parts[-2] not in _PROJECTIONS:
            yield name, tensor
            continue
        projection, kind = parts[-2:]
        _check(name, tensor, projection, kind, layers[index], hidden_size, head_size)
        heads, (layout, _) = layers[index].heads, layouts[index]
        if parts[-3] == "self_attn" and not layout.keeps(heads) and kind != "weight_shape":
            of_queries = projection in ("q_proj", "o_proj")
            tensor = _with_heads(
                name,
                tensor,
                dim=1 if projection == "o_proj" else 0,
                heads=heads.query_heads if of_queries else heads.kv_heads,
                order=layout.query_heads if of_queries else layout.kv_heads,
            )
        yield name, tensor


def _with_heads(
    name: str, tensor: Tensor, *, dim: int, heads: int, order: Sequence[int | None]
) -> Tensor:
    extent = tensor.shape[dim] if dim < tensor.dim() else 1
    if extent == 1:  # one value for all heads; a bias of the outputs
        return tensor
    if extent % heads:
        what = "columns" if dim else "rows"
        raise InputError(
            f"{name} has {extent} {what} for {heads} heads, which cannot be moved one by one; "
            "wanted heads in the order of the ranks before quantising (slmperf export)"
        )
    # Bytes: not every operation knows float8.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    moved = place(raw.movedim(dim, 0), order, extent // heads).movedim(0, dim)
    return moved.contiguous().view(tensor.dtype)


def _check(
    name: str,
    tensor: Tensor,
    projection: str,
    kind: str,
    sizes: LayerSizes,
    hidden_size: int,
    head_size: int,
) -> None:
    if kind not in ("weight", "weight_packed"):
        return
    queries, keys = sizes.heads.query_heads * head_size, sizes.heads.kv_heads * head_size
    outputs, inputs = {
        "q_proj": (queries, hidden_size),
        "k_proj": (keys, hidden_size),
        "v_proj": (keys, hidden_size),
        "o_proj": (hidden_size, queries),
        "down_proj": (hidden_size, sizes.intermediate_size),
    }.get(projection, (sizes.intermediate_size, hidden_size))
    # Packed codes are fewer along the inputs; their number follows from the bits.
    if tensor.shape[0] != outputs or (kind == "weight" and tensor.shape[1] != inputs):
        raise InputError(
            f"{name} is {tuple(tensor.shape)}, expected ({outputs}, {inputs}) by config.json "
            "(per_layer_config says what its layer has of its own)"
        )
