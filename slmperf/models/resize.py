"""From shrunken blocks to a model that loads: configuration, class, and `shrink`, which does both.

Where all layers are alike, the sizes go into the stock configuration; stock Transformers and the
serving engines load the result (but see `_ENGINE_NOTES`). Llama's configuration refuses head counts
that do not divide the hidden size, though its layers compute with any; such a model becomes
Mistral's class, which holds the same tensors under the same names and computes the same logits.
Everything else is a `PrunedForCausalLM`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from slmperf.check import InputError
from slmperf.models.structure import (
    FAMILIES,
    Indices,
    Sizes,
    decoder_blocks,
    expert_indices,
    experts_of,
    family_of,
    fit_experts,
    heads_of,
    indices_of,
    keep_heads,
    keep_neurons,
    kept_map,
    neurons_of,
    sizes_of,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LOG = logging.getLogger("slmperf")

# Families of which an engine's class takes the head size from the hidden size, whatever head_dim
# says; seen with vLLM 0.33.0 and SGLang 0.5.23.
_ENGINE_NOTES = {
    "qwen2": "vLLM loads Qwen2 with fewer heads only as export_for_engine writes it",
    "mixtral": "SGLang does not load Mixtral with fewer heads",
}


def shrink(
    model: PreTrainedModel,
    *,
    mlp: Sequence[Any] | None = None,
    kv_groups: Sequence[Indices] | None = None,
    query_heads: Sequence[Indices] | None = None,
) -> PreTrainedModel:
    """Keep only the named MLP neurons and heads; the blocks are changed in place.

    mlp         per layer the neurons to keep; for a mixture of experts per layer one list per
                expert, equally long
    kv_groups   per layer the key/value heads to keep, each with all query heads that read it, or
                with those of them that `query_heads` names
    query_heads per layer the query heads to keep, in any number per key/value head; where
                `kv_groups` is left out, the key/value heads that they read stay

    The kept weights are copied unchanged: a refit (`slmperf.prune`) is the caller's. Layers may
    keep different numbers. The model to go on with is returned; see `apply_sizes`.

    Raises InputError, before anything changes, for a model that cannot be pruned, another number of
    layers, indices out of range or named twice, and heads that do not go together.
    """
    blocks = decoder_blocks(model)
    plan = []
    for what, lists in (("mlp", mlp), ("kv_groups", kv_groups), ("query_heads", query_heads)):
        if lists is not None and len(lists) != len(blocks):
            raise InputError(
                f"{what}: wanted kept indices for {len(blocks)} layers, found {len(lists)}"
            )
    for index, block in enumerate(blocks):
        neurons = None
        experts = experts_of(block)
        if mlp is not None and experts is not None:
            count = experts.down_proj.shape[0]
            neurons = expert_indices(f"mlp: layer {index}", mlp[index], neurons_of(block), count)
        elif mlp is not None:
            neurons = indices_of(f"mlp: layer {index}", mlp[index], neurons_of(block))
        heads = None
        if kv_groups is not None or query_heads is not None:
            heads = _heads_kept(index, block, kv_groups, query_heads)
        plan.append((neurons, heads))
    for block, (neurons, heads) in zip(blocks, plan, strict=True):
        if neurons is not None:
            keep_neurons(block, neurons)
        if heads is not None:
            keep_heads(block, *heads)
    return apply_sizes(model)


def apply_sizes(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the blocks' real sizes make, with a configuration that says them.

    Its `pruning_note` is "" where stock Transformers and engines load the model under its own
    class. Else it says in a line what was done instead or what does not load it, as a warning of
    the logger "slmperf" does. Of another class the model is a new object with the same parameters;
    the one that was given is not to be used any more.
    `head_dim` is always written, because readers otherwise infer it from the number of heads.
    """
    from slmperf.models.pruned import PrunedForCausalLM, pruned_config

    blocks = decoder_blocks(model)
    heads = [heads_of(block) for block in blocks]
    sizes = sizes_of(model)
    if any(isinstance(size, list) for size in sizes):
        refused = "layers differ"
    elif not all(head_map.uniform for head_map in heads):
        refused = "query heads are spread unequally over key/value heads"
    else:
        result, refused = _stock(model, sizes)
        if result is not None:
            return result
    config = pruned_config(model.config, [neurons_of(block) for block in blocks], heads)
    config.head_dim = blocks[0].self_attn.head_dim
    note = f"{refused}: written as PrunedForCausalLM, which slmperf.models loads"
    return _noted(_rebuilt(model, PrunedForCausalLM, config), note)


def _stock(model: PreTrainedModel, sizes: Sizes) -> tuple[PreTrainedModel | None, str]:
    """The model in a stock class, or None and why no stock class takes it."""
    import transformers

    from slmperf.models.pruned import PrunedForCausalLM, stock_fields

    family = family_of(model.config)
    fields = stock_fields(model.config) | {
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.attention_heads,
        "num_key_value_heads": sizes.key_value_heads,
        "head_dim": decoder_blocks(model)[0].self_attn.head_dim,
    }
    name = FAMILIES[family]
    config, refused = _accepted(getattr(transformers, f"{name}Config"), fields)
    if config is not None:
        implied = fields["num_attention_heads"] * fields["head_dim"] == fields["hidden_size"]
        note = "" if implied else _ENGINE_NOTES.get(family, "")
        if isinstance(model, PrunedForCausalLM):
            kind = getattr(transformers, f"{name}ForCausalLM")
            return _noted(_rebuilt(model, kind, config), note), ""
        for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            setattr(model.config, key, fields[key])
        return _noted(model, note), ""
    biased = fields.get("attention_bias") or fields.get("mlp_bias")
    if family != "llama" or biased:
        return None, refused
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        fields.pop(key, None)
    config = transformers.MistralConfig(**fields, sliding_window=None)
    note = f"{refused}: written as MistralForCausalLM, the same tensors and the same logits"
    return _noted(_rebuilt(model, transformers.MistralForCausalLM, config), note), ""


def _accepted(
    kind: type[PretrainedConfig], fields: dict[str, Any]
) -> tuple[PretrainedConfig | None, str]:
    """The configuration, or None and why its class refuses it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return kind.from_dict(fields), ""
    except (StrictDataclassError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        return None, f"{kind.__name__} refuses {fields['num_attention_heads']} heads ({reason})"


def _rebuilt(model: PreTrainedModel, kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of class `kind` with the very parameters of `model`, tied ones still tied."""
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    config.dtype = model.config.dtype
    with torch.device("meta"):
        built = kind(config)
    wants_gradient = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    built.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    for name, tensor in built.named_parameters():  # assigned tensors all want one
        tensor.requires_grad_(wants_gradient[name])
    rotary = model.model.rotary_emb
    built.model.rotary_emb = type(built.model.rotary_emb)(config).to(rotary.inv_freq.device)
    built.generation_config = model.generation_config
    if getattr(model.model.layers[0], "gradient_checkpointing", False):
        built.gradient_checkpointing_enable()
    return built.train(model.training)


def _heads_kept(
    index: int,
    block: Any,
    kv_groups: Sequence[Indices] | None,
    query_heads: Sequence[Indices] | None,
) -> tuple[list[int], list[int]]:
    """The query and key/value heads of one layer that `shrink` is to keep, checked."""
    before = heads_of(block)
    where = f"layer {index}"
    kv_heads: list[int] | None = None
    if kv_groups is not None:
        kv_heads = indices_of(f"kv_groups: {where}", kv_groups[index], before.kv_heads).tolist()
    if query_heads is not None:
        queries = indices_of(
            f"query_heads: {where}", query_heads[index], before.query_heads
        ).tolist()
    else:
        queries = [
            head for kv in kv_heads or () for head, read in enumerate(before.reads) if read == kv
        ]
    if kv_heads is None:
        kv_heads = list(dict.fromkeys(before.reads[head] for head in queries))
    kept_map(where, before, queries, kv_heads)
    return queries, kv_heads


def _noted(model: PreTrainedModel, note: str) -> PreTrainedModel:
    if fit_experts(model):
        own = "experts run one by one (experts_implementation='eager'): a grouped product takes"
        note = "; ".join(filter(None, (note, f"{own} rows of whole multiples of 16 bytes")))
    model.pruning_note = note
    if note:
        _LOG.warning(note)
    return model
