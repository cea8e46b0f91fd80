"""The sizes of every layer, read from the fields of a config.json.

A model whose layers are alike says each size once. One whose layers differ has `per_layer_config`
(layer index -> what that layer has of its own), as `slmperf.models.pruned` writes it; its query
heads are counted by key/value head under `head_map` where they are unequal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from slmperf.check import InputError
from slmperf.ops.head_map import HeadMap

# Of the fields that `slmperf.models.pruned` adds to a configuration. Raised when an older reader
# would misread a newer file.
FORMAT_VERSION = 1


class LayerSizes(NamedTuple):
    """Sizes of one decoder layer."""

    intermediate_size: int
    heads: HeadMap


def layer_sizes(fields: Mapping[str, Any]) -> list[LayerSizes]:
    """The sizes of each layer by a configuration's fields, as config.json or `to_dict()` has them.

    Raises InputError for another format version, layers that the model has not, and heads that do
    not go together.
    """
    version = fields.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"config.json: format_version is {version!r}, this slmperf reads {FORMAT_VERSION}"
        )
    count = read_size("config.json", fields, "num_hidden_layers")
    own = _own_sizes(fields.get("per_layer_config") or {})
    if own and not 0 <= min(own) <= max(own) < count:
        raise InputError(
            f"config.json: per_layer_config has layers {sorted(own)}, wanted some of 0 to "
            f"{count - 1}"
        )
    return [_layer(f"config.json: layer {i}", {**fields, **own.get(i, {})}) for i in range(count)]


def read_size(where: str, fields: Mapping[str, Any], key: str) -> int:
    """A size among a configuration's fields; InputError, in the name of `where`, for none."""
    found = fields.get(key)
    if type(found) is not int or found < 1:
        raise InputError(f"{where}: {key} is {found!r}, wanted a whole number >= 1")
    return found


def _own_sizes(layers: Any) -> dict[int, Mapping[str, Any]]:
    """Layer -> what it has of its own; JSON has the layer as text."""
    if not isinstance(layers, Mapping):
        raise InputError(
            f"config.json: per_layer_config is a {type(layers).__name__}, wanted layers by number"
        )
    for index, own in layers.items():
        if not str(index).isdecimal() or not isinstance(own, Mapping):
            raise InputError(
                f"config.json: per_layer_config[{index!r}] is {own!r}, wanted a layer's number "
                "and its sizes"
            )
    return {int(index): own for index, own in layers.items()}


def _layer(where: str, fields: Mapping[str, Any]) -> LayerSizes:
    query_heads = read_size(where, fields, "num_attention_heads")
    kv_heads = query_heads
    if fields.get("num_key_value_heads") is not None:
        kv_heads = read_size(where, fields, "num_key_value_heads")
    counts = fields.get("head_map")
    if counts is None:
        if query_heads % kv_heads:
            raise InputError(
                f"{where}: {query_heads} query heads over {kv_heads} key/value heads, wanted a "
                "head_map or a multiple"
            )
        counts = [query_heads // kv_heads] * kv_heads
    if not isinstance(counts, list) or any(type(count) is not int for count in counts):
        raise InputError(f"{where}: head_map is {counts!r}, wanted a list of whole numbers")
    try:
        heads = HeadMap(tuple(counts))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if (heads.query_heads, heads.kv_heads) != (query_heads, kv_heads):
        raise InputError(
            f"{where}: head_map has {heads.query_heads} query and {heads.kv_heads} key/value "
            f"heads, wanted {query_heads} and {kv_heads}"
        )
    return LayerSizes(read_size(where, fields, "intermediate_size"), heads)
