"""unit: the layers of a block that read the same inputs, quantised as one.

Engines multiply with q, k and v as one weight, and with gate and up. Outputs with scales of their
own do not know of each other, so one factorisation serves all of them. Where a weight has but one
scale, the layers of a unit get the same, because engines hold but one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slmperf.check import InputError, one_line
from slmperf.ops.weight_spec import Scales, WeightSpec
from slmperf.quant.layer import QuantizedWeight, quantize_weight
from slmperf.quant.layer.errors import Layer
from slmperf.quant.results import LayerQuantized
from slmperf.quant.schemes import Scheme

_SPARSE = 0.05  # share of exact zeros from which they are taken for a pattern that is to be kept


class Solved(NamedTuple):
    """One layer's codes, which may be a part of a larger tensor, and its row of the report."""

    codes: Tensor
    scales: Scales
    row: LayerQuantized


class Grams(NamedTuple):
    """Gram matrices (in, in) fp32 of a unit's inputs, over the number of their tokens."""

    training: Tensor | None
    held_out: Tensor | None
    note: str = ""  # why there is none although there is text


class Errors(NamedTuple):
    """Errors of rows, e H e' each, and of rounding to nearest, and w H w': (out,) fp64 or None."""

    own: Tensor | None
    nearest: Tensor | None
    energy: Tensor | None

    def relative(self, rows: slice) -> float | None:
        """tr(E H E') / tr(W H W') of some rows; 0 where nothing flows."""
        return _ratio(self.own, self.energy, rows)

    def relative_rtn(self, rows: slice) -> float | None:
        """The same of rounding to nearest."""
        return _ratio(self.nearest, self.energy, rows)


@torch.no_grad()
def quantize_unit(
    layers: Mapping[str, nn.Linear],
    scheme: Scheme,
    grams: Grams,
    *,
    method: str,
    damping: float | None,
    alpha: float | None = None,
    note: str = "",
) -> dict[str, Solved]:
    """Codes for layers that read the same inputs, by full name.

    Blocks of weights may not reach from one layer into the next. method, damping: see
    `quantize_weight`. What it cannot do with them is rounded to nearest, and the report says so.
    alpha, note: of the smoothing, for the report.
    Raises InputError, naming the layers, for what cannot be rounded to nearest either.
    """
    start, spec = time.perf_counter(), scheme.linear.weights
    weights = [layer.weight.detach() for layer in layers.values()]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    made, found = _solve(list(layers), weight, _pattern(weights), spec, grams, method, damping)
    report, held_out = made.report, _held_out(weight, made, spec, grams.held_out)
    training = Errors(report.row_errors, report.row_errors_rtn, report.row_energy)
    seconds, end, solved = time.perf_counter() - start, 0, {}
    for name, own in zip(layers, weights, strict=True):
        rows = slice(end, end + len(own))
        end = rows.stop
        scales = _scales(made, rows, spec)
        row = LayerQuantized(
            name=name,
            scheme=scheme.name,
            method=report.method,
            bits=_bits(own, scales, spec),
            relative_error=training.relative(rows),
            relative_error_rtn=training.relative_rtn(rows),
            held_out_error=held_out.relative(rows),
            held_out_error_rtn=held_out.relative_rtn(rows),
            damping=None if report.method == "rtn" else report.damping,
            guarded_rows=report.guarded_rows,
            alpha=alpha,
            note="; ".join(filter(None, (note, found))),
            seconds=seconds * len(own) / len(weight),
        )
        solved[name] = Solved(made.codes[rows], scales, row)
    return solved


def _solve(
    names: Sequence[str],
    weight: Tensor,
    mask: Tensor | None,
    spec: WeightSpec,
    grams: Grams,
    method: str,
    damping: float | None,
) -> tuple[QuantizedWeight, str]:
    """The weight's codes, and what there is to say of them."""
    note = grams.note
    if grams.training is not None:
        try:
            made = quantize_weight(
                weight, grams.training, spec, method=method, damping=damping, mask=mask
            )
            return made, made.report.note
        except (InputError, torch.linalg.LinAlgError) as error:
            note = one_line(error)
    try:
        made = quantize_weight(weight, None, spec, method="rtn", mask=mask)
    except InputError as error:
        raise InputError(f"{', '.join(names)}: {error}") from error
    return made, f"{note}: rounded to nearest" if note else ""


def _held_out(
    weight: Tensor, made: QuantizedWeight, spec: WeightSpec, gram: Tensor | None
) -> Errors:
    """Errors on other text."""
    if gram is None:
        return Errors(None, None, None)
    layer, nearest = Layer(weight, gram, spec), spec.scales(weight)
    return Errors(
        layer.candidate(made.codes, Scales(made.scale, made.zero_point)).errors,
        layer.candidate(spec.encode(weight, nearest), nearest).errors,
        layer.energy(),
    )


def _pattern(weights: Sequence[Tensor]) -> Tensor | None:
    """Which weights are to stay 0: where False, in layers with enough zeros; None for none."""
    masks = [weight != 0 for weight in weights]
    sparse = [int(mask.sum()) <= (1 - _SPARSE) * mask.numel() for mask in masks]
    if not any(sparse):
        return None
    return torch.cat(
        [one if keeps else torch.ones_like(one) for one, keeps in zip(masks, sparse, strict=True)]
    )


def _scales(made: QuantizedWeight, rows: slice, spec: WeightSpec) -> Scales:
    """One layer's scales."""
    chosen = rows if spec.by_row else slice(None)
    if spec.block is not None:
        down = spec.block[0]
        chosen = slice(rows.start // down, -(-rows.stop // down))
    zero_point = made.zero_point
    return Scales(made.scale[chosen], None if zero_point is None else zero_point[chosen])


def _bits(weight: Tensor, scales: Scales, spec: WeightSpec) -> float:
    """Bits per weight of the codes, the scales and the zero points."""
    each = scales.scale.element_size() * 8 + (0 if spec.symmetric else spec.bits)
    return spec.bits + scales.scale.numel() * each / weight.numel()


def _ratio(errors: Tensor | None, energy: Tensor | None, rows: slice) -> float | None:
    if errors is None or energy is None:
        return None
    whole = float(energy[rows].sum())
    return float(errors[rows].sum()) / whole if whole > 0 else 0.0
