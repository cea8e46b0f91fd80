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
from slmperf.bench.layer.options import MEMORY_SHARE, free_bytes
from slmperf.check import InputError

SAME_LOGITS, SAME_HIDDEN = "same logits", "same hidden states"
WIDE_HEAD, ROUNDED = "head in float64 too", "exact, rounded to"
_ELEMENTS = 2**24  # rows x vocabulary of one piece of the formula
_BYTES = 160  # that an audit in float64 holds at most for each logit, as measured
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

    @property
    def every(self) -> Tensor:
        """(n,) the numbers of all rows."""
        return torch.arange(len(self.own), device=self.own.device)

    def rows(self, leaf: Tensor, seen: Watched, index: Tensor, exact: bool = False) -> Rows:
        """Some rows in float64: a student's logits (or hidden states), the teacher's of a run."""
        teacher, labels = None, self.labels
        if self.teacher is not None:
            teacher = self.teacher.logits(seen, index, exact)
            if teacher.shape[1] < self.vocabulary:
                raise InputError(
                    f"audit: the teacher's vocabulary is {teacher.shape[1]}, expected at least the "
                    f"student's {self.vocabulary}"
                )
            teacher = teacher[:, : self.vocabulary]
        return Rows(
            leaf[index].detach().double(),
            self.point.head,
            teacher,
            None if labels.targets is None else labels.targets[index],
            None if labels.same_position is None else labels.same_position[index],
        )


class Exact(NamedTuple):
    """What terms are looked for in, and how far the step's own gradient is from the exact one."""

    index: Tensor  # (n,) the rows that are compared: all, or as many as there is memory for
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
    free = int(MEMORY_SHARE * free_bytes(scene.own.device.type))
    needed = _BYTES * len(scene.own) * scene.vocabulary
    try:
        if needed > free:
            raise InexactError(
                f"it would take {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are to spare"
            )
        return _by_loss(step, batch, seen, scene)
    except InexactError as error:
        why = str(error)
    # Out of the handler, whose traceback holds what the replay had computed.
    room = max(1, free // (_BYTES * scene.vocabulary))
    return _by_formula(why, formula, weights, seen, scene, room)


def _by_loss(step: Step, batch: Batch, seen: Watched, scene: Scene) -> Exact:
    errors: dict[str, GradientError] = {}
    first: tuple[Tensor, Rows] | None = None
    keys = (*scene.point.keys, *(scene.teacher.keys if scene.teacher is not None else ()))
    calls = [number for kind, number in keys if kind == "call" and not _own_loss(seen, number)]
    hidden = scene.point.kind == "hidden"
    for name in [SAME_HIDDEN] if hidden else [SAME_LOGITS, WIDE_HEAD]:
        again = replay(step, batch, seen, recorded=name == SAME_LOGITS, calls=calls)
        tensors = at(scene.point.keys, again)
        try:
            found = torch.autograd.grad(again.loss, tensors, allow_unused=True)
        except RuntimeError as error:  # a checkpoint runs its part again, in the step's precision
            raise InexactError(
                f"its backward ends with {' '.join(str(error).split())[:120]}"
            ) from None
        if all(gradient is None for gradient in found):
            raise InexactError("a model computes it inside itself")
        gradient = flat(
            [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
        )
        if gradient.shape != scene.own.shape:
            raise InexactError("it takes other rows the second time")
        errors[name] = compare(scene.own, gradient)
        first = first or (gradient, scene.rows(flat(tensors), again, scene.every))
        if not seen.products:  # no head was seen that could be computed anew
            break
    assert first is not None
    errors |= _rounding(scene.own, first[0])
    return Exact(scene.every, *first, errors, _EXACT_NOISE, "the loss function in float64")


def _own_loss(seen: Watched, number: int) -> bool:
    """Whether the step takes the loss that a model computed inside, before its logits came out."""
    output = seen.calls[number].output
    inner = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(inner, Tensor) or not inner.requires_grad:
        return False
    (found,) = torch.autograd.grad(seen.loss, inner, allow_unused=True, retain_graph=True)
    return found is not None


def _by_formula(
    why: str,
    formula: Formula | None,
    weights: Tensor,
    seen: Watched,
    scene: Scene,
    room: int,
) -> Exact:
    """On a sample of at most `room` rows, the same one every time."""
    point, index = scene.point, scene.every
    reference = f"the loss does not run in float64: {why}"
    whole = room >= len(index)
    if not whole:
        index = ((scene.own != 0).any(-1) | (weights != 0)).nonzero()[:, 0]
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
        index = index[order[:room].sort().values.to(index.device)]
        reference += f"; on {len(index):,} of {len(scene.own):,} rows, a seeded sample"
    rows, own, weights = (
        scene.rows(flat(point.tensors), seen, index),
        scene.own[index],
        weights[index],
    )
    noise = _HALF_NOISE if own.dtype in (torch.bfloat16, torch.float16) else _FLOAT_NOISE
    if formula is None:
        return Exact(index, own.double(), rows, {}, noise, f"none; {reference}")
    exact = _formula_gradient(formula, rows, weights)
    name = SAME_LOGITS if point.kind == "logits" else SAME_HIDDEN
    errors = {name: compare(own, exact)}
    wide = exact_products(point.keys, seen) if whole else None
    if wide is not None:
        again = scene.rows(wide, seen, index, exact=True)
        errors[WIDE_HEAD] = compare(own, _formula_gradient(formula, again, weights))
    errors |= _rounding(own, exact)
    reference = f"the configured formula in float64 ({reference})"
    return Exact(index, own.double(), rows, errors, noise, reference)


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
