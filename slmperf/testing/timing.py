"""How long a call takes, and what the machine could do at best.

On a GPU a call's time is that of a CUDA graph holding one call per set of inputs, replayed and
divided: no launch overhead, and inputs that rotate through more memory than the second-level
cache holds. On a CPU it is wall time over the same rotation. Medians in both; calls to be
compared are interleaved, so that a clock or a neighbour disturbs all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]


def _cpu_sample(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds per call of one round over the inputs."""

    def sample() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    for call in calls:
        call()
    return sample


def _cuda_sample(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds per call of one replay of a graph that holds every call once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and warms the allocator before the capture
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(calls)

    sample()
    return sample


def median_us(
    variants: Mapping[str, Sequence[Call]], device: str, seconds: float = 1.0
) -> dict[str, float]:
    """Median microseconds per call of each variant; each is a list of calls on different inputs.

    Runs for about `seconds` per variant, at least 5 rounds, interleaved.
    """
    make = _cuda_sample if device == "cuda" else _cpu_sample
    samples = {name: make(calls) for name, calls in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds * len(variants)
    while len(min(found.values(), key=len)) < 5 or time.perf_counter() < deadline:
        for name, sample in samples.items():
            found[name].append(sample())
    return {name: statistics.median(times) * 1e6 for name, times in found.items()}


def rotations(bytes_per_call: int, device: str, least: int = 2) -> int:
    """Sets of inputs that together are twice what the last shared cache of a GPU holds."""
    if device != "cuda":
        return least
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(least, min(64, 1 + 2 * cache // max(1, bytes_per_call)))


def copy_roof_gbs(device: str, mib: int | None = None) -> float:
    """Bytes read and written per second, in GB/s, by the fastest of some large plain copies."""
    mib = mib or (2048 if device == "cuda" else 128)
    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    sample = (_cuda_sample if device == "cuda" else _cpu_sample)([lambda: target.copy_(source)])
    best = min(sample() for _ in range(10))
    return 2 * source.numel() * 4 / best / 1e9


def peak_mib(call: Call, device: str) -> float | None:
    """MiB that a call holds at most beyond what was there before; None on a CPU: nobody counts."""
    if device != "cuda":
        return None
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def forward_backward(
    run: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor], leaves: Sequence[Tensor]
) -> Call:
    """A call that runs forward and backward on the given tensors and keeps nothing."""
    upstream: list[Tensor] = []

    def call() -> None:
        result = run(given)
        if not upstream:
            upstream.append(torch.rand_like(result))
        torch.autograd.grad(result, leaves, upstream)

    return call
