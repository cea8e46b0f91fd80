"""Rivals: what other projects' packages do for the same call, where they are installed.

A rival is asked only on a GPU, where these packages run. It is imported when it is asked for, and
what it cannot take it refuses with NotImplementedError; the bench lists the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.ops import JSD, ForwardKL, ReverseKL
from slmperf.ops.divergence import Kind
from slmperf.testing.battery import Run, Tensors
from slmperf.testing.case import Case
from slmperf.testing.cases import DivergenceCase
from slmperf.testing.kd_cases import KDLossCase

# (T, D) hidden states, (V, D) head, and both of the teacher -> mean loss over the tokens.
KDLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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


def beta_of(kind: Kind) -> float:
    """Liger's beta for a divergence: there 0 is the forward KL and 1 the reverse."""
    if isinstance(kind, JSD) and not kind.rescale:
        return kind.beta
    if kind in (ForwardKL(), ReverseKL()):
        return float(kind == ReverseKL())
    raise NotImplementedError(f"liger-kernel has no {kind}")


def _liger_divergence(case: Case) -> Run:
    """LigerJSD on log-probabilities."""
    from liger_kernel.transformers import LigerJSD

    assert isinstance(case, DivergenceCase)
    loss = LigerJSD(beta=beta_of(case.kind))

    def run(tensors: Tensors) -> Tensor:
        student, teacher = (
            torch.log_softmax(tensors[name].float() / case.temperature, dim=-1)
            for name in ("student", "teacher")
        )
        return loss(student, teacher)

    return run


def liger_fused(beta: float) -> KDLoss:
    """LigerFusedLinearJSD: chunks of rows through both heads, gradients made in the forward."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda *heads: loss(*heads, None)


def liger_chunked(beta: float) -> KDLoss:
    """LigerFusedLinearJSDLoss: chunks of rows through a compiled function; no cross entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return loss(hidden, weight, teacher_hidden, teacher, labels, None, None)

    return run


# By name: beta -> the loss; imports the package.
KD_LOSSES: dict[str, Callable[[float], KDLoss]] = {
    "liger-kernel": liger_fused,
    "liger-kernel chunked": liger_chunked,
}


def _kd_loss(make: Callable[[float], KDLoss], case: Case) -> Run:
    """One of KD_LOSSES on a case of kd_loss: two plain heads, every token, no cross entropy."""
    assert isinstance(case, KDLossCase)
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    if (case.teacher, case.reduced, case.extras, case.cross_entropy, case.temperature) != (
        "head", "mean", "plain", 0.0, 1.0
    ):  # fmt: skip
        raise NotImplementedError("asked for two plain heads, a mean and temperature 1 alone")
    loss = make(beta_of(case.kind))
    return lambda tensors: loss(*(tensors[name] for name in names))


RIVALS: dict[str, dict[str, Rival]] = {
    # Its backward compares the incoming gradient with 1 on the host, so it waits for the device.
    "divergence": {
        "liger-kernel": Rival("liger_kernel", _liger_divergence, mean=True, graph=False)
    },
    "kd_loss": {
        name: Rival("liger_kernel", partial(_kd_loss, make), mean=True, graph=False)
        for name, make in KD_LOSSES.items()
    },
}


def installed(op: str, device: str) -> dict[str, Rival]:
    """Rivals of an op that can be asked on this machine; none on a CPU."""
    if device != "cuda":
        return {}
    return {name: rival for name, rival in RIVALS.get(op, {}).items() if find_spec(rival.package)}
