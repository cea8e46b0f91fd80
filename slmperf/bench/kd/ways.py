"""ways: from a problem's inputs to its loss; what others do, as they do it.

kd_loss, ... logits    ours, forward and backward, in a mode of its logits
products               its four matrix products alone, into buffers that are there
eager                  all logits at once, in the inputs' dtype; softmax and divergence in fp32,
                       in as few passes as torch has for it
reference              the op's own plain torch, on a CPU and inputs in fp32
torch.compile          the same, compiled
liger-kernel, ...      see slmperf.bench.rivals
before, now            of the quickstart's step: all logits of the tokens that count, in fp32
                       and through `divergence` and cross_entropy; kd_loss
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from slmperf.bench import rivals
from slmperf.bench.kd.problems import Problem, Step
from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    StudentHead,
    TeacherHead,
    divergence,
    kd_loss,
)
from slmperf.ops.divergence import divergence_of
from slmperf.testing.timing import Call

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensor]

OURS = "kd_loss, {} logits"
PRODUCTS = "products"


class Way(NamedTuple):
    """One way to the loss.

    role   ours, plain, compiled, rival or products
    run    inputs -> loss (); of the products: inputs -> a function that computes them
    graph  a CUDA graph can hold it, and the memory that it then keeps to itself is small
    """

    role: str
    run: Callable[[Tensors], Tensor] | Callable[[Tensors], Call]
    graph: bool = True


def ways_of(problem: Problem, logits: tuple[str, ...]) -> dict[str, Way]:
    """All ways to a problem's loss, by name; rivals only where they are installed."""
    found = {PRODUCTS: Way("products", products)}
    found |= {OURS.format(mode): Way("ours", ours(problem, mode)) for mode in logits}
    if problem.answers is not None:
        return found
    plain = eager(problem)
    found["eager"] = Way("plain", plain, graph=False)
    found["torch.compile"] = Way("compiled", torch.compile(plain, dynamic=False), graph=False)
    if problem.device == "cpu" and problem.dtype == "fp32":
        found["reference"] = Way("plain", ours(problem, "fp32", "reference"), graph=False)
    if isinstance(problem.kind, ForwardKL | ReverseKL | JSD):
        for name in rivals.installed("kd_loss", problem.device):
            found[name] = Way("rival", _rival(name, problem), graph=False)
    return found


def ours(problem: Problem, logits: str, impl: str = "auto") -> Run:
    """slmperf.ops.kd_loss."""
    kind = problem.kind

    def run(given: Tensors) -> Tensor:
        return kd_loss(
            StudentHead(given["hidden"], given["weight"]),
            TeacherHead(given["teacher_hidden"], given["teacher_weight"]),
            token_weight=given.get("token_weight"),
            rows=given.get("rows"),
            divergence=kind,
            logits=logits,
            impl=impl,
        ).loss

    return run


def eager(problem: Problem, dtype: torch.dtype = torch.float32) -> Run:
    """As trainers in plain torch do it, with no more passes than the divergence needs.

    dtype  of softmax and divergence
    """
    kind = problem.kind

    def run(given: Tensors) -> Tensor:
        log_q = torch.log_softmax(linear(given["hidden"], given["weight"]).to(dtype), dim=-1)
        with torch.no_grad():
            logits = linear(given["teacher_hidden"], given["teacher_weight"])
            log_p = torch.log_softmax(logits.to(dtype), dim=-1)
        if kind == ForwardKL():
            return kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).mean()
        if kind == ReverseKL():
            return kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1).mean()
        return divergence_of(log_p, log_q, kind).mean()

    return run


def _rival(name: str, problem: Problem) -> Run:
    """The rival's function, made by its first call: only then is its package imported."""
    made: list[rivals.KDLoss] = []

    def run(given: Tensors) -> Tensor:
        if not made:
            made.append(rivals.KD_LOSSES[name](rivals.beta_of(problem.kind)))
        names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
        return made[0](*(given[name] for name in names))

    return run


def products(given: Tensors) -> Call:
    """The four products of the shapes of a step into buffers of the inputs' dtype.

    Where only some tokens count, of those alone: what they hold does not matter to the time.
    """
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    hidden, weight, teacher_hidden, teacher_weight = (given[name].detach() for name in names)
    count = len(hidden)
    if "rows" in given:
        count = len(given["rows"])
    elif "token_weight" in given:
        count = int(given["token_weight"].count_nonzero())
    hidden, teacher_hidden = hidden[:count], teacher_hidden[:count]
    student, teacher = (hidden.new_empty(count, len(weight)) for _ in range(2))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(teacher_hidden, teacher_weight.mT, out=teacher)
        torch.mm(hidden, weight.mT, out=student)
        torch.mm(student, weight, out=grad_hidden)
        torch.mm(student.mT, hidden, out=grad_weight)

    return call


def steps_of(step: Step) -> dict[str, Way]:
    """The step before and now."""

    def before(given: Tensors) -> Tensor:
        logits = linear(given["hidden"], given["weight"])
        with torch.no_grad():
            teacher = linear(given["teacher_hidden"], given["teacher_weight"])
        kd = divergence(logits, teacher) @ given["token_weight"]
        ce = cross_entropy(logits, given["labels"], reduction="none") @ given["token_weight"]
        return (step.kd_weight * kd + step.ce_weight * ce) / given["examples"]

    def now(given: Tensors) -> Tensor:
        share = step.ce_weight / (step.kd_weight + step.ce_weight)
        return (step.kd_weight + step.ce_weight) * kd_loss(
            StudentHead(given["hidden"], given["weight"]),
            TeacherHead(given["teacher_hidden"], given["teacher_weight"]),
            labels=given["labels"],
            token_weight=given["token_weight"],
            cross_entropy=share,
            normalizer=given["examples"],
        ).loss

    return {"before": Way("plain", before), "now": Way("ours", now)}


def call_of(way: Way, given: Tensors) -> Call:
    """Forward and backward of the way on these inputs, by an incoming gradient of 1."""
    if way.role == "products":
        return way.run(given)
    leaves = (given["hidden"], given["weight"])
    return lambda: torch.autograd.grad(way.run(given), leaves)
