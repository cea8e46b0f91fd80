"""PrunedForCausalLM: a decoder whose layers differ, as a Transformers model.

config.json holds the fields of the model that was pruned, its model type under `base_model_type`,
and what differs under `per_layer_config`, Transformers' own key for it (layer index -> values):
intermediate_size, num_attention_heads, num_key_value_heads, and `head_map`, the number of query
heads of each key/value head where they are unequal; `format_version` rises when an older reader
would misread a newer file. The tensors have the names of the model that was pruned. Importing this
module registers both classes, after which `AutoConfig` and `AutoModelForCausalLM` read such a
folder.

Transformers is imported at the top: both classes derive from its own.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from slmperf.check import InputError
from slmperf.models.layer_sizes import FORMAT_VERSION, layer_sizes
from slmperf.models.structure import FAMILIES, experts_implementation, family_of, set_head_map
from slmperf.ops.head_map import HeadMap

# What a stock configuration does not have.
_OWN_KEYS = ("base_model_type", "format_version", "head_map", "per_layer_config")


class PrunedConfig(PretrainedConfig):
    """The fields of the base model's configuration, and `per_layer_config` where layers differ.

    Reading a size that differs from the configuration itself raises, as it does for every
    Transformers configuration with per-layer values: `per_layer_config[i]` has it. The value that
    stands for the whole model in config.json is the largest.
    """

    model_type = "slmperf_pruned"
    attribute_map = {"num_experts": "num_local_experts"}  # as in MixtralConfig
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_type: str = "llama"
    format_version: int = FORMAT_VERSION
    head_map: list[int] | None = None  # query heads of each key/value head; None: equally many
    max_position_embeddings: int = 2048  # which the rotary parameters of long contexts are read by
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True


class PrunedForCausalLM(PreTrainedModel, GenerationMixin):
    """The base model's decoder with each layer in its own sizes, and the language model's head.

    Layers, cache, attention implementations, generation and training are those of the base model;
    a mixture of experts has no auxiliary router loss here.
    Raises InputError for an unknown base model, and for heads that do not go together.
    """

    config_class = PrunedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [f"{prefix}DecoderLayer" for prefix in FAMILIES.values()]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PrunedConfig) -> None:
        # A decoder without experts refuses a way of running them: it gets what was asked for, not
        # the default that the class around it puts into the configuration.
        experts = config._experts_implementation
        if experts is None and config.base_model_type == "mixtral":
            experts = experts_implementation(config, config.dtype or torch.get_default_dtype())
        super().__init__(config)
        self.model = _decoder(config, experts)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for a class of experts in this file; Mixtral's stands in its own."""
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T) int64 -> logits (B, T, V), or of the last `logits_to_keep` positions.

        The arguments are those of the stock classes, and named because `generate` and `Trainer`
        pass only what they find in the signature.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **rest,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **rest)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def pruned_config(
    config: PretrainedConfig, intermediate_sizes: Sequence[int], heads: Sequence[HeadMap]
) -> PrunedConfig:
    """The configuration of a model pruned from `config`'s to these sizes, one per layer."""
    fields = stock_fields(config)
    layers: list[dict[str, Any]] = [
        {
            "intermediate_size": intermediate_size,
            "num_attention_heads": head_map.query_heads,
            "num_key_value_heads": head_map.kv_heads,
            "head_map": None if head_map.uniform else list(head_map.counts),
        }
        for intermediate_size, head_map in zip(intermediate_sizes, heads, strict=True)
    ]
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        fields[key] = max(layer[key] for layer in layers)
    different = [key for key in layers[0] if any(layer[key] != fields.get(key) for layer in layers)]
    if different:
        fields["per_layer_config"] = {
            index: {key: layer[key] for key in different} for index, layer in enumerate(layers)
        }
    return PrunedConfig(**fields, base_model_type=family_of(config))


def stock_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields that a configuration shares with that of the model it was pruned from."""
    own = {*_OWN_KEYS, "model_type", "architectures", "transformers_version"}
    return {key: value for key, value in config.to_dict().items() if key not in own}


def _decoder(config: PrunedConfig, experts: str | None) -> nn.Module:
    """The base model's decoder, each layer made from `per_layer_config`."""
    family = config.base_model_type
    if family not in FAMILIES:
        raise InputError(
            f"PrunedForCausalLM: base_model_type is {family!r}, wanted one of {', '.join(FAMILIES)}"
        )
    stock = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    # Made without layers, whose sizes it would read from the whole configuration.
    without_layers = copy.copy(config)
    without_layers.per_layer_config = None
    without_layers.num_hidden_layers = 0
    without_layers._experts_implementation = experts
    decoder = getattr(stock, f"{FAMILIES[family]}Model")(without_layers)
    make_layer = getattr(stock, f"{FAMILIES[family]}DecoderLayer")
    layers = layer_sizes(config.to_dict())
    for index, (of_layer, sizes) in enumerate(zip(config.per_layer_config, layers, strict=True)):
        layer = make_layer(of_layer, index)
        set_head_map(layer.self_attn, sizes.heads)
        decoder.layers.append(layer)
    config._experts_implementation = without_layers._experts_implementation
    # One configuration for all, so that a change of its attention implementation reaches all.
    for module in decoder.modules():
        if isinstance(getattr(module, "config", None), PrunedConfig):
            module.config = config
    return decoder


AutoConfig.register(PrunedConfig.model_type, PrunedConfig)
AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM)
