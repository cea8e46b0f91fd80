"""slmperf bench ops: what a row holds, what is refused, peak memory, result files, the plot."""

import functools
import json
import re
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch

from slmperf import cli
from slmperf.bench import ops, plots, results, rivals
from slmperf.bench.ops import Variant, measure, measure_case, variants
from slmperf.bench.roof import Roof
from slmperf.check import InputError
from slmperf.ops import JSD, ForwardKL, ReverseKL
from slmperf.testing.cases import FAMILIES, DivergenceCase
from slmperf.testing.timing import (
    host_us,
    peak_mib,
    rotations,
    rounds_s,
    sampler,
    summary,
    timings,
)

RATES = {"fp32": 2.0, "tf32": None, "bf16": 8.0, "fp16": 2.0, "fp8": None, "int8": 16.0}
ROOF = Roof("abacus", "cpu", "1", "2.0", 1, 10.0, RATES, 2.0, "2020-01-01T00:00Z")


def tiny(kind=ForwardKL(), dtype=torch.float32):  # noqa: B008
    return FAMILIES["divergence"].make((16, 500), dtype, kind, 1.0, "apart")


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without the minutes of a C++ compiler."""
    quick = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)


def test_rows_and_their_lines(quick_compile, capsys):
    case = tiny()
    rows = measure([case], "cpu", ROOF, 0.02)
    assert [(row.impl, row.role) for row in rows] == [
        ("cpu", "ours"),
        ("reference", "plain"),
        ("kl_div", "plain"),
        ("torch.compile", "compiled"),
    ]
    by_impl = {row.impl: row for row in rows}
    fastest = min(rows[1:], key=lambda row: row.time_us)
    plain_us = min(by_impl[name].time_us for name in ("reference", "kl_div"))
    for row in rows:
        assert row.low_us <= row.time_us <= row.high_us and row.samples >= 5
        assert row.gbs == pytest.approx(case.bytes / row.time_us * 1e-3)
        assert row.roof_share == pytest.approx(row.gbs / 10.0)
        assert row.speedup == pytest.approx(fastest.time_us / row.time_us)
        assert row.plain_speedup == pytest.approx(plain_us / row.time_us)
        assert row.baseline == fastest.name and row.yardstick == by_impl["reference"].name
        assert row.host_us is None and row.tflops is None
        assert row.peak_mib >= case.bytes / 5 / 2**20  # the gradient at least
    assert len({row.name for row in rows}) == len(rows)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == ops.HEADER
    numbers = r"[\d.]+ \| - \| [\d.]+ \| - \| \d+ \| [\d.]+ \| [\d.]+"
    pattern = rf"divergence 16x500 float32 ForwardKL\(\) (\S+) \| {numbers}"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == list(by_impl)


class WithProducts(DivergenceCase):
    """A case that has matrix products to count."""

    @property
    def flops(self):
        return 10**9


def test_operations_count_towards_the_roof():
    case = WithProducts(**vars(tiny()))
    (row,) = measure_case(case, "cpu", ROOF, 0.01, {"reference": Variant("plain", case.reference)})[
        0
    ]
    assert row.tflops == pytest.approx(1e9 / row.time_us * 1e-6)
    # 1 GFLOP at 2 TFLOP/s takes 500 us; the bytes take 16
    assert row.roof_share == pytest.approx(500 / row.time_us)


def off(case, change):
    """The reference with a mistake."""
    return lambda given: change(case.reference(given))


def fail(given):
    raise NotImplementedError("only on Tuesdays\nand Fridays")


def test_what_cannot_run_or_finds_another_result_is_refused(capsys, monkeypatch):
    case = tiny()
    ways = {
        "reference": Variant("plain", case.reference),
        "twice": Variant("rival", off(case, lambda value: 2 * value)),
        "shifted": Variant("rival", off(case, lambda value: value.roll(1))),
        "gradient": Variant("rival", off(case, lambda value: value.detach() + value - value)),
        "summed": Variant("rival", off(case, torch.sum)),
        "nan": Variant("ours", off(case, lambda value: value * torch.nan)),
        "missing": Variant("compiled", fail),
        "mean": Variant("rival", off(case, torch.mean), mean=True),
        "sum for mean": Variant("rival", off(case, torch.sum), mean=True),
        "eager": Variant("rival", case.reference, graph=False),
    }
    monkeypatch.setattr(ops, "variants", lambda case, device: ways)
    rows = measure([case], "cpu", ROOF, 0.01)
    assert [row.impl for row in rows] == ["reference", "mean", "eager:eager"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert len(lines) == 7 and all(line.startswith(f"divergence {case} ") for line in lines)
    found = measure_case(case, "cpu", ROOF, 0.01, ways).refused
    named = {name.removeprefix(f"divergence {case} "): reason for name, reason in found.items()}
    assert set(named) == {
        "twice", "shifted", "gradient", "summed", "nan", "missing", "sum for mean"
    }  # fmt: skip
    assert named["missing"] == "NotImplementedError: only on Tuesdays"
    assert "value is off by" in named["twice"] and "value is ()" in named["summed"]
    assert "gradient is off by" in named["gradient"]


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JSD(0.5)], ids=str)
def test_every_variant_of_a_cpu_case_agrees(quick_compile, kind):
    found = measure_case(tiny(kind, torch.bfloat16), "cpu", ROOF, 0.01)
    assert not found.refused
    assert [row.role for row in found.rows].count("ours") == 1, "the interpreter is not timed"


def test_the_reference_runs_as_often_as_it_is_needed(monkeypatch):
    """Its mean is taken for a rival alone, and a wait in a call is not time of the host."""
    case, asked = tiny(), []
    results_of = ops._results

    def noted(case, given, run, mean=False):
        asked.append(mean)
        return results_of(case, given, run, mean)

    monkeypatch.setattr(ops, "_results", noted)
    monkeypatch.setattr(ops, "host_us", lambda call, device: 7.0)
    plain = {"reference": Variant("plain", case.reference)}
    measure_case(case, "cpu", ROOF, 0.0, plain)
    assert asked == [False, False]  # the truth, and the variant against it
    rival = Variant("rival", off(case, torch.mean), mean=True, graph=False)
    rows = measure_case(case, "cpu", ROOF, 0.0, plain | {"rival": rival}).rows
    assert asked.count(True) == 1
    assert [(row.impl, row.host_us) for row in rows] == [("reference", 7.0), ("rival:eager", None)]
    assert rows[1].cells()[1] == "-"


def test_a_broken_reference_is_no_refusal():
    with pytest.raises(NotImplementedError):
        measure_case(tiny(), "cpu", ROOF, 0.01, {"reference": Variant("plain", fail)})


def test_rivals_are_found_lazily_and_refused_with_the_reason(monkeypatch):
    found = {"liger_kernel": ModuleSpec("liger_kernel", None)}
    monkeypatch.setattr(rivals, "find_spec", found.get)
    assert rivals.installed("divergence", "cpu") == {} == rivals.installed("gain", "cuda")
    (name,) = rivals.installed("divergence", "cuda")
    case = tiny()
    way = Variant("rival", ops._lazily(rivals.RIVALS["divergence"][name], case), mean=True)
    ways = {"reference": Variant("plain", case.reference), name: way}
    for module in [one for one in sys.modules if one.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, module)  # another test may have imported it
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # its import fails
    rows, refused = measure_case(case, "cpu", ROOF, 0.01, ways)
    assert [row.impl for row in rows] == ["reference"]
    assert "liger_kernel" in refused[f"divergence {case} {name}"]
    found.clear()
    assert rivals.installed("divergence", "cuda") == {}


def test_variants_on_a_gpu_are_known_without_one():
    ways = variants(tiny(), "cuda")
    assert [name for name, way in ways.items() if way.role == "ours"] == ["triton"]


def test_cases_by_op():
    assert ops.cases_of("divergence", "cpu") == list(FAMILIES["divergence"].bench["cpu"])
    assert ops.cases_of(None, "cuda")[0].op == "divergence"
    with pytest.raises(InputError, match="op is 'gain', expected one of divergence"):
        ops.cases_of("gain", "cpu")


def test_inputs_are_the_same_in_separate_memory():
    sets = ops.input_sets(tiny(), "cpu")
    assert len(sets) == 8
    assert len({given["student"].data_ptr() for given in sets}) == 8
    assert all(torch.equal(given["teacher"], sets[0]["teacher"]) for given in sets)
    for rows, count in ((100, 3), (250, 1)):  # of 305 KiB: 30 and 76 MiB in a set
        large = replace(tiny(), rows=rows, vocabulary=40000)
        assert len(ops.input_sets(large, "cpu")) == count


@pytest.mark.parametrize("rows,vocabulary", [(64, 32000), (64, 128256), (4096, 128256), (3, 999)])
def test_inputs_on_a_gpu_are_larger_than_its_cache(monkeypatch, rows, vocabulary):
    """By the size of the inputs; a call moves more than that."""
    cache = 60 * 2**20
    facts = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    case = replace(tiny(dtype=torch.bfloat16), rows=rows, vocabulary=vocabulary)
    size = 2 * rows * vocabulary * 2
    asked = []

    def counted(*given):
        asked.append((*given, rotations(*given)))
        return 1

    shaped = lambda case, device="cpu": {  # noqa: E731
        name: torch.empty(rows, vocabulary, dtype=case.dtype, device="meta")
        for name in ("student", "teacher")
    }
    monkeypatch.setattr(DivergenceCase, "tensors", shaped)
    monkeypatch.setattr(ops, "rotations", counted)
    ops.input_sets(case, "cuda")
    ((given, device, least, sets),) = asked
    assert (given, device, least) == (size, "cuda", 2)
    assert sets * size > 2 * cache or sets == 64


def test_peak_of_a_known_pattern():
    def staggered():
        a, b = torch.empty(2**20), torch.empty(2**19)  # 4 and 2 MiB
        del a
        c = torch.empty(2**19)  # 4 held, 6 before
        del b, c

    def one_after_the_other():
        for _ in range(10):
            x = torch.empty(2**20)
            del x

    kept = torch.ones(2**20, requires_grad=True)

    def trained():  # two activations and a gradient of 4 MiB, none of `kept` itself
        torch.autograd.grad(kept.exp().exp().sum(), [kept])

    assert peak_mib(staggered, "cpu") == pytest.approx(6)
    assert peak_mib(one_after_the_other, "cpu") == pytest.approx(4)
    assert peak_mib(trained, "cpu") == pytest.approx(12, abs=0.1)
    assert peak_mib(lambda: None, "cpu") == 0


def test_medians_quartiles_and_turns():
    assert summary([4e-6, 1e-6, 2e-6, 5e-6, 3e-6]) == pytest.approx((3, 2, 4, 5))
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1e-6 for name in "ab"}
    assert rounds_s(samplers, 0.0) == {"a": [1e-6] * 5, "b": [1e-6] * 5}
    rounds = ["".join(pair) for pair in zip(order[::2], order[1::2], strict=True)]
    assert len(rounds) == 5 and set(rounds) == {"ab", "ba"}, "each once a round, in any order"
    found = timings({"x": [lambda: sum(range(20000))], "y": [lambda: None]}, "cpu", 0.02)
    assert found["x"].time_us > 5 * found["y"].time_us
    assert sampler([lambda: None], "cpu", graph=False)() >= 0
    assert host_us(lambda: None, "cpu") is None


def command(monkeypatch, *arguments):
    """slmperf in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["slmperf", "bench", "ops", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.fixture
def one_tiny_case(monkeypatch, quick_compile):
    monkeypatch.setattr("slmperf.bench.roof.roof", lambda device: ROOF)
    family = replace(FAMILIES["divergence"], bench={"cpu": (tiny(), tiny(JSD(0.5)))})
    for other in set(FAMILIES) - {"divergence"}:
        monkeypatch.delitem(FAMILIES, other)
    monkeypatch.setitem(FAMILIES, "divergence", family)


def test_the_command(one_tiny_case, monkeypatch, capsys, tmp_path):
    out, plot = tmp_path / "ops.json", tmp_path / "roofline.png"
    arguments = ("--device", "cpu", "--seconds", "0.01", "--out", out, "--plot", plot)
    assert command(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    for text in (*ops.COLUMNS, "16x500", "kl_div", "torch.compile", "copy 10.0 GB/s"):
        assert text in printed
    assert all(len(line) <= 120 for line in printed.splitlines() if not line.startswith("plot"))
    content = results.read_results(out)
    assert content["kind"] == "ops" and content["roof"]["copy_gbs"] == 10.0
    assert content["refused"] == {} and len(content["rows"]) == 7
    assert len({row["name"] for row in content["rows"]}) == 7
    assert content["machine"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_the_command_fails_where_ours_cannot_run(one_tiny_case, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(DivergenceCase, "run", lambda self, given, impl: fail(given))
    code = command(monkeypatch, "--device", "cpu", "--seconds", "0.01", "--out", tmp_path / "x")
    assert code == 1 and "only on Tuesdays" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "x").read_text())["refused"]) == 2


def test_results_are_there_where_the_plot_fails(one_tiny_case, monkeypatch, tmp_path):
    def fails(*given):
        raise KeyError("no font")

    monkeypatch.setattr(plots, "roofline", fails)
    out, plot = tmp_path / "new" / "ops.json", tmp_path / "other" / "roof.SVG"
    arguments = ("--device", "cpu", "--seconds", "0.01", "--out", out, "--plot", plot)
    monkeypatch.setattr("sys.argv", ["slmperf", "bench", "ops", *map(str, arguments)])
    with pytest.raises(KeyError):
        cli.main()
    assert results.read_results(out)["kind"] == "ops" and plot.parent.is_dir()


def test_files_are_checked_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("slmperf.bench.roof.roof", lambda device: pytest.fail("measured"))
    for option, path, said in (
        ("--out", tmp_path / "file" / "x.json", "cannot write there"),
        ("--out", tmp_path, "a folder"),
        ("--plot", tmp_path / "file" / "x.png", "cannot write there"),
        ("--plot", tmp_path / "x", "expected a name that ends in .png, .svg, .pdf"),
    ):
        for bench in ("ops", "layer"):
            monkeypatch.setattr("sys.argv", ["slmperf", "bench", bench, option, str(path)])
            with pytest.raises(SystemExit) as end:
                cli.main()
            printed = capsys.readouterr()
            assert end.value.code == 2 and not printed.out
            assert said in printed.err and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--op", "gain"], "expected one of divergence"),
        (["--device", "tpu"], "expected auto, cpu or cuda"),
        (["--device", "cuda"], "no CUDA device"),
        (["--seconds", "0"], "expected more than 0"),
        (["--seconds", "nan"], "expected more than 0"),
        (["--plot", "roof.txt"], ".png, .svg, .pdf"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("slmperf.arch.cuda_capability", lambda device=0: None)
    assert command(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 1


def test_the_plot_takes_ops_with_and_without_products(tmp_path):
    case = tiny()
    ways = {"reference": Variant("plain", case.reference)}
    rows = measure_case(case, "cpu", ROOF, 0.01, ways).rows
    products = [
        replace(rows[0], op="linear", case=f"{number}", tflops=0.5 * number, dtype="bfloat16")
        for number in (1, 2, 3)
    ]
    for name, some in (("a.svg", rows), ("b.svg", products), ("c.svg", [*rows, *products])):
        plots.roofline(some, ROOF, tmp_path / name)
        assert "</svg>" in (tmp_path / name).read_text()


@pytest.mark.gpu
def test_ops_on_a_gpu():
    from slmperf.bench.roof import roof

    case = FAMILIES["divergence"].make((64, 32000), torch.bfloat16, ForwardKL(), 1.0, "apart")
    rows, refused = measure_case(case, "cuda", roof("cuda"), 0.1)
    assert not [name for name in refused if "liger" not in name], refused
    by_impl = {row.impl: row for row in rows}
    assert {"triton", "reference", "kl_div", "torch.compile"} <= set(by_impl)
    for row in rows:
        if not row.impl.endswith(":eager"):  # a call that waits has no time of the host alone
            assert row.host_us is not None and row.host_us > 1
        assert 0 < row.roof_share < 1.5 and row.peak_mib > 1
    assert by_impl["triton"].time_us < by_impl["reference"].time_us
