"""The small models, calibration batches and oracles that the tests of pruning share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slmperf.prune.results import LayerPruned, PruneReport

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 6}),
    "mistral-plain": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 6}),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    ),
}


def model_of(family: str = "llama", **changes: object) -> PreTrainedModel:
    """Random weights with biases; inputs are correlated, as in trained models."""
    torch.manual_seed(0)
    config, kind, own = FAMILIES[family]
    model = kind(config(**(SIZES | own | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        embedding = model.model.embed_tokens.weight  # of rank 6
        embedding.copy_(torch.randn(96, 6) @ torch.randn(6, embedding.shape[1]) / 6)
    return model


def random_batches(count: int = 4) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(1)
    result = []
    for length in (30, 17):
        ids = torch.randint(0, 96, (count, length), generator=make)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits * batch["attention_mask"][..., None]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return set(after) == set(before) and all(torch.equal(before[k], after[k]) for k in before)


def by_part(report: PruneReport, part: str) -> list[LayerPruned]:
    return [layer for layer in report.layers if layer.name.endswith(part)]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight (N, d) of a layer by its name in a report."""
    if ".experts." in name:
        experts, _, rest = name.partition(".experts.")
        return model.get_submodule(experts).experts.down_proj[int(rest.split(".")[0])]
    return model.get_submodule(name).weight


@torch.no_grad()
def masked(dense: PreTrainedModel, report: PruneReport) -> PreTrainedModel:
    """The dense model with the refitted columns where they came from, and zeros elsewhere."""
    result = copy.deepcopy(dense)
    for layer in report.layers:
        kept = torch.tensor(layer.kept)[:, None] * layer.group_size + torch.arange(layer.group_size)
        weight = weight_of(result, layer.name)
        weight.zero_()
        weight[:, kept.reshape(-1)] = weight_of(report.model, layer.name)
    return result
