"""Gradients that reach a model's parameters by another way than its logits.

The parameters' gradient of the loss, less the vector-Jacobian product of the logits' gradient, is
what penalties on weights and hidden states, router losses and forgotten terms leave there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slmperf.bench.auditing.capture import Watched, head_of, map_tensors
from slmperf.bench.auditing.rows import Point

_ELEMENTS = 2**26  # of the parameters looked at
_EXPLAINED = 0.98  # of the squared norm, for a form to be named


class Outside(NamedTuple):
    """Share of the sampled parameters' gradient that comes another way, and what it looks like."""

    share: float | None  # None where it could not be measured
    likely: tuple[str, ...]  # known forms that explain it, with their weights
    parameters: tuple[str, ...]  # the sampled ones that it reaches
    noise: float  # share below which rounding explains it


def outside(seen: Watched, point: Point, model: nn.Module) -> Outside:
    """Measure it on a sample of the parameters that the loss trains."""
    head = head_of(model)
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.numel() <= _ELEMENTS
        # A kernel that takes hidden states gives the head its gradient by itself.
        and not (point.kind == "hidden" and head is not None and parameter is head.weight)
    ]
    if not named:
        return Outside(None, (), (), 0.0)
    # Norms of all layers come first, which every gradient passes; then what there is room for.
    sample: list[tuple[str, Tensor]] = []
    room = _ELEMENTS
    for name, parameter in sorted(named, key=lambda entry: entry[1].numel()):
        room -= parameter.numel()
        if room < 0 and sample:
            break
        sample.append((name, parameter))
    wide = all(parameter.dtype == torch.float32 for _, parameter in sample)
    noise = 1e-4 if wide and point.gradients[0].dtype == torch.float32 else 2e-2
    tensors = [parameter for _, parameter in sample]
    try:
        whole = _gradients([seen.loss], None, tensors)
        by_logits = _gradients(point.tensors, point.gradients, tensors)
    except RuntimeError:  # re-entrant checkpoints allow no gradient by chosen tensors
        return Outside(None, (), (), noise)
    extra = [one - other for one, other in zip(whole, by_logits, strict=True)]
    total = _norm(whole)
    share = _norm(extra) / total if total else 0.0
    reached = tuple(
        name
        for (name, _), one, every in zip(sample, extra, whole, strict=True)
        # Gradients that are nothing but rounding, such as those of key biases, do not count.
        if one.norm() > max(10 * noise * float(every.norm()), 1e-6 * total)
    )
    if share <= noise and not reached:
        return Outside(share, (), (), noise)
    return Outside(share, tuple(_forms(seen, point, tensors, extra, noise)), reached, noise)


def _gradients(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor] | None, inputs: Sequence[Tensor]
) -> list[Tensor]:
    found = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(t, dtype=torch.float64) if g is None else g.double()
        for t, g in zip(inputs, found, strict=True)
    ]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


def _weight(extra: Sequence[Tensor], form: Sequence[Tensor]) -> float | None:
    """The weight with which a form is the extra gradient; None where it is not."""
    square = sum(float(one.square().sum()) for one in form)
    if not square:
        return None
    weight = sum(float((a * b).sum()) for a, b in zip(extra, form, strict=True)) / square
    left = _norm([a - weight * b for a, b in zip(extra, form, strict=True)])
    return weight if left**2 <= (1 - _EXPLAINED) * _norm(extra) ** 2 else None


def _forms(
    seen: Watched, point: Point, parameters: list[Tensor], extra: list[Tensor], noise: float
) -> Iterator[str]:
    for call in seen.calls:
        auxiliary = call.output.get("aux_loss") if isinstance(call.output, Mapping) else None
        if isinstance(auxiliary, Tensor) and auxiliary.requires_grad:
            weight = _weight(extra, _gradients([auxiliary], None, parameters))
            if weight is not None:
                yield f"the model's auxiliary loss (router balance), weight {weight:.4g}"
    weight = _weight(extra, [2 * parameter.detach().double() for parameter in parameters])
    if weight is not None:
        yield f"L2 of the weights (sum of squares), weight {weight:.4g}"
    yield from _hidden_forms(seen, point, noise)


def _hidden_forms(seen: Watched, point: Point, noise: float) -> Iterator[str]:
    """The last hidden states that get a gradient of their own, and which."""
    students = [call for call in seen.calls if _states(call.body, True)]
    teachers = [state for call in seen.calls for state in _states(call.body, False)]
    for call in students:
        states = _states(call.body, True)
        for number, hidden in reversed(list(enumerate(states))):
            (whole,) = _gradients([seen.loss], None, [hidden])
            (by_logits,) = _gradients(point.tensors, point.gradients, [hidden])
            extra = whole - by_logits
            if not whole.any() or extra.norm() <= noise * whole.norm():
                continue
            name = "last hidden states" if hidden is states[-1] else f"hidden states {number}"
            here = hidden.detach().double()
            scale = 2 / here.numel()
            weight = _weight([extra], [scale * here])
            if weight is not None:
                yield f"mean square of the {name}, weight {weight:.4g}"
            for state in teachers:
                if state.shape == here.shape:
                    weight = _weight([extra], [scale * (here - state.double())])
                    if weight is not None:
                        yield f"mean square error of the {name} to a teacher's, weight {weight:.4g}"
                        break
            else:
                if weight is None:
                    yield f"a term on the {name} of no known form"
            return  # what reaches earlier layers comes from here


def _states(body: object, student: bool) -> list[Tensor]:
    """Float tensors (batch, length, hidden) of a body's output, each once, in order of depth."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dim() == 3 and tensor.requires_grad == student:
            found.setdefault(id(tensor), tensor)
        return tensor

    map_tensors(body, note)
    states = list(found.values())
    # A body names its last hidden states first, then, where asked, all of them in order.
    return [*states[1:], states[0]] if states else []
