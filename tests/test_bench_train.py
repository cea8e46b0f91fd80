"""slmperf bench train: one step through every way, memory, what a row says, the command.

Over 400 lines: what a step is and what is said of it are held against each other in one place.
"""

import functools
import importlib.util
import json
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slmperf import cli
from slmperf.bench import results
from slmperf.bench.compare import compare
from slmperf.bench.roof import Roof
from slmperf.bench.train import counts, loop, measure, peaks, report, studies, ways
from slmperf.bench.train.problems import IGNORED, SIZES, TOY, Problem, models_of
from slmperf.check import InputError
from slmperf.models.shapes import Shape

TINY = Problem(
    Shape(2, 16, 2, 1, 8, 24, 96, name="small"), Shape(1, 24, 2, 2, 12, 32, 96, name="large"),
    rows=2, context=16, dtype="fp32", device="cpu", every=4,
)  # fmt: skip
ROOF = Roof("a CPU", "cpu", "", "", 1, 20.0, {"fp32": 0.2, "bf16": 0.5}, 1.0, "")


@pytest.fixture
def quick(monkeypatch):
    """Liger without the minutes of a C++ compiler, memory without a process for each way."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    sizes = {"eager": 80.0, "eager, lean": 70.0}
    monkeypatch.setattr(
        measure, "peak_of", lambda problem, name: peaks.Peak(sizes.get(name, 20.0), 1.0)
    )
    monkeypatch.setattr("slmperf.bench.roof.roof", lambda device: ROOF)


def taken(problem, way):
    """Loss of a step and the gradient that AdamW was given."""
    models = models_of(problem)
    seen = []

    def keep(optimizer, args, kwargs):
        seen.append([one.grad.clone() for one in models.student.parameters()])

    models.optimizer.register_step_pre_hook(keep)
    if way.loss is not None:
        loss = float(loop.take_step(way.loss, models, problem.batch()))
    else:
        with loop.trainer_of(problem, models, 1, lambda event: False) as trainer:
            trainer.train()
        (loss,) = trainer.losses
    assert all(one.grad is None for one in models.student.parameters())
    (gradients,) = seen
    return loss, torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize(
    "changes",
    [{}, {"every": 1}, {"checkpointing": True}, {"dtype": "bf16"}],
    ids=["fp32", "all", "checkpointing", "bf16"],
)
def test_all_ways_take_the_same_step(monkeypatch, changes):
    """Their losses and clipped gradients are those of plain torch on all logits."""
    problem = replace(TINY, **changes)
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    found = ways.ways_of(problem)
    alone = ["eager, answers alone"] if problem.every > 1 else []
    rows = ["kd_loss, every row"] if problem.every > 1 else []
    liger = ["liger-kernel chunked"] if ways.find_spec("liger_kernel") else []
    assert list(found) == [
        "eager", "eager, lean", *alone, *liger, *rows, "kd_loss", "DistillationTrainer"
    ]  # fmt: skip
    right, gradient = taken(problem, found.pop("eager"))
    near = 0.03 if problem.dtype == "bf16" else 1e-5
    assert gradient.norm() > 0.01
    for name, way in found.items():
        loss, other = taken(problem, way)
        assert loss == pytest.approx(right, rel=near), name
        assert (other - gradient).norm() < near * gradient.norm(), name


def test_rows_without_an_answer_are_computed_where_that_is_asked(monkeypatch):
    given = []
    inner = ways.DistillationLoss.forward

    def forward(self, student, teacher, **kwargs):
        given.append((len(student.hidden), kwargs.get("token_weight")))
        return inner(self, student, teacher, **kwargs)

    monkeypatch.setattr(ways.DistillationLoss, "forward", forward)
    models, batch = models_of(TINY), TINY.batch()
    found = ways.ways_of(TINY)
    for name in ("kd_loss", "kd_loss, every row"):
        found[name].loss(models, batch)
    (rows, _), (every, weight) = given
    assert rows == TINY.answers == 8 and every == TINY.tokens == 32
    assert (weight > 0).all() and (weight == 1).sum() == 8


@pytest.mark.parametrize("every,answers", [(1, 30), (2, 16), (4, 8), (16, 2)])
def test_answers_of_a_batch(every, answers):
    problem = replace(TINY, every=every)
    batch = problem.batch()
    assert len(batch.positions) == len(batch.targets) == problem.answers == answers
    assert (batch.labels != IGNORED).sum() == answers
    flat = batch.input_ids.flatten()
    assert torch.equal(batch.targets, flat[batch.positions + 1])
    for example, ids in zip(problem.examples(), batch.input_ids, strict=True):
        marked = [(i, label) for i, label in enumerate(example["labels"]) if label != IGNORED]
        assert len(marked) == answers / 2 and all(ids[i] == label for i, label in marked)


def test_a_bare_loop_has_the_trainers_batches():
    rows = TINY.batch().input_ids.tolist()
    batches = loop.batches_of(TINY)
    for made in (next(batches) for _ in range(3)):
        assert sorted(made.input_ids.tolist()) == sorted(rows)
        assert torch.equal(made.targets, made.input_ids.flatten()[made.positions + 1])
        flat = made.labels.flatten()
        assert torch.equal(flat[made.positions], made.targets)
        assert (flat != IGNORED).sum() == TINY.answers


class _Traffic(TorchDispatchMode):
    """Bytes that operators read and write of tensors of a size, matrix products left out.

    Of nll_loss's tensors of that size all that is touched is the gradient it fills.
    """

    def __init__(self, size):
        super().__init__()
        self.size, self.bytes = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        outputs = found if isinstance(found, tuple) else (found,)
        read = () if func.overloadpacket == aten.nll_loss_backward else args
        if not func.is_view and func.overloadpacket not in (
            aten.mm, aten._unsafe_view, aten.nll_loss_forward
        ):  # fmt: skip
            tensors = {id(one): one for one in (*read, *outputs) if isinstance(one, torch.Tensor)}
            self.bytes += sum(one.nbytes for one in tensors.values() if one.numel() == self.size)
        return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_counted_are_those_that_eager_moves(dtype):
    problem = replace(TINY, every=1, dtype=dtype)
    models, batch = models_of(problem), problem.batch()
    way = ways.ways_of(problem)["eager"]
    with _Traffic(problem.tokens * problem.student.vocabulary) as traffic:
        way.loss(models, batch).backward()
    assert traffic.bytes == counts.counts_of(problem).logit_bytes


def test_operations_are_those_of_a_step():
    from torch.utils.flop_counter import FlopCounterMode

    for checkpointing in (False, True):
        problem = replace(TINY, every=1, checkpointing=checkpointing)
        models, batch = models_of(problem), problem.batch()
        with FlopCounterMode(display=False) as counter:
            ways.ways_of(problem)["eager"].loss(models, batch).backward()
        found = counts.counts_of(problem)
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        # Of attention the counter takes all pairs of a row, those that are masked too.
        shapes = (problem.student, 4 if checkpointing else 3), (problem.teacher, 1)
        pairs = problem.rows * problem.context * (problem.context + 1) / 2
        attention = sum(n * 4 * s.layers * s.heads * s.head_size * pairs for s, n in shapes)
        assert products == pytest.approx(found.layer_flops + found.head_flops - attention)
    eager, ours = found.expected_us(ROOF, "fp32")
    assert eager > ours and found.answer_flops < found.head_flops
    assert replace(TINY, every=16).answers / 32 * found.head_flops == pytest.approx(
        counts.counts_of(replace(TINY, every=16)).answer_flops
    )


def test_rows_and_what_they_are_compared_with(quick):
    rows, refused = measure.measure(TINY, 0.01)
    assert not refused
    named = {row["way"]: row for row in rows}
    assert list(named) == [
        "eager", "eager, lean", "eager, answers alone", "kd_loss, every row", "kd_loss",
        "DistillationTrainer",
    ]  # fmt: skip
    for row in rows:
        assert row["samples"] >= 5 and row["time_us"] > 0 and row["loss"] == 1.0
        assert row["tokens_per_s"] == pytest.approx(32 / row["time_us"] * 1e6)
        assert row["name"] == f"{TINY}: {row['way']}" and row["yardstick"] == f"{TINY}: eager"
        assert row["memory_of_eager"] == row["peak_mib"] / 80.0
    eager, ours, trainer = named["eager"], named["kd_loss"], named["DistillationTrainer"]
    assert "speedup_over_eager" not in eager and ours["speedup_over_lean"] > 0
    assert 0.2 < ours["speedup_over_eager"] / (eager["time_us"] / ours["time_us"]) < 5
    assert ours["memory_of_eager"] == 0.25 and "overhead_pct" not in ours
    assert -80 < trainer["overhead_pct"] < 10_000
    text = "\n".join(report.lines(rows))
    assert "75% less memory" in text and "over the bare loop" in text
    assert len(text.splitlines()) == 3


def test_the_trainer_is_stopped_and_timed_apart_from_the_others():
    """Its time is without theirs, theirs without its."""
    slept = {"others": lambda: time.sleep(0.2) or 0.2}
    small = replace(TINY, every=1)
    found = loop.rounds_s(small, slept, models_of(small), "trainer", 0.01)
    assert found["others"] == [0.2] * 5 and len(found["trainer"]) == 5
    assert sorted(found["trainer"])[2] < 0.15


def test_what_cannot_run_is_refused_with_the_reason(quick, monkeypatch):
    def fails(models, batch):
        raise NotImplementedError("only on Tuesdays\nand Fridays")

    monkeypatch.setattr(ways, "_lean", lambda problem: fails)
    problem = replace(TINY, every=1)
    rows, refused = measure.measure(problem, 0.01)
    assert refused == {f"{problem}: eager, lean": "NotImplementedError: only on Tuesdays"}
    assert [row["way"] for row in rows] == ["eager", "kd_loss", "DistillationTrainer"]


def test_another_loss_is_refused(quick, monkeypatch):
    """A time of another formula is no comparison."""
    monkeypatch.setattr(
        measure, "peak_of", lambda problem, name: peaks.Peak(1.0, 1.0 + 0.1 * (name == "kd_loss"))
    )
    rows, refused = measure.measure(TINY, 0.01, ("eager", "kd_loss"))
    assert [row["way"] for row in rows] == ["eager"]
    assert refused == {f"{TINY}: kd_loss": "loss 1.1, eager has 1"}


def test_memory_is_that_of_the_step():
    """Eager holds its logits, ours at most a chunk of them; weights and moments do not count."""
    problem = replace(TINY, rows=16, context=32, every=1)
    wide = {
        name: replace(getattr(problem, name), vocabulary=8192) for name in ("student", "teacher")
    }
    problem = replace(problem, **wide)
    with ThreadPoolExecutor(2) as pool:
        eager, ours = pool.map(lambda name: peaks.peak_of(problem, name), ("eager", "kd_loss"))
    if eager.peak_mib is None:
        pytest.skip("this system does not forget a process's largest resident set")
    logits = problem.tokens * 8192 * 4 / 2**20
    assert 6 * logits < eager.peak_mib < 9 * logits
    assert ours.peak_mib < 3.5 * logits and ours.loss == pytest.approx(eager.loss, rel=1e-5)


def test_memory_of_the_trainer_is_that_of_its_step():
    """Asked at the same places of its loop, in this process."""

    class Gauge:
        told: list = []

        def begin(self):
            self.told.append("begin")

        def end(self):
            self.told.append("end")
            return 3.0

    found = peaks._measured(TINY, "DistillationTrainer", Gauge())
    assert found.peak_mib == 3.0 and Gauge.told == ["begin", "end"]
    models = models_of(TINY)
    batch = TINY.batch()
    assert found.loss == pytest.approx(ways.ways_of(TINY)["eager"].loss(models, batch).item())


def test_memory_of_a_process_that_fails(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="memory of eager: exit code 1"):
        peaks.peak_of(TINY, "eager")


def test_a_problem_in_another_process_is_the_same():
    assert Problem.of_json(json.loads(json.dumps(TINY.as_json()))) == TINY


def test_studies_of_a_device():
    given = (None, None, None, None, "1,8", "both", None)
    found = list(studies.problems("cpu", *given).items())
    small, large, tokens, context = SIZES["cpu"]
    whole = Problem(small, large, tokens // context, context, "fp32", "cpu")
    assert found == [
        (whole, None), (replace(whole, checkpointing=True), None), (replace(whole, every=8), None),
        (TOY, ("kd_loss", "DistillationTrainer")),
    ]  # fmt: skip
    (first, *_) = studies.problems("cuda", *given)
    assert str(first) == "train 1b<-8b, 4096 tokens, bf16" and first.rows == 4
    both = studies.problems("cpu", None, None, "1k", "256", "128", "off", "fp32,bf16")
    assert [(one.dtype, one.every, one.rows) for one in both][:2] == [
        ("fp32", 128, 4), ("bf16", 128, 4)
    ]  # fmt: skip


def test_the_toy_is_the_quickstarts_student(root):
    from slmperf.recipe import Recipe

    recipe = Recipe.load(root / "examples/recipes/quickstart.yaml")
    stages = {stage.name: stage for stage in recipe.stages}
    student = stages["student"]
    for mine, theirs in ((TOY.student, student.shape), (TOY.teacher, stages["teacher"].shape)):
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads"):
            assert getattr(mine, name) == getattr(theirs, name)
    assert TOY.student.vocabulary == recipe.data.vocabulary
    assert TOY.tokens == student.training.batch_tokens and TOY.context == recipe.data.context


def command(monkeypatch, *arguments):
    """slmperf in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["slmperf", "bench", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.fixture
def small(monkeypatch):
    """Tiny models where none are named."""
    monkeypatch.setitem(SIZES, "cpu", (TINY.student, TINY.teacher, 32, 16))
    monkeypatch.setattr(studies, "TOY", replace(TOY, rows=1, context=16))


def test_the_command(quick, small, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "train.json"
    options = ("--device", "cpu", "--seconds", 0.01, "--answers", "1,4")
    assert command(monkeypatch, *options, "--out", out) == 0
    printed = capsys.readouterr().out
    for text in ("train small<-large, 32 tokens, fp32", "an answer in 4", "checkpointing",
                 "counted: layers", "of the step", "over eager", "less memory",
                 "train quickstart 2x48<-2x64"):  # fmt: skip
        assert text in printed.replace("\n", " "), text
    content = results.read_results(out)
    assert content["kind"] == "train" and content["refused"] == {}
    assert len(content["rows"]) == 4 + 4 + 6 + 2
    assert not compare(out, out).missing


def test_json_instead_of_tables(quick, small, monkeypatch, capsys):
    options = ("--device", "cpu", "--seconds", 0.01, "--checkpointing", "off", "--answers", "1")
    assert command(monkeypatch, *options, "--dtype", "bf16", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["schema"] == results.SCHEMA and content["kind"] == "train"
    assert {row["dtype"] for row in content["rows"][:4]} == {"bf16"}


def test_the_command_fails_where_ours_cannot_run(quick, small, monkeypatch, capsys):
    def fails(models, batch):
        raise NotImplementedError("only on Tuesdays")

    monkeypatch.setattr(ways, "_kd_loss", lambda *given, **more: fails)
    options = ("--device", "cpu", "--seconds", 0.01, "--answers", "1", "--checkpointing", "off")
    assert command(monkeypatch, *options) == 1
    assert "only on Tuesdays" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,said",
    [
        (["--seconds", "0"], "seconds is 0.0, expected more than 0"),
        (["--answers", "some"], "answers is 'some', expected whole numbers"),
        (["--answers", "0"], "every is 0, expected at least 1"),
        (["--answers", "2000"], "answers is one in 2000, expected at most one in context = 512"),
        (["--tokens", "1000"], "tokens is 1000, expected a multiple of context = 512"),
        (["--dtype", "fp8"], "dtype is 'fp8', expected fp32 or bf16"),
        (["--checkpointing", "yes"], "checkpointing is 'yes', expected off, on or both"),
        (["--student", "1b"], "teacher has a vocabulary of 32000, expected the student's 128256"),
        (["--student", "900b"], "900b"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, options, said):
    assert command(monkeypatch, "--device", "cpu", *options) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 1


def test_a_vocabulary_each_is_refused():
    with pytest.raises(InputError, match="teacher has a vocabulary of 50"):
        replace(TINY, teacher=replace(TINY.teacher, vocabulary=50))


@pytest.fixture
def plans(root, monkeypatch):
    """bench/gpu_plans.py."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_plans", root / "bench" / "gpu_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_checks_sections_at_tiny_sizes(quick, plans, root):
    """The part "train" as `DEVICE=cpu` runs it; on a GPU it has the rows that targets wait for."""
    part, facts = type("Part", (), {"seconds": 0.01})(), {}
    rows = {}
    for section, work in plans.train_plan("cpu").items():
        found = {row["name"]: row for row in work(part, facts)}
        assert found and all(name.startswith(section) for name in found)
        rows |= found
    assert facts["refused"] == {} and len(rows) == 4 + 6 + 2
    assert sum("overhead_pct" in row for row in rows.values()) == 3
    targets = tomllib.loads((root / "bench" / "targets.toml").read_text())["target"]
    waited = [target["bench"]["row"] for target in targets if "bench" in target]
    waited = [row for row in waited if row.startswith("train ")]
    sections = plans.train_plan("cuda")
    assert len(waited) >= 3 and all(row.rpartition(": ")[0] in sections for row in waited)


def test_ours_that_cannot_run_fail_their_section(plans, monkeypatch):
    (name, *_), (work, *_) = zip(*plans.train_plan("cpu").items(), strict=True)
    refused = {f"{name}: eager": "OutOfMemoryError: too large"}
    monkeypatch.setattr(measure, "measure", lambda *given: measure.Measured([], refused))
    part = type("Part", (), {"seconds": 0.01})()
    assert list(work(part, {})) == []
    refused[f"{name}: kd_loss"] = "RuntimeError: kernel says no"
    with pytest.raises(plans.Failed, match="kd_loss: RuntimeError: kernel says no"):
        list(work(part, {}))


@pytest.mark.gpu
def test_on_a_device():
    """Every way of a small pair of models, the Triton kernels among them; memory of the device."""
    sizes = {"hidden": 128, "heads": 2, "kv_heads": 2, "head_size": 64, "intermediate": 256}
    student, teacher = (Shape(layers=2, vocabulary=8192, **sizes, name=name) for name in "ab")
    problem = Problem(student, teacher, 4, 128, "bf16", "cuda")
    rows, refused = measure.measure(problem, 0.05)
    ours = {row["way"]: row for row in rows if row["role"] == "ours"}
    assert not {name for name in refused if "kd_loss" in name or "Trainer" in name}, refused
    assert ours["kd_loss"]["memory_of_eager"] < 0.6 > ours["DistillationTrainer"]["memory_of_eager"]
