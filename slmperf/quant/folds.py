"""Folds: channels of a decoder block that can be divided where they come from and multiplied where
they are read, so that the block computes what it did before.

    input_layernorm                         -> q, k, v
    post_attention_layernorm (of Gemma2:
        the norm before the feed-forward)   -> gate, up
    rows of up_proj                         -> columns of down_proj; act(gate) * up is linear in up
    rows of v_proj                          -> columns of o_proj; attention is linear in its values,
                                               and all query heads of a value share its scale

(SmoothQuant, https://arxiv.org/abs/2211.10438, has the first two.) Only blocks whose every weight
is known here are folded: another reader of a norm's outputs would see them divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.structure import block_name, heads_of, layer_name
from slmperf.ops.head_map import HeadMap
from slmperf.quant.plan import LINEARS, UNITS

# Class of a decoder block -> its norm before the feed-forward part.
_BLOCKS = {
    "LlamaDecoderLayer": "post_attention_layernorm",
    "MistralDecoderLayer": "post_attention_layernorm",
    "Qwen2DecoderLayer": "post_attention_layernorm",
    "Qwen3DecoderLayer": "post_attention_layernorm",
    "GemmaDecoderLayer": "post_attention_layernorm",
    "Gemma2DecoderLayer": "pre_feedforward_layernorm",
}
# Class of a norm -> what it adds to its weight before it multiplies with it.
_NORMS = {
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "RMSNorm": 0.0,  # torch.nn's
    "LayerNorm": 0.0,
}
# Other modules with weights that such blocks have: norms of what nobody here scales.
_UNTOUCHED = (
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Fold:
    """d channels: `producer` gives them, `consumers`, one of `UNITS`, read them.

    offset  what a norm adds to its weight; None: the producer is a linear layer
    heads   the query heads of each key/value head, where channels are read by several
    """

    producer: str
    consumers: tuple[str, ...]
    offset: float | None = None
    heads: HeadMap | None = None

    def columns(self, scale: Tensor) -> Tensor:
        """Of the consumers' inputs, (d,) -> (in,)."""
        if self.heads is None:
            return scale
        return scale.view(self.heads.kv_heads, -1)[list(self.heads.reads)].flatten()

    def channels(self, columns: Tensor) -> Tensor:
        """The largest of each channel's columns, (in,) -> (d,)."""
        if self.heads is None:
            return columns
        by_head = columns.view(self.heads.query_heads, -1).split(self.heads.counts)
        return torch.cat([queries.amax(0) for queries in by_head])


def folds_of(block: nn.Module, index: int) -> tuple[Fold, ...]:
    """The folds of a decoder block, number `index` of its model.

    Raises InputError, by name, for a block, a layer or a norm that is not known.
    """
    kind = type(block).__name__
    if kind not in _BLOCKS:
        known = ", ".join(_BLOCKS)
        raise InputError(f"smooth: {block_name(index)}: wanted one of {known}, found {kind}")
    norms = ("input_layernorm", _BLOCKS[kind])
    for name, module in block.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        where, found = f"smooth: {layer_name(index, name)}", type(module).__name__
        if name in LINEARS and type(module) is not nn.Linear:  # a subclass may compute its weight
            raise InputError(f"{where}: wanted nn.Linear, found {found}")
        if name not in (*LINEARS, *norms, *_UNTOUCHED):
            raise InputError(f"{where}: wanted only layers known to smooth, found this {found}")
    attention, output, mlp, down = UNITS
    return (
        Fold(norms[0], attention, _offset(block, norms[0], index)),
        Fold("self_attn.v_proj", output, heads=heads_of(block)),
        Fold(norms[1], mlp, _offset(block, norms[1], index)),
        Fold("mlp.up_proj", down),
    )


def folded(
    block: nn.Module, folds: Iterable[Fold], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of a block that change, by name and in their dtypes, where the channels of
    folds are divided by scales (d,) > 0 in fp32 at the producer (the key) and multiplied at the
    consumers.
    """
    changed: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for fold in folds:
        scale = scales.get(fold.producer)
        if scale is None:
            continue
        producer = block.get_submodule(fold.producer)
        if fold.offset is None:
            rows[fold.producer] = scale
        else:
            weight, scale = _divided(producer.weight, scale, fold.offset)
            changed[f"{fold.producer}.weight"] = weight
        bias = getattr(producer, "bias", None)
        if bias is not None:
            changed[f"{fold.producer}.bias"] = (bias / scale).to(bias.dtype)
        columns |= dict.fromkeys(fold.consumers, fold.columns(scale))
    for name in rows.keys() | columns.keys():
        weight = block.get_submodule(name).weight
        whole = weight * columns[name] if name in columns else weight
        whole = whole / rows[name][:, None] if name in rows else whole
        changed[f"{name}.weight"] = whole.to(weight.dtype)
    return changed


def _divided(weight: Tensor, scale: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """A norm's weight with offset + weight divided by `scale`, in its dtype, and what it really was
    divided by: rounding, to which a weight of near -1 beside an offset of 1 loses much in half
    precision, is thus no error but another scale.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    before = weight.to(exact) + offset
    after = (before / scale - offset).to(weight.dtype)
    divided_by = before / (after.to(exact) + offset)
    kept = torch.isfinite(divided_by) & (divided_by > 0)  # not where the norm gives nothing
    return torch.where(kept, after, weight), torch.where(kept, divided_by, 1.0)


def _offset(block: nn.Module, name: str, index: int) -> float:
    """What the norm adds to its weight; InputError for a norm that is not known."""
    norm = block.get_submodule(name)
    kind = type(norm).__name__
    if kind not in _NORMS:
        known = ", ".join(_NORMS)
        raise InputError(f"smooth: {layer_name(index, name)}: wanted one of {known}, found {kind}")
    if getattr(norm, "weight", None) is None:
        raise InputError(
            f"smooth: {layer_name(index, name)}: wanted a norm with a weight, found none"
        )
    return _NORMS[kind]
