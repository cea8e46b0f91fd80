"""The models of the tests of smoothing and static scales: norms that are not all alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_pruning import SIZES, model_of, random_batches
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedModel,
)

from slmperf.calibrate import BlockStream
from slmperf.models.resize import apply_sizes
from slmperf.models.structure import keep_heads, keep_neurons
from slmperf.quant.folds import folded, folds_of


def gemma(kind: str = "gemma", **changes: object) -> PreTrainedModel:
    """Random weights, norms of (1 + w) that are not all alike."""
    config, model = {
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    return _uneven(model(config(**(SIZES | {"head_dim": 8, "sliding_window": 8} | changes))).eval())


def pruned() -> PreTrainedModel:
    """A model whose layers differ, one of them with a head map of 2, 1 and 2 query heads."""
    model = model_of("qwen2")
    keep_heads(model.model.layers[0], [0, 1, 2, 6, 7], [0, 1, 3])
    keep_neurons(model.model.layers[1], range(40))
    return _uneven(apply_sizes(model))


def with_layer_norms() -> PreTrainedModel:
    """A Llama whose first block has nn.LayerNorm with a bias."""
    model = _uneven(model_of("llama-bias"))
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = nn.LayerNorm(SIZES["hidden_size"])
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.3)
        setattr(model.model.layers[0], name, norm)
    return model


def _uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms whose weights are not all alike."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _uneven(model_of("llama")),
    "llama-bias": lambda: _uneven(model_of("llama-bias")),
    "mha": lambda: _uneven(model_of("llama", num_key_value_heads=8)),
    "mistral": lambda: _uneven(model_of("mistral")),
    "qwen2": lambda: _uneven(model_of("qwen2")),
    "qwen3": lambda: _uneven(model_of("qwen3")),
    "gemma": gemma,
    "gemma2": lambda: gemma("gemma2"),
    "pruned": pruned,
    "layer-norms": with_layer_norms,
}


def stream_of(model: PreTrainedModel, batches: list | None = None) -> BlockStream:
    return BlockStream(model, model.model.layers, batches or random_batches())


@torch.no_grad()
def with_outliers(model: PreTrainedModel, size: float = 60.0) -> PreTrainedModel:
    """The same function, with channels `size` times as large as they were in every input."""
    for index, block in enumerate(model.model.layers):
        folds = folds_of(block, index)
        scales = {}
        for fold in folds:
            width = block.get_submodule(fold.producer).weight.shape[0]
            scales[fold.producer] = torch.where(torch.arange(width) % 11 == 3, 1 / size, 1.0)
        for name, value in folded(block, folds, scales).items():
            block.get_parameter(name).copy_(value)
    return model
