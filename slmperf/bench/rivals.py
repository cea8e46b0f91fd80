"""Rivals: what other projects' packages do for the same call, where they are installed.

A rival is asked only on a GPU, where these packages run. It is imported when it is asked for, and
what it cannot take it refuses with NotImplementedError; the bench lists the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from slmperf.ops import JSD, ForwardKL
from slmperf.testing.battery import Run, Tensors
from slmperf.testing.cases import Case, DivergenceCase


class Rival(NamedTuple):
    """One package's way to an op's result.

    package  what must be importable
    make     case -> the function that runs it; imports the package
    mean     it gives the mean of the op's rows, one number, in place of the rows
    graph    a CUDA graph can hold it; not so where it waits for the device
    """

    package: str
    make: Callable[[Case], Run]
    mean: bool
    graph: bool


def _liger_divergence(case: Case) -> Run:
    """LigerJSD on log-probabilities; by its convention 0 is the forward KL and 1 the reverse."""
    from liger_kernel.transformers import LigerJSD  # type: ignore[import-not-found]

    assert isinstance(case, DivergenceCase)
    beta = case.kind.beta if isinstance(case.kind, JSD) else float(case.kind != ForwardKL())
    loss = LigerJSD(beta=beta)

    def run(tensors: Tensors) -> torch.Tensor:
        student, teacher = (
            torch.log_softmax(tensors[name].float() / case.temperature, dim=-1)
            for name in ("student", "teacher")
        )
        return loss(student, teacher)

    return run


RIVALS: dict[str, dict[str, Rival]] = {
    # Its backward compares the incoming gradient with 1 on the host, so it waits for the device.
    "divergence": {
        "liger-kernel": Rival("liger_kernel", _liger_divergence, mean=True, graph=False)
    },
}


def installed(op: str, device: str) -> dict[str, Rival]:
    """Rivals of an op that can be asked on this machine; none on a CPU."""
    if device != "cuda":
        return {}
    return {name: rival for name, rival in RIVALS.get(op, {}).items() if find_spec(rival.package)}
