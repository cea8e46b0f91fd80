"""latency: the predicted time of a pruned model, from the sizes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from slmperf.prune.counts import Counts, LayerSize

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from slmperf.plan import LatencyModel


def milliseconds_of(
    config: PretrainedConfig,
    counts: Counts,
    gpu: str | LatencyModel,
    context: int,
    tensor_parallel: int,
    scheme: str,
) -> Callable[[Sequence[LayerSize]], float]:
    """Milliseconds to the first token of a cold prompt, of a model with layers of given sizes.

    Layers that differ each take their share. See `slmperf.plan.LatencyModel` for the arguments.
    """
    from slmperf.models.shapes import Shape, shape_of
    from slmperf.plan import LatencyModel

    latency = LatencyModel.preset(gpu) if isinstance(gpu, str) else gpu
    base: Shape = shape_of({**config.to_dict(), **counts.first_layer()})

    @cache
    def of(size: LayerSize) -> tuple[float, float]:
        shape = replace(
            base, intermediate=size.neurons, heads=size.heads, kv_heads=size.kv_heads, name=""
        )
        terms = latency.breakdown(
            shape, context=context, tensor_parallel=tensor_parallel, scheme=scheme
        )
        return terms.layers_ms, terms.total_ms

    def measure(sizes: Sequence[LayerSize]) -> float:
        if all(size == sizes[0] for size in sizes):
            return of(sizes[0])[1]
        layers_ms, total_ms = of(sizes[0])
        return total_ms - layers_ms + sum(of(size)[0] for size in sizes) / len(sizes)

    return measure
