"""`slmperf distill`: recipes on text end to end, stopped and resumed, refused where they are wrong.

Over 400 lines, because one finished run is shared by most of these tests.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slmperf import models
from slmperf.check import InputError
from slmperf.data.problems import problems
from slmperf.data.text import read_lines, tokenize, train_text_tokenizer
from slmperf.recipe.distillation import Recipe, preview, run, stages
from slmperf.recipe.distillation.grid import expand
from slmperf.recipe.distillation.paper import VALIDATION_LOSSES
from slmperf.recipe.distillation.report import main_table
from slmperf.recipe.distillation.results import Results, summarise, t_interval
from slmperf.recipe.distillation.runner import open_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
TINY = """
name: tiny
seeds: [0, 1]
data:
  problems: {train: 200, validation: 20}
  context: 80
  vocabulary: 320
stages:
  - name: teacher
    stage: sft
    shape: {layers: 2, hidden: 32, intermediate: 48, heads: 4, kv_heads: 2}
    seeds: [0]
    training: {steps: 12, learning_rate: 5e-3, batch_tokens: 640, report_to: tensorboard,
               gradient_checkpointing: true, offload_optimizer: true}
  - name: fkl
    title: FKL
    stage: distil
    shape: &student {layers: 1, hidden: 16, intermediate: 32, heads: 2, kv_heads: 1}
    teacher: teacher
    training: &t {steps: 6, learning_rate: 5e-3, batch_tokens: 320, precision: fp32,
               evaluate_steps: 3}
  - name: narrow
    stage: prune_mlp
    from: fkl
    intermediate: 16
    calibration_rows: 16
    evaluate: false
    seeds: [0]
  # Four problems alone: what is best comes early, and then the student learns them by heart.
  - name: best-early
    stage: sft
    shape: *student
    seeds: [0]
    share: 0.02
    training: {steps: 40, learning_rate: 5e-2, schedule: constant_with_warmup, batch_tokens: 320,
               precision: fp32, evaluate_steps: 4}
  - name: own-{tokens}
    title: FKL -> oFKL, {tokens} tokens
    stage: distil
    from: fkl
    teacher: teacher
    on_policy: {new_tokens: "{tokens}"}
    training: *t
    grid: {tokens: [4, 6]}
  - name: last
    stage: distil
    from: best-early
    seeds: [0]
    teacher: teacher
    on_policy: {new_tokens: 8, fraction: 0.5}
    training: {steps: 24, learning_rate: 1e-3, batch_tokens: 320, precision: fp32,
               evaluate_steps: 8, samples: 2}
tables:
  single_stage: {fkl: fkl}
  on_policy: {tokens_200: own-4, tokens_300: own-6}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> tuple[Results, Path]:
    """The tiny recipe from start to end in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return run(recipe, out), out


def manifest_of(out: Path, stage: str) -> dict:
    return json.loads((out / stage / "manifest.json").read_text())


# The whole run


def test_every_stage_leaves_a_checkpoint_and_its_loss(undisturbed):
    results, out = undisturbed
    assert [stage for stage in results.stages] == ["fkl", "own-4", "own-6", "teacher", "best-early",
                                                   "last"]  # fmt: skip
    for stage in results.stages.values():
        assert all(0 < seed.loss < 20 for seed in stage.seeds)
        assert (stage.interval is None) == (len(stage.seeds) == 1)
    for name in ("teacher", "fkl-seed0", "fkl-seed1", "narrow", "own-6-seed1", "last"):
        manifest = manifest_of(out, name)
        assert {"settings", "data"} <= manifest["inputs"].keys() and manifest["versions"]["torch"]
        assert (manifest["metrics"] is None) == (name == "narrow")
    assert manifest_of(out, "narrow")["pruning"]["layers"][0]["kept"] == 16
    assert models.load(out / "narrow").config.intermediate_size == 16
    assert manifest_of(out, "teacher")["training"]["precision"] == "fp32"
    assert list((out / "teacher" / "runs").rglob("events.out.tfevents.*"))
    assert not list(out.glob("*.training")) and not list(out.rglob(".*.new-*"))
    samples = [json.loads(line) for line in open(out / "last" / "samples.jsonl")]
    assert [one["step"] for one in samples] == [8, 8, 16, 16, 24, 24]
    assert " has " in samples[0]["prompt"] and "Answer:" in samples[0]["reference"]
    stored = json.loads((out / "results.json").read_text())
    assert stored["groups"]["single_stage"][0]["loss"] == results.stages["fkl"].loss
    assert stored["groups"]["on_policy"][0]["paper_loss"] == 0.191


def test_table_is_laid_out_like_the_papers(undisturbed, capsys):
    results, out = undisturbed
    table = main_table(results)
    ours = ["method", "validation loss", "95% interval", "seeds"]
    less = ["less FKL", "less FKL: 95% interval"]
    assert table.columns == [*ours, *less, "the paper's row", "the paper's loss"]
    assert [row[0] for row in table.rows] == [
        "Single stage", "FKL",
        "Settings of the student's own text, stage two", "FKL -> oFKL, 4 tokens",
        "FKL -> oFKL, 6 tokens", "Other stages", "teacher", "best-early", "last",
    ]  # fmt: skip
    assert table.apart == {0, 2, 5} and table.rows[1][6:] == ["FKL", "0.2045"]
    text = (out / "report.md").read_text()
    assert text.startswith("The text is synthetic: worked sums in words")
    assert "| FKL -> oFKL, 6 tokens |" in text and "| 300 tokens | 0.1894 |" in text
    assert "own-6" in (out / "report.html").read_text()


def test_a_second_stage_starts_from_the_best_checkpoint_of_the_first(undisturbed, monkeypatch):
    _, out = undisturbed
    manifest = manifest_of(out, "best-early")
    training = manifest["training"]
    losses = {int(one["step"]): one["loss"] for one in training["evaluations"]}
    best = training["best_step"]
    assert losses[best] == min(losses.values()) and best < max(losses)
    assert losses[max(losses)] > losses[best] + 0.05, "the last is no worse: nothing is proved"
    # What is stored, and so what others start from, has the loss of the best one.
    assert manifest["metrics"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    begun = {}
    given = open_recipe(Recipe.parse(TINY))
    job = next(one for one in given.jobs if one.stage.name == "last")
    monkeypatch.setattr(stages, "train", lambda model, *_, **__: begun.update(model.state_dict()))
    with pytest.raises(AttributeError):  # no training, no result
        finished = {key: out / one.folder for key, one in job.parents.items()}
        stages.make(job, given.material, Path(), finished, out, lambda *_: None)
    stored = models.load(out / "best-early").state_dict()
    assert begun.keys() == stored.keys()
    assert all(torch.equal(begun[name], stored[name]) for name in stored)
    weights = {name: file["sha256"] for name, file in manifest["files"].items()}
    assert manifest_of(out, "last")["inputs"]["from"]
    assert weights["model.safetensors"]


# Going on


def killed(recipe: Path, out: Path, when) -> None:
    """Start the command in a process of its own and kill -9 it as soon as `when()` holds."""
    command = [sys.executable, "-m", "slmperf.cli", "distill", str(recipe), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    while process.poll() is None and not when():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, problems = process.communicate()
    assert process.returncode == -signal.SIGKILL, problems.decode()


def test_killed_and_gone_on_with_gives_the_same_table(undisturbed, recipe, tmp_path, capsys):
    """kill -9 in the on-policy training of the last stage, after its first checkpoint."""
    results, whole = undisturbed
    out = tmp_path / "out"
    # All stages before are taken over: this is about the one that is killed.
    shutil.copytree(whole, out)
    shutil.rmtree(out / "last")
    for name in ("results.json", "report.md", "report.html"):
        (out / name).unlink()
    training = out / "last.training"
    killed(recipe, out, lambda: bool(list(training.glob("checkpoint-*"))))
    assert training.is_dir() and not (out / "last").exists()
    again = run(recipe, out)
    said = capsys.readouterr().out
    assert said.count("finished before") == 9
    assert again.groups.keys() == results.groups.keys()
    assert {name: [seed.loss for seed in stage.seeds] for name, stage in again.stages.items()} == {
        name: [seed.loss for seed in stage.seeds] for name, stage in results.stages.items()
    }
    assert main_table(again) == main_table(results)
    for stage in ("last", "fkl-seed0"):
        one, other = manifest_of(out, stage), manifest_of(whole, stage)
        for name in ("model.safetensors", *(["samples.jsonl"] if stage == "last" else [])):
            assert one["files"][name] == other["files"][name]
        assert one["training"]["evaluations"] == other["training"]["evaluations"]


def test_another_recipe_in_the_same_folder_is_refused(undisturbed, recipe, tmp_path, slmperf):
    _, out = undisturbed
    other = tmp_path / "tiny.yaml"
    other.write_text(TINY.replace("steps: 24", "steps: 25"))
    code, _, error = slmperf("distill", other, "--out", out)
    assert code == 2 and "holds a run of another recipe" in error


# Looking before


def test_dry_run_tells_all_and_writes_nothing(recipe, tmp_path, slmperf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, error = slmperf("distill", recipe, "--dry-run")
    assert code == 0, error
    assert not list(tmp_path.iterdir())
    lines = told.splitlines()
    row = next(line for line in lines if line.startswith("own-4"))
    student = stages.recipe_stages.new_model(
        Recipe.parse(TINY).stages[1].shape, 320, 80, 0
    )  # the same sizes, weights and all
    assert f" {models.parameters(student):,} " in row and "100% of 4 tokens" in row
    assert re.search(r"[\d.]+ MiB +2$", row) and "distil from fkl, teacher teacher" in row
    # 12 + 2 * 6 + 40 + 2 * 2 * 6 + 24
    assert "10 models, 112 steps" in lines[-1]


def test_shipped_recipes_are_planned():
    """table5 holds every row that the paper has a figure for, and its settings fit its text."""
    table5 = Recipe.load(RECIPES / "table5.yaml")
    for group, rows in VALIDATION_LOSSES.items():
        wanted = {role for role, figure in rows.items() if figure.loss is not None}
        assert wanted <= table5.tables[group].keys(), group
    few = table5.data.problems.model_copy(update={"train": 300, "validation": 50})
    data = table5.data.model_copy(update={"problems": few})
    given = open_recipe(table5.model_copy(update={"data": data}))
    assert len({job.folder for job in given.jobs}) == len(given.jobs) > 50
    by_name = {stage.name: stage for stage in table5.stages}
    two = by_name[table5.tables["teachers"]["small_medium"]]
    assert (two.source, two.teacher) == ("fkl-small", "medium")
    half = by_name[table5.tables["on_policy"]["tokens_300_half"]]
    assert half.on_policy.fraction == 0.5
    stories = Recipe.load(RECIPES / "stories.yaml")
    assert {"fkl", "jsd", "rkl", "ofkl"} == stories.tables["single_stage"].keys()


def test_papers_figures(paper):
    theirs = paper["reasoning_val_loss"]
    ours = {
        group: {row.loss for row in rows.values() if row.loss is not None}
        for group, rows in VALIDATION_LOSSES.items()
    }
    for group in ("baseline", "single_stage", "teachers"):
        assert ours[group] == set(theirs[group].values()), group
    assert ours["two_stages"] | ours["on_policy"] == set(theirs["two_stages"].values())


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("stage: prune_mlp", "stage: prune", "stages[2] (narrow).stage: unknown stage 'prune'"),
        ("fraction: 0.5", "fraction: 1.5", "stages[6] (last).on_policy.fraction: expected less"),
        ("fraction: 0.5", "fraction: -1", "on_policy.fraction: expected greater than or equal to"),
        ("fraction: 0.5", "fractoin: 1", "(last).on_policy.fractoin: unknown key, expected one of"),
        ("new_tokens: 8", "new_tokens: 0", "on_policy.new_tokens: expected greater than or equal"),
        ("new_tokens: 8", "new_tokens: 70", "on_policy.new_tokens: 70 after the longest prompt of"),
        ("from: best-early", "from: best", "stages[6] (last).from: no stage is named 'best'"),
        ("teacher: teacher\n    training", "teacher: techer\n    training", "no stage is named 't"),
        ("intermediate: 16", "intermediate: 160", "expected less than the 32 neurons that fkl has"),
        ("share: 0.02", "share: 0", "(best-early).share: expected greater than 0, found 0"),
        ("evaluate_steps: 3}", "patience: 3}", "training: patience is given, expected evaluate_st"),
        ("evaluate_steps: 3}", "beta: 0.5}", "training: beta is given, expected divergence jsd"),
        ("learning_rate: 1e-3", "learning_rate: -1", "training.learning_rate: expected greater"),
        ("context: 80", "context: 20", "the prompt has "),
        ("vocabulary: 320", "vocabulary: 200", "vocabulary is 200, expected at least 259"),
        ("train: 200", "trane: 200", "data.problems.trane: unknown key"),
        ("train: 200", "train: 200, steps: [3, 2]", "steps is [3, 2], expected the smaller number"),
        ("tokens_200: own-4", "tokens_250: own-4", "tables.on_policy.tokens_250: unknown key, exp"),
        ("tokens_200: own-4", "tokens_200: own-5", "tables.on_policy.tokens_200: no stage is name"),
        ("fkl: fkl}", "fkl: narrow}", "narrow has `evaluate: false`, expected a scored stage"),
        ("grid: {tokens: [4, 6]}", "grid: {tokens: [4, 4]}", "the name 'own-4' is given 2 times"),
        ("grid: {tokens: [4, 6]}", "grid: {tokens: 4}", "grid.tokens: expected a list of values"),
        ("grid: {tokens: [4, 6]}", "grid: {token: [4]}", "(own-{tokens}).name: no word 'tokens'"),
        ("name: own-{tokens}", "name: own-{tokens}-{x}", ".name: no word 'x' in the grid, found"),
        ("seeds: [0, 1]", "seeds: [-1]", "seeds[0]: expected greater than or equal to 0, found -1"),
        ("name: tiny", "name: [tiny", "line 3: expected"),
    ],
)  # fmt: skip
def test_bad_recipes_are_one_line_before_anything_is_written(tmp_path, slmperf, old, new, said):
    assert old in TINY
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(TINY.replace(old, new, 1))
    code, printed, error = slmperf("distill", path, "--out", out)
    assert code == 2 and printed == "" and not out.exists()
    assert error.startswith(f"error: {path}") and len(error.splitlines()) == 1
    assert said in error


def test_a_checkpoint_has_to_have_the_runs_tokenizer(undisturbed, tmp_path, slmperf):
    _, out = undisturbed
    data = "data: {problems: {train: 200, validation: 20}, context: 80, vocabulary: 320}"
    training = "training: {steps: 2, batch_tokens: 320, precision: fp32}"
    text = f"""
name: other
{data}
stages:
  - {{name: there, stage: checkpoint, checkpoint: {out / "teacher"}}}
  - {{name: more, stage: distil, from: there, teacher: there, {training}}}
"""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    results = run(path, tmp_path / "out")
    assert results.stages["there"].loss == undisturbed[0].stages["teacher"].loss
    assert results.stages["more"].source == "there"
    assert results.groups.keys() == {"stages"}  # no tables, and so nothing of the paper's
    assert "the paper's row" not in main_table(results).columns
    for old, new, said in (
        (
            "vocabulary: 320",
            "vocabulary: 300",
            "has another tokenizer than the run, expected its 3",
        ),
        ("context: 80", "context: 90", "has 80 positions, expected at least the context of 90"),
        (str(out / "teacher"), str(tmp_path / "none"), "expected a Transformers checkpoint, found"),
    ):
        path.write_text(text.replace(old, new))
        code, _, error = slmperf("distill", path, "--out", tmp_path / "none")
        assert code == 2 and said in error and "stages[0] (there).checkpoint: " in error


# Text


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_the_three_forms_of_a_line(tmp_path):
    tokenizer = train_text_tokenizer(["Two and two make four."] * 3, 280)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    path = write(
        tmp_path / "text.jsonl",
        {"prompt": "Two and two make", "completion": " four."},
        {"text": "Two and two make four."},
        {"input_ids": [5, 6, 7], "prompt_tokens": 1},
    )
    (one, two, three), cut = tokenize(read_lines(path), tokenizer, 64, prompt_tokens=3)
    assert one.input_ids.tolist()[0] == begin and one.input_ids.tolist()[-1] == end and cut == 0
    assert tokenizer.decode(one.input_ids[one.answer], skip_special_tokens=True) == " four."
    assert tokenizer.decode(one.input_ids, skip_special_tokens=True) == "Two and two make four."
    assert two.prompt_tokens == 3 and two.answer.sum() == len(two.input_ids) - 3
    assert three.input_ids.tolist() == [5, 6, 7] and three.answer.tolist() == [False, True, True]
    (short, _, _), cut = tokenize(read_lines(path), tokenizer, 6, prompt_tokens=3)
    assert cut == 2 and short.input_ids.tolist() == one.input_ids.tolist()[:6]


@pytest.mark.parametrize(
    "lines,said",
    [
        ([{"text": "plain"}], "line 1: no completion, expected prompt and completion, or prompt"),
        ([{"prompt": "12" * 45, "completion": "b"}], "line 1: the prompt has 91 tokens, expected"),
        ([{"input_ids": [1, 2], "prompt_tokens": 2}], "line 1: 2 tokens, 2 of them the prompt"),
        ([{"input_ids": [1, 999], "prompt_tokens": 1}], "token id 999, expected less than the"),
        ([{"prompt": "a"}], "line 1: expected prompt and completion, or text, or input_ids, found"),
        ([{"text": "a", "prompt": "b"}], "expected prompt and completion, or text, or input_ids"),
        ([{"text": 3}], "line 1: text is 3, expected a text"),
        ([{"text": "a", "split": "eval"}, {"text": "b"}], "line 2: no key split, which other"),
        ([{"text": "a", "split": "test"}], "no line is of split train, found test"),
        (["text"], "line 1: expected one JSON object, found str"),
    ],
)  # fmt: skip
def test_bad_text_is_one_line_before_anything_is_written(recipe, tmp_path, slmperf, lines, said):
    good = [
        {
            "prompt": "ab",
            "completion": "cd",
            **({"split": "train"} if "split" in str(lines) else {}),
        }
    ] * 3
    path = write(tmp_path / "text.jsonl", *lines, *(good if "split" not in str(lines) else []))
    code, _, error = slmperf("distill", recipe, "--data", path, "--out", tmp_path / "out")
    assert code == 2 and said in error and not (tmp_path / "out").exists()


def test_lines_without_a_split_are_split_by_a_seed(tmp_path):
    path = write(
        tmp_path / "text.jsonl",
        *({"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(100)),
    )
    one, again = (open_recipe(Recipe.parse(TINY), path).material for _ in range(2))
    other = open_recipe(Recipe.parse(TINY.replace("context: 80", "context: 80\n  seed: 1")), path)
    assert one.sha256 == again.sha256 != other.material.sha256
    assert (len(one.training), len(one.validation)) == (90, 10)
    keys = {example.key for part in (one.training, one.validation) for example in part}
    assert len(keys) == 100
    small, large = ({example.key for example in one.share(share)} for share in (0.1, 0.5))
    assert len(small) == 9 and small < large


def test_problems_are_the_same_again_disjoint_and_solved():
    made = problems(800, seed=3)
    assert made == problems(800, seed=3) and made[:300] == problems(300, seed=3)
    assert made != problems(800, seed=4)
    assert len({one.prompt for one in made}) == 800, "a prompt is there twice"
    for one in made:
        number = None
        for sentence in one.prompt.split(".")[:-1]:  # the story, told again
            change = int((re.findall(r"\d+", sentence) or [0])[0])
            if " has " in sentence:
                number = change
            elif "doubles" in sentence:
                number *= 2
            elif re.search(r" (eats|sells|loses) ", sentence):
                number -= change
            else:
                number += change
            assert 0 < number <= 99
        assert one.answer == number and one.completion.endswith(f"Answer: {number}")
        for before, sign, change, after in re.findall(
            r"(\d+) ([-+*]) (\d+) = (\d+)", one.completion
        ):
            calculated = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign]
            assert calculated(int(before), int(change)) == int(after)
    with pytest.raises(InputError, match="expected at most 20000 of 1 to 1 steps"):
        problems(10**6, steps=(1, 1))


# Grids and intervals


def test_a_grid_is_a_product_or_a_list_of_points():
    stage = {
        "name": "a-{x}-{y}",
        "on": {"x": "{x}", "y": "{y}"},
        "title": "{x} of {y}",
        "from": "b-{y}",
    }
    product = expand({"stages": [{**stage, "grid": {"x": [1, 2], "y": [0.5]}}]}, "")["stages"]
    assert product == [
        {"name": "a-1-0_5", "on": {"x": 1, "y": 0.5}, "title": "1 of 0.5", "from": "b-0_5"},
        {"name": "a-2-0_5", "on": {"x": 2, "y": 0.5}, "title": "2 of 0.5", "from": "b-0_5"},
    ]
    points = [{"x": 1, "y": 0.5}, {"x": 3, "y": 2}]
    listed = expand({"stages": [{"name": "z"}, {**stage, "grid": points}]}, "")["stages"]
    assert [one["name"] for one in listed] == ["z", "a-1-0_5", "a-3-2"]
    with pytest.raises(InputError, match=r"grid.z: expected \{z\} in the stage, found none"):
        expand({"stages": [{**stage, "grid": {"x": [1], "y": [2], "z": [3]}}]}, "")
    with pytest.raises(InputError, match=r"grid\[1\]: expected the words x, y, found x"):
        expand({"stages": [{**stage, "grid": [{"x": 1, "y": 2}, {"x": 1}]}]}, "")


def test_intervals_are_students():
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.low == pytest.approx(2 - 4.303 / 3**0.5) and interval.level == 0.95
    assert interval.high == pytest.approx(2 + 4.303 / 3**0.5)
    assert t_interval([1.0]) is None
    many = t_interval([0.0, 1.0] * 50)  # 99 degrees of freedom: 1.984
    half = 1.984 * (0.25 * 100 / 99) ** 0.5 / 10
    assert many.high - 0.5 == pytest.approx(half, rel=1e-3)
    # Seeds that share their luck differ by less than they vary.
    losses = {"fkl": {0: 1.0, 1: 2.0, 2: 3.0}, "new": {0: 0.9, 1: 1.91, 2: 2.89}, "one": {5: 1.0}}
    found = summarise(losses, "fkl")
    assert found["fkl"][2] is None and found["one"][2:] == (None, None)
    mean, interval, difference, narrow = found["new"]
    assert difference == pytest.approx(-0.1) and interval.high - interval.low > 4
    assert narrow.high - narrow.low < 0.06 and narrow.high < 0
    assert summarise(losses, "fkl") == found and summarise(losses, None)["new"][2] is None


def test_real_stories_are_told_by_their_own_tokenizer(shared_data, tmp_path):
    sys.path.insert(0, str(RECIPES.parents[1] / "bench"))
    try:
        import stories as driver
    finally:
        sys.path.pop(0)
    from stories260k import story_tokens

    if not (shared_data / "models" / "tok512.bin").is_file():
        pytest.skip("no stories260K in the shared data")
    tokenizer = driver.tokenizer(shared_data)
    text = (shared_data / "text" / "tinystories_917.jsonl").read_text().splitlines()
    told = [one["text"] for one in map(json.loads, text) if one["split"] == "eval"][:8]
    for story, tokens in zip(told, story_tokens(shared_data, "eval", 8), strict=True):
        assert [1, *tokenizer.encode(story, add_special_tokens=False)][:512] == tokens.tolist()
    driver.write_input(shared_data, tmp_path, count=12)
    told = preview(tmp_path / "stories.yaml")
    assert "stories.jsonl; 24 examples to learn from" in told and "from narrow" in told
