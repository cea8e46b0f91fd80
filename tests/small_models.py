"""Small models with random weights, the same on every call."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(**changes: object) -> LlamaForCausalLM:
    """Two layers of width 32 with groups of two heads, vocabulary 64; `changes` are config keys."""
    torch.manual_seed(0)
    sizes: dict = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def mixtral() -> MixtralForCausalLM:
    """One layer of two experts: what no dense-model function takes."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
