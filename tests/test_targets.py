"""Every numeric target has a status, and a row in bench/RESULTS.md that agrees with it."""

import re
import tomllib

import pytest

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
        if set(target) - {"bench"} != KEYS or not all(
            str(value).strip() for value in target.values()
        ):
            found.append(f"{name}: wants {sorted(KEYS)}, has {sorted(target)}")
            continue
        if target["status"] not in ("measured", "missed", "owed"):
            found.append(f"{name}: status is {target['status']}")
        if target["machine"] not in ("cpu", "gpu"):
            found.append(f"{name}: machine is {target['machine']}")
        if not re.search(r"\d", target["figure"]):
            found.append(f"{name}: its figure holds no number")
        decided = set(target.get("bench", {}))
        if decided not in (set(), {"row", "key", "least"}, {"row", "key", "most"}):
            found.append(f"{name}: bench wants row, key, and least or most, has {sorted(decided)}")
        if target["machine"] == "gpu" and not decided:
            found.append(f"{name}: a GPU's target without the row of a bench")
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
        ({"machine": "gpu"}, "without the row of a bench"),
        ({"bench": {"row": "r", "key": "k"}}, "bench wants row, key, and least or most"),
    ],
)
def test_a_spoilt_target_is_found(change, complaint):
    rows = rows_of(TABLE)
    target = dict(name="n", figure="2 x", command="c", machine="cpu", status="measured", row="a")
    assert complaints([target], rows) == []
    spoilt = {name: value for name, value in (target | change).items() if value is not None}
    (found,) = complaints([spoilt], rows)
    assert complaint in found
