"""quantize_weight: a linear layer's weight on a grid, so that its outputs change as little as they
can.

    min over What on the grid of  tr((W - What) H (W - What)'),   H the Gram matrix of the inputs

    rtn                every value to its nearest; needs no H
    gptq               column after column, the later ones make good the errors of the earlier
                       (arXiv 2210.17323), scales fixed before (static groups)
    quantease          coordinate descent from W, 30 passes, of which the passes 1, 4, ..., 25 do
                       not round (arXiv 2309.01885)
    gptq+quantease     scales searched for, GPTQ in order of activity, coordinate descent, scales
                       refitted in closed form, coordinate descent again

After any of them, a row that came out worse than rounding to nearest (or than GPTQ, where that was
on the way) takes that row instead: no row is ever worse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.weight_spec import WeightSpec
from slmperf.quant.layer.columns import Columns, reversed_cholesky
from slmperf.quant.layer.errors import Candidate, Layer
from slmperf.quant.layer.scales import refit_scales, search_scales

METHODS = ("rtn", "gptq", "quantease", "gptq+quantease")
ORDERS = ("natural", "activity")
_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PASSES = {"quantease": 30, "gptq+quantease": 6}
_AFTER_REFIT = 2  # passes of coordinate descent
_LAST_RELAXED = 25  # pass of quantease
_MOST_DAMPING = 1.0


class WeightReport(NamedTuple):
    """How a weight was quantised, and how well; errors are tr(E H E') / tr(W H W')."""

    method: str  # that made it: "rtn" where the one asked for could not
    relative_error: float  # NaN without a Gram matrix
    relative_error_rtn: float
    damping: float  # as used, over the mean of H's diagonal
    guarded_rows: int  # rows that the method made worse than rtn, or than GPTQ, did
    passes: int  # of coordinate descent
    note: str  # why damping rose or the method changed; "" where neither did
    row_errors: Tensor | None  # e H e' of every row, (out,) fp64; None without a Gram matrix
    row_errors_rtn: Tensor | None
    row_energy: Tensor | None  # w H w'


class QuantizedWeight(NamedTuple):
    """A weight (out, in) as (codes - zero_point) * scale."""

    codes: Tensor  # (out, in) int8, or float8_e4m3fn
    scale: Tensor  # WeightSpec.scale_shape, (out, groups) where rows have their own
    zero_point: Tensor | None  # the same shape, int8
    report: WeightReport


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    gram: Tensor | None,
    spec: WeightSpec,
    *,
    method: str = "gptq+quantease",
    order: str | None = None,
    iterations: int | None = None,
    damping: float | None = None,
    scale_search: bool | None = None,
    refit: bool | None = None,
    mask: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Quantise `weight` (out, in), floating, for inputs with the Gram matrix `gram` (in, in), fp32
    or fp64, symmetric; None with method "rtn".

    method: one of METHODS, see above. What is None is as the method says:
    order: "natural", or "activity", the inputs with the largest H_jj first; groups of inputs stay
        what they are. None: activity, but natural for quantease.
    iterations: passes of coordinate descent, 30 for quantease; 6 and 2 more after the refit.
    damping: added to H's diagonal, over its mean; 0.01, 0 for quantease. Where H is not definite,
        GPTQ takes ten times more, up to 1, and then the weight is rounded to nearest.
    scale_search, refit: on for gptq+quantease, off for gptq and quantease, refused for rtn; never
        where outputs share a scale, whose rows could not be guarded one by one.
    mask: (out, in) bool; where False the quantised weight is 0.
    scale_dtype: dtype that scales are stored in; None: the weight's.

    The weight's outputs do not depend on each other, but where they share a scale: weights with the
    same inputs may be quantised as one. The same call gives the same bits.

    Raises InputError for shapes that do not fit, a weight or Gram matrix with values that are not
    finite, a Gram matrix that is not symmetric or has a negative diagonal, a group size that does
    not divide the inputs, scales that overflow their dtype, and settings that do not exist.
    """
    method, settings = _settings(method, order, iterations, damping, scale_search, refit, spec)
    _check_weight(weight, mask)
    if gram is None:
        if method != "rtn":
            raise InputError(f"gram: wanted a Gram matrix for method {method!r}, found None")
    else:
        check_gram(gram, weight.shape[1])
    dtype = scale_dtype or weight.dtype
    if dtype not in _FLOATING:
        raise InputError(f"scale_dtype: wanted bf16, fp16, fp32 or fp64, found {dtype}")
    kept = weight if mask is None else weight * mask
    scales = spec.scales(kept, dtype)
    codes = spec.encode(kept, scales)
    if gram is None:
        nan = float("nan")
        report = WeightReport("rtn", nan, nan, 0.0, 0, 0, "", None, None, None)
        return QuantizedWeight(codes, *scales, report)
    layer = Layer(weight, gram.to(weight.device), spec)
    nearest = layer.candidate(codes, scales)
    made = Made(nearest, "rtn", 0.0, 0, 0, "")
    if method != "rtn" and bool((gram.diagonal() > 0).any()):
        made = _solve(layer, method, settings, mask, kept, nearest)
    energy = layer.energy()
    whole = float(energy.sum())
    report = WeightReport(
        made.method,
        float(made.found.errors.sum()) / whole if whole > 0 else 0.0,
        float(nearest.errors.sum()) / whole if whole > 0 else 0.0,
        made.damping,
        made.guarded,
        made.passes,
        made.note,
        made.found.errors,
        nearest.errors,
        energy,
    )
    return QuantizedWeight(made.found.codes, *made.found.scales, report)


class Settings(NamedTuple):
    """The arguments of quantize_weight with what the method says in the place of None."""

    order: str
    iterations: int
    damping: float
    scale_search: bool
    refit: bool


class Made(NamedTuple):
    """What a method came to; the words are those of WeightReport."""

    found: Candidate
    method: str
    damping: float
    guarded: int
    passes: int
    note: str


def _solve(
    layer: Layer,
    method: str,
    settings: Settings,
    mask: Tensor | None,
    kept: Tensor,
    nearest: Candidate,
) -> Made:
    """Any method but rtn, on a Gram matrix that is not all zeros."""
    weight, gram, spec = layer.weight, layer.gram, layer.spec
    diagonal = gram.diagonal()
    order = torch.arange(len(diagonal), device=weight.device)
    if settings.order == "activity":
        order = torch.argsort(diagonal, descending=True, stable=True)
    scales = nearest.scales
    if settings.scale_search:
        scales = search_scales(kept, diagonal, spec, scales.scale.dtype)
    columns = Columns(weight, gram, spec, order=order, damping=settings.damping, mask=mask)
    columns.set_scales(scales)
    others, damping, note, passes = [nearest], settings.damping, "", 0
    if method != "quantease":
        factor, damping = _factor(columns, settings.damping)
        if factor is None:
            note = f"no Cholesky factor of the Gram matrix up to damping {_MOST_DAMPING:g}: rtn"
            return Made(nearest, "rtn", _MOST_DAMPING, 0, 0, note)
        if damping != settings.damping:
            note = f"damping {settings.damping:g} left the Gram matrix indefinite: {damping:g}"
        columns.gptq(factor)
        del factor
    if method == "gptq+quantease":
        others.insert(0, layer.candidate(columns.codes(), scales))
    if method != "gptq":
        for number in range(settings.iterations):
            last = number + 1 == settings.iterations
            relaxed = method == "quantease" and number % 3 == 1 and number <= _LAST_RELAXED
            columns.descend(relaxed and not last)
        passes = settings.iterations
    if settings.refit:
        scales = refit_scales(columns, scales)
        columns.set_scales(scales)
        if method != "gptq":
            for _ in range(_AFTER_REFIT):
                columns.descend()
            passes += _AFTER_REFIT
    codes = columns.codes()
    del columns
    found, guarded = layer.candidate(codes, scales), 0
    for other in others:
        found, count = layer.better_rows(found, other)
        guarded += count
    return Made(found, method, damping, guarded, passes, note)


def _factor(columns: Columns, damping: float) -> tuple[Tensor | None, float]:
    """The factor that GPTQ wants, and the damping that it took."""
    while True:
        factor = reversed_cholesky(columns.gram)
        if factor is not None or damping >= _MOST_DAMPING:
            return factor, damping
        more = min(_MOST_DAMPING, max(10 * damping, 0.001))
        columns.gram.diagonal().add_(more - damping)
        damping = more


def _settings(
    method: str,
    order: str | None,
    iterations: int | None,
    damping: float | None,
    scale_search: bool | None,
    refit: bool | None,
    spec: WeightSpec,
) -> tuple[str, Settings]:
    if method not in METHODS:
        raise InputError(f"method: wanted one of {', '.join(METHODS)}, found {method!r}")
    if order is not None and order not in ORDERS:
        raise InputError(f"order: wanted one of {', '.join(ORDERS)}, found {order!r}")
    if iterations is not None and iterations < 1:
        raise InputError(f"iterations: wanted a number >= 1, found {iterations}")
    if damping is not None and not 0 <= damping < float("inf"):
        raise InputError(f"damping: wanted a number >= 0, found {damping}")
    for name, given in (("scale_search", scale_search), ("refit", refit)):
        if given and not spec.by_row:
            raise InputError(f"{name}: wanted a grid whose outputs have scales of their own")
        if given and method == "rtn":
            raise InputError(f"{name}: wanted another method than rtn beside it")
    if iterations is not None and method not in _PASSES:
        raise InputError(f"iterations: wanted method {' or '.join(_PASSES)}, found {method}")
    paper, best = method == "quantease", method == "gptq+quantease" and spec.by_row
    return method, Settings(
        order or ("natural" if paper else "activity"),
        iterations or _PASSES.get(method, 0),
        (0.0 if paper else 0.01) if damping is None else damping,
        best if scale_search is None else scale_search,
        best if refit is None else refit,
    )


def _check_weight(weight: Tensor, mask: Tensor | None) -> None:
    check_shapes("quantize_weight", weight=(weight, "out in"))
    if weight.dtype not in _FLOATING or not weight.numel():
        raise InputError(
            "weight: wanted (out, in) in bf16, fp16, fp32 or fp64, "
            f"found {weight.dtype} {tuple(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise InputError("weight: wanted finite values, found some that are not")
    if mask is not None:
        check_shapes("quantize_weight", weight=(weight, "out in"), mask=(mask, "out in"))
        if mask.dtype != torch.bool:
            raise InputError(f"mask: wanted torch.bool, found {mask.dtype}")


def check_gram(gram: Tensor, inputs: int) -> None:
    """InputError unless gram is (inputs, inputs) fp32 or fp64, finite, symmetric to rounding, with
    a diagonal >= 0."""
    if gram.dtype not in (torch.float32, torch.float64) or gram.shape != (inputs, inputs):
        raise InputError(
            f"gram: wanted fp32 or fp64 ({inputs}, {inputs}), "
            f"found {gram.dtype} {tuple(gram.shape)}"
        )
    least, largest, apart = 0.0, 0.0, 0.0
    for start in range(0, inputs, 256):
        rows = slice(start, start + 256)
        part = gram[rows]
        largest = max(largest, float(part.abs().max()))  # NaN stays NaN only if it comes first
        if not bool(torch.isfinite(part).all()):
            raise InputError("gram: wanted finite values, found some that are not")
        apart = max(apart, float((part - gram[:, rows].T).abs().max()))
        least = min(least, float(part[:, rows].diagonal().min()))
    if apart > 1e-4 * largest:
        raise InputError(
            f"gram: wanted a symmetric matrix, found entries {apart:.3g} apart "
            f"from their mirror images (largest {largest:.3g})"
        )
    if least < 0:
        raise InputError(f"gram: wanted a diagonal >= 0, found {least:.3g}")


def rtn(weight: Tensor, spec: WeightSpec, **settings: Any) -> QuantizedWeight:
    """`quantize_weight` by rounding to nearest, without a Gram matrix."""
    return quantize_weight(weight, None, spec, method="rtn", **settings)


def gptq(weight: Tensor, gram: Tensor, spec: WeightSpec, **settings: Any) -> QuantizedWeight:
    """`quantize_weight` by GPTQ; settings are its other arguments."""
    return quantize_weight(weight, gram, spec, method="gptq", **settings)


def quantease(weight: Tensor, gram: Tensor, spec: WeightSpec, **settings: Any) -> QuantizedWeight:
    """`quantize_weight` by QuantEase as its paper has it; settings are its other arguments."""
    return quantize_weight(weight, gram, spec, method="quantease", **settings)
