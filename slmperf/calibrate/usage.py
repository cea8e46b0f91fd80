"""usage: the time and the memory that a run over a model's blocks takes."""

from __future__ import annotations

import resource
import sys
import time

import torch


def begin(device: torch.device) -> float:
    """A run begins: the time (perf_counter); the device's peak memory counts from now on."""
    if device.type == "cuda":
        torch.cuda.init()  # a streamed model may not be there yet
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter()


def now(device: torch.device) -> float:
    """The time (perf_counter) when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mib() -> float:
    """The most memory that the process held, since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB


def device_peak_mib(device: torch.device) -> float | None:
    """The most memory that tensors on a CUDA device took since `begin`; None on another."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
