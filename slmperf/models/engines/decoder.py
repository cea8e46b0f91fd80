"""What an engine has to build for a model, read from its configuration: the plug-ins' common part.

The four families differ in biases, in norms of queries and keys, and in sliding windows; else their
decoders are the same (modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py
of Transformers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from slmperf.models.engines.flat import flat_layer_sizes
from slmperf.models.engines.layout import RankLayout, over_ranks
from slmperf.models.layer_sizes import LayerSizes
from slmperf.models.structure import family_of, head_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _Family(NamedTuple):
    """What a family's layers have, or have where the configuration says so."""

    takes_bias: bool = False  # attention_bias: in all four projections
    takes_mlp_bias: bool = False
    qkv_bias: bool = False
    normed: bool = False


_FAMILIES = {
    "llama": _Family(takes_bias=True, takes_mlp_bias=True),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(takes_bias=True, normed=True),
}


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
    """The decoder of a FlatConfig, or of a stock configuration, that `support.check_served` found
    nothing against.

    Raises KeyError for another family, InputError for heads that `ranks` ranks cannot share.
    """
    family = family_of(config)
    own, layers = _FAMILIES[family], flat_layer_sizes(config)
    biased = own.takes_bias and bool(getattr(config, "attention_bias", False))
    return Decoder(
        layers,
        [over_ranks(sizes.heads, ranks) for sizes in layers],
        [_window(config, family, index) for index in range(len(layers))],
        head_size(config),
        qkv_bias=biased or own.qkv_bias,
        output_bias=biased,
        mlp_bias=own.takes_mlp_bias and bool(getattr(config, "mlp_bias", False)),
        normed=own.normed,
    )


def _window(config: PretrainedConfig, family: str, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    if family == "llama" or window is None:
        return None
    if family == "mistral":  # in all layers
        return window
    kinds = getattr(config, "layer_types", None)
    return window if kinds and kinds[index] == "sliding_attention" else None
