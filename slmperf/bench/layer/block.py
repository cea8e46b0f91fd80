"""One Transformer block, step by step, so that it can be run whole and timed part by part.

A Llama-like block in the order in which serving engines run it: the residual addition belongs to
the norm behind it, q, k and v are one matrix, gate and up are one matrix.

    norms       residual += delta; RMSNorm                                    (twice)
    qkv         (T, D) -> (T, (H + 2 G) C)
    rope        q and k turned by their positions
    attention   causal, G key/value heads for H query heads
    o           (T, H C) -> (T, D)
    gate/up     (T, D) -> (T, 2 F)
    act         silu(gate) * up
    down        (T, F) -> (T, D)
    quantise    activations to fp8 or int8 before each matrix product, one scale per token

`delta` is what the layer before has computed and not yet added. Of several tensor-parallel ranks
each runs the block on its slices (`Shape.rank`); the deltas of o and down are then partial sums,
which an all-reduce adds up. T tokens, D hidden, F intermediate, H query heads, G key/value heads,
C head size.

Every part has one function below: where a fused operator is to take its place, it is put there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slmperf.models.shapes import Shape

PARTS = ("norms", "qkv", "rope", "attention", "o", "gate/up", "act", "down", "quantise")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPS = 1e-5
ROPE_BASE = 500000.0
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# Columns of a 4-bit weight under one scale: the widest that divides the row.
INT4_GROUPS = (128, 64, 32)


def add_norm(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D) x 2, (D,) -> the residual with delta added, and its RMSNorm."""
    residual = residual + delta
    return residual, F.rms_norm(residual, weight.shape, weight, EPS)


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


def silu_mul(gate_up: Tensor) -> Tensor:
    """(T, 2 F) -> (T, F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quantise_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) -> float8_e4m3fn codes (T, K) and their scales (T, 1) fp32."""
    scale = _scale(x, FP8_MAX)
    return (x / scale).to(torch.float8_e4m3fn), scale


def quantise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) -> int8 codes (T, K) and their scales (T, 1) fp32."""
    scale = _scale(x, 127)
    return (x / scale).round_().to(torch.int8), scale


def _scale(x: Tensor, top: float) -> Tensor:
    return x.abs().amax(dim=-1, keepdim=True).float().clamp_min_(1e-12) / top


def product(dtype: torch.dtype, x: Tensor, weight: Tensor) -> Tensor:
    """(T, K), (N, K) -> (T, N)."""
    return F.linear(x, weight)


def product_fp8(
    dtype: torch.dtype, x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    """Codes (T, K) and (N, K), scales (T, 1) and (1, N) -> (T, N) in bf16."""
    # Sums in the tensor cores' own registers, as serving engines do: a GPU's only difference.
    return torch._scaled_mm(
        x, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=True
    )


def product_int8(
    dtype: torch.dtype, x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    """Codes (T, K) and (N, K), scales (T, 1) and (1, N) -> (T, N); the scaling is a pass of its
    own over int32 sums, and belongs to the product's time.
    """
    return (torch._int_mm(x, weight.t()) * scale).mul_(weight_scale).to(dtype)


def product_int4(dtype: torch.dtype, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """(T, K) bf16, packed (N, K/2), scales and zeros (K/group, N, 2) -> (T, N); a CPU's."""
    group = x.shape[1] // scales.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, scales)


def _pack_fp8(weight: Tensor) -> tuple[Tensor, ...]:
    codes, scale = quantise_fp8(weight)
    return codes, scale.t().contiguous()


def _pack_int8(weight: Tensor) -> tuple[Tensor, ...]:
    codes, scale = quantise_int8(weight)
    return codes, scale.t().contiguous()


def _pack_int4(weight: Tensor) -> tuple[Tensor, ...]:
    rows, columns = weight.shape
    group = next(size for size in INT4_GROUPS if columns % size == 0)
    grouped = weight.float().view(rows, -1, group)
    scale = grouped.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12) / 7
    codes = (grouped / scale).round_().to(torch.int32).view(rows, columns) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = scale[:, :, 0].t().to(torch.bfloat16)
    return packed, torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


class Scheme(NamedTuple):
    """How the four matrix products are computed.

    `pack` turns a weight (N, K) into the tensors that `product` takes after the activations;
    `quantise` turns activations into codes and scales.
    """

    dtypes: tuple[str, ...]  # of the activations; the first is what is taken if none is asked for
    product: Callable[..., Tensor]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    rate: str  # name of the roof's matrix rate
    multiple: int  # of which K and N must be multiples


SCHEMES: Mapping[str, Scheme] = {
    "bf16": Scheme(("bf16",), product, lambda weight: (weight,), None, "bf16", 1),
    "fp32": Scheme(("fp32",), product, lambda weight: (weight,), None, "fp32", 1),
    "fp8": Scheme(("bf16",), product_fp8, _pack_fp8, quantise_fp8, "fp8", 16),
    "w8a8": Scheme(("bf16", "fp32"), product_int8, _pack_int8, quantise_int8, "int8", 8),
    "w4a16": Scheme(("bf16",), product_int4, _pack_int4, None, "bf16", 32),
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
    """A block (or one rank's share) ready to run on `context` tokens, batch 1.

    tensors   its inputs and weights by name; "residual" and "delta" (T, D) are the inputs
    steps     in order
    """

    def __init__(self, shape: Shape, weights: Weights, context: int, scheme: Scheme) -> None:
        self.shape, self.context, self.scheme = shape, context, scheme
        self.dtype = weights.attention_norm.dtype
        device = weights.attention_norm.device
        self.tensors: dict[str, Tensor] = {
            "attention_norm": weights.attention_norm,
            "mlp_norm": weights.mlp_norm,
        }
        half = torch.arange(0, shape.head_size, 2, device=device) / shape.head_size
        angles = torch.arange(context, device=device)[:, None, None] * ROPE_BASE**-half
        self.tensors["cos"] = angles.cos().to(self.dtype)
        self.tensors["sin"] = angles.sin().to(self.dtype)
        pairs = context * (context + 1) // 2
        self.steps = (
            Step(
                "norms",
                add_norm,
                ("residual", "delta", "attention_norm"),
                ("attention_residual", "attention_in"),
            ),
            *self._linear("qkv", weights.qkv, "attention_in", ("qk_in", "v"), self._heads),
            Step("rope", rope, ("qk_in", "cos", "sin"), ("qk",)),
            Step(
                "attention",
                attention,
                ("qk", "v"),
                ("attended",),
                4 * pairs * shape.heads * shape.head_size,
            ),
            *self._linear("o", weights.o, "attended", ("attention_delta",)),
            Step(
                "norms",
                add_norm,
                ("attention_residual", "attention_delta", "mlp_norm"),
                ("mlp_residual", "mlp_in"),
            ),
            *self._linear("gate/up", weights.gate_up, "mlp_in", ("gate_up",)),
            Step("act", silu_mul, ("gate_up",), ("activated",)),
            *self._linear("down", weights.down, "activated", ("mlp_delta",)),
        )
        last = {name: place for place, step in enumerate(self.steps) for name in step.takes}
        made = [name for step in self.steps for name in step.gives]
        self._done = [
            [name for name in made if last.get(name) == place] for place in range(len(self.steps))
        ]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(T, (H + 2 G) C) -> views of q with k (T, H + G, C), and of v (T, G, C)."""
        heads = qkv.view(self.context, -1, self.shape.head_size)
        cut = heads.shape[1] - self.shape.kv_heads
        return heads[:, :cut], heads[:, cut:]

    def _linear(
        self,
        part: str,
        weight: Tensor,
        takes: str,
        gives: tuple[str, ...],
        view: Callable[[Tensor], Any] = lambda out: out,
    ) -> list[Step]:
        """The steps of one matrix product; `view` cuts its result up without touching it."""
        scheme, steps = self.scheme, []
        inputs: tuple[str, ...] = (takes,)
        packed = scheme.pack(weight)
        names = tuple(f"{part} weight {place}" for place in range(len(packed)))
        self.tensors.update(zip(names, packed, strict=True))
        if scheme.quantise is not None:
            inputs = (f"{takes} codes", f"{takes} scale")
            steps.append(Step("quantise", scheme.quantise, (takes,), inputs))
        multiply = partial(scheme.product, self.dtype)

        def run(*given: Tensor) -> Any:
            return view(multiply(*given))

        flops = 2 * self.context * weight.numel()
        return [*steps, Step(part, run, (*inputs, *names), gives, flops)]

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
        """Random "residual" and "delta" beside the weights: what `run` takes."""
        size, device = (self.context, self.shape.hidden), self.tensors["cos"].device

        def normal() -> Tensor:
            return torch.randn(size, dtype=self.dtype, device=device, generator=generator)

        return {**self.tensors, "residual": normal(), "delta": normal()}
