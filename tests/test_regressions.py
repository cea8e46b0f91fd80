"""Speed that is lost: the CPU kernels against plain torch beside them, and `bench compare`."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from slmperf import cli
from slmperf.bench.compare import compare
from slmperf.bench.results import write_results
from slmperf.check import InputError
from slmperf.ops.routing import MISSING, cpu_isa
from slmperf.testing.cases import DivergenceCase

spec = importlib.util.spec_from_file_location(
    "ratios", __file__.replace("tests/test_regressions.py", "bench/ratios.py")
)
ratios = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ratios)


@pytest.fixture(scope="module")
def expected():
    """The recorded ratios of this machine's instruction set."""
    if MISSING["native"]:
        pytest.skip(MISSING["native"])
    isa, entries = cpu_isa(), ratios.recorded()
    if isa == "scalar":
        pytest.skip("without vectors the kernels are a fallback, whose speed nobody promises")
    assert isa in entries, f"no ratios of {isa}: python bench/ratios.py --write takes them down"
    return entries[isa]


@pytest.mark.parametrize("name", ratios.CASES)
def test_no_ratio_is_lost(expected, name):
    wanted = expected["ratios"][name]
    found = ratios.lost(ratios.CASES[name], wanted)
    assert found is None, (
        f"{name}: {found:.2f} x plain torch, recorded {wanted} x on {expected['date']} "
        f"({expected['machine']}, torch {expected['torch']}): more than a quarter is lost"
    )


def test_no_ratio_of_avx2_is_lost(expected):
    """Where the kernels are wider, the same test in a process in which they and torch are not."""
    if cpu_isa() != "avx512":
        pytest.skip("the other test measured these")
    narrow = {"SLMPERF_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    test = f"{__file__}::{test_no_ratio_is_lost.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=os.environ | narrow, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"{len(ratios.CASES)} passed" in done.stdout, done.stdout


class Slowed(DivergenceCase):
    """A kernel whose forward takes five times as long."""

    def run(self, tensors, impl):
        for _ in range(4):
            super().run(tensors, impl)
        return super().run(tensors, impl)


def test_a_slower_kernel_is_found(expected):
    name = next(name for name in ratios.CASES if "JSD" in name)
    slowed = Slowed(**vars(ratios.CASES[name]))
    assert ratios.lost(slowed, expected["ratios"][name], tries=2) is not None


def test_records_are_whole(expected, tmp_path, monkeypatch):
    assert set(ratios.recorded()) == {"avx2", "avx512"}
    for entry in ratios.recorded().values():
        assert set(entry["ratios"]) == set(ratios.CASES)
        assert min(entry["ratios"].values()) > 1
    entries = {"neon": expected, "scalar": expected}
    monkeypatch.setattr(ratios, "FILE", tmp_path / "ratios.toml")
    assert ratios.recorded() == {}
    ratios.write(entries)
    assert ratios.recorded() == entries


def row(name, time_us, spread=0.02, **more):
    """A row whose quartiles are `spread` to both sides."""
    quartiles = dict(low_us=time_us * (1 - spread), high_us=time_us * (1 + spread), samples=9)
    return {"name": name, "time_us": time_us} | quartiles | more


@pytest.fixture
def compared(tmp_path):
    """Compare two lists of rows; the paths of their files lie in the folder."""

    def run(a, b, kind_b="ops", **machine_b):
        machine = {"device": "abacus", "threads": 2, "torch": "2.13"}
        write_results(tmp_path / "A.json", "ops", a, machine=machine)
        write_results(tmp_path / "B.json", kind_b, b, machine=machine | machine_b)
        return compare(tmp_path / "A.json", tmp_path / "B.json")

    return run


@pytest.mark.parametrize(
    "before,after,spread,verdict",
    [
        (100, 100, 0.02, "same"),
        (100, 130, 0.02, "slower"),
        (100, 70, 0.02, "faster"),
        (100, 104, 0.0, "same"),  # beyond the spread, within the threshold
        (100, 106, 0.0, "slower"),
        (100, 130, 0.2, "same"),  # beyond the threshold, within the spread: 80..120, 104..156
        (100, 70, 0.2, "same"),
        (100, 160, 0.2, "slower"),
    ],
)
def test_a_change_must_beat_noise_and_threshold(compared, before, after, spread, verdict):
    (change,) = compared([row("x", before, spread)], [row("x", after, spread)]).changes
    assert change.verdict == verdict and change.relative is None
    assert change.ratio == pytest.approx(after / before)


def pair(ours, reference, spread=0.02):
    """Rows of a case: a kernel and its yardstick."""
    more = {"yardstick": "case reference"}
    return [row("case cpu", ours, spread, **more), row("case reference", reference, spread, **more)]


@pytest.mark.parametrize(
    "before,after,relative,verdict",
    [
        ((100, 600), (200, 1200), 1.0, "same"),  # a slower machine
        ((100, 600), (100, 300), 2.0, "slower"),  # a faster machine hides it
        ((100, 600), (100, 1200), 0.5, "faster"),
        ((100, 600), (150, 600), 1.5, "slower"),
    ],
)
def test_times_are_taken_in_yardsticks(compared, before, after, relative, verdict):
    found = compared(pair(*before), pair(*after))
    change, yardstick = found.changes
    assert change.relative == pytest.approx(relative) and change.verdict == verdict
    assert yardstick.relative is None and yardstick.is_yardstick and not change.is_yardstick
    assert [one.name for one in found.worse_than(1.25)] == (
        ["case cpu"] if verdict == "slower" else []
    )


def test_a_noisy_yardstick_decides_nothing(compared):
    found = compared(pair(100, 600), [*pair(140, 600, spread=0.02)[:1], *pair(1, 600, 0.4)[1:]])
    assert found.changes[0].verdict == "same" and found.changes[0].ratio == pytest.approx(1.4)


def test_rows_of_one_file_and_rows_without_a_time(compared):
    found = compared(
        [row("a", 1), row("both", 5), {"name": "refused", "time_us": None}],
        [row("both", 5), row("b", 1), {"name": "refused", "time_us": None}],
    )
    verdicts = {one.name: one.verdict for one in found.changes}
    assert verdicts == {"a": "only in A", "both": "same", "b": "only in B"}
    assert found.summary() == "1 same, 1 only in A, 1 only in B" and not found.worse_than(1.0)


def test_sections_keep_rows_of_one_name_apart(compared):
    rows = [row("x", 100, section="owed"), row("x", 100, section="ops")]
    found = compared(rows, [row("x", 100, section="owed"), row("x", 200, section="ops")])
    assert [one.verdict for one in found.changes] == ["same", "slower"]
    with pytest.raises(InputError, match="two rows are named x"):
        compared([row("x", 1), row("x", 2)], [])


def test_other_machines_are_said_and_other_kinds_refused(compared):
    found = compared([row("x", 1)], [row("x", 1)], device="slide rule", torch="2.14")
    assert found.warnings == [
        "warning: device is abacus in A and slide rule in B",
        "warning: torch is 2.13 in A and 2.14 in B",
    ]
    (warning,) = compared(pair(100, 600), pair(500, 3000)).warnings
    assert "yardsticks took 5 x as long in B" in warning
    with pytest.raises(InputError, match=r"B\.json is of kind layer, .*A\.json of ops"):
        compared([], [], kind_b="layer")


def command(monkeypatch, *arguments):
    """slmperf in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["slmperf", "bench", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_the_command(compared, tmp_path, monkeypatch, capsys):
    compared(pair(100, 600), pair(150, 600), device="slide rule")
    files = (tmp_path / "A.json", tmp_path / "B.json")
    assert command(monkeypatch, *files) == 0
    printed = capsys.readouterr().out
    assert "1.500" in printed and "slower" in printed and "1 slower, 1 same" in printed
    assert "warning: device is abacus in A and slide rule in B" in printed
    assert command(monkeypatch, *files, "--fail-over", "1.6") == 0
    assert command(monkeypatch, *files, "--fail-over", "1.25") == 1
    assert "slower than 1.25 x: case cpu, 1.50 x" in capsys.readouterr().out


def test_a_row_that_is_gone_fails_where_a_slower_one_does(compared, tmp_path, monkeypatch, capsys):
    refused = {"name": "case cpu", "time_us": None}
    compared(pair(100, 600), [refused, pair(100, 600)[1]])
    files = (tmp_path / "A.json", tmp_path / "B.json")
    assert command(monkeypatch, *files) == 0
    capsys.readouterr()
    assert command(monkeypatch, *files, "--fail-over", "1.25") == 1
    assert "1 rows of A have no time in B: case cpu" in capsys.readouterr().out
    assert command(monkeypatch, *reversed(files), "--fail-over", "1.25") == 0
    for factor in ("0", "-3", "0.99", "nan"):
        assert command(monkeypatch, *files, "--fail-over", factor) == 2
        printed = capsys.readouterr().err
        assert "expected a factor of at least 1" in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "change,said",
    [
        ({"low_us": "x"}, "low_us of row 'x' is 'x', expected a number or null"),
        ({"time_us": True}, "time_us of row 'x' is True, expected a number or null"),
        ({"time_us": float("nan")}, "time_us of row 'x' is nan"),
        ({"high_us": 10**400}, "high_us of row 'x' is 1000000000"),
        ({"samples": 1.5}, "samples of row 'x' is 1.5, expected a whole number or null"),
        ({"yardstick": ["x"]}, "yardstick of row 'x' is ['x'], expected a row's name or null"),
        ({"section": {}}, "section of row 'x' is {}"),
        ({"name": 7}, "expected rows, each with a name"),
    ],
)
def test_a_row_of_other_types_is_one_line(compared, tmp_path, monkeypatch, capsys, change, said):
    compared([row("x", 1)], [row("x", 1, low_us=None, samples=None)])  # null is right
    content = json.loads((tmp_path / "B.json").read_text())
    content["rows"][0] |= change
    (tmp_path / "B.json").write_text(json.dumps(content))
    assert command(monkeypatch, tmp_path / "A.json", tmp_path / "B.json") == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.splitlines()) == 1 and "B.json" in printed


def test_a_machine_that_is_no_object_is_one_line(compared, tmp_path, monkeypatch, capsys):
    compared([], [])
    content = json.loads((tmp_path / "B.json").read_text())
    (tmp_path / "B.json").write_text(json.dumps(content | {"machine": [1]}))
    assert command(monkeypatch, tmp_path / "A.json", tmp_path / "B.json") == 2
    assert "machine is [1], expected an object or null" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,said",
    [
        ("{", "no JSON"),
        (json.dumps({"schema": "slmperf.bench/0", "rows": []}), "schema is 'slmperf.bench/0'"),
        (json.dumps({"benchmarks": []}), "schema is None"),
        (None, "No such file"),
    ],
)
def test_another_schema_is_one_line(compared, tmp_path, monkeypatch, capsys, text, said):
    compared([], [])
    if text is None:
        (tmp_path / "B.json").unlink()
    else:
        (tmp_path / "B.json").write_text(text)
    assert command(monkeypatch, tmp_path / "A.json", tmp_path / "B.json") == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.splitlines()) == 1 and "B.json" in printed
