"""slmperf.ops.gram: the packed lower half of X'X against fp64, its layouts and its operator."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops.gram import gram, gram_reference, packed_size, stripes, unpack
from slmperf.ops.routing import table

SIZES = (1, 7, 255, 256, 257, 700, 1100)  # below, at and beyond a stripe and a product's height


def packed(size: int) -> torch.Tensor:
    return torch.zeros(packed_size(size), dtype=torch.float64)


def random_rows(rows: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Correlated columns of unequal size, with outliers, as activations are."""
    make = torch.Generator().manual_seed(rows * 10000 + size)
    x = torch.randn(rows, size, generator=make) + torch.randn(rows, 1, generator=make)
    x *= torch.rand(size, generator=make) * 3
    x[:, size // 2] *= 100
    return x.to(dtype)


def check(found: torch.Tensor, rows: torch.Tensor) -> None:
    """Each element within fp32's rounding of a sum of products of this size."""
    gold = gram_reference(rows.double())
    whole = unpack(found, rows.shape[1])
    scale = gold.diagonal().sqrt()
    error = (whole - gold).abs() / (scale[:, None] * scale).clamp(min=1e-30)
    assert float(error.max()) < 2e-6, float(error.max())
    assert torch.equal(whole, whole.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_dtype_against_fp64(size: int, dtype: torch.dtype) -> None:
    rows = random_rows(37, size, dtype)
    for impl in table("gram").implementations:
        found = packed(size)
        gram(rows, found, impl=impl)
        check(found, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_add_up_and_no_rows_add_nothing(dtype: torch.dtype) -> None:
    rows = random_rows(900, 300, dtype)
    found = packed(300)
    for part in rows.split([0, 1, 500, 0, 399]):
        gram(part, found)
    check(found, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_taken_as_they_are(dtype: torch.dtype) -> None:
    rows = random_rows(40, 290, dtype)
    for lead in (0, 1, 3):  # misaligned, among NaN
        around = rows.new_full((40, 290 + lead + 5), torch.nan)
        view = around[:, lead : lead + 290]
        view.copy_(rows)
        found = packed(290)
        gram(view, found)
        check(found, rows)
    found = packed(290)
    gram(rows.T.contiguous().T, found)
    check(found, rows)


def test_processors_without_bf16_units_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("slmperf.ops.gram")  # by its name: slmperf.ops.gram is the function
    monkeypatch.setattr(module, "has_bf16_units", lambda device: False)
    rows = random_rows(60, 600, torch.bfloat16)
    found = packed(600)
    gram(rows, found)
    check(found, rows)


def test_half_of_the_matrix_is_kept() -> None:
    assert packed_size(4096) < 0.54 * 4096**2
    for size in SIZES:
        ends = [(first, end) for first, end, _ in stripes(size)]
        assert ends[0][0] == 0 and ends[-1][1] == size
        assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))


def test_the_same_bits_again_and_for_rows_of_their_own() -> None:
    rows = random_rows(513, 520, torch.bfloat16)
    one, two = packed(520), packed(520)
    gram(rows, one)
    gram(rows.clone(), two)
    assert torch.equal(one, two)


def test_operator() -> None:
    arguments = (random_rows(20, 270), packed(270))
    torch.library.opcheck(torch.ops.slmperf.gram.torch, arguments)
    compiled = torch.compile(
        lambda rows, found: gram(rows, found), fullgraph=True, backend="aot_eager"
    )
    compiled(*arguments)
    check(arguments[1], arguments[0])


@pytest.mark.parametrize(
    ("rows", "found", "message"),
    [
        (torch.ones(3, 4), torch.zeros(15, dtype=torch.float64), r"packed is \(15,\), .*\(16,\)"),
        (torch.ones(4), torch.zeros(16, dtype=torch.float64), r"rows is \(4,\), expected \(n, d\)"),
        (torch.ones(3, 4), torch.zeros(16), "packed is torch.float32 on cpu, expected torch.float"),
    ],
)
def test_bad_input_is_one_line(rows: torch.Tensor, found: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        gram(rows, found)
    assert "\n" not in str(caught.value)


def test_other_implementations_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="gram: impl='triton'.*there is: torch"):
        gram(torch.ones(3, 4), packed(4), impl="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        gram(torch.ones(3, 4, dtype=torch.float64), packed(4), impl="torch")


def test_float64_stays_so() -> None:
    rows = torch.randn(50, 300, dtype=torch.float64)
    found = packed(300)
    gram(rows, found)
    torch.testing.assert_close(unpack(found, 300), rows.T @ rows, rtol=1e-14, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [7, 700, 4500])
def test_on_a_device(size: int, dtype: torch.dtype) -> None:
    rows = random_rows(900, size, dtype).cuda()
    found = packed(size).cuda()
    gram(rows, found)
    check(found.cpu(), rows.cpu())
