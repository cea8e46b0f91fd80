"""Every numeric target has a status, and a row in bench/RESULTS.md that agrees with it."""

import importlib.util
import json
import re
import tomllib

import pytest
import torch

from slmperf.ops import ForwardKL
from slmperf.testing.cases import FAMILIES

KEYS = {"name", "figure", "command", "machine", "status", "row"}


def load_targets(text):
    return tomllib.loads(text)["target"]


def rows_of(markdown):
    """Row name -> cells, over all tables whose first column is called `row`."""
    rows, inside = {}, False
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "row":
            inside = True
        elif inside and not set(cells[0]) <= {"-", ":"}:
            assert cells[0] not in rows, f"bench/RESULTS.md has two rows {cells[0]}"
            rows[cells[0]] = cells
    return rows


def complaints(targets, rows):
    """What is wrong with each target, in words."""
    found = []
    for target in targets:
        name = target.get("name", "a target without a name")
        if set(target) != KEYS or not all(str(value).strip() for value in target.values()):
            found.append(f"{name}: wants {sorted(KEYS)}, has {sorted(target)}")
            continue
        if target["status"] not in ("measured", "missed", "owed"):
            found.append(f"{name}: status is {target['status']}")
        if target["machine"] not in ("cpu", "gpu"):
            found.append(f"{name}: machine is {target['machine']}")
        if not re.search(r"\d", target["figure"]):
            found.append(f"{name}: its figure holds no number")
        if target["row"] not in rows:
            found.append(f"{name}: bench/RESULTS.md has no row {target['row']}")
            continue
        text = " | ".join(rows[target["row"]][1:])
        if target["status"] == "owed" and "owed" not in text:
            found.append(f"{name}: owed, but its row shows a figure")
        if target["status"] != "owed":
            if "owed" in text:
                found.append(f"{name}: {target['status']}, but its row says owed")
            if not re.search(r"\b20\d\d-\d\d-\d\d\b", text):
                found.append(f"{name}: its row has no date")
    return found


def test_targets_and_rows_agree(root):
    targets = load_targets((root / "bench" / "targets.toml").read_text())
    rows = rows_of((root / "bench" / "RESULTS.md").read_text())
    assert len({target["name"] for target in targets}) == len(targets) >= 10
    assert complaints(targets, rows) == []


TABLE = """
| row | figure |
|---|---|
| a | 3 x, 2026-11-22 |
| b | owed 2026-11-22 |
| c | 3 x |
"""


@pytest.mark.parametrize(
    "change,complaint",
    [
        ({"status": None}, "wants"),
        ({"status": "done"}, "status is done"),
        ({"row": "nowhere"}, "no row nowhere"),
        ({"status": "owed"}, "shows a figure"),
        ({"row": "b"}, "says owed"),
        ({"row": "c"}, "no date"),
        ({"figure": "fast"}, "no number"),
        ({"machine": "abacus"}, "machine is abacus"),
    ],
)
def test_a_spoilt_target_is_found(change, complaint):
    rows = rows_of(TABLE)
    target = dict(name="n", figure="2 x", command="c", machine="cpu", status="measured", row="a")
    assert complaints([target], rows) == []
    spoilt = {name: value for name, value in (target | change).items() if value is not None}
    (found,) = complaints([spoilt], rows)
    assert complaint in found


@pytest.fixture
def gpu_check(root):
    spec = importlib.util.spec_from_file_location("gpu_check", root / "bench" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_check_runs_without_a_gpu(gpu_check, tmp_path, capsys, monkeypatch, root):
    """The whole script on tiny shapes: it says what is owed, times the CPU, writes its JSON."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "copy_roof_gbs", lambda device: 10.0)
    tiny = FAMILIES["divergence"].make((16, 500), torch.float32, ForwardKL(), 1.0, "apart")
    assert gpu_check.main(["--out", str(tmp_path)], cases=[tiny], seconds=0.05) == 0
    printed = capsys.readouterr().out
    targets = load_targets((root / "bench" / "targets.toml").read_text())
    owed = [t["name"] for t in targets if t["machine"] == "gpu" and t["status"] == "owed"]
    assert "no CUDA device" in printed and all(name in printed for name in owed)
    name = r"divergence 16x500 float32 ForwardKL\(\) (\w+)"
    numbers = r"[\d.]+ \| [\d.]+ \| \d+ \| [\d.]+"
    lines = re.findall(rf"^{name} \| {numbers} \| -$", printed, flags=re.MULTILINE)
    assert lines == ["cpu", "reference", "kl_div"]
    (path,) = tmp_path.glob("*/*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", path.stem)
    result = json.loads(path.read_text())
    assert result["pytest_gpu"] is None and result["machine"]["torch"] == torch.__version__
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert row["gbs"] == pytest.approx(tiny.bytes / row["time_us"] * 1e-3)
        assert row["roof_share"] == pytest.approx(row["gbs"] / 10.0)
    fastest = min(row["time_us"] for row in result["rows"] if row["impl"] != "cpu")
    cpu = next(row for row in result["rows"] if row["impl"] == "cpu")
    assert cpu["speedup"] == pytest.approx(fastest / cpu["time_us"])


@pytest.mark.gpu
def test_timing_on_a_device():
    """Graph replay, the copy roof and peak memory on the device itself."""
    from slmperf.testing.timing import copy_roof_gbs, median_us, peak_mib

    x = torch.empty(2**26, device="cuda")
    times = median_us({"fill": [x.zero_], "twice": [lambda: (x.zero_(), x.zero_())]}, "cuda", 0.2)
    assert 1.5 < times["twice"] / times["fill"] < 2.5
    roof = copy_roof_gbs("cuda")
    assert 0.3 * roof < x.numel() * 4 / times["fill"] * 1e-3 < 3 * roof
    assert peak_mib(lambda: torch.empty(2**20, device="cuda"), "cuda") == pytest.approx(4, abs=1)
