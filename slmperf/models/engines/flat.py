"""FlatConfig: the configuration that an engine's process has of a PrunedForCausalLM checkpoint.

Engines read one number of heads and neurons from a configuration; PrunedConfig has none where
layers differ, and raises. Here the numbers are those that every layer fits into (they size cache
and buffers), and the layers' own sizes stand beside them.

Transformers is imported at the top: the class derives from its own. `register` is not for processes
that import `slmperf.models.pruned`, which has another class of the same model type.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from slmperf.models.engines.rules import widest_heads
from slmperf.models.layer_sizes import LayerSizes, layer_sizes, read_size


class FlatConfig(PretrainedConfig):
    """A checkpoint's fields with the sizes that hold for all layers.

    layers                          each layer's own sizes: intermediate_size, num_attention_heads,
                                    num_key_value_heads, head_map
    num_key_value_heads             G, of the widest layer
    num_attention_heads             of G groups of the largest size that any layer has
    num_attention_heads_per_layer   G groups of the layer's own largest size: what attention
                                    computes where the cache has one width for all layers
    intermediate_size               F, of the widest layer
    head_dim                        C

    Raises InputError as `layer_sizes` does.
    """

    model_type = "slmperf_pruned"
    max_position_embeddings: int = 2048  # which the rotary parameters of long contexts are read by
    rope_parameters: dict[str, Any] | None = None
    label_token_ids: list[int] | None = None  # answers that are scored: no other logits are needed

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **changed: Any) -> Any:
        """From the fields of config.json."""
        return super().from_dict(_flat(config_dict), **changed)


def flat_layer_sizes(config: PretrainedConfig) -> list[LayerSizes]:
    """The sizes of each layer of a FlatConfig, or of a stock configuration."""
    layers = getattr(config, "layers", None)
    per_layer = None if layers is None else dict(enumerate(layers))
    return layer_sizes(config.to_dict() | {"per_layer_config": per_layer})


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    if "layers" in fields:
        return fields
    layers = layer_sizes(fields)
    queries, kv_heads = widest_heads(layers)
    if fields.get("head_dim") is None:  # which engines would take from the number of heads below
        width, heads = (
            read_size("config.json", fields, key) for key in ("hidden_size", "num_attention_heads")
        )
        fields = fields | {"head_dim": width // heads}
    rest = {k: v for k, v in fields.items() if k not in ("per_layer_config", "head_map")}
    return rest | {
        "layers": [
            {
                "intermediate_size": layer.intermediate_size,
                "num_attention_heads": layer.heads.query_heads,
                "num_key_value_heads": layer.heads.kv_heads,
                "head_map": list(layer.heads.counts),
            }
            for layer in layers
        ],
        "num_key_value_heads": kv_heads,
        "num_attention_heads": queries,
        "num_attention_heads_per_layer": [kv_heads * max(one.heads.counts) for one in layers],
        "intermediate_size": max(layer.intermediate_size for layer in layers),
    }


def register() -> None:
    """Have AutoConfig read the model type as FlatConfig, in this process."""
    AutoConfig.register(FlatConfig.model_type, FlatConfig, exist_ok=True)
