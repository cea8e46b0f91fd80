"""slmperf bench gram and its part of the GPU check, at a toy's size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_rows_say_how_fast_an_update_is(slmperf, tmp_path: Path) -> None:
    out = tmp_path / "gram.json"
    code, printed, _ = slmperf(
        "bench", "gram", "--rows", 300, "--size", 70, "--seconds", 0.01, "--out", out
    )
    assert code == 0 and "of fp32's rate" in printed
    content = json.loads(out.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert content["kind"] == "gram" and len(rows) == 7
    product, update = (rows[f"gram 300x70 fp32 {way}"] for way in ("torch.mm", "update"))
    assert product["of_fp32"] == product["of_same"] == 1.0
    # Half of the operations: as fast a rate would take half of the time.
    ratio = product["time_us"] / update["time_us"] / 2
    assert update["of_fp32"] == pytest.approx(ratio)
    assert update["tflops"] == pytest.approx(300 * 70**2 / update["time_us"] / 1e6)
    assert rows["gram 300x70 bf16 torch.mm fp32"]["of_fp32"] == pytest.approx(1.0)


@pytest.mark.parametrize("wrong", [("--rows", 0), ("--size", -1), ("--seconds", 0)])
def test_bad_numbers_are_one_line(slmperf, wrong: tuple) -> None:
    code, _, said = slmperf("bench", "gram", *wrong)
    assert code == 2 and len(said.strip().splitlines()) == 1


def test_the_part_of_the_gpu_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "bench")])
    from gpu_plans import BENCHES

    plan = BENCHES["gram"]("cpu")
    assert set(BENCHES["gram"]("cuda")) == {
        f"gram 16384x{size} {dtype}" for size in (8192, 14336) for dtype in ("fp32", "bf16")
    }
    for section, work in plan.items():
        names = [row["name"] for row in work(SimpleNamespace(seconds=0.01), {})]
        assert names[-2:] == [f"{section} update", f"{section} with scores"]
