"""DeciLM: the checkpoint in which stock engines read layers of different sizes.

vLLM and SGLang load them as DeciLMForCausalLM, model type "nemotron-nas"
(vllm/model_executor/models/nemotron_nas.py, sglang/srt/models/nemotron_nas.py): Llama's tensors,
one number of query heads H for all layers, and in `block_configs` each layer's query heads per
key/value head and its neurons. What a pruned layer has less of is filled up with zeros that change
no output: copies of query heads without output columns, heads and neurons of zeros.
Layers with fewer heads therefore save less there than in `PrunedForCausalLM`. vLLM takes any sizes
per layer, SGLang one number of key/value heads for all layers and neurons in multiples of 256.

The engine has to be started with trust_remote_code, for the configuration's class: a file of the
folder (configuration_decilm.py) without anything else in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slmperf.models.checkpoint import older_rope_fields
from slmperf.models.engines.facts import DECILM, Engine
from slmperf.models.engines.layout import HeadLayout, queries_of
from slmperf.ops.head_map import HeadMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
_VECTOR = 8  # bf16 values in 16 bytes, which activation kernels read at once
_FFN_MULTIPLE = 256  # to which the engines round what they compute from ffn_mult


def decilm_neurons(ranks: int, engine: Engine) -> int:
    """What the neurons of every layer are a multiple of."""
    return _VECTOR * ranks if engine == "vllm" else math.lcm(ranks, _FFN_MULTIPLE)


def decilm_layouts(maps: Sequence[HeadMap], ranks: int, engine: Engine) -> list[HeadLayout]:
    """The cheapest layouts with one number of query heads H for all layers.

    A layer's G' is a multiple of the ranks or, as engines repeat heads where there are fewer than
    ranks, divides them; divides H, holds the layer's key/value heads, and leaves each of them H /
    G' >= its query heads. Tried is every H up to the one that surely works, the most query heads
    per key/value head in the model times the most key/value heads.
    """
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
        if engine == "sglang":
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


def _layout(heads: HeadMap, kv_heads: int, group: int, ranks: int) -> HeadLayout:
    owners = min(ranks, kv_heads)  # with fewer heads than ranks, several ranks share each
    kept: list[int | None] = []
    for owned in heads.over_ranks(owners):
        kept += [*owned, *[None] * (kv_heads // owners - len(owned))]
    queries: list[int | None] = []
    for head in kept:
        own = [] if head is None else queries_of(heads, head)
        queries += [*own, *[None] * (group - len(own))]
    return HeadLayout(tuple(kept), tuple(queries))


def decilm_fields(
    config: PretrainedConfig,
    layouts: Sequence[HeadLayout],
    sizes: Sequence[int],
    *,
    engine: Engine,
    head_size: int,
    dtype: torch.dtype,
    biased: bool,
) -> dict[str, Any]:
    """config.json: Llama's fields, and those of the engines' class.

    sizes   (layers,) neurons, those of zeros among them
    biased  whether q, k, v and o have biases: all of them or none
    """
    from transformers import LlamaConfig

    from slmperf.models.pruned import stock_fields  # not in an engine's process: see flat.py

    known = {*LlamaConfig().to_dict(), "quantization_config"}
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
        "architectures": [DECILM],
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.DeciLMConfig"},
        "num_attention_heads": len(layouts[0].query_heads),
        "num_key_value_heads": max(len(layout.kv_heads) for layout in layouts),
        "intermediate_size": max(sizes),
        "head_dim": head_size,
        "attention_bias": biased,
        "dtype": str(dtype).removeprefix("torch."),
        "block_configs": block_configs,
        **older_rope_fields(fields["rope_parameters"]),
    }
