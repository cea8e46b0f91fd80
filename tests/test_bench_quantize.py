"""slmperf bench quantize and its parts of the GPU check, at a toy's size; the synthetic layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slmperf.testing.spectra import SPECTRA, Kind, spectrum_problem


def test_costs_stand_beside_product_and_factorisation(slmperf, tmp_path: Path) -> None:
    out = tmp_path / "quantize.json"
    code, printed, _ = slmperf(
        "bench", "quantize", "--outputs", 24, "--inputs", 96, "--seconds", 0.01, "--out", out
    )
    assert code == 0 and "of the time allowed" in printed and "held out" in printed
    content = json.loads(out.read_text())
    assert content["kind"] == "quantize"
    rows = {row["name"]: row for row in content["rows"]}
    costs = {
        way: rows[f"quantize 24x96 {way}"]
        for way in ("matmul", "cholesky", "pass", "gptq alone", "gptq", "default")
    }
    times = {way: row["time_us"] for way, row in costs.items()}
    assert costs["matmul"]["of_matmul"] == 1.0
    assert costs["pass"]["of_matmul"] == pytest.approx(times["pass"] / times["matmul"])
    allowed = 3 * times["matmul"] + 1.5 * times["cholesky"]
    assert costs["gptq"]["of_allowed"] == pytest.approx(times["gptq"] / allowed)
    assert costs["default"]["peak_of_allowed"] > 0.1 and costs["default"]["seconds"] > 0
    for kind in SPECTRA:
        found = {
            name.partition(": ")[2]: row for name, row in rows.items() if f" {kind}, 1536" in name
        }
        ours, paper, rtn = (found[way]["of_gptq"] for way in ("default", "quantease", "rtn"))
        assert found["gptq"]["of_gptq"] == found["gptq"]["held_out_of_gptq"] == 1.0
        assert ours < min(1.0, paper) < rtn and found["default"]["held_out_of_gptq"] < 1.0


@pytest.mark.parametrize("wrong", [("--outputs", 0), ("--inputs", -1), ("--seconds", 0)])
def test_bad_numbers_are_one_line(slmperf, wrong: tuple[Any, ...]) -> None:
    code, _, said = slmperf("bench", "quantize", *wrong)
    assert code == 2 and len(said.strip().splitlines()) == 1


@pytest.fixture
def plans(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "bench")])
    import gpu_plans

    return gpu_plans


PART = SimpleNamespace(seconds=0.01)


def test_the_part_for_layers(plans: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"quantize 4096x4096", "quantize 4096x14336"} < set(plans.BENCHES["quantize"]("cuda"))
    plan = plans.BENCHES["quantize"]("cpu")
    for section, work in plan.items():
        names = [row["name"] for row in work(PART, {})]
        assert names and all(name.startswith(section) for name in names)

    from slmperf.bench.quantize import layer

    apart = {"name": "x", "error_apart": 0.1}
    monkeypatch.setattr(layer, "same_on_both", lambda size, device: apart)
    with pytest.raises(plans.Failed, match="0.1 apart"):
        list(plan["quantize 40x64 on both devices"](PART, {}))


def test_thirty_passes_are_those_of_quantease() -> None:
    from slmperf.bench.quantize.layer import RELAXED

    assert len(RELAXED) == 30
    assert [i for i, relaxed in enumerate(RELAXED) if relaxed] == list(range(1, 26, 3))


def test_the_part_for_models(plans: ModuleType) -> None:
    assert list(plans.BENCHES["quantize-model"]("cuda")) == ["quantize 8b, w4a16, 1048576 tokens"]
    ((section, work),) = plans.BENCHES["quantize-model"]("cpu").items()
    forwards, whole = work(PART, {})
    assert (forwards["name"], whole["name"]) == (f"{section}, two forwards", section)
    assert whole["forwards_seconds"] == pytest.approx(forwards["time_us"] / 1e6)
    assert 0 < whole["solve_seconds"] < whole["seconds"] < 60
    assert whole["error"] < whole["error_rtn"] < 0.1
    assert whole["bytes_after"] < whole["bytes_before"]


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to 4 bits in groups of 128 by the largest value."""
    scale = weight.unflatten(1, (-1, 128)).abs().amax(2).repeat_interleave(128, 1) / 7.5
    return (weight / scale).round().clamp(-8, 7) * scale


@pytest.mark.parametrize(("kind", "ratio"), [("mild", 1.9), ("steep", 6.9)])
def test_spectra_tell_gptq_and_rounding_apart(kind: Kind, ratio: float) -> None:
    """The ratios that the generator promises, by a GPTQ of its own, column after column."""
    weight, inputs, held_out = spectrum_problem(kind, 96, 512, 4096, seed=3)
    assert torch.equal(inputs, spectrum_problem(kind, 96, 512, 4096, seed=3).inputs)
    assert weight.shape == (96, 512) and held_out.shape == (4096, 512)
    gram = (inputs.T @ inputs).double()
    order = gram.diagonal().argsort(descending=True)
    damped = gram[order][:, order]
    damped.diagonal().add_(0.01 * float(gram.diagonal().mean()))
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    factor /= factor.diagonal()
    scale = (weight.unflatten(1, (-1, 128)).abs().amax(2) / 7.5).repeat_interleave(128, 1)
    error = torch.zeros(weight.shape, dtype=torch.float64)
    for j, column in enumerate(order.tolist()):
        target = weight[:, column] + error[:, :j] @ factor[:j, j]
        code = (target / scale[:, column]).round().clamp(-8, 7)
        error[:, j] = weight[:, column] - code * scale[:, column]
    gptq = float(((error @ gram[order][:, order]) * error).sum())
    wrong = (weight - nearest(weight)).double()
    assert float(((wrong @ gram) * wrong).sum()) / gptq == pytest.approx(ratio, rel=0.1)


@pytest.mark.slow
def test_the_bench_on_real_weights(
    root: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The smaller model and two of the ways; every line is one of the results page."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "bench")])
    import quantize_stories

    ways = "w4a16, rtn;w4a16"
    given = ["--data", shared_data, "--out", tmp_path, "--model", "stories260k", "--ways", ways]
    quantize_stories.main(list(map(str, given)))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[1] for line in printed] == [
        "stories260k fp32", "stories260k w4a16, rtn", "stories260k w4a16",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "quantize-stories.json").read_text())["rows"]
    fp32, rtn, ours = (row["perplexity"] for row in rows)
    assert 3.8 < fp32 < ours < rtn and ours / fp32 == rows[2]["of_fp32"]
    assert rows[2]["error"] < rows[2]["error_rtn"]
    with pytest.raises(SystemExit, match="ways holds 'w5a16'"):
        quantize_stories.main([*map(str, given[:-1]), "w5a16"])
