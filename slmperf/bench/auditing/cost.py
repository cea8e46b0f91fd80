"""What one training step costs: time of its parts, and the memory that it holds at most.

Nothing is changed: gradients, random states and the optimiser's state are put back, and the
optimiser steps with a learning rate of 0.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slmperf.bench.auditing.capture import Batch, Step, Watched, rerun, scalar, shallow

FORWARD, BACKWARD, OPTIMISER = "forward", "backward", "optimiser step"
HEAD_AND_LOSS = "head and loss, both ways"
_SAMPLES = 7
_SECONDS = 4.0  # per part, whatever that leaves of the samples


class PartTime(NamedTuple):
    """Median and quartiles of one part of the step, microseconds."""

    name: str
    time_us: float
    low_us: float
    high_us: float
    samples: int


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the gradients of the model and the random states back afterwards."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def step_times(
    step: Step, batch: Batch, model: nn.Module, seen: Watched, optimizer: Any | None
) -> list[PartTime]:
    """Times of forward (all models that the step calls), backward, head and loss, optimiser."""
    device = seen.loss.device
    took: dict[str, list[float]] = {FORWARD: [], BACKWARD: [], HEAD_AND_LOSS: []}
    with untouched(model):
        deadline = time.perf_counter() + 2 * _SECONDS
        for _ in _until(deadline):
            model.zero_grad(set_to_none=True)
            loss = _timed(took[FORWARD], device, lambda: scalar(step(shallow(batch))))
            _timed(took[BACKWARD], device, loss.backward)
            del loss
        if optimizer is not None:
            took[OPTIMISER] = _optimizer_times(optimizer, device)
        for _ in _until(time.perf_counter() + _SECONDS):
            model.zero_grad(set_to_none=True)
            _timed(took[HEAD_AND_LOSS], device, lambda: rerun(step, batch, seen).loss.backward())
    return [_part(name, seconds) for name, seconds in took.items() if seconds]


def _until(deadline: float) -> Iterator[int]:
    """Three rounds at least, of which the first warms up, then until enough or too late."""
    for number in range(_SAMPLES + 1):
        if number > 2 and time.perf_counter() > deadline:
            return
        yield number


def _timed(seconds: list[float], device: torch.device, call: Callable[[], Any]) -> Any:
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    seconds.append(time.perf_counter() - start)
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _optimizer_times(optimizer: Any, device: torch.device) -> list[float]:
    """Steps at a learning rate of 0, which leaves the weights as they are."""
    # accelerate's wrapper skips the step inside an accumulation.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = {
        parameter: {name: _kept(value) for name, value in entry.items()}
        for parameter, entry in optimizer.state.items()
    }
    seconds: list[float] = []
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if _is_tensor(group["lr"]) else 0.0
        for _ in _until(time.perf_counter() + _SECONDS):
            _timed(seconds, device, optimizer.step)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.state.clear()
        optimizer.state.update(state)
    return seconds


def _kept(value: Any) -> Any:
    return value.clone() if _is_tensor(value) else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _part(name: str, seconds: list[float]) -> PartTime:
    times = [1e6 * each for each in seconds[1:]]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return PartTime(name, middle, low, high, len(times))


def peak_mib(step: Step, batch: Batch, model: nn.Module, device: torch.device) -> float:
    """MiB that forward and backward hold at most beyond what was there: activations, gradients.

    On a GPU the allocator's count. On a CPU the storages that operators return, by their lives;
    what an operator uses inside itself is not seen.
    """
    with untouched(model):
        if device.type != "cuda":
            with _Alive() as alive:
                scalar(step(shallow(batch))).backward()
            return alive.peak / 2**20
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        scalar(step(shallow(batch))).backward()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20


class _Alive(TorchDispatchMode):
    """Bytes of the storages that were made since it began and still live; their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {
            id(value.untyped_storage())
            for value in pytree.tree_leaves((args, kwargs))
            if _is_tensor(value)
        }
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if _is_tensor(value):
                storage = value.untyped_storage()
                key = id(storage)
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
