"""Physically smaller Llama-like models: fewer MLP neurons, fewer groups of attention heads.

An MLP neuron is a row of gate_proj and up_proj and a column of down_proj. A head group is one
key/value head with the query heads that read it: rows of q_proj, k_proj and v_proj and columns of
o_proj; query head h reads key/value head h // (H / G). Sizes stay equal across layers, because
stock Transformers (and serving engines) read one number from config.json; `head_dim` is written
explicitly, because readers otherwise infer it from the number of heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a Llama-like model; InputError where a projection is not nn.Linear."""
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise InputError(
            f"{type(model).__name__}: wanted decoder blocks in model.layers, found none"
        )
    for index, block in enumerate(blocks):
        for part, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
            for name in names:
                layer = getattr(getattr(block, part, None), name, None)
                if not isinstance(layer, nn.Linear):
                    raise InputError(
                        f"{type(model).__name__}: layer {index}: wanted nn.Linear {part}.{name}, "
                        f"found {type(layer).__name__}"
                    )
    return blocks


def head_size(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def shrink(
    model: PreTrainedModel,
    *,
    mlp: Sequence[Sequence[int] | Tensor] | None = None,
    kv_groups: Sequence[Sequence[int] | Tensor] | None = None,
) -> PreTrainedModel:
    """Keep only the named MLP neurons and head groups; the model is changed in place and returned.

    `mlp` and `kv_groups` hold, per layer, the indices to keep, the same number in every layer. The
    kept weights are copied unchanged: a refit (`slmperf.prune`) is the caller's. Stock Transformers
    loads the result.

    Raises InputError for counts that differ between layers, indices out of range, or a number of
    heads that the model's own configuration refuses.
    """
    blocks = decoder_blocks(model)
    config = model.config
    mlp_kept = _checked("mlp", mlp, len(blocks), config.intermediate_size)
    groups_kept = _checked("kv_groups", kv_groups, len(blocks), config.num_key_value_heads)
    new_mlp = len(mlp_kept[0]) if mlp_kept else None
    new_groups = len(groups_kept[0]) if groups_kept else None
    check_sizes(config, mlp=new_mlp, kv_heads=new_groups)
    for index, block in enumerate(blocks):
        if mlp_kept:
            keep_neurons(block, mlp_kept[index])
        if groups_kept:
            keep_head_groups(block, groups_kept[index], config)
    set_sizes(config, mlp=new_mlp, kv_heads=new_groups)
    return model


def check_sizes(config: PretrainedConfig, *, mlp: int | None, kv_heads: int | None) -> None:
    """InputError unless a model of this kind can shrink to these sizes and load again."""
    have_mlp, have_kv = config.intermediate_size, config.num_key_value_heads
    if mlp is not None and not 1 <= mlp <= have_mlp:
        raise InputError(f"mlp: wanted {mlp} neurons, the model has intermediate_size {have_mlp}")
    if kv_heads is None:
        return
    if not 1 <= kv_heads <= have_kv:
        raise InputError(f"kv_heads: wanted {kv_heads} key/value heads, the model has {have_kv}")
    refused = _refusal(config, kv_heads)
    if refused:
        passing = [str(count) for count in range(1, have_kv) if not _refusal(config, count)]
        raise InputError(
            f"kv_heads: wanted {kv_heads} of {have_kv} key/value heads, "
            f"{type(config).__name__} refuses it ({refused}); "
            f"it takes {', '.join(passing) or 'no smaller number'}"
        )


def set_sizes(config: PretrainedConfig, *, mlp: int | None, kv_heads: int | None) -> None:
    """Write the new sizes, and the head size that they no longer imply, into the config."""
    if mlp is not None:
        config.intermediate_size = mlp
    if kv_heads is not None:
        config.head_dim = head_size(config)
        config.num_attention_heads = _query_heads(config, kv_heads)
        config.num_key_value_heads = kv_heads


def keep_neurons(block: nn.Module, kept: Tensor) -> None:
    """Keep the MLP neurons `kept` (int64 indices) of one block, in that order."""
    for name in ("gate_proj", "up_proj"):
        _keep_rows(block.mlp.get_submodule(name), kept)
    _keep_columns(block.mlp.down_proj, kept)
    block.mlp.intermediate_size = len(kept)


def keep_head_groups(block: nn.Module, kept: Tensor, config: PretrainedConfig) -> None:
    """Keep the head groups `kept` (int64) of one block; `config` has the old sizes."""
    size = head_size(config)
    queries = group_columns(kept, size * (config.num_attention_heads // config.num_key_value_heads))
    _keep_rows(block.self_attn.q_proj, queries)
    for name in ("k_proj", "v_proj"):
        _keep_rows(block.self_attn.get_submodule(name), group_columns(kept, size))
    _keep_columns(block.self_attn.o_proj, queries)


def group_columns(groups: Tensor, size: int) -> Tensor:
    """Indices of the columns of whole groups of `size` neighbours: (k,) -> (k * size,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)


def _query_heads(config: PretrainedConfig, kv_heads: int) -> int:
    return kv_heads * (config.num_attention_heads // config.num_key_value_heads)


def _refusal(config: PretrainedConfig, kv_heads: int) -> str:
    """Why the configuration class does not take that many heads, or an empty string."""
    from huggingface_hub.errors import StrictDataclassError

    changed = copy.deepcopy(config)
    try:
        set_sizes(changed, mlp=None, kv_heads=kv_heads)
        type(config).from_dict(changed.to_dict())
    except (StrictDataclassError, ValueError) as error:
        return " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return ""


def _checked(
    what: str, kept: Sequence[Sequence[int] | Tensor] | None, layers: int, size: int
) -> list[Tensor]:
    if kept is None:
        return []
    if len(kept) != layers:
        raise InputError(f"{what}: wanted kept indices for {layers} layers, found {len(kept)}")
    tensors = [torch.as_tensor(indices, dtype=torch.int64).reshape(-1) for indices in kept]
    for index, indices in enumerate(tensors):
        if len(indices) != len(tensors[0]):
            raise InputError(
                f"{what}: layer {index} keeps {len(indices)}, layer 0 keeps {len(tensors[0])}: "
                "wanted one number for all layers"
            )
        if len(indices.unique()) != len(indices):
            raise InputError(f"{what}: layer {index} names an index twice")
        if len(indices) and (indices.min() < 0 or indices.max() >= size):
            raise InputError(f"{what}: layer {index}: wanted indices in 0..{size - 1}")
    return tensors


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
