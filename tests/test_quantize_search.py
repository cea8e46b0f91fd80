"""The search of quantize_weight: against naive GPTQ and QuantEase in fp64, brute force, and how far
below GPTQ it comes."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_layers import SPECS, errors, problem
from torch import Tensor

from slmperf.ops.weight_spec import Int4, Scales, WeightSpec
from slmperf.quant.layer import (
    QuantizedWeight,
    gptq,
    quantease,
    quantize_weight,
)
from slmperf.quant.layer.columns import Columns, reversed_cholesky
from slmperf.testing.spectra import spectrum_problem

# GPTQ -------------------------------------------------------------------------------------------


def naive_gptq(weight: Tensor, gram: Tensor, scale: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ as its paper has it, in fp64, by the inverse and its Cholesky factor: int4 codes of
    scales (out, groups), and how far each value was from the middle between two codes."""
    w, h = weight.double()[:, order].clone(), gram[order][:, order].clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    group = weight.shape[1] // scale.shape[1]
    codes, margin = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(len(order)):
        s = scale[:, int(order[j]) // group].double()
        ratio = w[:, j] / s
        codes[:, j] = ratio.round().clamp(-8, 7)
        margin[:, j] = ((ratio - ratio.floor()) - 0.5).abs()
        missed = (w[:, j] - codes[:, j] * s) / factor[j, j]
        w[:, j:] -= missed[:, None] * factor[j, j:]
    back = torch.argsort(order)
    return codes[:, back], margin[:, back]


@pytest.mark.parametrize("block", [1, 32, 64, 128])
@pytest.mark.parametrize("order", ["natural", "activity"])
def test_gptq_gives_the_codes_of_the_naive_algorithm(block: int, order: str) -> None:
    spec = Int4(group_size=48)
    weight, gram = problem(3, 40, 144, 500)
    scales = spec.scales(weight)
    places = torch.arange(144)
    if order == "activity":
        places = gram.diagonal().argsort(descending=True)
    columns = Columns(weight, gram, spec, order=places, damping=0.01, block=block)
    columns.set_scales(scales)
    factor = reversed_cholesky(columns.gram)
    assert factor is not None
    columns.gptq(factor)
    codes = columns.codes()
    wanted, margin = naive_gptq(weight, gram, scales.scale, places)
    rows = (codes != wanted).any(1)  # after a tie went the other way a row is another problem
    assert (margin[rows].amin(1) < 1e-5).all()
    assert int(rows.sum()) <= 1
    made = gptq(weight, gram, spec, order=order)
    assert float((made.codes != codes).float().mean()) < 0.01  # another block, and guarded rows


# Coordinate descent -----------------------------------------------------------------------------


def naive_quantease(weight: Tensor, gram: Tensor, spec: WeightSpec, passes: int = 30) -> Tensor:
    """QuantEase as its paper has it, in fp64: the error of every row at the end."""
    scales = spec.scales(weight)
    scale = spec.spread(scales.scale, (weight.shape[0], weight.shape[1])).double()
    w, h = weight.double(), gram.double()
    now = w.clone()
    for number in range(passes):
        relaxed = number % 3 == 1 and number <= 25 and number + 1 < passes
        for j in range(w.shape[1]):
            target = now[:, j] + ((w - now) @ h[:, j]) / h[j, j]
            if not relaxed:
                code = (target / scale[:, j]).round().clamp(spec.lowest, spec.highest)
                target = code * scale[:, j]
            now[:, j] = target
    error = w - now
    return ((error @ h) * error).sum(1)


def test_quantease_reaches_what_the_paper_s_algorithm_does() -> None:
    spec = Int4(group_size=32)
    for seed in range(20):
        weight, gram = problem(seed, 48, 64, 400)
        found = errors(weight, quantease(weight, gram, spec), gram, spec).sum()
        wanted = naive_quantease(weight, gram, spec).sum()
        assert float(found) <= 1.0001 * float(wanted), seed


@pytest.mark.parametrize("name", ["int4 groups", "int4 zero points", "fp8", "fp8 blocks"])
def test_descent_is_monotone_and_ends_where_no_single_code_helps(name: str) -> None:
    spec = SPECS[name]
    weight, gram = problem(5, 12, 96, 300)
    scales = spec.scales(weight)
    order = gram.diagonal().argsort(descending=True)
    columns = Columns(weight, gram, spec, order=order)
    columns.set_scales(scales)
    curve, codes = [], None
    for _ in range(60):
        columns.descend()
        before, codes = codes, columns.codes()
        made = QuantizedWeight(codes, *scales, report=None)  # type: ignore[arg-type]
        curve.append(float(errors(weight, made, gram, spec).sum()))
        if before is not None and torch.equal(before.float(), codes.float()):
            break
    else:
        pytest.fail("60 passes did not end")
    assert len(curve) > 3  # else there was nothing to see
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(curve))
    now = spec.decode(codes, Scales(scales.scale.double(), scales.zero_point))
    slope = (weight.double() - now) @ gram
    if spec.kind == "int":
        others = [
            (codes.int() + step).clamp(int(spec.lowest), int(spec.highest)) for step in (-1, 1)
        ]
        neighbours = [one.to(torch.int8) for one in others]
    else:
        ladder = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        ladder = ladder[ladder.isfinite()].unique()
        place = torch.searchsorted(ladder, codes.float())
        neighbours = [
            ladder[(place + step).clamp(0, len(ladder) - 1)].to(torch.float8_e4m3fn)
            for step in (-1, 1)
        ]
    for other in neighbours:  # f is a parabola in one code: its neighbours are enough
        step = spec.decode(other, Scales(scales.scale.double(), scales.zero_point)) - now
        change = step * (step * gram.diagonal() - 2 * slope)
        assert float(change.min()) > -1e-6 * curve[-1]


def test_brute_force_is_met_and_gptq_beaten() -> None:
    spec = WeightSpec(bits=2)
    met = total = 0
    ours, theirs = 0.0, 0.0
    for seed in range(40):
        weight, gram = problem(seed, 2, 5, 40)
        scale = spec.scales(weight).scale.double()
        grid = torch.tensor(list(itertools.product(range(-2, 2), repeat=5)), dtype=torch.float64)
        made = quantize_weight(weight, gram, spec, scale_search=False, refit=False, damping=0.0)
        found = errors(weight, made, gram, spec)
        for row in range(2):
            tried = weight[row].double() - grid * scale[row]
            best = ((tried @ gram) * tried).sum(1).min()
            met += bool(found[row] <= best * (1 + 1e-6))
            total += 1
        ours += float(found.sum())
        theirs += float(errors(weight, gptq(weight, gram, spec, damping=0.0), gram, spec).sum())
    assert met >= 0.6 * total, (met, total)
    assert ours < theirs


# Figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mild", "steep"])
def test_the_default_is_far_below_gptq_on_both_spectra(kind: str) -> None:
    spec = Int4()
    weight, inputs, held_out = spectrum_problem(kind, 256, 512, 16 * 512)  # type: ignore[arg-type]
    gram, other = (x.double().T @ x.double() for x in (inputs, held_out))
    base = gptq(weight, gram, spec)
    made = quantize_weight(weight, gram, spec)
    for seen, limit in ((gram, 0.75), (other, 0.80)):
        ratio = errors(weight, made, seen, spec).sum() / errors(weight, base, seen, spec).sum()
        assert float(ratio) <= limit
    assert made.report.relative_error < 0.75 * base.report.relative_error
    assert made.report.relative_error_rtn == pytest.approx(base.report.relative_error_rtn)
