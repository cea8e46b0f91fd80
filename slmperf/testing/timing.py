"""How long a call takes, and what the machine could do at best.

On a GPU a call's time is that of a CUDA graph holding one call per set of inputs, replayed and
divided: no launch overhead, and inputs that rotate through more memory than the second-level
cache holds. On a CPU it is wall time over the inputs in turn. Medians in both; calls to be
compared are interleaved, so that a clock or a neighbour disturbs all of them alike.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]


class Timing(NamedTuple):
    """Median and quartiles of a call, in microseconds, and how many rounds they come from."""

    time_us: float
    low_us: float
    high_us: float
    samples: int


def replayed(calls: Sequence[Call]) -> Callable[[], None]:
    """The calls once each as a CUDA graph: a function that enqueues one replay of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels and warms the allocator before the capture
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except BaseException:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
        raise
    return graph.replay


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


def _cuda_sample(calls: Sequence[Call], graph: bool) -> Callable[[], float]:
    """Seconds per call of one round on the device: a replay of a graph, or the calls themselves."""

    def eager() -> None:
        for call in calls:
            call()

    replay = replayed(calls) if graph else eager
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(calls)

    sample()
    return sample


def sampler(calls: Sequence[Call], device: str, graph: bool = True) -> Callable[[], float]:
    """A function that runs one round over the calls and gives its seconds per call.

    `graph=False` is for calls that wait for the device, which no CUDA graph can hold.
    """
    return _cuda_sample(calls, graph) if device == "cuda" else _cpu_sample(calls)


def rounds_s(
    samplers: Mapping[str, Callable[[], float]], seconds: float = 1.0
) -> dict[str, list[float]]:
    """Seconds per call of every round of each sampler, interleaved: the lists' n-th are neighbours.

    In another order every round: a call that runs hot slows down the one behind it (on a CPU the
    clock stays low for milliseconds), which is not to be always the same one. Runs for about
    `seconds` per sampler, at least 5 rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in samplers}
    order, chance = list(samplers), random.Random(0)
    deadline = time.perf_counter() + seconds * len(samplers)
    while len(min(found.values(), key=len)) < 5 or time.perf_counter() < deadline:
        chance.shuffle(order)
        for name in order:
            found[name].append(samplers[name]())
    return found


def summary(times_s: Sequence[float]) -> Timing:
    """Median and quartiles of seconds, at least two of them."""
    low, middle, high = statistics.quantiles(times_s, n=4, method="inclusive")
    return Timing(middle * 1e6, low * 1e6, high * 1e6, len(times_s))


def timings(
    variants: Mapping[str, Sequence[Call]], device: str, seconds: float = 1.0
) -> dict[str, Timing]:
    """Microseconds per call of each variant; each is a list of calls on different inputs.

    Runs for about `seconds` per variant, at least 5 rounds, interleaved.
    """
    samplers = {name: sampler(calls, device) for name, calls in variants.items()}
    return {name: summary(times) for name, times in rounds_s(samplers, seconds).items()}


def median_us(
    variants: Mapping[str, Sequence[Call]], device: str, seconds: float = 1.0
) -> dict[str, float]:
    """The medians of `timings`."""
    return {name: found.time_us for name, found in timings(variants, device, seconds).items()}


def host_us(call: Call, device: str, calls: int = 20) -> float | None:
    """Median microseconds that the CPU needs to enqueue one call without a graph.

    The device is idle before each, so that no call waits for room in its queue. None on a CPU,
    where there is no other time.
    """
    if device != "cuda":
        return None
    times = []
    for _ in range(calls + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times[3:]) * 1e6


def rotations(set_bytes: int, device: str, least: int = 2) -> int:
    """Sets of inputs that together are more than twice what the last shared cache of a GPU holds.

    set_bytes  of the tensors in one set: each counts once, however often a call passes over it

    At most 64: sets of less than a 64th of the cache stay in it. On a CPU `least`.
    """
    if device != "cuda":
        return least
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(least, min(64, 1 + 2 * cache // max(1, set_bytes)))


def copy_rates_gbs(device: str, mib: int) -> list[float]:
    """Bytes read and written per second, in GB/s, by each of ten plain copies of `mib` MiB."""
    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    sample = sampler([lambda: target.copy_(source)], device)
    return [2 * source.nbytes / sample() / 1e9 for _ in range(10)]


def copy_roof_gbs(device: str, mib: int | None = None) -> float:
    """The fastest of `copy_rates_gbs`."""
    return max(copy_rates_gbs(device, mib or (2048 if device == "cuda" else 128)))


def peak_mib(call: Call, device: str) -> float:
    """MiB of tensors and scratch that a call holds at most beyond what was there before.

    What torch's allocator gives out: on a GPU by its own statistics, on a CPU by the profiler's
    record of every allocation. A C++ kernel's own vectors are in neither.
    """
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Otherwise the profiler announces its own start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    # The public events sum up each operator's memory; only these keep the order of time.
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = top = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        top = max(top, held)
    return top / 2**20


def forward_backward(
    run: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor], leaves: Sequence[Tensor]
) -> Call:
    """A call that runs forward and, where there are leaves, backward, and keeps nothing."""
    upstream: list[Tensor] = []

    def call() -> None:
        result = run(given)
        if not leaves:
            return
        if not upstream:
            # One number is a loss: training hands it 1.
            upstream.append(torch.rand_like(result) if result.dim() else torch.ones_like(result))
        torch.autograd.grad(result, leaves, upstream)

    return call
