"""The main job: a whole recipe end to end, stopped and resumed, refused where it is wrong.

Over 400 lines, because one finished run is shared by all of these tests.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_recipes import RECIPES

from slmperf import cli
from slmperf.check import InputError
from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from slmperf.recipe import Recipe, run
from slmperf.recipe.plan import plan
from slmperf.recipe.results import Results
from slmperf.recipe.schema import Training
from slmperf.recipe.stages import training_config

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = RECIPES / "tiny.yaml"
STAGES = [
    "teacher",
    "student",
    "student-sft-seed0",
    "student-sft-seed1",
    "narrow",
    "narrow-kd",
    "fewer-heads",
    "int8",
    "narrow-sft",
    "step-2",
    "step-2-kd",
    "one-step",
    "one-step-kd",
    "heads-kd",
    "gradual",
    "uniform",
]


@pytest.fixture(scope="module")
def rows(root, tmp_path_factory) -> Path | None:
    """150 members of movietweetings where ../shared/data is; elsewhere None: the world."""
    source = root.parent / "shared" / "data" / "recsys" / "movietweetings-100k"
    if not source.is_dir():
        return None
    lines = (source / "ratings.dat").read_text(encoding="utf-8").splitlines()
    count = Counter(line.split("::")[0] for line in lines)
    members = [name for name, rated in sorted(count.items()) if 20 <= rated <= 60][:150]
    chosen = [line for line in lines if line.split("::")[0] in set(members)]
    folder = tmp_path_factory.mktemp("rows")
    (folder / "ratings.dat").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    shutil.copy(source / "movies.dat", folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory) -> tuple[Results, Path]:
    """The tiny recipe from start to end in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return run(TINY, out, data=rows), out


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    """A copy of the finished output folder, to be damaged."""
    return Path(shutil.copytree(undisturbed[1], tmp_path / "out"))


def outcome(out: Path) -> dict[str, tuple]:
    """What must not depend on how often a run was stopped: weights and metrics of every stage."""
    found = {}
    for stage in STAGES:
        manifest = json.loads((out / stage / "manifest.json").read_text())
        hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
        weights, scores = hashes["model.safetensors"], hashes["scores.safetensors"]
        found[stage] = weights, scores, manifest["metrics"], manifest["inputs"]
    return found


def times(out: Path) -> dict[str, int]:
    """When each checkpoint was written."""
    return {stage: (out / stage / "model.safetensors").stat().st_mtime_ns for stage in STAGES}


# The whole line


def test_every_stage_leaves_a_checkpoint_and_a_manifest(undisturbed):
    _, out = undisturbed
    for stage in STAGES:
        manifest = json.loads((out / stage / "manifest.json").read_text())
        assert {"settings", "data"} <= manifest["inputs"].keys()
        assert manifest["versions"]["torch"] and manifest["seconds"] > 0
        assert manifest["started"] <= manifest["finished"]
        assert 0 < manifest["metrics"]["auc_mean"] < 1 and manifest["metrics"]["perplexity"] > 1
        assert not list((out / stage).glob("*.bin")) and not list((out / stage).glob("*.pt"))
    assert json.loads((out / "narrow-kd" / "manifest.json").read_text())["inputs"]["from"]
    assert not list(out.glob("*.training")), "checkpoints of finished trainings are left"


def test_pruned_stages_are_smaller_and_stock_transformers_loads_them(undisturbed):
    from transformers import AutoModelForCausalLM

    results, out = undisturbed
    sizes = {}
    for stage, neurons, heads, groups in (
        ("student", 48, 4, 2),
        ("narrow", 24, 4, 2),
        ("fewer-heads", 24, 2, 1),
        ("gradual", 16, 4, 2),
        ("uniform", 48, 2, 2),
    ):
        config = json.loads((out / stage / "config.json").read_text())
        assert config["intermediate_size"] == neurons
        assert config["num_attention_heads"] == heads
        assert config["num_key_value_heads"] == groups
        model = AutoModelForCausalLM.from_pretrained(out / stage)
        logits = model(torch.arange(20)[None]).logits
        assert logits.isfinite().all()
        sizes[stage] = sum(value.numel() for value in model.parameters())
        assert results.stage(stage).parameters == sizes[stage]
    assert sizes["student"] > sizes["narrow"] > sizes["fewer-heads"]
    assert results.stage("teacher").shape["experts"] == 4
    int8, before = results.stage("int8"), results.stage("fewer-heads")
    assert int8.parameters == before.parameters and int8.size_mib < before.size_mib


def test_results_hold_floors_intervals_tables_and_latency(undisturbed, rows):
    results, out = undisturbed
    assert results.data.synthetic == (rows is None)
    floors = [stage for stage in results.stages if stage.kind == "floor"]
    assert [floor.name for floor in floors] == [
        "item mean",
        "member mean",
        "logistic member + item",
    ]
    for stage in results.stages:
        assert stage.auc_interval.low <= stage.mean("auc_mean") <= stage.auc_interval.high
        assert (stage.latency is None) == (stage.kind == "floor")
    twin = results.stage("student-sft")
    assert [seed.seed for seed in twin.seeds] == [0, 1]
    assert twin.seeds[0].auc_mean != twin.seeds[1].auc_mean
    kinds = [table.kind for table in results.comparisons]
    assert kinds == ["distillation", "after_pruning", "one_shot", "gradual", "attention"]
    assert [row.role for row in results.comparisons[0].rows] == ["baseline", "kd", "sft"]
    assert results.comparisons[0].rows[0].delta_pct == 0.0
    # The student has seed 0 alone and is held against the twin of that seed.
    gap = results.stage("student").seeds[0].auc_mean - twin.seeds[0].auc_mean
    assert f"student minus student-sft: {gap:+.4f} AUC" in results.notes[1]
    pairs = [(one.stage_a, one.stage_b) for one in results.parities]
    assert ("fewer-heads", "int8") in pairs and ("student", "narrow-kd") in pairs
    assert Results.from_json((out / "results.json").read_text()) == results
    assert "teacher minus the best floor" in results.notes[0]
    for name in ("report.md", "report.html", "run.log"):
        assert (out / name).stat().st_size > 500


def test_the_first_line_says_whether_the_data_is_synthetic(rows, undisturbed, copied, capsys):
    run(TINY, copied, data=rows)
    first = capsys.readouterr().out.splitlines()[0]
    assert ("synthetic" in first) == (rows is None)
    assert rows is None or str(rows) in first


# Going on


def test_finished_stages_are_not_computed_again(undisturbed, copied, rows, capsys):
    results, out = undisturbed
    before = times(copied)
    again = run(TINY, copied, data=rows)
    assert times(copied) == before and outcome(copied) == outcome(out)
    said = capsys.readouterr().out
    assert said.count("finished before") == len(STAGES)
    assert [stage.seeds for stage in again.stages] == [stage.seeds for stage in results.stages]
    assert again.comparisons == results.comparisons
    # Times are taken over too: the machine and the weights are the same.
    assert [stage.latency for stage in again.stages] == [stage.latency for stage in results.stages]


def test_a_stage_without_manifest_is_made_again_and_no_other(undisturbed, copied, rows):
    (copied / "narrow" / "manifest.json").unlink()
    with open(copied / "narrow" / "model.safetensors", "r+b") as file:
        file.truncate(1000)  # half-written, as far as anybody knows
    before = times(copied)
    run(TINY, copied, data=rows)
    changed = {stage for stage, at in times(copied).items() if at != before[stage]}
    assert changed == {"narrow"}
    assert outcome(copied) == outcome(undisturbed[1])


def test_a_stage_whose_input_changed_is_made_again(copied, rows, capsys):
    """Another student, unlike a missing one, outdates what was made from it."""
    manifest = json.loads((copied / "narrow" / "manifest.json").read_text())
    manifest["inputs"]["from"] = "0" * 64
    (copied / "narrow" / "manifest.json").write_text(json.dumps(manifest))
    run(TINY, copied, data=rows)
    assert "narrow: made from other inputs, made again" in capsys.readouterr().out


@pytest.mark.slow  # half a minute; one kill of a training is in test_distill.py
def test_killed_three_times_and_gone_on_with(undisturbed, rows, tmp_path):
    """kill -9 at random moments: the metrics and weights are those of the undisturbed run."""
    out, seed = tmp_path / "out", random.SystemRandom().randrange(10**6)
    moments, log = random.Random(seed), out / "run.log"
    command = [sys.executable, "-m", "slmperf.cli", "run", str(TINY), "--out", str(out)]
    command += ["--data", str(rows)] if rows else []
    threads = {"OMP_NUM_THREADS": "1"}
    span = float(undisturbed[0].seconds) / 3
    kills = []
    for _ in range(3):
        known = len(log.read_text()) if log.is_file() else 0
        process = subprocess.Popen(
            command, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and not (log.is_file() and len(log.read_text()) > known):
            time.sleep(0.02)  # Python and torch are being loaded
        time.sleep(moments.uniform(0, span))
        process.send_signal(signal.SIGKILL)
        _, problems = process.communicate()
        kills.append((process.returncode, log.read_text().splitlines()[-1], problems.decode()))
    print(f"seed {seed}:", *kills, sep="\n")
    assert any(code == -signal.SIGKILL for code, _, _ in kills)
    done = subprocess.run(
        command, env=os.environ | threads, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert outcome(out) == outcome(undisturbed[1])
    assert not list(out.glob("*.training")) and not list(out.rglob(".*.new-*"))
    texts = Results.from_json((out / "results.json").read_text())
    assert texts.comparisons == undisturbed[0].comparisons


def test_a_second_run_in_the_same_folder_is_refused(copied, rows):
    import fcntl

    with open(copied / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is at work"):
            run(TINY, copied, data=rows)


# What is refused, in one line and without output


def refused(capsys, monkeypatch, recipe: Path, out: Path, data: Path | None = None) -> str:
    """Run the command; its one line on stderr."""
    arguments = ["slmperf", "run", str(recipe), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments + (["--data", str(data)] if data else []))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("calibration_rows: 32", "calibraton_rows: 32", "stages[3] (narrow).calibraton_rows: unk"),
        ("steps: 18", "stops: 18", "stages[0] (teacher).training.stops: unknown key"),
        ("seeds: [0]", "sed: [0]", "sed: unknown key"),
        ("seeds: [0]", "seeds: zero", "seeds: expected list, found 'zero'"),
        ("stage: quantise", "stage: quantize", "stages[6] (int8).stage: unknown stage 'quantize'"),
        ("kv_heads: 1,", "kv_heads: 9,", "kv_heads: expected less than the 2 KV heads"),
        ("kv_heads: 1,", "kv_heads: 2,", "kv_heads: expected less than the 2 KV heads"),
        ("timing: {context: 64", "timing: {context: 640", "timing.context: expected"),
        ("name: narrow,", "name: narrow.training,", "stages[3] (narrow.training).name: "),
        ("kv_heads: 1,", "kv_heads: 0,", "kv_heads: expected greater than or equal to 1, found 0"),
        ("intermediate: 24", "intermediate: 480", "expected less than the 48 neurons"),
        ("intermediate: [24, 16]", "intermediate: [16, 24]", "(gradual): intermediate is [16, 24]"),
        ("intermediate: [24, 16]", "intermediate: [48, 16]", "expected less than the 48 neurons"),
        ("intermediate: 24", "intermediate: 24, method: best", "narrow).method: expected 'osscar'"),
        ("intermediate: 24", "intermediate: 24, mode: both", "stages[3] (narrow).mode: expected"),
        ("kv_heads: 1,", "", "(fewer-heads): expected kv_heads or heads, found neither"),
        ("kv_heads: 1,", "heads: 1,", "(fewer-heads).heads: 1 query heads are no whole groups"),
        ("heads: 2, head_mode: uniform", "heads: 3, head_mode: uniform", "nearest legal: 4/2, 2/"),
        ("intermediate: 24", "intermediate: 24, calibration_text: no.txt", "no.txt: wanted a file"),
        (
            "intermediate: 24",
            "intermediate: 24, calibration_text: no.txt, subset: {members: 0.5}",
            "expected one of `subset` and `calibration_text`, found both",
        ),
        ("from: student,", "from: sutdent,", "stages[3] (narrow).from: no stage is named 'sutd"),
        ("from: narrow-kd", "from: int8", "reads itself: fewer-heads <- int8 <- fewer-heads"),
        ("from: narrow,", "from: teacher,", "narrow-kd is a mixture of experts, expected a dense"),
        ("from: student,", "from: teacher,", "teacher is a mixture of experts"),
        ("learning_rate: 3e-3", "learning_rate: fast", "learning_rate: expected number, found 'f"),
        (
            "learning_rate: 3e-3",
            "learning_rate: 3e-3, divergence: kl",
            "divergence: expected 'forw",
        ),
        ("learning_rate: 3e-3", "learning_rate: 3e-3, beta: 0.1", "beta is given, expected diverg"),
        ("learning_rate: 3e-3", "learning_rate: 3e-3, alpha: 1", "training.alpha: expected less"),
        ("name: tiny", "name: tiny\nname: two", "line 3: the key 'name' is given twice"),
        ("name: tiny", "name: [tiny", "line 3:"),
        ("tasks: [like, top]", "tasks: [like, love]", "data.tasks: no task is named 'love'"),
        ("vocabulary: 600", "vocabulary: 100", "vocab_size is 100, expected at least"),
        ("context: 128", "context: 16", "context is 16, expected at least"),
        ("kd: student,", "kd: nobody,", "tables.distillation.kd: no stage is named 'nobody'"),
        ("distillation:", "destillation:", "tables.destillation: unknown key"),
        ("heads: 4, kv_heads: 2}", "heads: 4, kv_heads: 3}", "expected a multiple of kv_heads 3"),
    ],
)
def test_bad_recipes(capsys, monkeypatch, tmp_path, rows, old, new, said):
    text = TINY.read_text()
    assert old in text
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(text.replace(old, new, 1))
    line = refused(capsys, monkeypatch, recipe, out, rows)
    assert said in line and "recipe.yaml" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "words,kind",
    [
        ({}, ForwardKL()),
        ({"divergence": "reverse_kl"}, ReverseKL()),
        ({"divergence": "jsd"}, JSD(0.5)),
        ({"divergence": "jsd", "beta": 1}, JSD(1.0)),
        ({"divergence": "skew_forward_kl"}, SkewForwardKL(0.1)),
        ({"divergence": "skew_reverse_kl", "alpha": 0.3}, SkewReverseKL(0.3)),
        ({"divergence": "total_variation"}, TotalVariation()),
    ],
)
def test_every_divergence_has_a_word(words, kind):
    training = Training(steps=1, temperature=2.0, **words)
    config = training_config(training, context=8, seed=3, folder=Path("unused"))
    assert config.kind == kind
    assert (config.temperature, config.context, config.seed) == (2.0, 8, 3)


def without_column(folder: Path) -> None:
    (folder / "ratings.csv").write_text("userId,movieId,timestamp\n1,1,5\n")


def empty(folder: Path) -> None:
    (folder / "ratings.csv").write_text("")


def no_rows(folder: Path) -> None:
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")


def too_short(folder: Path) -> None:
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,9\n")


def one_label(folder: Path) -> None:
    lines = "".join(f"1,1,5,{time}\n" for time in range(20))
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines)


@pytest.mark.parametrize(
    "write,said",
    [
        (without_column, "ratings.csv line 1: no column rating"),
        (empty, "ratings.csv line 1: no column"),
        (no_rows, "ratings.csv: no rows"),
        (too_short, "expected at least 10 rows of one member, found at most 1"),
        (one_label, "task like: expected candidates with label 0 and 1, found 4 with the label 1"),
    ],
)
def test_bad_interactions(capsys, monkeypatch, tmp_path, write, said):
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    (folder / "movies.csv").write_text("movieId,title,genres\n1,Alien (1979),Horror\n")
    write(folder)
    assert said in refused(capsys, monkeypatch, TINY, out, folder)
    assert not out.exists()


def prompt_line(**changes: object) -> str:
    good = {
        "task": "Will the member like this?",
        "member": "m1",
        "history": [{"text": "Alien", "action": "yes"}],
        "candidate": "Aliens",
        "label": 1,
        "time": 3,
    }
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    "lines,said",
    [
        ([prompt_line(), prompt_line(label=2)], "prompts.jsonl line 2: label is 2, expected 0 or"),
        ([prompt_line(history=[])], "prompts.jsonl line 1: history is empty"),
        ([prompt_line(), "{"], "prompts.jsonl line 2: expected one JSON object"),
        ([], "prompts.jsonl: no prompts"),
        ([prompt_line()], "prompts.jsonl: no prompt is early enough to train on"),
        ([prompt_line()] * 5, "expected candidates with label 0 and 1"),
    ],
)
def test_bad_prompts(capsys, monkeypatch, tmp_path, lines, said):
    file, out, recipe = tmp_path / "prompts.jsonl", tmp_path / "out", tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines))
    recipe.write_text(TINY.read_text().replace("tasks: [like, top]", "tasks:"))
    assert said in refused(capsys, monkeypatch, recipe, out, file)
    assert not out.exists()


def test_output_of_another_recipe_or_on_other_data(capsys, monkeypatch, tmp_path, copied, rows):
    before = sorted(copied.rglob("*"))
    recipe = tmp_path / "other.yaml"
    recipe.write_text(TINY.read_text().replace("name: tiny", "name: other"))
    line = refused(capsys, monkeypatch, recipe, copied, rows)
    assert "another recipe, expected other" in line and "found tiny" in line
    assert sorted(copied.rglob("*")) == before
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    line = refused(capsys, monkeypatch, TINY, stranger, rows)
    assert "expected an empty folder or one of a run, found thesis.txt" in line
    assert [file.name for file in stranger.iterdir()] == ["thesis.txt"]
    stored = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(stored | {"data_sha256": "0" * 64}))
    assert "on other data" in refused(capsys, monkeypatch, TINY, copied, rows)


def test_truncated_checkpoint(capsys, monkeypatch, copied, rows):
    file = copied / "student" / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(size // 2)
    log = (copied / "run.log").read_text()
    line = refused(capsys, monkeypatch, TINY, copied, rows)
    assert f"{file}: truncated: expected {size} bytes, found {size // 2}" in line
    assert (copied / "run.log").read_text() == log


def test_changed_checkpoint(capsys, monkeypatch, copied, rows):
    file = copied / "student" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = refused(capsys, monkeypatch, TINY, copied, rows)
    assert str(file) in line and "sha256" in line


# Prompts as data, subsets, and the recipes that are shipped


def test_prompts_as_data(tmp_path):
    chance = random.Random(0)
    titles = [f"Film {number}" for number in range(12)]
    lines = []
    for member in range(30):
        seen = chance.sample(titles, 4)
        history = [{"text": title, "action": chance.choice(["yes", "no"])} for title in seen]
        lines += [
            prompt_line(
                member=f"m{member}",
                history=history,
                candidate=chance.choice(titles),
                label=chance.randrange(2),
                time=time,
            )
            for time in range(10)
        ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    text = TINY.read_text().replace("tasks: [like, top]", "tasks:").split("  - name: student-sft")
    recipe = Recipe.parse(text[0])
    results = run(recipe, tmp_path / "out", data=tmp_path / "prompts.jsonl")
    assert results.data.tasks == ["Will the member like this?"]
    assert results.data.candidates == 60 and results.data.members == 30
    assert [stage.name for stage in results.stages][-2:] == ["teacher", "student"]


@pytest.mark.parametrize("name", ["tiny", "quickstart", "full", "world"])
def test_shipped_recipes(name):
    """They are valid, and the teacher has at least four times the parameters of its student."""
    from slmperf.models import parameters
    from slmperf.recipe.stages import new_model

    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    sizes = {}
    for job in plan(recipe):
        with torch.device("meta"):
            model = new_model(job.shape, recipe.data.vocabulary, recipe.data.context, 0)
        sizes.setdefault(job.stage.name, parameters(model))
    kinds = {stage.stage for stage in recipe.stages}
    assert {"teacher", "distil", "sft"} <= kinds
    if name != "tiny":
        pair = recipe.tables["distillation"]
        assert sizes[pair["baseline"]] >= 4 * sizes[pair["kd"]]
        assert sizes[pair["kd"]] == sizes[pair["sft"]]
