"""Sums and maxima over torch.distributed workers, each with a part of the calibration set."""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.check import InputError

_PIECE = 2**23  # elements at a time: 64 MiB of fp64, wherever the whole lives


def workers() -> int:
    """Number of workers; 0 without a process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 0


def check_single(what: str) -> None:
    """InputError where several workers run: `what` writes one folder, which each would replace."""
    if workers() > 1:
        raise InputError(
            f"{what}: wanted one process, found {workers()} workers, each of which would write the "
            "same folder; of a model in memory they add up what each sees"
        )


def sum_of_workers(part: Tensor) -> Tensor:
    """The sum of all workers' tensors, in place of this one's; the same without workers."""
    return _reduced(part, torch.distributed.ReduceOp.SUM) if workers() else part


def max_of_workers(part: Tensor) -> Tensor:
    """The elementwise maximum over all workers, in the same way."""
    return _reduced(part, torch.distributed.ReduceOp.MAX) if workers() else part


def _reduced(part: Tensor, by: torch.distributed.ReduceOp) -> Tensor:
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    for piece in part.view(-1).split(_PIECE):
        moved = piece.to(device)
        torch.distributed.all_reduce(moved, by)
        if moved is not piece:
            piece.copy_(moved)
    return part
