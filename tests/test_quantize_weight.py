"""quantize_weight: what it promises of every row, whatever the method, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import SPECS, errors, problem, values
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.weight_spec import Fp8, Int4, Int8, Scales, WeightSpec
from slmperf.quant.layer import (
    METHODS,
    gptq,
    quantize_weight,
    rtn,
)

# What holds for every method --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECS)
def test_no_row_is_worse_than_rounding_to_nearest(name: str, method: str) -> None:
    spec = SPECS[name]
    for seed, tokens in ((1, 300), (2, 20)):  # the second has fewer tokens than inputs
        weight, gram = problem(seed, 33, 96, tokens)
        made = quantize_weight(weight, gram, spec, method=method)
        assert made.codes.dtype == spec.code_dtype and made.codes.shape == weight.shape
        assert made.scale.shape == spec.scale_shape((33, 96))
        assert (made.zero_point is None) == spec.symmetric
        nearest = errors(weight, rtn(weight, spec), gram, spec)
        assert (errors(weight, made, gram, spec) <= nearest * (1 + 1e-9)).all()
        assert made.codes.float().abs().max() <= max(-spec.lowest, spec.highest)
        total = ((weight.double() @ gram) * weight.double()).sum()
        relative = float(errors(weight, made, gram, spec).sum() / total)
        assert made.report.relative_error == pytest.approx(relative, rel=1e-4)
        again = quantize_weight(weight, gram, spec, method=method)
        assert torch.equal(again.codes.view(torch.int8), made.codes.view(torch.int8))
        assert torch.equal(again.scale, made.scale)


def degenerate(kind: str) -> tuple[Tensor, Tensor]:
    weight, gram = problem(7, 24, 64, 200)
    if kind == "zero":
        gram = torch.zeros_like(gram)
    elif kind == "rank 1":
        x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gram = x[:, None] * x
    elif kind == "duplicated":
        place = torch.arange(64) // 2
        gram = gram[place][:, place]
    elif kind == "few tokens":
        gram = problem(7, 24, 64, 5)[1]
    elif kind == "dead inputs":
        gram[::3] = 0.0
        gram[:, ::3] = 0.0
    elif kind == "one at 1e6":
        gram[5] *= 1e6
        gram[:, 5] *= 1e6
    elif kind == "one token at 1e6":
        gram = gram + 1e12 * torch.ones_like(gram)
    elif kind == "zero rows":
        weight[3] = weight[4] = 0.0
        weight[:, 10] = 0.0
    return weight, gram


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind",
    ["zero", "rank 1", "duplicated", "few tokens", "dead inputs", "one at 1e6", "one token at 1e6",
     "zero rows"],
)  # fmt: skip
def test_degenerate_problems_stay_finite_and_never_above_nearest(kind: str, method: str) -> None:
    weight, gram = degenerate(kind)
    for spec in (Int4(group_size=16), Int4(group_size=16, symmetric=False), Int8(), Fp8()):
        for damping in (None, 0.0):
            made = quantize_weight(weight, gram, spec, method=method, damping=damping)
            assert values(made, spec).isfinite().all() and (made.scale > 0).all()
            assert math.isfinite(made.report.relative_error)
            nearest = errors(weight, rtn(weight, spec), gram, spec)
            limit = nearest * (1 + 1e-9) + 1e-15 * float(gram.abs().max())
            assert (errors(weight, made, gram, spec) <= limit).all()
            if kind == "zero rows":
                assert not values(made, spec)[3:5].any()


def test_without_a_factor_damping_rises_and_then_the_weight_is_rounded() -> None:
    weight, gram = degenerate("rank 1")
    made = gptq(weight, gram, Int4(group_size=16), damping=0.0)
    assert made.report.damping > 0 and "damping" in made.report.note
    indefinite = gram - 3 * gram.diagonal().max() * (1 - torch.eye(64, dtype=gram.dtype))
    made = gptq(weight, indefinite, Int4(group_size=16))
    assert made.report.method == "rtn" and "no Cholesky factor" in made.report.note
    assert torch.equal(made.codes, rtn(weight, Int4(group_size=16)).codes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECS)
def test_a_diagonal_gram_is_rounding_to_nearest(name: str, method: str) -> None:
    spec = SPECS[name]
    weight = problem(8, 20, 96, 10)[0]
    gram = torch.diag(torch.linspace(0.1, 5, 96, dtype=torch.float64))
    off = {} if method == "rtn" else {"scale_search": False, "refit": False}
    made = quantize_weight(weight, gram, spec, method=method, **off)
    assert torch.equal(made.codes.float(), rtn(weight, spec).codes.float())


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_each_other(method: str) -> None:
    weight, gram = problem(9, 90, 64, 300)
    spec = Int4(group_size=32)
    whole = quantize_weight(weight, gram, spec, method=method)
    parts = [quantize_weight(part, gram, spec, method=method) for part in weight.split([40, 7, 43])]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["int4 groups", "int4 zero points", "fp8", "fp8 blocks"])
def test_a_mask_stays_zero(name: str, method: str) -> None:
    spec = SPECS[name]
    weight, gram = problem(10, 30, 96, 300)
    mask = torch.rand(30, 96, generator=torch.Generator().manual_seed(0)) > 0.5
    made = quantize_weight(weight, gram, spec, method=method, mask=mask)
    assert not values(made, spec)[~mask].any()
    assert values(made, spec)[mask].any()
    if method != "rtn":  # what is left makes good some of what left
        nearest = quantize_weight(weight, None, spec, method="rtn", mask=mask)
        ours, theirs = (errors(weight, one, gram, spec).sum() for one in (made, nearest))
        assert float(ours) < 0.9 * float(theirs)


@pytest.mark.parametrize("name", SPECS)
def test_views_are_quantised_as_their_copies(name: str) -> None:
    weight, gram = problem(13, 40, 192, 300)
    view = weight.T[::2].T  # neither rows nor columns are contiguous
    made, wanted = (rtn(one, SPECS[name]) for one in (view, view.contiguous()))
    assert torch.equal(made.codes.view(torch.int8), wanted.codes.view(torch.int8))
    spec = SPECS[name]
    found = quantize_weight(view, gram[::2, ::2], spec)
    wanted = quantize_weight(view.contiguous(), gram[::2, ::2].contiguous(), spec)
    assert torch.equal(found.codes.view(torch.int8), wanted.codes.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_those_of_the_file(dtype: torch.dtype) -> None:
    weight, gram = problem(11, 20, 64, 300)
    for method in METHODS:
        made = quantize_weight(weight.to(dtype), gram, Int4(group_size=32), method=method)
        assert made.scale.dtype == dtype
    made = quantize_weight(weight, gram.float(), Int4(group_size=32), scale_dtype=dtype)
    assert made.scale.dtype == dtype


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(SPECS)),
    exponent=st.integers(-5, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_nearest_codes(seed: int, name: str, exponent: int, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    make = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, 96, generator=make) * 10.0**exponent).to(dtype)
    made = rtn(weight, spec)
    if spec.kind == "int":
        ladder = torch.arange(int(spec.lowest), int(spec.highest) + 1).to(torch.int8)
    else:
        ladder = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        ladder = ladder[ladder.float().isfinite()]
    wide = Scales(made.scale.double(), made.zero_point)
    tried = [spec.decode(code.expand(5, 96), wide) for code in ladder]
    nearest = (torch.stack(tried) - weight.double()).abs().amin(0)
    found = (spec.decode(made.codes, wide) - weight.double()).abs()
    step = spec.spread(wide.scale, (5, 96))
    assert (found <= nearest + 1e-5 * step).all()


# Bad arguments ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused_in_one_line() -> None:
    weight, gram = problem(12, 8, 64, 100)
    spec = Int4(group_size=32)
    nan, lopsided = gram.clone(), gram.clone()
    nan[3, 4] = float("nan")
    lopsided[3, 4] += 0.01 * gram.max()
    negative = gram.clone()
    negative[5, 5] = -1.0
    for bad, message in (
        (nan, "gram: wanted finite values"),
        (lopsided, "gram: wanted a symmetric matrix"),
        (negative, "gram: wanted a diagonal >= 0, found -1"),
        (gram[:10], r"gram: wanted fp32 or fp64 \(64, 64\), found torch.float64 \(10, 64\)"),
        (None, "gram: wanted a Gram matrix for method 'gptq', found None"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_weight(weight, bad, spec, method="gptq")
    for settings_, message in (
        ({"method": "awq"}, "method: wanted one of rtn, gptq, quantease, gptq"),
        ({"order": "random"}, "order: wanted one of natural, activity, found 'random'"),
        ({"iterations": 0}, "iterations: wanted a number >= 1, found 0"),
        ({"damping": -1.0}, "damping: wanted a number >= 0, found -1"),
        ({"mask": torch.ones(8, 63, dtype=torch.bool)}, r"mask is \(8, 63\)"),
        ({"mask": torch.ones(8, 64)}, "mask: wanted torch.bool"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_weight(weight, gram, spec, **settings_)
    with pytest.raises(InputError, match="group_size 128 does not divide 64 inputs"):
        quantize_weight(weight, gram, Int4())
    for method, wrong, message in (
        ("rtn", {"refit": True}, "refit: wanted another method than rtn"),
        ("gptq", {"iterations": 3}, r"iterations: wanted method quantease or gptq\+quantease"),
        ("gptq", {"scale_dtype": torch.int8}, "scale_dtype: wanted bf16, fp16, fp32 or fp64"),
    ):
        with pytest.raises(InputError, match=message):
            quantize_weight(weight, gram, spec, method=method, **wrong)
    with pytest.raises(InputError, match=r"weight: wanted \(out, in\) in bf16"):
        rtn(weight.to(torch.float8_e4m3fn), spec)
    with pytest.raises(InputError, match="scale_search: wanted a grid whose outputs"):
        quantize_weight(weight, gram, Fp8(group_size=None), scale_search=True)
    with pytest.raises(InputError, match=r"scale: wanted at most 65504 in float16, found [0-9]"):
        rtn(weight * 1e6, Int4(group_size=32), scale_dtype=torch.float16)
    with pytest.raises(InputError, match="weight: wanted finite values"):
        rtn(weight / 0, spec)
    for arguments, message in (
        ({"bits": 5}, "bits: wanted 2, 3, 4 or 8, found 5"),
        ({"kind": "float", "bits": 4}, "bits: wanted 8, found 4"),
        ({"kind": "float", "symmetric": False}, "symmetric: wanted True"),
        ({"group_size": 0}, "group_size: wanted a number >= 1, -1 or None, found 0"),
        ({"block": (128, 128), "group_size": 64}, "block: wanted"),
    ):
        with pytest.raises(InputError, match=message):
            WeightSpec(**arguments)
