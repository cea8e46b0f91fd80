"""slmperf bench kd: what is computed, what a row says, memory in a process of its own, the step."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from slmperf import cli
from slmperf.bench import results, rivals
from slmperf.bench.kd import measure, peaks, report, studies, ways
from slmperf.bench.kd.problems import (
    CLOSE_GAP,
    CLOSE_OFFSET,
    CLOSE_SPREAD,
    Problem,
    Step,
    parse_divergence,
)
from slmperf.check import InputError
from slmperf.ops import JSD, ForwardKL, ReverseKL, SkewForwardKL, TotalVariation

TINY = Problem(12, 300, 8, 16, "fp32", "cpu")


@pytest.fixture
def quick(monkeypatch):
    """torch.compile without the minutes of a C++ compiler, memory without a process for each."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    sizes = {"eager": 80.0, "reference": 90.0, "torch.compile": 40.0, "before": 8.0, "now": 2.0}
    monkeypatch.setattr(measure, "peak_of", lambda problem, name, *_: sizes.get(name, 5.0))


@pytest.mark.parametrize(
    "text,kind",
    [
        ("forward_kl", ForwardKL()),
        ("jsd", JSD(0.5)),
        ("jsd:0.25", JSD(0.25)),
        ("skew_forward_kl:0.3", SkewForwardKL(0.3)),
        ("total_variation", TotalVariation()),
    ],
)
def test_divergences_by_name(text, kind):
    assert parse_divergence(text) == kind == replace(TINY, divergence=text).kind


@pytest.mark.parametrize("text", ["", "kl", "jsd:", "jsd:2", "jsd:x", "forward_kl:0.5"])
def test_divergences_that_are_none(text):
    with pytest.raises(InputError, match=r"divergence is|beta is 2\.0"):
        parse_divergence(text)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(64, 96), (96, 64), (64, 64)])
def test_a_close_student_is_close(dtype, sizes):
    """The gap that the two heads give, in float64 on the inputs as they are."""
    problem = Problem(64, 2000, *sizes, dtype, "cpu")
    logits = {}
    for close in (False, True):
        given = {name: one.detach().double() for name, one in problem.inputs(close).items()}
        logits[close] = (
            given["hidden"] @ given["weight"].mT,
            given["teacher_hidden"] @ given["teacher_weight"].mT,
        )
    student, teacher = logits[True]
    assert (student - teacher).std() == pytest.approx(CLOSE_GAP, rel=0.2)
    assert teacher.mean() == pytest.approx(CLOSE_OFFSET, rel=0.05)
    assert teacher.std() == pytest.approx(CLOSE_SPREAD, rel=0.2)
    apart, other = logits[False]
    assert apart.std() == pytest.approx(1, rel=0.1) and (apart - other).std() > 1


@pytest.mark.parametrize(
    "text", ["forward_kl", "reverse_kl", "jsd:0.3", "skew_forward_kl", "total_variation"]
)
def test_all_ways_find_the_same(quick, text):
    problem = replace(TINY, divergence=text)
    found = ways.ways_of(problem, ("fp32",))
    roles = [way.role for way in found.values()]
    assert roles == ["products", "ours", "plain", "compiled", "plain"]
    errors = measure.gradient_errors(problem, found)
    assert errors.pop("products") == {} and len(errors) == 4
    assert all(one["gradient_error"] < 1e-5 for one in errors.values())
    given = problem.inputs()
    losses = [float(way.run(given).detach()) for way in found.values() if way.role != "products"]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_a_wrong_gradient_is_an_error():
    half = ways.Way("plain", lambda given: ways.eager(TINY)(given) / 2)
    broken = ways.Way("rival", lambda given: 1 / 0)
    found = measure.gradient_errors(TINY, {"half": half, "broken": broken})
    assert found["half"]["gradient_error"] == pytest.approx(0.5, rel=1e-3)
    assert found["broken"] == {}, "why it cannot run is said where it is timed"


def test_products_are_those_of_the_tokens_that_count(monkeypatch):
    """Four, of 2 T V (3 D + D of the teacher) operations together."""
    done = []
    mm = torch.mm

    def counted(a, b, out):
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    for problem in (TINY, replace(TINY, answers=3)):
        done.clear()
        ways.call_of(ways.ways_of(problem, ())["products"], problem.inputs())()
        assert len(done) == 4 and sum(done) == problem.flops
    assert replace(TINY, answers=3).flops == TINY.flops / 4


def test_answers_are_spread_and_alone():
    problem = replace(TINY, answers=3)
    given = problem.inputs()
    assert given["token_weight"].nonzero().flatten().tolist() == [0, 4, 8]
    call = ways.ways_of(problem, ("fp32",))["kd_loss, fp32 logits"]
    (hidden, _) = torch.autograd.grad(call.run(given), (given["hidden"], given["weight"]))
    assert hidden.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 4, 8]


def test_rows_and_what_they_are_compared_with(quick):
    answers, half = replace(TINY, answers=3), replace(TINY, dtype="bf16")
    problems = {TINY: ("fp32",), answers: ("fp32",), half: ("fp32", "bf16")}
    rows, refused = measure.measure(problems, 0.01)
    assert not refused and len({row["name"] for row in rows}) == len(rows) == 5 + 2 + 5
    named = {row["name"]: row for row in rows}
    ours = named[f"{TINY}: kd_loss, fp32 logits"]
    products, eager = named[f"{TINY}: products"], named[f"{TINY}: eager"]
    assert ours["role"] == "ours" and ours["yardstick"] == products["name"]
    assert 0.2 < ours["times_products"] / (ours["time_us"] / products["time_us"]) < 5
    assert 0.2 < ours["speedup_over_eager"] / (eager["time_us"] / ours["time_us"]) < 5
    assert ours["peak_mib"] == 5 and ours["memory_of_eager"] == 5 / 80
    assert ours["memory_of_reference"] == 5 / 90
    assert ours["above_gradients_gib"] == (5 - (12 + 300) * 8 * 4 / 2**20) / 1024
    assert ours["tflops"] == pytest.approx(TINY.flops / ours["time_us"] * 1e-6)
    assert ours["gradient_error"] < 1e-5 and ours["gradient_error_close"] < 0.1
    assert not {"times_products", "peak_mib", "gradient_error"} & set(products)
    assert not {"speedup_over_eager", "speedup_over_fp32"} & set(eager)
    few = named[f"{answers}: kd_loss, fp32 logits"]
    assert few["answers"] == 3 and few["speedup_over_eager"] > 0 and "gradient_error" not in few
    wide = named[f"{half}: kd_loss, fp32 logits"]
    assert wide["speedup_over_fp32"] > 0 and "speedup_over_fp32" not in ours
    narrow = named[f"{half}: kd_loss, bf16 logits"]
    assert narrow["gradient_error_close"] > 10 * wide["gradient_error_close"], "what fp32 is for"
    text = "\n".join(report.lines(rows))
    assert "1/16.0 of its memory" in text and len(text.splitlines()) == 4


def test_what_cannot_run_is_refused_with_the_reason(quick, monkeypatch):
    def fails(problem, logits, impl="auto"):
        def run(given):
            raise NotImplementedError("only on Tuesdays\nand Fridays")

        return run

    monkeypatch.setattr(ways, "ours", fails)
    rows, refused = measure.measure({TINY: ("fp32",)}, 0.01)
    said = "NotImplementedError: only on Tuesdays"
    assert refused == {f"{TINY}: {name}": said for name in ("kd_loss, fp32 logits", "reference")}
    assert [row["way"] for row in rows] == ["products", "eager", "torch.compile"]


def test_memory_is_that_of_the_process():
    """Eager holds at least the logits of both models, two softmaxes and a gradient; ours none."""
    problem = Problem(512, 8192, 16, 24, "fp32", "cpu")
    logits = problem.tokens * problem.vocabulary * 4 / 2**20
    eager = peaks.peak_of(problem, "eager")
    ours = peaks.peak_of(problem, "kd_loss, fp32 logits", ("fp32",))
    if eager is None:
        pytest.skip("this system does not forget a process's largest resident set")
    assert 4 * logits < eager < 9 * logits
    assert problem.gradient_bytes / 2**20 <= ours < 3 * logits


def test_memory_of_a_process_that_fails(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="memory of eager: exit code 1"):
        peaks.peak_of(TINY, "eager")


WRITTEN = """
import torch
from slmperf.bench.kd import peaks, ways
from slmperf.bench.kd.problems import Problem

def run(given):
    kept = torch.ones(20 * 2**18)  # 20 MiB
    for _ in range(3):
        torch.ones(10 * 2**18)
    unused = torch.empty(100 * 2**18)
    bytes(5 * 2**20)  # torch knows nothing of it
    del unused
    return kept[:1].sum() + 0.0 * given["hidden"].sum() + 0.0 * given["weight"].sum()

print(peaks._measured(Problem(12, 300, 8, 16, "fp32", "cpu"), ways.Way("plain", run)))
"""


def test_memory_counts_pages_that_were_written():
    """Of torch and of anything else; what is freed is gone. In a process of its own: malloc is set
    to map every block alone, which would slow down whatever comes after.
    """
    done = subprocess.run([sys.executable, "-c", WRITTEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("this system does not forget a process's largest resident set")
    assert 29 < float(done.stdout) < 36


def test_the_step_before_and_now_are_one(quick):
    step = Step(tokens=40, vocabulary=100)
    given, found = step.inputs(), ways.steps_of(step)
    before, now = (
        [way.run(given), *torch.autograd.grad(way.run(given), (given["hidden"], given["weight"]))]
        for way in found.values()
    )
    for one, other in zip(before, now, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    rows = measure.measure_step(step, 0.01)
    assert [row["way"] for row in rows] == ["before", "now"]
    assert rows[1]["memory_of_before"] == 0.25 and rows[1]["speedup_over_before"] > 0
    assert "0.25" in rendered(report.step_table(rows, step))


def test_the_step_is_that_of_the_quickstart(root):
    """Sizes as the recipe has them, and a batch as its packing makes them."""
    from slmperf.distill import PackedBatches
    from slmperf.recipe import Recipe, material
    from slmperf.recipe.stages import training_config

    recipe = Recipe.load(root / "examples/recipes/quickstart.yaml")
    stages = {stage.name: stage for stage in recipe.stages}
    student = stages["student"]
    step = Step()
    assert step.vocabulary == recipe.data.vocabulary
    assert step.student == student.shape.hidden
    assert step.teacher == stages[student.teacher].shape.hidden
    config = training_config(student.training, recipe.data.context, 0, root / "unused")
    assert (config.kd_weight, config.ce_weight) == (step.kd_weight, step.ce_weight)
    made = material.prepare(recipe.data, material.read(recipe.data, None), "world")
    batches = PackedBatches(made.training, config)
    picked = [batches[index] for index in range(0, 100, 5)]
    tokens = np.median([len(batch["positions"]) for batch in picked])
    examples = np.median([int(batch["totals"][0]) for batch in picked])
    assert step.tokens == pytest.approx(tokens, rel=0.03)
    assert step.examples == pytest.approx(examples, rel=0.03)


def rendered(table):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_studies_of_a_device(monkeypatch):
    (problems,) = studies.studies("cpu", None, None, None, None, None, None, "forward_kl").values()
    whole = Problem(1024, 32000, 512, 768, "fp32", "cpu")
    half = replace(whole, dtype="bf16")
    assert problems == {
        one: ("fp32",) for one in (whole, replace(whole, answers=8), half, replace(half, answers=8))
    }
    found = studies.studies("cuda", None, None, None, None, None, None, "jsd")
    assert len(found) == 4 and all("jsd" in title for title in found)
    modes = [mode for problems in found.values() for mode in problems.values()]
    assert modes == [("bf16", "fp32", "difference"), ("difference",)] * 4
    (one,) = studies.studies("cuda", "100", 500, 8, 16, "fp32", None, "jsd").values()
    assert one == {Problem(100, 500, 8, 16, "fp32", "cuda", "jsd"): ("fp32",)}


def command(monkeypatch, *arguments):
    """slmperf in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["slmperf", "bench", "kd", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


SIZES = ("--tokens", 256, "--vocabulary", 300, "--student", 8, "--teacher", 16)


def test_the_command(quick, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "kd.json"
    assert command(monkeypatch, *SIZES, "--device", "cpu", "--seconds", 0.01, "--out", out) == 0
    printed = capsys.readouterr().out
    for text in ("kd 8<-16 x 300, 256 tokens", "x products", "over eager", "torch.compile",
                 "bf16, 2 answers alone", "kd step of the quickstart", "bf16 units: "):  # fmt: skip
        assert text in printed
    assert "x as fast as on inputs in fp32" in printed
    content = results.read_results(out)
    assert content["kind"] == "kd" and content["refused"] == {}
    assert len(content["rows"]) == 5 + 2 + 4 + 2 + 2
    assert isinstance(content["machine"]["bf16_units"], bool)


def test_json_instead_of_tables(quick, monkeypatch, capsys):
    options = ("--device", "cpu", "--seconds", 0.01, "--dtype", "bf16", "--logits", "bf16")
    assert command(monkeypatch, *SIZES, *options, "--divergence", "jsd:0.3", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == results.SCHEMA and content["kind"] == "kd"
    rows = [row for row in content["rows"] if row.get("role") == "ours"]
    assert {row["way"] for row in rows} == {"kd_loss, bf16 logits"}
    assert {row["divergence"] for row in rows} == {"jsd:0.3"}


def test_the_command_fails_where_ours_cannot_run(quick, monkeypatch, capsys):
    def fails(*given):
        raise NotImplementedError("only on Tuesdays")

    monkeypatch.setattr(ways, "ours", lambda *given: fails)
    assert command(monkeypatch, *SIZES, "--device", "cpu", "--seconds", 0.01) == 1
    assert "only on Tuesdays" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,said",
    [
        (["--tokens", "0"], "expected a number of tokens"),
        (["--vocabulary", "0"], "vocabulary is 0, expected at least 1"),
        (["--dtype", "fp8"], "dtype is 'fp8', expected fp32 or bf16"),
        (["--logits", "int8"], "logits is 'int8', expected one of bf16, fp32, difference"),
        (["--logits", "difference"], "expected fp32 or bf16 on a CPU"),
        (["--logits", "bf16", "--dtype", "fp32"], "expected fp32 with dtype fp32"),
        (["--divergence", "kl"], "divergence is 'kl', expected one of forward_kl"),
        (["--seconds", "0"], "seconds is 0.0, expected more than 0"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, options, said):
    assert command(monkeypatch, "--device", "cpu", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 1


# Rivals: their packages run on a GPU alone; here what they are asked for.


def test_liger_is_asked_as_it_names_things(monkeypatch):
    asked = []

    def fused(jsd_beta):
        def loss(hidden, weight, teacher_hidden, teacher_weight, labels):
            asked.append(("fused", jsd_beta, labels))
            return (hidden.sum() + weight.sum()) * 0 + 2.0

        return loss

    def chunked(weight_hard_loss, weight_soft_loss, beta):
        def loss(hidden, weight, teacher_hidden, teacher_weight, labels, bias, teacher_bias):
            asked.append(("chunked", beta, weight_hard_loss, weight_soft_loss, labels.tolist()))
            return (hidden.sum() + weight.sum()) * 0 + 3.0

        return loss

    modules = {
        "liger_kernel": ModuleType("liger_kernel"),
        "liger_kernel.transformers": SimpleNamespace(LigerFusedLinearJSD=fused),
        "liger_kernel.chunked_loss": SimpleNamespace(LigerFusedLinearJSDLoss=chunked),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rivals, "find_spec", {"liger_kernel": ModuleSpec("l", None)}.get)
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    for text, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd:0.3", 0.3)):
        problem = replace(TINY, device="cuda", divergence=text)
        found = ways.ways_of(problem, ("difference",))
        assert [name for name, way in found.items() if way.role == "rival"] == [
            "liger-kernel", "liger-kernel chunked"
        ]  # fmt: skip
        assert not any(way.graph for way in found.values() if way.role == "rival")
        given = TINY.inputs()
        asked.clear()
        losses = [float(way.run(given).detach()) for way in found.values() if way.role == "rival"]
        assert losses == [2.0, 3.0]
        assert asked == [("fused", beta, None), ("chunked", beta, 0.0, 1.0, [0] * 12)]
    skewed = ways.ways_of(replace(problem, divergence="skew_forward_kl"), ("difference",))
    assert "rival" not in {way.role for way in skewed.values()}


@pytest.mark.parametrize("kind", [JSD(0.3, rescale=True), TotalVariation(), SkewForwardKL(0.0)])
def test_liger_has_no_other_divergences(kind):
    with pytest.raises(NotImplementedError, match="liger-kernel has no"):
        rivals.beta_of(kind)
    assert rivals.beta_of(ReverseKL()) == 1.0 == rivals.beta_of(JSD(1.0))


@pytest.mark.gpu
def test_on_a_device():
    """Every way of a small head: errors by mode, graphs, memory."""
    problem = Problem(512, 8192, 256, 512, "bf16", "cuda")
    answers = replace(problem, answers=8)
    modes = studies.LOGITS["cuda"]
    rows, refused = measure.measure({problem: modes, answers: modes}, 0.05)
    assert not refused
    ours = {row["way"].split()[1]: row for row in rows
            if row["role"] == "ours" and row["answers"] is None}  # fmt: skip
    assert all(row["graph"] for row in rows if row["role"] in ("ours", "products"))
    assert ours["difference"]["gradient_error_close"] < 0.02 < ours["bf16"]["gradient_error_close"]
    assert all(row["above_gradients_gib"] < 2.5 for row in ours.values())
