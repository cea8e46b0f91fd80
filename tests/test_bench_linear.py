"""slmperf bench linear and its part of the GPU check, at a toy's size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slmperf.bench.linear import measure, rivals
from slmperf.bench.roof import Roof
from slmperf.testing.linear_cases import random_weight

ROOF = Roof("none", "cpu", "", "", 1, 10.0, {"fp32": 0.1, "bf16": 0.5, "int8": 1.0}, 1.0, "")


def rows_of(scheme: str, shape: tuple[int, int] = (64, 128), rows: tuple = (1, 17, 200)) -> list:
    refused: dict[str, str] = {}
    found = list(measure.measure(scheme, shape, rows, "cpu", ROOF, 0.001, refused))
    assert refused == {}
    return found


@pytest.mark.parametrize("scheme", measure.BENCHED)
def test_rows_and_the_worst_of_them(scheme: str) -> None:
    *rows, worst = rows_of(scheme)
    ways = {row["way"] for row in rows}
    assert {measure.OURS, "slmperf cpu", "slmperf torch", "torch bf16", "torch fp32"} <= ways
    assert "slmperf triton" not in ways, "an interpreter's time says nothing"
    by = {(row["rows"], row["way"]): row for row in rows}
    one, plain = by[1, measure.OURS], by[1, "torch bf16"]
    assert one["over_bf16"] == pytest.approx(plain["time_us"] / one["time_us"])
    theirs = min(by[1, way]["time_us"] for way in ways if way.startswith("torch"))
    assert one["over_best"] == pytest.approx(theirs / one["time_us"])
    held = plain["weight_mib"] / one["weight_mib"]
    assert 3 < held < 4 if scheme.startswith("int4") else 1.5 < held <= 2
    moved = plain["weight_mib"] * 2**20 + 2 * (64 + 128)
    assert plain["copy_share"] == pytest.approx(moved / plain["time_us"] * 1e-3 / 10.0)
    ours = [row for row in rows if row["way"] == measure.OURS]
    assert worst["over_best"] == min(row["over_best"] for row in ours)
    assert worst["over_fp32_from_128"] == by[200, measure.OURS]["over_fp32"]
    assert worst["copy_share_few"] == one["copy_share"] and "over_bf16_many" not in worst


@pytest.mark.parametrize("scheme", ["int4-64-zeros", "int8-weight"])
def test_rivals_multiply_the_same_weight(scheme: str) -> None:
    weight = random_weight(scheme, 64, 128, torch.bfloat16, "plain", 0)
    x = torch.randn(8, 128).bfloat16()
    wanted = x.float() @ weight.dequantized().float().T
    names = {"int4-64-zeros": "torch int4pack", "int8-weight": "torch int8pack"}
    found = rivals.others(weight, "cpu")[names[scheme]](weight, x)().float()
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_the_command(slmperf, tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    code, printed, _ = slmperf(
        "bench", "linear", "--scheme", "int8-token", "--shape", "32x64", "--rows", "2,3",
        "--seconds", 0.001, "--out", out,
    )  # fmt: skip
    assert code == 0 and "of best" in printed
    content = json.loads(out.read_text())
    assert content["kind"] == "linear" and content["roof"]["copy_gbs"] > 0
    assert content["rows"][-1]["name"] == "linear int8-token 32x64, worst"


@pytest.mark.parametrize(
    "wrong,message",
    [
        (("--scheme", "int5"), "scheme is 'int5', expected one of int4-32"),
        (("--shape", "32"), "shape is '32'"),
        (("--shape", "32x0"), "shape is '32x0'"),
        (("--rows", "1,-2"), "rows is '1,-2'"),
        (("--scheme", "int4-128", "--shape", "64x64"), "does not divide 64 inputs"),
        (("--seconds", 0), "seconds is 0"),
    ],
)
def test_bad_arguments_are_one_line(slmperf, wrong: tuple, message: str) -> None:
    code, _, said = slmperf("bench", "linear", *wrong)
    assert code == 2 and len(said.strip().splitlines()) == 1 and message in said


def test_the_part_of_the_gpu_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "bench")])
    from gpu_plans import BENCHES

    assert "linear int4-128 4096x14336" in BENCHES["linear"]("cuda")
    plan = BENCHES["linear"]("cpu")
    assert list(plan) == [f"linear {scheme} 64x128" for scheme in measure.BENCHED]
    part = SimpleNamespace(seconds=0.002, roof=lambda: ROOF)
    for section, work in plan.items():
        facts: dict = {}
        assert [row["name"] for row in work(part, facts)][-1] == f"{section}, worst"
        assert facts["refused"] == {}
