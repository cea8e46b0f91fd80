"""What an engine has to build for a model, read from its configuration: the plug-ins' common part.

The four families differ in biases, in norms of queries and keys, and in sliding windows; else their
decoders are the same (modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py
of Transformers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from slmperf.check import InputError
from slmperf.models.engines.flat import flat_layer_sizes
from slmperf.models.engines.layout import RankLayout, over_ranks
from slmperf.models.layer_sizes import LayerSizes
from slmperf.models.structure import family_of, head_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SERVED = ("llama", "mistral", "qwen2", "qwen3")


class Decoder(NamedTuple):
    """A model's decoder over tensor-parallel ranks."""

    layers: list[LayerSizes]
    layouts: list[RankLayout]  # of each layer's heads
    windows: list[int | None]  # keys that a layer's queries see, their own among them; None: all
    head_size: int  # C
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    normed: bool  # norms of queries and keys


def decoder_of(config: PretrainedConfig, ranks: int) -> Decoder:
    """The decoder of a FlatConfig, or of a stock configuration.

    Raises InputError for a family that the plug-ins do not know, and, naming the layer, for sizes
    that `ranks` ranks cannot share.
    """
    family = family_of(config)
    if family not in SERVED:
        raise InputError(f"base_model_type is {family!r}, wanted one of {', '.join(SERVED)}")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act is {config.hidden_act!r}, wanted 'silu'")
    layers = flat_layer_sizes(config)
    biased = family in ("llama", "qwen3") and bool(getattr(config, "attention_bias", False))
    return Decoder(
        layers,
        [_layout(index, sizes, ranks) for index, sizes in enumerate(layers)],
        [_window(config, family, index) for index in range(len(layers))],
        head_size(config),
        qkv_bias=biased or family == "qwen2",
        output_bias=biased,
        mlp_bias=family == "llama" and bool(getattr(config, "mlp_bias", False)),
        normed=family == "qwen3",
    )


def _layout(index: int, sizes: LayerSizes, ranks: int) -> RankLayout:
    if sizes.intermediate_size % ranks:
        raise InputError(
            f"layer {index}: {sizes.intermediate_size} neurons do not divide by {ranks} "
            "tensor-parallel ranks, wanted a multiple (slmperf export fills up with zeros)"
        )
    try:
        return over_ranks(sizes.heads, ranks)
    except InputError as error:
        raise InputError(f"layer {index}: {error}") from None


def _window(config: PretrainedConfig, family: str, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    if family == "llama" or window is None:
        return None
    if family == "mistral":  # in all layers
        return window
    kinds = getattr(config, "layer_types", None)
    return window if kinds and kinds[index] == "sliding_attention" else None
