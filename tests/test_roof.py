"""The roof: its arithmetic, when a kept one is believed, and what a broken cache does."""

import json

import pytest
import torch

from slmperf import cli
from slmperf.bench import roof as roofs
from slmperf.bench.compare import compare
from slmperf.bench.results import read_results
from slmperf.bench.roof import FORMATS, Roof, keep, kept_roof, measure_roof
from slmperf.testing.timing import Timing, copy_rates_gbs

RATES = {"fp32": 2.0, "tf32": None, "bf16": 8.0, "fp16": 2.0, "fp8": None, "int8": 16.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMPERF_CACHE", str(tmp_path / "cache"))
    roofs.roof.cache_clear()
    yield
    roofs.roof.cache_clear()


def made(**changes):
    """A roof of this machine with round figures."""
    facts = dict(
        device=roofs._device_name("cpu"), kind="cpu", driver=roofs._driver("cpu"),
        torch=torch.__version__, threads=torch.get_num_threads(), copy_gbs=100.0,
        matrix_tflops=RATES, launch_us=2.0, date="2020-01-01T00:00Z", missing={"tf32": "no GPU"},
    )  # fmt: skip
    return Roof(**(facts | changes))


@pytest.fixture
def stubbed(monkeypatch):
    """roof() without measuring: the copy rate of this run, and how often all was measured."""
    state = {"copy": 100.0, "measured": 0}

    def measure(kind):
        state["measured"] += 1
        times = {"copy, 1 GB": Timing(1e6 / state["copy"], 9000.0, 11000.0, 10)}
        return made(copy_gbs=state["copy"], date="2030-01-01T00:00Z", times=times)

    monkeypatch.setattr(roofs, "copy_roof_gbs", lambda kind, mib: state["copy"])
    monkeypatch.setattr(roofs, "measure_roof", measure)
    return state


def test_share_is_the_ideal_time_by_the_time():
    roof = made()
    assert roof.share(10**9, 0, torch.float32, 10_000) == pytest.approx(1.0)  # 1 GB at 100 GB/s
    assert roof.share(10**9, 0, torch.float32, 40_000) == pytest.approx(0.25)
    # 1 GB takes 10 ms; 160 GFLOP take 80 ms in fp32, 20 in bf16, 10 in int8
    assert roof.ideal_us(10**9, 160 * 10**9, torch.float32) == pytest.approx(80_000)
    assert roof.ideal_us(10**9, 160 * 10**9, "bf16") == pytest.approx(20_000)
    assert roof.ideal_us(10**9, 80 * 10**9, torch.int8) == pytest.approx(10_000)
    # no rate of its own: fp32's
    assert roof.ideal_us(0, 10**12, "fp8") == roof.ideal_us(0, 10**12, "fp32")


def test_measured_on_this_machine(monkeypatch):
    monkeypatch.setitem(roofs.COPY_MIB, "cpu", (16,))
    monkeypatch.setitem(roofs.MATRIX_SIZES, "cpu", (192,))
    copies = []

    def copied(*given):
        copies.append(copy_rates_gbs(*given))
        return copies[-1]

    monkeypatch.setattr(roofs, "copy_rates_gbs", copied)
    before = torch.get_float32_matmul_precision()
    roof = measure_roof("cpu")
    assert torch.get_float32_matmul_precision() == before
    assert list(roof.matrix_tflops) == list(FORMATS)
    for name, rate in roof.matrix_tflops.items():
        assert (rate is None) == (name in roof.missing), name
        assert rate is None or rate > 0
    assert roof.matrix_tflops["tf32"] is None and "GPU" in roof.missing["tf32"]
    assert roof.matrix_tflops["fp32"] and roof.matrix_tflops["bf16"] and roof.matrix_tflops["int8"]
    assert 0.05 < roof.launch_us < 1000
    (rates,) = copies
    assert len(rates) == 10 and roof.copy_gbs == max(rates) > 0
    rows = {row["name"]: row for row in roof.rows()}
    there = [name for name in FORMATS if name not in roof.missing]
    assert list(rows) == [
        "cpu copy, 1 GB", *(f"cpu matrix product {name}, 1 TFLOP" for name in there), "cpu launch"
    ]  # fmt: skip
    for row in rows.values():
        assert 0 < row["best_us"] <= row["low_us"] <= row["time_us"] <= row["high_us"]
    assert rows["cpu copy, 1 GB"]["best_us"] == pytest.approx(1e6 / roof.copy_gbs)
    assert rows["cpu launch"]["samples"] == 10
    assert roof.threads == torch.get_num_threads() and roof.device
    assert Roof(**json.loads(json.dumps(roof.as_json()))) == roof


def test_kept_once_confirmed_by_a_copy(stubbed):
    keep(made())
    stubbed["copy"] = 114.0
    assert roofs.roof("cpu") == made() and stubbed["measured"] == 0
    stubbed["copy"] = 1.0
    assert roofs.roof("cpu") == made(), "asked for once in a process"


@pytest.mark.parametrize("now", [84.0, 116.0])
def test_measured_anew_where_the_copy_differs(stubbed, now):
    keep(made())
    stubbed["copy"] = now
    assert roofs.roof("cpu").copy_gbs == now and stubbed["measured"] == 1
    assert kept_roof("cpu").copy_gbs == now


@pytest.mark.parametrize(
    "change",
    [{"driver": "1"}, {"torch": "1.0"}, {"threads": 99}, {"device": "abacus"}, {"kind": "cuda"}],
)
def test_another_machine_is_no_roof_of_this_one(stubbed, change):
    keep(made(**change))
    assert kept_roof("cpu") is None
    assert roofs.roof("cpu").date.startswith("2030") and stubbed["measured"] == 1
    entries = json.loads(roofs.cache_file().read_text())["roofs"]
    assert len(entries) == 2, "the other machine's roof stays"


def damaged(**changes):
    return json.dumps({"schema": roofs.SCHEMA, "roofs": [made().as_json() | changes]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": "roof/99", "roofs": []}',
        '{"schema": "slmperf.roof/1"}',
        '{"schema": "slmperf.roof/1", "roofs": [{"copy_gbs": 1}]}',
        '{"schema": "slmperf.roof/1", "roofs": [7]}',
        damaged(copy_gbs="fast"),
        damaged(copy_gbs=0),
        damaged(matrix_tflops=None),
        damaged(matrix_tflops={"fp32": 1.0}),
        damaged(matrix_tflops=RATES | {"bf16": "x"}),
        damaged(threads=[1]),
    ],
)
def test_a_broken_cache_is_replaced(stubbed, text):
    roofs.cache_file().parent.mkdir()
    roofs.cache_file().write_text(text)
    assert roofs.roof("cpu").date.startswith("2030")
    assert kept_roof("cpu") is not None and len(roofs._kept()) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_else(stubbed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLMPERF_CACHE", str(tmp_path / "file" / "cache"))
    assert roofs.roof("cpu").date.startswith("2030")


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert roofs.cache_file() == tmp_path / "cache" / "roof.json"
    monkeypatch.delenv("SLMPERF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert roofs.cache_file() == tmp_path / "slmperf" / "roof.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert roofs.cache_file() == tmp_path / ".cache" / "slmperf" / "roof.json"


def command(monkeypatch, *arguments):
    """slmperf in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["slmperf", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_the_command_always_measures_and_shows_what_was_before(stubbed, monkeypatch, capsys):
    keep(made(copy_gbs=80.0))
    assert command(monkeypatch, "bench", "roof", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "80 GB/s" in printed and "100 GB/s" in printed and "8 TFLOP/s" in printed
    assert "2020-01-01" in printed and "tf32: no GPU" in printed
    assert kept_roof("cpu").copy_gbs == 100.0 and stubbed["measured"] == 1
    assert command(monkeypatch, "bench", "roof", "--device", "cpu", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert Roof(**entry).copy_gbs == 100.0 and stubbed["measured"] == 2


def test_two_roofs_can_be_compared(stubbed, monkeypatch, capsys, tmp_path):
    for name, rate in (("A.json", 100.0), ("B.json", 50.0)):
        stubbed["copy"] = rate
        arguments = ("--device", "cpu", "--json", "--out", str(tmp_path / name))
        assert command(monkeypatch, "bench", "roof", *arguments) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) and name in printed.err, "stdout is JSON alone"
    content = read_results(tmp_path / "A.json")
    assert content["kind"] == "roof" and content["roof"]["copy_gbs"] == 100.0
    (change,) = compare(tmp_path / "A.json", tmp_path / "B.json").changes
    assert change.name == "cpu copy, 1 GB" and change.ratio == pytest.approx(2.0)


def test_a_roof_that_cannot_be_kept_is_still_shown(stubbed, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLMPERF_CACHE", str(tmp_path / "file" / "cache"))
    assert command(monkeypatch, "bench", "roof", "--device", "cpu") == 0
    printed = capsys.readouterr()
    assert "100 GB/s" in printed.out
    assert len(printed.err.splitlines()) == 1 and "not kept: " in printed.err


def test_nothing_is_measured_for_a_file_that_cannot_be_written(
    stubbed, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "roof.json"
    assert command(monkeypatch, "bench", "roof", "--device", "cpu", "--out", str(out)) == 2
    assert stubbed["measured"] == 0 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("slmperf.arch.cuda_capability", lambda device=0: None)
    assert command(monkeypatch, "bench", "roof", "--device", "cuda") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.gpu
def test_roof_of_a_gpu(monkeypatch):
    monkeypatch.setitem(roofs.MATRIX_SIZES, "cuda", (4096,))
    roof = measure_roof("cuda")
    rates = roof.matrix_tflops
    assert roof.device == torch.cuda.get_device_name() and roof.driver
    assert roof.copy_gbs > 100 and 0.5 < roof.launch_us < 200
    assert rates["fp32"] and rates["bf16"] and rates["bf16"] > 2 * rates["fp32"]
    assert all(rates[name] is not None or name in roof.missing for name in FORMATS)
