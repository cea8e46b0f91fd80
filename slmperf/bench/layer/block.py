"""One Transformer block, step by step, so that it can be run whole and timed part by part.

A Llama-like block in the order in which serving engines run it: the residual addition belongs to
the norm behind it, q, k and v are one matrix, gate and up are one matrix.

    norms       residual += delta; RMSNorm, and its output rounded          (twice)
    qkv         (T, D) -> (T, (H + 2 G) C)
    rope        q and k turned by their positions
    attention   causal, G key/value heads for H query heads
    o           (T, H C) -> (T, D)
    gate/up     (T, D) -> (T, 2 F)
    act         silu(gate) * up, rounded
    down        (T, F) -> (T, D)
    quantise    o's inputs to fp8 or int8, one scale per token; those of the other products are
                rounded where they are made

`delta` is what the layer before has computed and not yet added. Of several tensor-parallel ranks
each runs the block on its slices (`Shape.rank`); the deltas of o and down are then partial sums,
which an all-reduce adds up. A prefill has T tokens of one sequence; a decode step one new token of
each of T sequences, with a cache of keys and values behind it. T tokens, D hidden, F intermediate,
H query heads, G key/value heads, C head size.

Every part has one function below, or is an operator of slmperf.ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slmperf.models.shapes import Shape
from slmperf.ops import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedInput,
    linear,
    quantize_input,
    rms_norm,
    silu_mul,
)
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Fp8, Int4, Int8

PARTS = ("norms", "qkv", "rope", "attention", "o", "gate/up", "act", "down", "quantise")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPS = 1e-5
ROPE_BASE = 500000.0
# Columns of a 4-bit weight under one scale: the widest that divides the row.
INT4_GROUPS = (128, 64, 32)


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H + G, C) -> the same, channel c turned with channel c + C/2; cos, sin (T, 1, C/2)."""
    low, high = qk.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def attention(qk: Tensor, v: Tensor) -> Tensor:
    """(T, H + G, C), (T, G, C) -> (T, H C), causal; torch chooses the kernel."""
    tokens, kv_heads, size = v.shape
    q, k = qk.split((qk.shape[1] - kv_heads, kv_heads), dim=1)
    # Four dimensions: with three, torch 2.13 takes its unfused path on a CPU.
    q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(tokens, -1)


def attention_cached(qk: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token of each sequence, (T, H + G, C), (T, G, C), (T, G, L, C) twice -> (T, H C): its key
    and value take the last place of the cache."""
    q, k = qk.split((qk.shape[1] - v.shape[1], v.shape[1]), dim=1)
    keys[:, :, -1], values[:, :, -1] = k, v
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True).flatten(1)


def _fp8(weight: Tensor) -> Fp8Weight:
    spec = Fp8()
    scales = spec.scales(weight)
    return Fp8Weight.from_codes(spec.encode(weight, scales), scales.scale, ActivationSpec("float"))


def _int8(weight: Tensor) -> Int8Weight:
    spec = Int8()
    scales = spec.scales(weight)
    return Int8Weight.from_codes(spec.encode(weight, scales), scales.scale, ActivationSpec("int"))


def _int4(weight: Tensor) -> Int4Weight:
    inputs = weight.shape[1]
    group = next((size for size in INT4_GROUPS if inputs % size == 0), -1)
    spec = Int4(group_size=group)
    scales = spec.scales(weight)
    return Int4Weight.from_codes(spec.encode(weight, scales), scales, group)


class Scheme(NamedTuple):
    """How the four matrix products are computed: `pack` makes the weight that `linear` takes of a
    dense one (N, K), and `rate` names the roof's matrix rate."""

    dtypes: tuple[str, ...]  # of the activations; the first is what is taken if none is asked for
    pack: Callable[[Tensor], Any]
    rate: str
    activations: ActivationSpec | None = None


SCHEMES: Mapping[str, Scheme] = {
    "bf16": Scheme(("bf16",), lambda weight: weight, "bf16"),
    "fp32": Scheme(("fp32",), lambda weight: weight, "fp32"),
    "fp8": Scheme(("bf16",), _fp8, "fp8", ActivationSpec("float")),
    "w8a8": Scheme(("bf16", "fp32"), _int8, "int8", ActivationSpec("int")),
    "w4a16": Scheme(("bf16",), _int4, "bf16"),
}


class Weights(NamedTuple):
    """Weights of one block (or of one rank's share of it), dense, in torch layout (out, in)."""

    qkv: Tensor  # ((H + 2 G) C, D)
    o: Tensor  # (D, H C)
    gate_up: Tensor  # (2 F, D)
    down: Tensor  # (D, F)
    attention_norm: Tensor  # (D,)
    mlp_norm: Tensor  # (D,)


def matrix_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(N, K) of the four matrices."""
    channels = shape.heads * shape.head_size
    qkv = channels + 2 * shape.kv_heads * shape.head_size
    return {
        "qkv": (qkv, shape.hidden),
        "o": (shape.hidden, channels),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }


def random_weights(
    shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Weights:
    """Normal numbers of the size that trained weights have; norms of ones."""
    matrices = {
        name: torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(0.02)
        for name, size in matrix_sizes(shape).items()
    }
    ones = torch.ones(shape.hidden, dtype=dtype, device=device)
    return Weights(**matrices, attention_norm=ones, mlp_norm=ones.clone())


class Step(NamedTuple):
    """One call: the tensors it takes and gives, by name, and the part whose time it is."""

    part: str
    run: Callable[..., Any]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    flops: int = 0  # of matrix products; element-wise arithmetic is not counted

    def __call__(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it gives, by name, from tensors by name."""
        found = self.run(*(known[name] for name in self.takes))
        return dict(zip(self.gives, (found,) if isinstance(found, Tensor) else found, strict=True))


class Block:
    """A block (or one rank's share) ready to run: a prefill of `context` tokens, or a decode step
    of `sequences`, each with so many tokens, the new one among them.

    tensors   its inputs and weights by name; "residual" and "delta" (T, D) are the inputs, and of a
              decode step "keys" and "values" (T, G, context, C)
    steps     in order
    """

    def __init__(
        self, shape: Shape, weights: Weights, context: int, scheme: Scheme, sequences: int = 0
    ) -> None:
        self.shape, self.context, self.scheme = shape, context, scheme
        self.sequences, self.rows = sequences, sequences or context
        self.dtype = weights.attention_norm.dtype
        device = weights.attention_norm.device
        self.tensors: dict[str, Tensor] = {
            "attention_norm": weights.attention_norm,
            "mlp_norm": weights.mlp_norm,
        }
        half = torch.arange(0, shape.head_size, 2, device=device) / shape.head_size
        places = torch.arange(context, device=device)
        if sequences:
            places = places[-1:].expand(sequences)
        angles = places[:, None, None] * ROPE_BASE**-half
        self.tensors["cos"] = angles.cos().to(self.dtype)
        self.tensors["sin"] = angles.sin().to(self.dtype)
        pairs = sequences * context if sequences else context * (context + 1) // 2
        attend, cache = (attention_cached, ("keys", "values")) if sequences else (attention, ())
        self.steps = (
            self._norm("attention_", ("residual", "delta"), "attention_in"),
            self._linear("qkv", weights.qkv, "attention_in", ("qk_in", "v"), self._heads),
            Step("rope", rope, ("qk_in", "cos", "sin"), ("qk",)),
            Step(
                "attention",
                attend,
                ("qk", "v", *cache),
                ("attended",),
                4 * pairs * shape.heads * shape.head_size,
            ),
            *self._quantise("attended"),
            self._linear("o", weights.o, "attended", ("attention_delta",)),
            self._norm("mlp_", ("attention_residual", "attention_delta"), "mlp_in"),
            self._linear("gate/up", weights.gate_up, "mlp_in", ("gate_up",)),
            Step("act", self._activated, ("gate_up",), self._rounded("activated")),
            self._linear("down", weights.down, "activated", ("mlp_delta",)),
        )
        last = {name: place for place, step in enumerate(self.steps) for name in step.takes}
        made = [name for step in self.steps for name in step.gives]
        self._done = [
            [name for name in made if last.get(name) == place] for place in range(len(self.steps))
        ]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(T, (H + 2 G) C) -> views of q with k (T, H + G, C), and of v (T, G, C)."""
        heads = qkv.view(self.rows, -1, self.shape.head_size)
        cut = heads.shape[1] - self.shape.kv_heads
        return heads[:, :cut], heads[:, cut:]

    def _rounded(self, name: str) -> tuple[str, ...]:
        """The tensors that a product's inputs are, by name."""
        return (name,) if self.scheme.activations is None else (f"{name} codes", f"{name} scale")

    def _quantise(self, name: str) -> list[Step]:
        """The step that rounds a product's inputs, where they are not rounded as they are made."""
        spec = self.scheme.activations
        if spec is None:
            return []
        return [Step("quantise", lambda x: quantize_input(x, spec), (name,), self._rounded(name))]

    def _norm(self, prefix: str, takes: tuple[str, str], gives: str) -> Step:
        """Add the delta to the residual, and norm it."""

        def run(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            made = rms_norm(
                delta, weight, eps=EPS, residual=residual, activations=self.scheme.activations
            )
            assert made.residual is not None  # one was given
            output = made.output
            return made.residual, *((output,) if isinstance(output, Tensor) else output)

        given = (*takes, f"{prefix}norm")
        return Step("norms", run, given, (f"{prefix}residual", *self._rounded(gives)))

    def _activated(self, gate_up: Tensor) -> Tensor | QuantizedInput:
        return silu_mul(gate_up, activations=self.scheme.activations)

    def _linear(
        self,
        part: str,
        dense: Tensor,
        takes: str,
        gives: tuple[str, ...],
        view: Callable[[Tensor], Any] = lambda out: out,
    ) -> Step:
        """A matrix product; `view` cuts its result up without touching it."""
        weight = self.scheme.pack(dense)
        fields = {"": weight} if isinstance(weight, Tensor) else vars(weight)
        own = {name: one for name, one in fields.items() if isinstance(one, Tensor)}
        names = tuple(f"{part} weight {name}" for name in own)
        self.tensors.update(zip(names, own.values(), strict=True))
        inputs = self._rounded(takes)

        def run(*given: Tensor) -> Any:
            x: Any = given[0] if len(inputs) == 1 else QuantizedInput(*given[: len(inputs)])
            tensors = given[len(inputs) :]  # a copy of the weight's
            if isinstance(weight, Tensor):
                return view(linear(x, tensors[0]))
            copied = replace(weight, **dict(zip(own, tensors, strict=True)))
            return view(linear(x, copied, out_dtype=self.dtype))

        return Step(part, run, (*inputs, *names), gives, 2 * self.rows * dense.numel())

    def run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Residual and delta behind the block, each (T, D), from the inputs and weights in
        `tensors`; their sum is what the next layer sees. What no later step takes is let go.
        """
        known = dict(tensors)
        for step, done in zip(self.steps, self._done, strict=True):
            known.update(step(known))
            for name in done:
                del known[name]
        return known["mlp_residual"], known["mlp_delta"]

    def trace(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor by name: what `run` would take, come across and return."""
        known = dict(tensors)
        for step in self.steps:
            known.update(step(known))
        return known

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs beside the weights: what `run` takes."""
        shape, device = self.shape, self.tensors["cos"].device
        sizes: dict[str, tuple[int, ...]] = {}
        sizes["residual"] = sizes["delta"] = self.rows, shape.hidden
        if self.sequences:
            cache = self.sequences, shape.kv_heads, self.context, shape.head_size
            sizes["keys"] = sizes["values"] = cache
        return self.tensors | {
            name: torch.randn(size, dtype=self.dtype, device=device, generator=generator)
            for name, size in sizes.items()
        }
