"""checkpoint: what a folder's config.json says of weights, cache and time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from slmperf.check import InputError
from slmperf.models.engines.facts import Facts, facts_of, fields_of
from slmperf.models.layer_sizes import read_size
from slmperf.models.quantized import LinearScheme
from slmperf.models.shapes import Shape
from slmperf.models.structure import UNITS
from slmperf.plan.work import bytes_of_weight

_WIDE = 2  # bytes of a value that is not quantised: bfloat16 or float16, as which it is served
_POSITIONS = 2048  # of a configuration that does not say how many


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be served.

    facts      sizes of all layers, heads and schemes
    vocabulary V, and `tied`: whether one matrix is both embedding and head
    positions  tokens of the longest prompt, answer included
    full       stored in float32, which an engine has to be told to serve in bfloat16
    """

    folder: Path
    facts: Facts
    vocabulary: int
    tied: bool
    positions: int
    full: bool

    @property
    def shapes(self) -> list[Shape]:
        """The layers as the latency model reads them: a Shape for each kind, with its number.

        Query heads spread unevenly over key/value heads count as groups of the largest size, as
        which engines' attention computes them.
        """
        kinds = Counter(
            (layer.intermediate_size, layer.heads.kv_heads, max(layer.heads.counts))
            for layer in self.facts.layers
        )
        return [
            Shape(
                layers=count,
                hidden=self.facts.hidden_size,
                heads=kv_heads * group,
                kv_heads=kv_heads,
                head_size=self.facts.head_size,
                intermediate=neurons,
                vocabulary=self.vocabulary,
                tied=self.tied,
                name=self.folder.resolve().name,
            )
            for (neurons, kv_heads, group), count in kinds.items()
        ]

    @property
    def schemes(self) -> list[str]:
        """The planner's names of how layers are quantised, that of most weights first."""
        weights: Counter[str] = Counter()
        for index in range(len(self.facts.layers)):
            for part, (rows, columns) in self._matrices(index, 1).items():
                weights[_planned(self.facts.schemes.get((index, part)))] += round(rows * columns)
        return [name for name, _ in weights.most_common()]

    def weight_bytes(self, ranks: int) -> int:
        """Bytes of all weights on one of `ranks` GPUs, without norms and biases; fewer key/value
        heads than ranks are repeated.
        """
        found = 0.0
        for index in range(len(self.facts.layers)):
            for part, (rows, columns) in self._matrices(index, ranks).items():
                found += rows * columns * _bytes(self.facts.schemes.get((index, part)))
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.facts.hidden_size
        return round(found + embeddings * _WIDE / ranks)

    def _matrices(self, index: int, ranks: int) -> dict[str, tuple[float, float]]:
        """(rows, columns) of a layer's matrices on one rank, by projection."""
        layer, hidden = self.facts.layers[index], self.facts.hidden_size
        queries = layer.heads.query_heads / ranks * self.facts.head_size
        keys = max(layer.heads.kv_heads / ranks, 1) * self.facts.head_size
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
        parts = [part for parts in UNITS.values() for part in parts]
        neurons = layer.intermediate_size / ranks
        return {part: (rows.get(part.rpartition(".")[2], neurons), hidden) for part in parts}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json of a folder; no weights.

    Raises InputError for what is no checkpoint of a dense decoder, and for one that contradicts
    itself.
    """
    fields, where = fields_of(folder), str(folder / "config.json")
    facts = facts_of(fields)
    key = "max_position_embeddings"
    experts = fields.get("num_local_experts") or fields.get("num_experts") or 1
    if experts > 1:
        raise InputError(f"{folder}: wanted a dense model, found a mixture of {experts} experts")
    return Checkpoint(
        folder=folder,
        facts=replace(facts, itemsize=_WIDE),
        vocabulary=read_size(where, fields, "vocab_size"),
        tied=bool(fields.get("tie_word_embeddings")),
        positions=read_size(where, {key: _POSITIONS} | fields, key),
        full=facts.itemsize > _WIDE,
    )


def _planned(scheme: LinearScheme | None) -> str:
    """The name in slmperf.plan of a way to quantise: what its matrix products compute in."""
    if scheme is None:
        return "bf16"
    if scheme.activations is None:
        return "w4a16"
    return "fp8" if scheme.activations.kind == "float" else "w8a8"


def _bytes(scheme: LinearScheme | None) -> float:
    """Bytes of one weight."""
    if scheme is None:
        return _WIDE
    size = scheme.weights.group_size
    return bytes_of_weight(scheme.weights.bits, None if size == -1 else size)
