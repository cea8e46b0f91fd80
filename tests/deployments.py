"""Checkpoints of a configuration alone, sized for an H100: what `slmperf deploy` is tried with."""

from __future__ import annotations

import json
from pathlib import Path

from slmperf.models.formats.compressed_tensors import quantization_config
from slmperf.plan import LatencyModel
from slmperf.quant.schemes import SCHEMES
from slmperf.serve.deploy.checkpoint import read_checkpoint
from slmperf.serve.deploy.lines import Deployment
from slmperf.serve.deploy.sizing import Wanted, size

H100 = LatencyModel.preset("h100")
LAYERS = 28
# Llama 3.2 3B, half of its heads and of its neurons pruned: the paper's 2.1B.
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
# Every second layer with half of the key/value heads, and query heads that are spread unevenly.
PER_LAYER = SMALL | {
    "architectures": ["PrunedForCausalLM"],
    "model_type": "slmperf_pruned",
    "base_model_type": "llama",
    "format_version": 1,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "per_layer_config": {
        str(index): {
            "intermediate_size": 4096 + 512 * (index % 2),
            "num_attention_heads": 12 if index % 2 else 16,
            "num_key_value_heads": 4 if index % 2 else 8,
            "head_map": None if index % 2 else [3, 1, 2, 2, 3, 1, 2, 2],
        }
        for index in range(LAYERS)
    },
}


# The same as the engines' class for layers that differ.
DECILM = SMALL | {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "block_configs": [{"attention": {"n_heads_in_group": 3}, "ffn": {"intermediate_size": 5120}}]
    * LAYERS,
}


def quantised(scheme: str, *, down: str | None = None, kv_cache: bool = False) -> dict:
    """SMALL in a scheme, its down projections in another."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    schemes = {
        f"model.layers.{index}.{part}": SCHEMES[(down if "down" in part else "") or scheme].linear
        for index in range(LAYERS)
        for part in parts
    }
    written = quantization_config(schemes, linears=[*schemes, "lm_head"], kv_cache=kv_cache)
    return SMALL | {"quantization_config": written}


FP8 = quantised("fp8")


def folder(path: Path, fields: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def deployment(path: Path, fields: dict, name: str = "small", tp: int | None = None, **asked):
    wanted = Wanted(**{"engine": "sglang", "context": 16384} | asked)
    read = read_checkpoint(folder(path, fields))
    sized, _ = size(read, H100, wanted, tp)
    return Deployment(name, read, wanted, sized, image="engine:1", claim="models")


def options_of(line: list[str]) -> dict[str, list[str]]:
    """Option -> its values."""
    found: dict[str, list[str]] = {}
    for word in line:
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found
