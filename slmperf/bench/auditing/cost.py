"""What one training step costs: time of its parts, and the memory that it holds at most.

Nothing is changed: whatever a step moves is put back.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slmperf.bench.auditing.capture import Batch, Step, Watched, keep_random, rerun, scalar

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
def untouched(model: nn.Module, optimizer: Any | None = None) -> Iterator[None]:
    """Put gradients, the model's buffers and the random states back afterwards."""
    groups = optimizer.param_groups if optimizer is not None else []
    parameters = {*model.parameters(), *(one for group in groups for one in group["params"])}
    gradients = {parameter: parameter.grad for parameter in parameters}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    redraw = keep_random()
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)
        redraw()


def step_times(step: Step, batch: Batch, model: nn.Module, optimizer: Any | None) -> list[PartTime]:
    """Times of forward (all models that the step calls), backward, and the optimiser."""
    took: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
    for _ in _until(time.perf_counter() + 2 * _SECONDS):
        model.zero_grad(set_to_none=True)
        loss = _timed(took[FORWARD], lambda: scalar(step(copy.copy(batch))))
        _timed(took[BACKWARD], loss.backward)
        del loss
    if optimizer is not None:
        took[OPTIMISER] = _optimizer_times(optimizer)
    return [_part(name, seconds) for name, seconds in took.items()]


def head_time(step: Step, batch: Batch, model: nn.Module, seen: Watched) -> PartTime:
    """Time of head and loss, forward and backward, on the recorded hidden states."""
    seconds: list[float] = []
    for _ in _until(time.perf_counter() + _SECONDS):
        model.zero_grad(set_to_none=True)
        _timed(seconds, lambda: rerun(step, batch, seen).backward())
    return _part(HEAD_AND_LOSS, seconds)


def _until(deadline: float) -> Iterator[int]:
    """Three rounds at least, of which the first warms up, then until enough or too late."""
    for number in range(_SAMPLES + 1):
        if number > 2 and time.perf_counter() > deadline:
            return
        yield number


def _timed(seconds: list[float], call: Callable[[], Any]) -> Any:
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    seconds.append(time.perf_counter() - start)
    return result


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _optimizer_times(optimizer: Any) -> list[float]:
    """Steps at a learning rate of 0; weights and state, which some move all the same, are copied
    to the host and put back.
    """
    # accelerate's wrapper skips the step inside an accumulation.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: dict(entry) for parameter, entry in optimizer.state.items()}
    tensors = pytree.tree_leaves(([group["params"] for group in groups], list(state.values())))
    copies = [
        (one, one.detach().to("cpu", copy=True)) for one in tensors if isinstance(one, Tensor)
    ]
    seconds: list[float] = []
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for _ in _until(time.perf_counter() + _SECONDS):
            _timed(seconds, optimizer.step)
    finally:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        with torch.no_grad():
            for tensor, copied in copies:
                tensor.copy_(copied)
    return seconds


def _part(name: str, seconds: list[float]) -> PartTime:
    times = [1e6 * each for each in seconds[1:]]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return PartTime(name, middle, low, high, len(times))


def peak_mib(step: Step, batch: Batch, device: torch.device) -> float:
    """MiB that forward and backward hold at most beyond what was there: activations, gradients.

    On a GPU the allocator's count. On a CPU the storages that operators return, by their lives;
    what an operator uses inside itself is not seen.
    """
    if device.type != "cuda":
        with _Alive() as alive:
            scalar(step(copy.copy(batch))).backward()
        return alive.peak / 2**20
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    scalar(step(copy.copy(batch))).backward()
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
            if isinstance(value, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
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
