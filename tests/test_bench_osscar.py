"""slmperf bench osscar at a toy's size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_rows_stand_beside_cholesky_and_the_recurrence(slmperf, tmp_path: Path) -> None:
    out = tmp_path / "osscar.json"
    code, printed, _ = slmperf(
        "bench", "osscar", "--size", 96, "--remove", 40, "--seconds", 0.01, "--out", out
    )
    assert code == 0 and "faster" in printed
    content = json.loads(out.read_text())
    rows = {row["name"].rsplit(" ", 1)[1]: row for row in content["rows"]}
    assert content["kind"] == "osscar" and set(rows) == {"cholesky", "osscar", "recurrence"}
    solver = rows["osscar"]
    assert rows["cholesky"]["of_cholesky"] == 1.0 and solver["same"] is True
    assert solver["speedup"] == pytest.approx(rows["recurrence"]["time_us"] / solver["time_us"])
    assert solver["of_cholesky"] == pytest.approx(solver["time_us"] / rows["cholesky"]["time_us"])
    assert 2 < solver["peak_matrices"] < 6  # N and the temporaries of small matrices count


@pytest.mark.parametrize("wrong", [("--size", 0), ("--remove", 1024), ("--seconds", -1)])
def test_bad_numbers_are_one_line(slmperf, wrong: tuple) -> None:
    code, _, said = slmperf("bench", "osscar", *wrong)
    assert code == 2 and len(said.strip().splitlines()) == 1
