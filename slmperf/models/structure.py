"""Physically smaller Llama-like models: fewer MLP neurons, fewer attention heads.

An MLP neuron is a row of gate_proj and up_proj and a column of down_proj. A query head is rows of
q_proj and columns of o_proj, a key/value head rows of k_proj and v_proj; biases of the shortened
rows are sliced with them, and the norms of Qwen3's queries and keys, one for all heads, stay. Where
query heads are no longer spread evenly over the key/value heads, the layer gets a `HeadMap`.

The functions here change blocks; what they leave is written into a configuration, or a class of
its own where layers differ, by `slmperf.models.resize.apply_sizes`.

Shapes: F neurons, H query heads, G key/value heads, C head size, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.ops.head_map import HeadMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Model type -> what its class names begin with.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

# Projections that engines run as one linear layer, by its name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The linear layers of a dense block as engines run them: their name, the projections in the block.
UNITS = {
    "qkv_proj": tuple(f"self_attn.{part}" for part in FUSED["qkv_proj"]),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": tuple(f"mlp.{part}" for part in FUSED["gate_up_proj"]),
    "down_proj": ("mlp.down_proj",),
}

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# What a caller may pass as indices to keep.
Indices: TypeAlias = Sequence[int] | Tensor


class Sizes(NamedTuple):
    """Sizes of a model's layers: one number where all layers are alike, else one per layer."""

    intermediate_size: int | list[int]
    attention_heads: int | list[int]
    key_value_heads: int | list[int]


def family_of(config: PretrainedConfig) -> str:
    """The model type whose layers the model has: its own, or that of what it was pruned from."""
    return getattr(config, "base_model_type", None) or config.model_type


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a model that can be pruned.

    Raises InputError, by name, for every other architecture, and for a model whose projections are
    no plain linear layers (a quantised one, one with adapters).
    """
    family = family_of(model.config)
    if family not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        names = ", ".join(f"{name}ForCausalLM" for name in FAMILIES.values())
        raise InputError(f"{type(model).__name__}: cannot be pruned; wanted {names}")
    if family != "mixtral":
        return linear_blocks(model)
    blocks = model.model.layers
    _check_linear(model, blocks, "self_attn", _ATTENTION)
    return blocks


def linear_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of any Llama-like model; InputError where a projection is not nn.Linear.

    A mixture of experts, which keeps the projections of all experts in one tensor, is refused.
    """
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise InputError(
            f"{type(model).__name__}: wanted decoder blocks in model.layers, found none"
        )
    _check_linear(model, blocks, "self_attn", _ATTENTION)
    _check_linear(model, blocks, "mlp", _MLP)
    return blocks


def block_name(index: int) -> str:
    """The name of block `index` within the model."""
    return f"model.layers.{index}"


def layer_name(index: int, name: str) -> str:
    """A layer's name within the model from that within block `index`; of "" what all begin with."""
    return f"{block_name(index)}.{name}"


def block_of(name: str) -> int | None:
    """The decoder block that a tensor's name puts it into; None for one outside of them."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def check_finite(what: str, module: nn.Module, prefix: str = "", *, streamed: bool = False) -> None:
    """InputError, in the name of `what`, for the first weight with a value that is not finite, or
    that is not in memory; only where the module is `streamed`, some need not be.
    """
    for name, weight in module.named_parameters():
        if weight.is_meta and not streamed:
            raise InputError(
                f"{what}: wanted the model in memory, found {prefix}{name} on the meta device"
            )
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise InputError(f"{what}: {prefix}{name} holds values that are not finite")


def head_size(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def experts_of(block: nn.Module) -> nn.Module | None:
    """The module that holds a block's experts: gate_up_proj (E, 2F, D), gate before up, and
    down_proj (E, D, F). None for a dense block."""
    return getattr(block.mlp, "experts", None)


def experts_implementation(config: PretrainedConfig, dtype: torch.dtype) -> str:
    """How a mixture of experts is to run its experts: all in one grouped product, which takes rows
    of whole multiples of 16 bytes only (torch._grouped_mm), or one after the other."""
    sizes = {getattr(layer, "intermediate_size", None) or 0 for layer in config.per_layer_config}
    return "grouped_mm" if _whole_rows(sizes, dtype) else "eager"


def fit_experts(model: PreTrainedModel) -> bool:
    """Have a mixture of experts run them one after the other where the real size of a block, not
    the one in its configuration, asks for it (see `experts_implementation`); whether it does.

    To be called when experts have become smaller, before they run.
    """
    sizes = [neurons_of(block) for block in model.model.layers if experts_of(block) is not None]
    odd = not _whole_rows(sizes, model.dtype)
    if odd:
        model.config._experts_implementation = "eager"
    return odd


def neurons_of(block: nn.Module) -> int:
    """F of one block: of each expert, where it has experts."""
    experts = experts_of(block)
    return block.mlp.down_proj.in_features if experts is None else experts.down_proj.shape[2]


def heads_of(block: nn.Module) -> HeadMap:
    """The query heads of each key/value head of one block."""
    attention = block.self_attn
    mapped = getattr(attention, "head_map", None)
    if mapped is not None:
        return mapped
    kv_heads = attention.k_proj.out_features // attention.head_dim
    query_heads = attention.q_proj.out_features // attention.head_dim
    return HeadMap((query_heads // kv_heads,) * kv_heads)


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes that the model's blocks really have, whatever its configuration says."""
    blocks = decoder_blocks(model)
    heads = [heads_of(block) for block in blocks]
    return Sizes(
        _one_or_all([neurons_of(block) for block in blocks]),
        _one_or_all([head_map.query_heads for head_map in heads]),
        _one_or_all([head_map.kv_heads for head_map in heads]),
    )


@torch.no_grad()
def keep_neurons(block: nn.Module, kept: Indices | Sequence[Indices]) -> None:
    """Keep the MLP neurons `kept` of one block, in that order.

    kept    (F',) int64; for a block of experts (E, F'), or one (F',) per expert

    Raises InputError for indices that are out of range, named twice, or not as many in each expert.
    """
    have, experts = neurons_of(block), experts_of(block)
    if experts is None:
        rows = indices_of("keep_neurons", kept, have)
        for name in ("gate_proj", "up_proj"):
            _keep_rows(block.mlp.get_submodule(name), rows)
        _keep_columns(block.mlp.down_proj, rows)
        block.mlp.intermediate_size = len(rows)
        return
    stacked = expert_indices("keep_neurons", kept, have, experts.down_proj.shape[0])
    experts.gate_up_proj = _gathered(
        experts.gate_up_proj, 1, torch.cat([stacked, stacked + have], dim=1)
    )
    experts.down_proj = _gathered(experts.down_proj, 2, stacked)
    experts.intermediate_dim = stacked.shape[1]


@torch.no_grad()
def keep_heads(block: nn.Module, query_heads: Indices, kv_heads: Indices) -> None:
    """Keep these heads of one block, in that order: (H',) and (G',) int64.

    Query heads stand in the order of the key/value heads that they read, as ascending indices do.
    Where the kept key/value heads have unequal numbers of them, the block gets a head map.

    Raises InputError for indices out of range or named twice, a query head whose key/value head is
    not kept, a key/value head that no kept query head reads, and another order.
    """
    before = heads_of(block)
    queries = indices_of("keep_heads: query_heads", query_heads, before.query_heads)
    keys = indices_of("keep_heads: kv_heads", kv_heads, before.kv_heads)
    after = kept_map("keep_heads", before, queries.tolist(), keys.tolist())
    attention = block.self_attn
    query_rows = group_columns(queries, attention.head_dim)
    _keep_rows(attention.q_proj, query_rows)
    for name in ("k_proj", "v_proj"):
        _keep_rows(attention.get_submodule(name), group_columns(keys, attention.head_dim))
    _keep_columns(attention.o_proj, query_rows)
    set_head_map(attention, after)


def kept_map(
    what: str, before: HeadMap, query_heads: Sequence[int], kv_heads: Sequence[int]
) -> HeadMap:
    """The map of a layer that keeps these heads of `before`; see `keep_heads` for what it refuses,
    under the name `what`.

    A key/value head that nothing reads is refused: it would take cache for nothing.
    """
    place = {head: index for index, head in enumerate(kv_heads)}
    reads = [before.reads[head] for head in query_heads]
    for query_head, kv_head in zip(query_heads, reads, strict=True):
        if kv_head not in place:
            raise InputError(
                f"{what}: query head {query_head} reads key/value head {kv_head}, which is not kept"
            )
    places = [place[kv_head] for kv_head in reads]
    unread = [head for head, index in place.items() if index not in places]
    if unread:
        raise InputError(f"{what}: no kept query head reads key/value head {unread[0]}")
    if places != sorted(places):
        raise InputError(
            f"{what}: wanted query heads in the order of the key/value heads that they read, "
            f"found {list(query_heads)} over {list(kv_heads)}"
        )
    return HeadMap(tuple(places.count(index) for index in range(len(kv_heads))))


def set_head_map(attention: nn.Module, heads: HeadMap) -> None:
    """Tell an attention module how its query heads are spread over its key/value heads.

    An even spread needs no map: stock attention repeats each key/value head. For another, keys and
    values are repeated as the map says on their way from the cache, which goes on holding each
    once, and attention then sees one key/value head per query head.
    """
    if not heads.uniform and not hasattr(attention, "head_map"):
        attention.register_forward_pre_hook(_repeat_through_cache, with_kwargs=True)
    if not heads.uniform or hasattr(attention, "head_map"):
        attention.head_map = None if heads.uniform else heads
    attention.num_key_value_groups = heads.counts[0] if heads.uniform else 1


def group_columns(groups: Tensor, size: int) -> Tensor:
    """Indices of the columns of whole groups of `size` neighbours: (k,) -> (k * size,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)


def indices_of(what: str, kept: Any, size: int) -> Tensor:
    """`kept` as (k,) int64 on the CPU; InputError unless they are distinct numbers in 0..size-1."""
    indices = torch.as_tensor(kept).cpu()
    if indices.numel() == 0:
        raise InputError(f"{what}: wanted at least one index to keep, found none")
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError(
            f"{what}: wanted a list of whole numbers, found {indices.dtype} {tuple(indices.shape)}"
        )
    if len(indices.unique()) != len(indices):
        raise InputError(f"{what}: an index is named twice, wanted each once")
    if indices.min() < 0 or indices.max() >= size:
        outside = indices[(indices < 0) | (indices >= size)][0]
        raise InputError(f"{what}: wanted indices in 0..{size - 1}, found {outside}")
    return indices.to(torch.int64)


def expert_indices(what: str, kept: Any, size: int, experts: int) -> Tensor:
    """(E, k) int64 on the CPU, checked expert by expert as `indices_of` does."""
    if len(kept) != experts:
        raise InputError(f"{what}: wanted kept indices for {experts} experts, found {len(kept)}")
    rows = [indices_of(f"{what}: expert {index}", one, size) for index, one in enumerate(kept)]
    for index, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InputError(
                f"{what}: expert {index} keeps {len(row)}, expert 0 keeps {len(rows[0])}: "
                "wanted one number for all experts of a layer"
            )
    return torch.stack(rows)


class _Repeated:
    """A cache, or none, that hands its keys and values on once per query head that reads them."""

    def __init__(self, cache: Any, heads: HeadMap) -> None:
        self.cache, self.heads = cache, heads

    def update(self, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """(B, G, T, C) each -> (B, H, T', C) each."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, *rest, **named)
        return self._repeat(key), self._repeat(value)

    def _repeat(self, states: Tensor) -> Tensor:
        parts = [
            states[:, head : head + 1].expand(-1, count, -1, -1)
            for head, count in enumerate(self.heads.counts)
        ]
        return torch.cat(parts, dim=1)


def _repeat_through_cache(
    attention: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if attention.head_map is not None:
        cache = _Repeated(named.get("past_key_values"), attention.head_map)
        named = named | {"past_key_values": cache}
    return positional, named


def _check_linear(
    model: PreTrainedModel, blocks: nn.ModuleList, part: str, names: tuple[str, ...]
) -> None:
    for index, block in enumerate(blocks):
        for name in names:
            layer = getattr(getattr(block, part, None), name, None)
            if not isinstance(layer, nn.Linear):
                raise InputError(
                    f"{type(model).__name__}: layer {index}: wanted nn.Linear {part}.{name}, "
                    f"found {type(layer).__name__}"
                )


def _whole_rows(sizes: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether rows of so many values each are whole multiples of 16 bytes."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def _one_or_all(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _keep_rows(layer: nn.Linear, rows: Tensor) -> None:
    layer.weight = _selected(layer.weight, 0, rows)
    if layer.bias is not None:
        layer.bias = _selected(layer.bias, 0, rows)
    layer.out_features = len(rows)


def _keep_columns(layer: nn.Linear, columns: Tensor) -> None:
    layer.weight = _selected(layer.weight, 1, columns)
    layer.in_features = len(columns)


def _selected(parameter: nn.Parameter, dimension: int, indices: Tensor) -> nn.Parameter:
    kept = parameter.detach().index_select(dimension, indices.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _gathered(parameter: nn.Parameter, dimension: int, indices: Tensor) -> nn.Parameter:
    """Of parameter (E, ., .) the slices indices (E, k) along `dimension`, each expert its own."""
    kept = [
        one.index_select(dimension - 1, rows)
        for one, rows in zip(parameter.detach(), indices.to(parameter.device), strict=True)
    ]
    return nn.Parameter(torch.stack(kept), requires_grad=parameter.requires_grad)
