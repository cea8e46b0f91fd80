"""search: which shapes meet a latency, and what each of them holds and costs.

A shape is a base model with fewer MLP neurons and fewer groups of heads, as pruning leaves it; how
well it ranks is not predicted here, but of two shapes that meet the latency the one with more
parameters has lost less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slmperf.check import InputError
from slmperf.models.shapes import Shape, shape_of
from slmperf.plan.latency import LatencyModel, Prediction
from slmperf.plan.work import kv_bytes_per_token, weight_bytes

BASES = ("8b", "3b", "1b")
STEPS = 16  # widths tried per base: sixteenths of its neurons
# Share of a GPU's memory that weights and cache may take; the rest is workspace. SGLang's default
# for large GPUs is about this.
USABLE = 0.88


@dataclass(frozen=True)
class Choice:
    """A shape that meets the latency, with what follows from it. Bytes are of all ranks."""

    base: Shape
    shape: Shape
    scheme: str
    context: int
    tensor_parallel: int
    items: int
    item_tokens: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    members: int  # prompts of `context` tokens whose cache fits beside the weights
    ttft_cold_ms: Prediction  # all items answered, the member's history not cached
    ttft_hot_ms: Prediction  # the same on a cached history
    gpu_hours_cold: float  # per million scores, GPUs never idle, a member's items at a time
    gpu_hours_hot: float

    @property
    def members_per_gpu(self) -> float:
        """Of the cached prompts, one GPU's share."""
        return self.members / self.tensor_parallel


def plan(
    *,
    target_ttft_ms: float,
    context: int,
    gpu: str | LatencyModel = "h100-paper",
    tensor_parallel: int = 1,
    items: int = 1,
    item_tokens: int = 128,
    hot: bool = False,
    bases: Sequence[Shape | str | Any] = BASES,
    schemes: Sequence[str] = (),
) -> list[Choice]:
    """Shapes whose predicted TTFT is at most `target_ttft_ms`, most parameters first, and whose
    weights leave room for the cache of at least one prompt.

    gpu      a preset's name or a LatencyModel
    hot      hold the target against the cached prefix instead of the cold one
    bases    shapes to prune; each is cut to sixteenths of its neurons (multiples of 128 per rank,
             so that block-quantised kernels take them) and to fewer groups of heads
    schemes  of the model's rates; all that it has if empty

    Of each base, number of heads and scheme the widest that meets the target is listed: the others
    have fewer parameters for nothing. Raises InputError for sizes that cannot be, and where no base
    divides by tensor_parallel.
    """
    model = LatencyModel.preset(gpu) if isinstance(gpu, str) else gpu
    if not 0 < target_ttft_ms < math.inf:
        raise InputError(f"plan: target_ttft_ms is {target_ttft_ms}, expected a number > 0")
    if tensor_parallel < 1:
        raise InputError(f"plan: tensor_parallel is {tensor_parallel}, expected at least 1")
    choices: list[Choice] = []
    divided = False
    for base in map(shape_of, bases):
        for shapes in candidates(base, tensor_parallel):
            divided = True
            for scheme in schemes or tuple(model.gemm_tflops):
                for shape in shapes:  # widest first
                    one = _choice(
                        model, base, shape, scheme, context, tensor_parallel, items, item_tokens
                    )
                    time_ms = one.ttft_hot_ms if hot else one.ttft_cold_ms
                    if time_ms <= target_ttft_ms and one.members >= 1:
                        choices.append(one)
                        break
    if not divided:
        names = ", ".join(str(shape_of(base)) for base in bases)
        raise InputError(
            f"plan: tensor_parallel is {tensor_parallel}, which divides no shape of {names}"
        )
    return sorted(choices, key=lambda one: (-one.parameters, one.ttft_cold_ms))


def floor_ms(
    model: LatencyModel, *, context: int, items: int = 1, item_tokens: int = 128, hot: bool = False
) -> float:
    """What no shape can save: the cost per token and per pass."""
    least = Shape(1, 1, 1, 1, 1, 1, 1)
    found = model.breakdown(least, context=context, items=items, item_tokens=item_tokens, hot=hot)
    return found.token + found.fixed


def candidates(base: Shape, ranks: int) -> list[list[Shape]]:
    """Per number of KV groups that pruning can leave and ranks divide: shapes, widest first."""
    group = base.heads // base.kv_heads
    unit = 128 * ranks if base.intermediate % (128 * ranks) == 0 else ranks
    widths = {base.intermediate * step // STEPS // unit * unit for step in range(4, STEPS + 1)}
    found = []
    for kv_heads in range(base.kv_heads, 0, -1):
        if kv_heads % ranks and not (kv_heads == base.kv_heads and ranks % kv_heads == 0):
            continue  # pruned groups are divided, not repeated
        if kv_heads < base.kv_heads and kv_heads % 2 and kv_heads > 1:
            continue  # odd numbers of groups divide over no two ranks later
        if group * kv_heads % ranks:
            continue
        name = base.name if kv_heads == base.kv_heads else ""
        found.append([
            replace(
                base,
                heads=group * kv_heads,
                kv_heads=kv_heads,
                intermediate=width,
                name=name if width == base.intermediate else "",
            )
            for width in sorted(widths, reverse=True)
            if width > 0 and width % ranks == 0
        ])  # fmt: skip
    return [shapes for shapes in found if shapes]


def _choice(
    model: LatencyModel,
    base: Shape,
    shape: Shape,
    scheme: str,
    context: int,
    ranks: int,
    items: int,
    item_tokens: int,
) -> Choice:
    asked: dict[str, Any] = {
        "context": context,
        "tensor_parallel": ranks,
        "scheme": scheme,
        "items": items,
        "item_tokens": item_tokens,
    }
    cold = model.prefill_ms(shape, **asked)
    warm = model.prefill_ms(shape, **asked, hot=True)
    weights = weight_bytes(shape, scheme)
    per_token = kv_bytes_per_token(shape.rank(ranks)) * ranks  # heads that ranks repeat count twice
    left = model.device_memory_gb * 1e9 * USABLE - weights / ranks
    return Choice(
        base=base,
        shape=shape,
        scheme=scheme,
        context=context,
        tensor_parallel=ranks,
        items=items,
        item_tokens=item_tokens,
        parameters=shape.parameters,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        members=max(0, int(left * ranks // (per_token * context))),
        ttft_cold_ms=cold,
        ttft_hot_ms=warm,
        gpu_hours_cold=_gpu_hours(cold, ranks, items),
        gpu_hours_hot=_gpu_hours(warm, ranks, items),
    )


def _gpu_hours(ttft_ms: float, ranks: int, items: int) -> float:
    return ranks * 1e6 / items * ttft_ms / 3.6e6
