"""Facts: what the rules of the engines look at in a checkpoint, all of it from config.json."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slmperf.check import InputError
from slmperf.models.checkpoint import read_config
from slmperf.models.engines.labels import check_labels
from slmperf.models.formats import compressed_tensors
from slmperf.models.layer_sizes import LayerSizes, layer_sizes, read_size
from slmperf.models.quantized import LinearScheme
from slmperf.models.stored import read_json
from slmperf.models.structure import FAMILIES, UNITS, layer_name
from slmperf.ops.head_map import HeadMap

Engine = Literal["vllm", "sglang"]
ENGINES: tuple[Engine, ...] = ("sglang", "vllm")
PRUNED, DECILM = "PrunedForCausalLM", "DeciLMForCausalLM"


class Cache(NamedTuple):
    """An engine's keys and values of one token, all layers and ranks together."""

    bytes_per_token: int
    wasted: float  # the share of them that no layer uses


class Waste(NamedTuple):
    """Bytes of keys and values of one token, all layers and ranks together."""

    native: int  # each layer its own heads: vLLM
    pool: int  # all layers as wide as the widest: SGLang

    @property
    def share(self) -> float:
        """Of the pool, what no layer uses."""
        return 1 - self.native / self.pool

    def of(self, engine: Engine) -> Cache:
        """What one of the engines has of it."""
        return Cache(self.pool, self.share) if engine == "sglang" else Cache(self.native, 0.0)


@dataclass(frozen=True)
class Facts:
    """A checkpoint as an engine sees it.

    written     the class that is to run it: a stock class, `PRUNED`, `DECILM`
    family      whose layers it has: one of `FAMILIES`
    windows     per layer whether its attention has a sliding window
    schemes     (layer, projection such as "mlp.down_proj") -> how it is quantised
    itemsize    bytes of an unquantised value
    labels      tokens that alone get a logit: answers that are scored
    """

    written: str
    family: str
    layers: tuple[LayerSizes, ...]
    hidden_size: int
    head_size: int
    windows: tuple[bool, ...]
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    itemsize: int
    fp8_cache: bool
    schemes: Mapping[tuple[int, str], LinearScheme]
    labels: tuple[int, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether all layers have the same sizes, and all key/value heads as many query heads."""
        return len(set(self.layers)) == 1 and self.layers[0].heads.uniform

    @property
    def quantized(self) -> bool:
        return bool(self.schemes)

    def with_neurons(self, multiple: int) -> Facts:
        """The same with the neurons of every layer filled up to a multiple."""
        filled = (filled_up(layer.intermediate_size, multiple) for layer in self.layers)
        layers = zip(filled, (layer.heads for layer in self.layers), strict=True)
        return replace(self, layers=tuple(LayerSizes(*one) for one in layers))

    def with_heads(self, heads: list[HeadMap], written: str) -> Facts:
        """The same with other heads in each layer, as another class."""
        sizes = zip(self.layers, heads, strict=True)
        layers = tuple(LayerSizes(layer.intermediate_size, own) for layer, own in sizes)
        return replace(self, layers=layers, written=written)

    def cache(self, ranks: int = 1) -> Waste:
        """What keys and values take; with fewer heads than ranks the ranks repeat them."""
        counts = [max(layer.heads.kv_heads, ranks) for layer in self.layers]
        each = 2 * self.head_size * (1 if self.fp8_cache else self.itemsize)
        return Waste(each * sum(counts), each * len(counts) * max(counts))


def filled_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def facts_of(model: str | os.PathLike[str] | Mapping[str, Any]) -> Facts:
    """The facts of a checkpoint in a folder, or of the fields of its configuration.

    Raises InputError for a configuration that lacks sizes or contradicts itself, or that is of
    another version or of another kind of model.
    """
    fields = dict(model) if isinstance(model, Mapping) else fields_of(model)
    decilm = fields.get("block_configs")
    family = fields.get("base_model_type") or fields.get("model_type") or ""
    if decilm is not None:
        family = "llama"
    elif family not in FAMILIES:  # whose sizes may have other names
        raise InputError(
            f"config.json: models of type {family!r} are not known, only {', '.join(FAMILIES)}"
        )
    (written, *_) = fields.get("architectures") or [FAMILIES.get(family, family) + "ForCausalLM"]
    if fields.get("model_type") == "slmperf_pruned":
        written = PRUNED
    if "layers" in fields:  # of a FlatConfig
        fields["per_layer_config"] = dict(enumerate(fields["layers"]))
    layers = tuple(layer_sizes(fields) if decilm is None else _decilm_sizes(fields, decilm))
    windows = _windows(fields, family, len(layers))
    if "attention_bias" in fields:
        biased = bool(fields["attention_bias"])
    else:
        biased = family == "qwen2"
    schemes, fp8_cache = _schemes(fields.get("quantization_config"), len(layers))
    hidden_size = read_size("config.json", fields, "hidden_size")
    if fields.get("head_dim") is None:
        head_size = hidden_size // read_size("config.json", fields, "num_attention_heads")
    else:
        head_size = read_size("config.json", fields, "head_dim")
    labels = fields.get("label_token_ids")
    if labels is not None:
        check_labels(labels, read_size("config.json", fields, "vocab_size"))
    return Facts(
        written=written,
        family=family,
        layers=layers,
        hidden_size=hidden_size,
        head_size=head_size,
        windows=windows,
        attention_bias=biased,
        mlp_bias=bool(fields.get("mlp_bias")),
        hidden_act=fields.get("hidden_act", "silu"),
        itemsize=4 if "float32" in str(fields.get("dtype") or fields.get("torch_dtype")) else 2,
        fp8_cache=fp8_cache,
        schemes=schemes,
        labels=tuple(labels or ()),
    )


def fields_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of config.json in a folder, with the defaults of Transformers where it is of a
    stock model; InputError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a checkpoint folder, found none")
    fields = read_json(folder / "config.json")
    return read_config(folder).to_dict() if fields.get("model_type") in FAMILIES else fields


def _decilm_sizes(fields: Mapping[str, Any], blocks: Any) -> list[LayerSizes]:
    """The sizes that the engines' class reads from a configuration of the type "nemotron-nas"."""
    layers = []
    for index, block in enumerate(blocks):
        try:
            group = block["attention"]["n_heads_in_group"]
            neurons = block["ffn"].get("intermediate_size")
            if neurons is None:
                exact = int(2 * block["ffn"]["ffn_mult"] * fields["hidden_size"] / 3)
                neurons = filled_up(exact, 256)
            heads = HeadMap((group,) * (fields["num_attention_heads"] // group))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"config.json: block_configs[{index}] wants attention and ffn, found {block}"
            ) from error
        layers.append(LayerSizes(neurons, heads))
    return layers


def _windows(fields: Mapping[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    """Per layer whether it has a window, which is shorter than what the model was trained on."""
    window = fields.get("sliding_window")
    longest = fields.get("max_position_embeddings") or math.inf
    if window is None or window >= longest or not fields.get("use_sliding_window", True):
        return (False,) * layers
    types = fields.get("layer_types")
    if types:
        return tuple(kind == "sliding_attention" for kind in types)
    return (family in ("mistral", "mixtral"),) * layers  # which have it in all layers


def _schemes(quantization: Any, layers: int) -> tuple[dict[tuple[int, str], LinearScheme], bool]:
    if quantization is None:
        return {}, False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != compressed_tensors.METHOD:
        raise InputError(
            f"config.json: quantization_config has quant_method {method!r}, wanted "
            f"{compressed_tensors.METHOD!r}, as which slmperf.models.load and save write others"
        )
    names = {
        layer_name(index, part): (index, part)
        for index in range(layers)
        for parts in UNITS.values()
        for part in parts
    }
    stored, fp8_cache = compressed_tensors.read_schemes(quantization, names)
    return {names[name]: one.scheme for name, one in stored.items()}, fp8_cache
