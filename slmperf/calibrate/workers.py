"""Sums over torch.distributed workers, each of which has its own part of the calibration set."""

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
            f"{what}: wanted one process, found {workers()} workers; prune_model adds up what each "
            "of several sees, and one of them saves the result"
        )


def sum_of_workers(part: Tensor) -> Tensor:
    """The sum of all workers' tensors, in place of this one's; the same without workers."""
    if not workers():
        return part
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    for piece in part.view(-1).split(_PIECE):
        moved = piece.to(device)
        torch.distributed.all_reduce(moved)
        if moved is not piece:
            piece.copy_(moved)
    return part
