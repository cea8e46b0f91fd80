"""work: the flops and bytes of a forward pass, from shape and scheme alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from slmperf.check import InputError
from slmperf.models.shapes import Shape


class Scheme(NamedTuple):
    """What a quantisation scheme stores and computes in."""

    weight_bytes: float  # per weight of a layer's matrix, scales included
    quantised_activations: bool  # activations are rounded before each matrix product


def bytes_of_weight(bits: int, group_size: int | None = None) -> float:
    """Bytes of one weight of so many bits; of scales, those that `group_size` neighbours share, 2
    bytes each, count. None: one for a channel's some thousand weights or more, which is left out.
    """
    return bits / 8 + (0 if group_size is None else 2 / group_size)


SCHEMES: Mapping[str, Scheme] = {
    "fp32": Scheme(bytes_of_weight(32), False),
    "bf16": Scheme(bytes_of_weight(16), False),
    "fp8": Scheme(bytes_of_weight(8), True),
    "w8a8": Scheme(bytes_of_weight(8), True),
    "w4a16": Scheme(bytes_of_weight(4, 128), False),
}
KV_BYTES = 2  # bf16 keys and values


class Work(NamedTuple):
    """What one rank does in a forward pass: flops and bytes, which no machine changes."""

    new: int  # tokens
    gemm_flops: float
    weight_bytes: float
    attention_flops: float
    cache_bytes: float
    allreduce_bytes: float
    elementwise_bytes: float

    @classmethod
    def of(
        cls, shape: Shape, ranks: int, scheme: str, *, new: int, pairs: float, cached: int
    ) -> Work:
        """Of `new` tokens that see `pairs` keys in all, `cached` of them read from the cache."""
        weights = shape.layers * shape.layer_matrix_parameters
        channels = shape.heads * shape.head_size
        ring = 2 * (ranks - 1) / ranks
        return cls(
            new=new,
            gemm_flops=2.0 * new * weights / ranks,
            weight_bytes=weights * SCHEMES[scheme].weight_bytes / ranks,
            attention_flops=4.0 * shape.layers * channels * pairs / ranks,
            cache_bytes=float(cached) * kv_bytes_per_token(shape.rank(ranks)),
            allreduce_bytes=shape.layers * 2 * ring * new * shape.hidden * 2,
            elementwise_bytes=float(shape.layers) * new * _elementwise(shape, ranks, scheme),
        )

    @classmethod
    def together(cls, works: Sequence[Work]) -> Work:
        """Of layers that differ, the works of each kind on the same tokens."""
        new, *_ = works[0]
        return cls(new, *(sum(column) for column in list(zip(*works, strict=True))[1:]))


def prefill_works(
    shape: Shape,
    ranks: int,
    scheme: str,
    *,
    context: int,
    items: int,
    item_tokens: int,
    hot: bool,
) -> list[Work]:
    """The forward passes of `LatencyModel.prefill_ms`: the cold prompt, then all hot ones at once.

    Raises InputError for items or item_tokens that cannot be.
    """
    if items < 1:
        raise InputError(f"plan: items is {items}, expected at least 1")
    if not 1 <= item_tokens <= context:
        raise InputError(
            f"plan: item_tokens is {item_tokens}, expected 1 to the context's {context}"
        )
    works = []
    if not hot:
        works.append(Work.of(shape, ranks, scheme, new=context, pairs=context**2 / 2, cached=0))
    behind = items if hot else items - 1
    if behind:
        prefix = context - item_tokens
        pairs = behind * (item_tokens * prefix + item_tokens**2 / 2)
        new, cached = behind * item_tokens, behind * prefix
        works.append(Work.of(shape, ranks, scheme, new=new, pairs=pairs, cached=cached))
    return works


def kv_bytes_per_token(shape: Shape) -> int:
    """Bytes of keys and values that a token leaves in the cache."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * KV_BYTES


def weight_bytes(shape: Shape, scheme: str) -> int:
    """Bytes of all weights: the layers' matrices in the scheme, the rest in bf16."""
    matrices = shape.layers * shape.layer_matrix_parameters
    wide = 4 if scheme == "fp32" else 2
    return round(matrices * SCHEMES[scheme].weight_bytes) + wide * (shape.parameters - matrices)


def _elementwise(shape: Shape, ranks: int, scheme: str) -> float:
    """Bytes per token and layer on one rank: every pass reads and writes each of its tensors once.

    Twice add-and-norm (residual and delta in, residual and normed out), rope in place on q and k,
    the activation (gate and up in, product out), and before each of the four matrix products
    2 bytes in and 1 byte out where activations are quantised.
    """
    wide = 4 if scheme == "fp32" else 2
    q_and_k = (shape.heads + shape.kv_heads) * shape.head_size / ranks
    passes = 2 * 4 * shape.hidden + 2 * q_and_k + 3 * shape.intermediate / ranks
    quantised = 2 * shape.hidden + (shape.heads * shape.head_size + shape.intermediate) / ranks
    return wide * passes + 3 * quantised * SCHEMES[scheme].quantised_activations
