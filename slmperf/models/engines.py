"""Checkpoints for serving engines that read per-layer sizes, and the order of heads over ranks.

vLLM and SGLang load layers of different sizes as DeciLMForCausalLM, model type "nemotron-nas"
(vllm/model_executor/models/nemotron_nas.py, sglang/srt/models/nemotron_nas.py): Llama's tensors,
one number of query heads H for all layers, and in `block_configs` each layer's query heads per
key/value head and its neurons. What a pruned layer has less of is filled up with zeros that change
no output: query heads without output columns, key/value heads that only those read, neurons.
Layers with fewer heads therefore save less there than in `PrunedForCausalLM`. Models whose layers
are alike need none of this, but for Qwen2 with fewer heads: vLLM 0.33's own class for it takes the
head size from the hidden size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.checkpoint import older_rope_fields
from slmperf.models.files import write_folder
from slmperf.models.pruned import stock_fields
from slmperf.models.resize import apply_sizes
from slmperf.models.shards import ShardWriter
from slmperf.models.structure import (
    block_of,
    decoder_blocks,
    family_of,
    heads_of,
    keep_heads,
    layer_name,
    linear_blocks,
    neurons_of,
)
from slmperf.ops.head_map import HeadMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Engine = Literal["vllm", "sglang"]
_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
_VECTOR = 8  # bf16 values in 16 bytes, which their activation kernels read at once
_FFN_MULTIPLE = 256  # to which the engines round what they compute from ffn_mult


class Layout(NamedTuple):
    """Where an engine's layer has its heads; None: a head of zeros."""

    kv_heads: list[int | None]  # (G',) which of the layer's key/value heads
    query_heads: list[int | None]  # (H,), H / G' in a row for each of them


def permute_kv_heads(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """Order the key/value heads of each layer so that `ranks` equal slices of them, in order, have
    query heads as even in number as whole groups allow; the logits stay.

    Tensor-parallel engines give each rank a slice of neighbouring key/value heads with the query
    heads that read them. Only layers with a head map change. Use the model that is returned.

    Raises InputError where a layer has fewer key/value heads than there are ranks.
    """
    blocks = decoder_blocks(model)
    maps = [heads_of(block) for block in blocks]
    for index, heads in enumerate(maps):
        if not 1 <= ranks <= heads.kv_heads:
            raise InputError(
                f"permute_kv_heads: layer {index} has {heads.kv_heads} key/value heads, "
                f"wanted at least one for each of {ranks} ranks"
            )
    for block, heads in zip(blocks, maps, strict=True):
        order = [head for owned in heads.over_ranks(ranks) for head in owned]
        if order != sorted(order):
            keep_heads(block, [query for kv in order for query in _queries(heads, kv)], order)
    return apply_sizes(model)


def export_for_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    engine: Engine,
    ranks: int = 1,
) -> None:
    """Write the model as a DeciLMForCausalLM checkpoint, in one step; the model stays as it is.

    engine  "vllm" takes any sizes per layer. "sglang" takes one number of key/value heads for all
            layers, and neurons in multiples of 256: both are filled up to.
    ranks   the tensor-parallel size: query heads and neurons are filled up to multiples of it,
            key/value heads to a multiple or, as engines repeat them where there are fewer than
            ranks, a divisor; those that are not zero are spread evenly over the ranks

    The engine has to be started with trust_remote_code, for the configuration's class: a file of
    the folder (configuration_decilm.py) without anything else in it.

    Raises InputError for what the engines' class does not compute: mixtures of experts, norms of
    queries and keys, sliding windows, and biases in the MLP with SGLang.
    """
    config = model.config
    blocks = _checked(model, engine)
    layouts = _layouts([heads_of(block) for block in blocks], ranks, engine == "sglang")
    multiple = _VECTOR * ranks if engine == "vllm" else math.lcm(ranks, _FFN_MULTIPLE)
    sizes = [-(-neurons_of(block) // multiple) * multiple for block in blocks]
    with write_folder(folder) as aside:
        shards = ShardWriter(aside)
        for index, block in enumerate(blocks):
            tensors = _padded(block, layouts[index], sizes[index])
            shards.write({layer_name(index, name): value for name, value in tensors.items()})
        rest = {n: v for n, v in model.state_dict().items() if block_of(n) is None}
        if config.tie_word_embeddings:
            rest.pop("lm_head.weight")
        shards.write(rest)
        shards.finish()
        fields = _fields(model, layouts, sizes, engine)
        (aside / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(_CONFIGURATION, aside / _CONFIGURATION.name)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)


def _checked(model: PreTrainedModel, engine: Engine) -> nn.ModuleList:
    """The model's blocks; InputError where DeciLMForCausalLM does not compute what they do."""
    if engine not in ("vllm", "sglang"):
        raise InputError(f"export_for_engine: engine is {engine!r}, wanted 'vllm' or 'sglang'")
    decoder_blocks(model)
    name, config = family_of(model.config), model.config
    if name in ("mixtral", "qwen3"):
        raise InputError(
            f"export_for_engine: {name} has parts that DeciLMForCausalLM lacks; wanted another"
        )
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windows or (name == "mistral" and config.sliding_window is not None):
        raise InputError(
            "export_for_engine: the model has sliding windows, DeciLMForCausalLM has none"
        )
    if engine == "sglang" and getattr(config, "mlp_bias", False):
        raise InputError(
            "export_for_engine: the model has biases in its MLP, SGLang's DeciLM has none"
        )
    if config.hidden_act != "silu":
        raise InputError(
            f"export_for_engine: hidden_act is {config.hidden_act!r}, the engines know 'silu'"
        )
    return linear_blocks(model)


def _layouts(maps: list[HeadMap], ranks: int, same_kv_heads: bool) -> list[Layout]:
    """The cheapest layouts with one number of query heads H for all layers.

    A layer's G' is a multiple of the ranks or divides them, divides H, holds the layer's key/value
    heads, and leaves each of them H / G' >= its query heads. Tried is every H up to the one that
    surely works, the most query heads per key/value head in the model times the most key/value
    heads.
    """
    if ranks < 1:
        raise InputError(f"export_for_engine: ranks is {ranks}, wanted at least 1")
    widest = max(max(heads.counts) for heads in maps)
    most = -(-max(heads.kv_heads for heads in maps) // ranks) * ranks
    best: tuple[int, int, list[int]] | None = None
    for total in range(ranks, most * widest + 1, ranks):
        places = [
            g for g in range(1, total + 1) if total % g == 0 and (g % ranks == 0 or ranks % g == 0)
        ]
        fits = [
            [g for g in places if g >= heads.kv_heads and total // g >= max(heads.counts)]
            for heads in maps
        ]
        if same_kv_heads:
            common = set(fits[0]).intersection(*fits)
            fits = [sorted(common)] * len(maps)
        if not all(fits):
            continue
        chosen = [min(options) for options in fits]
        cost = total * len(maps) + sum(chosen)  # in heads of q and o, and of k and v
        if best is None or cost < best[0]:
            best = cost, total, chosen
    assert best is not None  # total = most * widest works, with `most` for every layer
    _, total, chosen = best
    return [_layout(heads, g, total // g, ranks) for heads, g in zip(maps, chosen, strict=True)]


def _layout(heads: HeadMap, kv_heads: int, group: int, ranks: int) -> Layout:
    owners = min(ranks, kv_heads)  # with fewer heads than ranks, several ranks share each
    kept: list[int | None] = []
    for owned in heads.over_ranks(owners):
        kept += [*owned, *[None] * (kv_heads // owners - len(owned))]
    queries: list[int | None] = []
    for head in kept:
        own = [] if head is None else _queries(heads, head)
        queries += [*own, *[None] * (group - len(own))]
    return Layout(kept, queries)


def _queries(heads: HeadMap, kv_head: int) -> list[int]:
    """The query heads that read one key/value head."""
    first = sum(heads.counts[:kv_head])
    return list(range(first, first + heads.counts[kv_head]))


def _padded(block: nn.Module, layout: Layout, neurons: int) -> dict[str, Tensor]:
    """A block's tensors with heads and neurons where the layout puts them, zeros elsewhere."""
    attention = block.self_attn
    size, tensors = attention.head_dim, dict(block.state_dict())
    for name in ("q_proj", "k_proj", "v_proj"):
        heads = layout.query_heads if name == "q_proj" else layout.kv_heads
        for kind in ("weight", "bias"):
            key = f"self_attn.{name}.{kind}"
            if key in tensors:
                tensors[key] = _placed(tensors[key], heads, size)
    key = "self_attn.o_proj.weight"
    tensors[key] = _placed(tensors[key].T, layout.query_heads, size).T
    if attention.q_proj.bias is not None and attention.o_proj.bias is None:
        # The engines have a bias in all four projections or in none.
        tensors["self_attn.o_proj.bias"] = tensors[key].new_zeros(tensors[key].shape[0])
    rows: list[int | None] = [*range(neurons_of(block))]
    rows += [None] * (neurons - len(rows))
    for name in ("gate_proj", "up_proj"):
        for kind in ("weight", "bias"):
            if f"mlp.{name}.{kind}" in tensors:
                tensors[f"mlp.{name}.{kind}"] = _placed(tensors[f"mlp.{name}.{kind}"], rows, 1)
    tensors["mlp.down_proj.weight"] = _placed(tensors["mlp.down_proj.weight"].T, rows, 1).T
    return tensors


def _placed(tensor: Tensor, groups: list[int | None], size: int) -> Tensor:
    """Rows of `tensor` (m * size, ...) in groups of `size`, in the order of `groups`; None: zeros.

    -> (len(groups) * size, ...)
    """
    whole = tensor.reshape(-1, size, *tensor.shape[1:])
    placed = whole.new_zeros(len(groups), *whole.shape[1:])
    real = [place for place, group in enumerate(groups) if group is not None]
    placed[real] = whole[[group for group in groups if group is not None]]
    return placed.reshape(-1, *tensor.shape[1:])


def _fields(
    model: PreTrainedModel, layouts: list[Layout], sizes: list[int], engine: Engine
) -> dict[str, Any]:
    """config.json: Llama's fields, and those of the engines' class."""
    from transformers import LlamaConfig

    config = model.config
    known = set(LlamaConfig().to_dict())
    fields = {key: value for key, value in stock_fields(config).items() if key in known}
    block_configs = []
    for layout, size in zip(layouts, sizes, strict=True):
        group = len(layout.query_heads) // len(layout.kv_heads)
        ffn: dict[str, Any] = {"no_op": False}
        if engine == "vllm":
            ffn["intermediate_size"] = size
        else:
            ffn["ffn_mult"] = 3 * size / (2 * config.hidden_size)
        block_configs.append({"attention": {"no_op": False, "n_heads_in_group": group}, "ffn": ffn})
    return fields | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIGURATION.stem}.DeciLMConfig"},
        "num_attention_heads": len(layouts[0].query_heads),
        "num_key_value_heads": max(len(layout.kv_heads) for layout in layouts),
        "intermediate_size": max(sizes),
        "head_dim": linear_blocks(model)[0].self_attn.head_dim,
        "attention_bias": linear_blocks(model)[0].self_attn.q_proj.bias is not None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_configs": block_configs,
        **older_rope_fields(fields["rope_parameters"]),
    }
