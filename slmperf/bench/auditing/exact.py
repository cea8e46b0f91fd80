"""The exact gradient of a step's loss by its logits, and how far the step's own is from it.

By the loss function itself in float64 where it runs there, else by the configured formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.bench.auditing.capture import Batch, InexactError, Step, Watched, replay
from slmperf.bench.auditing.report import Formula, GradientError
from slmperf.bench.auditing.rows import Labels, Point, Teacher, at, exact_products, flat
from slmperf.bench.auditing.terms import Rows
from slmperf.check import InputError

SAME_LOGITS, SAME_HIDDEN = "same logits", "same hidden states"
WIDE_HEAD, ROUNDED = "head in float64 too", "exact, rounded to"
_ELEMENTS = 2**24  # rows x vocabulary of one piece of the formula
# Relative norm below which no term is looked for: in float64, and where only the step's own
# gradient can be looked at, in fp32 and in bf16 or fp16.
_EXACT_NOISE, _FLOAT_NOISE, _HALF_NOISE = 1e-6, 1e-3, 3e-2


class Scene(NamedTuple):
    """The rows of one step: the student's with their gradient, the teacher's, their labels."""

    point: Point
    own: Tensor  # (n, D) the gradient as the step computes it
    teacher: Teacher | None
    labels: Labels

    @property
    def vocabulary(self) -> int:
        """V."""
        head = self.point.head
        return int(self.own.shape[1] if head is None else head.weight.shape[0])

    def rows(self, leaf: Tensor, seen: Watched, exact: bool = False) -> Rows:
        """In float64: a student's logits (or hidden states), and the teacher's of a run."""
        teacher = None if self.teacher is None else self.teacher.logits(seen, exact)
        if teacher is not None:
            if teacher.shape[1] < self.vocabulary:
                raise InputError(
                    f"audit: the teacher's vocabulary is {teacher.shape[1]}, expected at least the "
                    f"student's {self.vocabulary}"
                )
            teacher = teacher[:, : self.vocabulary]
        labels = self.labels
        return Rows(
            leaf.detach().double(),
            self.point.head,
            teacher,
            labels.targets,
            labels.same_position,
        )


class Exact(NamedTuple):
    """What terms are looked for in, and how far the step's own gradient is from the exact one."""

    gradient: Tensor  # (n, D) float64: the loss's exact one, or its own where that is not known
    rows: Rows  # that it is of
    errors: dict[str, GradientError]
    noise: float  # relative norm below which nothing is looked for in it
    reference: str


def compare(own: Tensor, exact: Tensor) -> GradientError:
    """How far a gradient is from the exact one."""
    own, exact = own.double(), exact.double()
    difference = own - exact
    norm, largest = exact.norm().clamp(min=1e-300), exact.abs().max().clamp(min=1e-300)
    cosine = (own * exact).sum() / (own.norm().clamp(min=1e-300) * norm)
    values = difference.norm() / norm, difference.abs().max() / largest, cosine
    return GradientError(*(float(value) for value in values))


def exact_gradient(
    step: Step, batch: Batch, seen: Watched, scene: Scene, formula: Formula | None, weights: Tensor
) -> Exact:
    """weights (n,): what the rows weigh in the formula, divided by N."""
    try:
        return _by_loss(step, batch, seen, scene)
    except InexactError as why:
        return _by_formula(str(why), formula, weights, seen, scene)


def _by_loss(step: Step, batch: Batch, seen: Watched, scene: Scene) -> Exact:
    errors: dict[str, GradientError] = {}
    first: tuple[Tensor, Rows] | None = None
    keys = (*scene.point.keys, *(scene.teacher.keys if scene.teacher is not None else ()))
    calls = [number for kind, number in keys if kind == "call" and not _own_loss(seen, number)]
    hidden = scene.point.kind == "hidden"
    for name in [SAME_HIDDEN] if hidden else [SAME_LOGITS, WIDE_HEAD]:
        again = replay(step, batch, seen, recorded=name == SAME_LOGITS, calls=calls)
        tensors = at(scene.point.keys, again)
        found = torch.autograd.grad(again.loss, tensors, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise InexactError("a model computes it inside itself")
        gradient = flat(
            [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
        )
        if gradient.shape != scene.own.shape:
            raise InexactError("it takes other rows the second time")
        errors[name] = compare(scene.own, gradient)
        first = first or (gradient, scene.rows(flat(tensors), again))
        if not seen.products:  # no head was seen that could be computed anew
            break
    assert first is not None
    errors |= _rounding(scene.own, first[0])
    return Exact(*first, errors, _EXACT_NOISE, "the loss function in float64")


def _own_loss(seen: Watched, number: int) -> bool:
    """Whether the step takes the loss that a model computed inside, before its logits came out."""
    output = seen.calls[number].output
    inner = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(inner, Tensor) or not inner.requires_grad:
        return False
    (found,) = torch.autograd.grad(seen.loss, inner, allow_unused=True, retain_graph=True)
    return found is not None


def _by_formula(
    why: str, formula: Formula | None, weights: Tensor, seen: Watched, scene: Scene
) -> Exact:
    point, own = scene.point, scene.own
    rows = scene.rows(flat(point.tensors), seen)
    noise = _HALF_NOISE if own.dtype in (torch.bfloat16, torch.float16) else _FLOAT_NOISE
    lacking = f"the loss does not run in float64: {why}"
    if formula is None:
        return Exact(own.double(), rows, {}, noise, f"none; {lacking}")
    exact = _formula_gradient(formula, rows, weights)
    name = SAME_LOGITS if point.kind == "logits" else SAME_HIDDEN
    errors = {name: compare(own, exact)}
    wide = exact_products(point.keys, seen)
    if wide is not None:
        again = _formula_gradient(formula, scene.rows(wide, seen, exact=True), weights)
        errors[WIDE_HEAD] = compare(own, again)
    errors |= _rounding(own, exact)
    return Exact(
        own.double(), rows, errors, noise, f"the configured formula in float64 ({lacking})"
    )


def _rounding(own: Tensor, exact: Tensor) -> dict[str, GradientError]:
    name = f"{ROUNDED} {str(own.dtype).removeprefix('torch.')}"
    return {name: compare(exact.to(own.dtype), exact)}


def _pieces(rows: Rows) -> Iterator[tuple[Tensor, Rows]]:
    width = rows.leaf.shape[1] if rows.teacher is None else rows.teacher.shape[1]
    every = torch.arange(len(rows.leaf), device=rows.leaf.device)
    for index in every.split(max(1, _ELEMENTS // width)):
        yield index, rows.at(index)


def _formula_gradient(formula: Formula, rows: Rows, weights: Tensor) -> Tensor:
    found = torch.zeros_like(rows.leaf)
    for index, part in _pieces(rows):
        for term, weight in formula.terms():
            found[index] += weight * weights[index, None] * term.gradient(part)
    return found


def formula_value(formula: Formula, rows: Rows, weights: Tensor) -> float:
    """The formula's loss; weights (n,) divided by N."""
    total = 0.0
    with torch.no_grad():
        for index, part in _pieces(rows):
            logits = part.logits(part.leaf)
            for term, weight in formula.terms():
                values = term.value(logits, part).masked_fill(weights[index] == 0, 0.0)
                total += float(weight * (values @ weights[index]))
    return total
