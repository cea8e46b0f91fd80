"""Shapes of dense, Llama-like decoders: sizes, names, parameter counts. Imports no torch.

A shape says all that a time or a number of bytes depends on, and nothing of the weights. Names are
those of arXiv 2502.14305: 8b and 3b are Llama 3.1 8B and Llama 3.2 3B, the others what pruning
leaves of them (6.8b, 6.4b, 6.0b, 2.8b, 2.4b: fewer MLP neurons; 2.1b: fewer heads; its head
counts follow from its parameter count). 1b is Llama 3.2 1B, the next smaller model to start from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from slmperf.check import InputError


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose layers are alike. D = hidden, F = intermediate, H = heads,
    G = kv_heads, C = head_size, V = vocabulary.

    Raises InputError for sizes below 1, or heads that kv_heads do not divide.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool = False  # one matrix for embedding and head
    name: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("tied", "name"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"shape: {field.name} is {value!r}, expected a whole number >= 1")
        if self.heads % self.kv_heads:
            raise InputError(
                f"shape: heads is {self.heads}, expected a multiple of kv_heads {self.kv_heads}"
            )

    def __str__(self) -> str:
        return self.name or (
            f"{self.layers}x{self.hidden}, F {self.intermediate}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_size}"
        )

    @property
    def attention_parameters(self) -> int:
        """Weights of q, k, v and o of one layer."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size

    @property
    def mlp_parameters(self) -> int:
        """Weights of gate, up and down of one layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of all seven matrices of one layer: what quantisation makes smaller."""
        return self.attention_parameters + self.mlp_parameters

    @property
    def parameters(self) -> int:
        """All weights: layers with two norms each, embedding, final norm, head if not tied."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        layers = self.layers * (self.layer_matrix_parameters + 2 * self.hidden)
        return layers + embeddings + self.hidden

    def rank(self, tensor_parallel: int) -> Shape:
        """What one of `tensor_parallel` ranks holds of the layers: heads and neurons divided,
        KV heads divided or, where there are fewer than ranks, repeated.

        Raises InputError where heads, KV heads or neurons do not divide.
        """
        ranks = tensor_parallel
        if ranks < 1:
            raise InputError(f"shape: tensor_parallel is {ranks}, expected at least 1")
        repeated = ranks > self.kv_heads and ranks % self.kv_heads == 0
        for what, size, fits in (
            ("heads", self.heads, self.heads % ranks == 0),
            ("kv_heads", self.kv_heads, repeated or self.kv_heads % ranks == 0),
            ("intermediate", self.intermediate, self.intermediate % ranks == 0),
        ):
            if not fits:
                raise InputError(
                    f"shape {self}: {what} is {size}, expected a multiple of "
                    f"tensor_parallel {ranks}"
                )
        return replace(
            self,
            heads=self.heads // ranks,
            kv_heads=max(1, self.kv_heads // ranks),
            intermediate=self.intermediate // ranks,
        )


def _llama(name: str, head_size: int = 128, **sizes: Any) -> Shape:
    return Shape(head_size=head_size, vocabulary=128256, name=name, **sizes)


_8B = _llama("8b", layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336)
_3B = _llama("3b", layers=28, hidden=3072, heads=24, kv_heads=8, intermediate=8192, tied=True)
_1B = _llama("1b", 64, layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, tied=True)
_2_4B = replace(_3B, name="2.4b", intermediate=5120)

SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        _8B,
        replace(_8B, name="6.8b", intermediate=11264),
        replace(_8B, name="6.4b", intermediate=10240),
        replace(_8B, name="6.0b", intermediate=9216),
        _3B,
        replace(_3B, name="2.8b", intermediate=6656),
        _2_4B,
        replace(_2_4B, name="2.1b", heads=12, kv_heads=4),
        _1B,
    )
}

# Names of a size in a Transformers config, and in a table of shapes.
_CONFIG_KEYS = {
    "layers": ("num_hidden_layers", "layers"),
    "hidden": ("hidden_size", "hidden"),
    "heads": ("num_attention_heads", "q_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "kv_heads"),
    "head_size": ("head_dim", "head_size"),
    "intermediate": ("intermediate_size", "intermediate"),
    "vocabulary": ("vocab_size", "vocab", "vocabulary"),
    "tied": ("tie_word_embeddings", "tied"),
}


def shape_of(what: Shape | str | Path | Mapping[str, Any] | Any, name: str = "") -> Shape:
    """The shape that `what` names or holds.

    what    a Shape; a name of SHAPES; a folder with config.json (or such a file); a mapping with a
            Transformers config's keys or with those of a table of shapes (layers, hidden, q_heads,
            kv_heads, head_dim, intermediate, vocab, tied; `base` names the shape whose sizes the
            others replace); a PretrainedConfig
    name    of the result, where `what` has none of its own

    Raises InputError, naming what there is, for anything else, and for mixtures of experts, whose
    layers are not the dense ones that a shape describes.
    """
    if isinstance(what, Shape):
        return what
    if isinstance(what, str) and what.lower() in SHAPES:
        return SHAPES[what.lower()]
    if isinstance(what, str | Path):
        return _from_path(Path(what))
    if not isinstance(what, Mapping):
        if not hasattr(what, "to_dict"):
            raise InputError(f"shape: expected a name, folder or config, found {what!r}")
        what = what.to_dict()
    return _from_mapping(what, name)


def _from_path(path: Path) -> Shape:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"shape: {path} is no known shape ({', '.join(SHAPES)}) and no folder with config.json"
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a config's mapping, found {type(value).__name__}")
    return _from_mapping(value, (path if path.is_dir() else path.parent).resolve().name)


def _from_mapping(value: Mapping[str, Any], name: str) -> Shape:
    base: Mapping[str, Any] = {}
    if "base" in value:
        base = vars(shape_of(str(value["base"])))
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(value.get(key), int) and value[key] > 1:
            raise InputError(f"shape {name}: {key} is {value[key]}, expected a dense model")
    if value.get("per_layer_config"):
        raise InputError(f"shape {name}: layers differ (per_layer_config), expected one size")
    sizes: dict[str, Any] = {}
    for size, keys in _CONFIG_KEYS.items():
        found = next((value[key] for key in keys if value.get(key) is not None), base.get(size))
        if isinstance(found, list | tuple):  # one number per layer
            if not found or any(one != found[0] for one in found):
                raise InputError(f"shape {name}: {size} differs between layers, expected one size")
            found = found[0]
        sizes[size] = found
    sizes["tied"] = bool(sizes["tied"])
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    hidden, heads = sizes["hidden"], sizes["heads"]
    if sizes["head_size"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        sizes["head_size"] = hidden // heads
    missing = [f"{_CONFIG_KEYS[size][0]}" for size, found in sizes.items() if found is None]
    if missing:
        raise InputError(f"shape {name}: missing {', '.join(missing)}")
    return Shape(**sizes, name=str(value.get("name") or name))
