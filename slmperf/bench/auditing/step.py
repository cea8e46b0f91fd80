"""audit: one training step looked at from outside, and what it does beside its formula.

The step runs once as it is, watched; its loss then runs again in float64 on the same logits, and
with the head in float64 on the same hidden states. That gives the exact gradients which the step's
own is compared with, and in which the terms of the loss can be told apart to many digits. Where a
loss does not run in float64 (kernels of its own), the configured formula takes its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.bench.auditing import cost as audit_cost
from slmperf.bench.auditing.capture import Batch, Step, Watched, head_of, unwrapped, watch
from slmperf.bench.auditing.exact import Scene, exact_gradient, formula_value
from slmperf.bench.auditing.findings import Evidence, findings, found_terms
from slmperf.bench.auditing.outside import outside
from slmperf.bench.auditing.report import AuditReport, Cost, Formula, Waste
from slmperf.bench.auditing.rows import (
    Key,
    flat,
    labels_of,
    locate,
    padding_of,
    teacher_of,
    weights_of,
)
from slmperf.bench.auditing.terms import Head, fit
from slmperf.bench.roof import Roof
from slmperf.bench.roof import roof as roof_of
from slmperf.check import InputError

# Norm of a gradient, beside that of the rows' weights, that is nothing but float64's rounding.
_NOTHING = 1e-13


def audit(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    formula: Formula | None = None,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    roof: Roof | None = None,
) -> AuditReport:
    """Audit one step: `loss_fn(model(**inputs), batch)`, backward, and the optimiser's step.

    model           a language model; with Transformers' get_decoder and get_output_embeddings its
                    head is audited apart from its body
    batch           the model is called with the entries that its forward names
    loss_fn         (outputs, batch) -> scalar; it may call a teacher without gradients
    formula         what the loss is meant to be; without it terms are listed and not judged
    teacher_logits  (..., V) where neither a call within loss_fn nor the batch shows them
    labels          target of every row of logits, -100 for none; otherwise the batch's "labels",
                    of which a row predicts the next
    weights         what every row weighs; otherwise 1 where there is a label, and where there are
                    no labels 1 where the attention mask is 1
    optimizer       timed at a learning rate of 0 where it is given
    roof            otherwise measured, or read from the cache

    Takes about 160 bytes of memory for each logit; where there is less, a seeded sample of the rows
    is held against the formula. Weights, buffers, gradients, optimiser and random states are
    afterwards what they were. Raises InputError where no logits can be found, and where the loss or
    its gradient is 0 or not finite.
    """
    if not isinstance(batch, Mapping):
        raise InputError(f"audit: batch is {type(batch).__name__}, expected a mapping")
    names = inspect.signature(unwrapped(model).forward).parameters

    def step(batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name in names}
        return loss_fn(model(**inputs), batch)

    declared = Declared(formula, labels, weights, teacher_logits)
    return audit_step(step, model, batch, declared, optimizer=optimizer, roof=roof)


@dataclass(frozen=True)
class Declared:
    """What is known of a step beside what can be seen."""

    formula: Formula | None = None
    labels: Tensor | None = None  # of every row of logits
    weights: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher: nn.Module | None = None  # whose head a kernel applies
    padding: tuple[int, int] | None = None  # padding and all positions, where no mask says


def audit_step(
    step: Step,
    model: nn.Module,
    batch: Batch,
    declared: Declared,
    *,
    optimizer: Any | None = None,
    roof: Roof | None = None,
) -> AuditReport:
    """Audit `step`, a function of the batch that calls `model` and returns the loss."""
    with audit_cost.untouched(model, optimizer):
        report = _audit(step, model, batch, declared, roof)
    # What was watched is gone by now: a step that fills the memory finds it as it was.
    with audit_cost.untouched(model, optimizer):
        peak = audit_cost.peak_mib(step, batch, torch.device(report.device))
    with audit_cost.untouched(model, optimizer):
        parts = audit_cost.step_times(step, batch, model, optimizer)
    cost = report.cost._replace(peak_mib=peak)
    return replace(report, cost=cost, parts=(*parts[:2], *report.parts, *parts[2:]))


def _audit(
    step: Step, model: nn.Module, batch: Batch, declared: Declared, roof: Roof | None
) -> AuditReport:
    """All but what is measured on the whole step."""
    seen = watch(step, batch, model)
    scene = _scene(seen, model, batch, declared)
    evidence, reference, value = _evidence(step, model, batch, declared, seen, scene)
    head = audit_cost.head_time(step, batch, model, seen)
    device = seen.loss.device.type
    return AuditReport(
        device=device,
        vocabulary=scene.vocabulary,
        reference=reference,
        loss=float(seen.loss.detach()),
        formula_loss=value,
        errors=evidence.errors,
        terms=tuple(evidence.terms),
        residue=evidence.fit.residue,
        outside=evidence.outside.share,
        waste=evidence.waste,
        cost=_cost(seen, scene, evidence.waste, head.time_us, roof or roof_of(device)),
        parts=(head,),
        findings=tuple(findings(evidence)),
        judged=declared.formula is not None,
    )


def _scene(seen: Watched, model: nn.Module, batch: Batch, declared: Declared) -> Scene:
    point = locate(seen, model)
    own = flat(point.gradients)
    if not (seen.loss.isfinite() and own.isfinite().all()):
        wrong = int((~own.isfinite()).any(-1).sum())
        raise InputError(
            f"audit: the loss is {float(seen.loss.detach()):.6g} and its gradient by {wrong:,} of "
            f"{len(own):,} rows of logits is not finite, expected finite numbers"
        )
    teacher = teacher_of(seen, batch, len(own), declared.teacher_logits, declared.teacher)
    labels = labels_of(batch, declared.labels, len(own), own.device)
    scene = Scene(point, own, teacher, labels)
    formula = declared.formula
    if formula is not None and formula.divergence is not None and teacher is None:
        trained = any(
            call.logits is not None and call.logits.requires_grad and not _share(call.model, model)
            for call in seen.calls
        )
        raise InputError(
            f"audit: the formula has a divergence, but no teacher logits of {len(own)} rows were "
            + ("seen; those of another model have a gradient, expected torch.no_grad()"
               if trained else "seen; give teacher_logits")
        )  # fmt: skip
    if formula is not None and formula.ce_weight and not scene.labels.meant:
        raise InputError(
            f"audit: the formula has a cross entropy, but no labels of {len(own)} rows were found; "
            "give labels, one for every row of logits"
        )
    return scene


def _share(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have a parameter in common: one wraps the other."""
    return not {id(p) for p in one.parameters()}.isdisjoint(id(p) for p in other.parameters())


def _evidence(
    step: Step, model: nn.Module, batch: Batch, declared: Declared, seen: Watched, scene: Scene
) -> tuple[Evidence, str, float | None]:
    formula, own = declared.formula, scene.own
    weights = weights_of(batch, declared.weights, scene.labels, len(own)).to(own.device)
    batch_size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
    normaliser = 1.0 if formula is None else formula.normaliser(weights, batch_size)
    exact = exact_gradient(step, batch, seen, scene, formula, weights / normaliser)
    floor = _NOTHING * float((weights / weights.sum()).norm())
    if float(exact.gradient.norm()) <= floor:
        raise InputError(
            "audit: the exact gradient by the logits is 0 (does the student equal its teacher?), "
            "expected a step that has one"
        )
    used = (own != 0).any(-1)
    used[exact.index] = has_gradient = (exact.gradient != 0).any(-1)
    index = exact.index[has_gradient]
    if formula is None:  # a plain mean over the rows that count, for want of anything better
        weights, normaliser = used.double(), float(used.sum())
    configured = None if formula is None else formula.terms()
    fitted = fit(
        exact.rows.at(has_gradient.nonzero()[:, 0]),
        exact.gradient[has_gradient],
        weights[index],
        [term for term, _ in configured or ()],
        temperature=1.0 if formula is None else formula.temperature,
        noise=exact.noise,
    )
    value = None
    if formula is not None and len(exact.index) == len(own):
        value = formula_value(formula, exact.rows, weights / normaliser)
    evidence = Evidence(
        formula=formula,
        errors=exact.errors,
        fit=fitted,
        terms=found_terms(fitted, weights[index], normaliser, configured),
        weights=weights,
        fitted=index,
        used=used,
        normaliser=normaliser,
        batch_size=batch_size,
        vocabulary=scene.vocabulary,
        noise=exact.noise,
        outside=outside(seen, scene.point, model),
        waste=_waste(seen, batch, declared, scene),
    )
    return evidence, exact.reference, value


def _hidden_size(keys: Sequence[Key], head: Head | None, seen: Watched) -> int:
    """Length of the sums in the head's products; 0 where no head is known."""
    if head is not None:
        return int(head.weight.shape[1])
    for kind, number in keys:
        if kind == "product":
            return seen.products[number].depth
        module = head_of(seen.calls[number].model)
        if module is not None:
            return int(module.weight.shape[1])
    return 0


def _student_sums(seen: Watched, scene: Scene) -> int:
    """Of a row and an entry: forward, by the hidden states, and by the head where it is trained."""
    head = head_of(seen.model)
    passes = 2 if head is not None and not head.weight.requires_grad else 3
    return passes * _hidden_size(scene.point.keys, scene.point.head, seen)


def _waste(seen: Watched, batch: Batch, declared: Declared, scene: Scene) -> Waste:
    used = int((scene.own != 0).any(-1).sum())
    # Of which hidden states a kernel makes logits cannot be seen: those used, at least.
    rows = used if scene.point.kind == "hidden" else len(scene.own)
    rows, teacher = rows + scene.point.idle_rows, scene.teacher
    teacher_rows = 0
    for call in seen.calls:
        if call.logits is not None and not call.logits.requires_grad:
            teacher_rows += call.logits.numel() // call.logits.shape[-1]
    idle, idle_teacher = rows - used, max(0, teacher_rows - used)
    sums = idle * _student_sums(seen, scene)
    if teacher is not None:
        sums += idle_teacher * _hidden_size(teacher.keys, teacher.head, seen)
    elements = scene.vocabulary * (2 * idle + idle_teacher)
    padding, positions = declared.padding or padding_of(batch) or (None, None)
    return Waste(
        rows=rows,
        used=used,
        teacher_rows=teacher_rows,
        head_tflop=2 * scene.vocabulary * sums / 1e12,
        head_mib=elements * scene.own.element_size() / 2**20,
        padding=padding,
        positions=positions,
    )


def _cost(seen: Watched, scene: Scene, waste: Waste, took_us: float, roof: Roof) -> Cost:
    """Least work: the products of the used rows, both models' logits and a gradient once each."""
    point, teacher = scene.point, scene.teacher
    student_sums, teacher_sums = _student_sums(seen, scene), 0
    element = point.tensors[0].element_size()
    bytes_per_entry = element + scene.own.element_size()
    if teacher is not None:
        teacher_sums = _hidden_size(teacher.keys, teacher.head, seen)
        bytes_per_entry += element
    entries = waste.used * scene.vocabulary
    flops = 2 * entries * (student_sums + teacher_sums)
    dtype = point.tensors[0].dtype
    fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    least_us = roof.ideal_us(entries * bytes_per_entry, flops, "tf32" if fast else dtype)
    return Cost(
        peak_mib=0.0,  # known later
        logits_mib=entries * bytes_per_entry / 2**20,
        least_tflop=flops / 1e12,
        roof_us=least_us,
        roof_share=least_us / took_us,
    )
