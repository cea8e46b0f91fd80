"""`slmperf plan` and `slmperf plan fit`: tables, files, recipes that run, one line a mistake."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from measurements import measurements

from slmperf.check import InputError
from slmperf.plan import LatencyModel
from slmperf.recipe import Recipe
from slmperf.recipe.plan import plan as jobs_of


def test_a_fit_of_bench_results(slmperf, tmp_path):
    """What `bench serve` writes, `plan fit` reads; what that writes, `plan --gpu` takes."""
    h100 = LatencyModel.preset("h100-paper")
    rows = [
        {
            "name": str(number),
            "shape": cell.shape.name,
            "ttft_p50_ms": cell.ttft_ms,
            **cell.settings,
        }
        for number, cell in enumerate(measurements(h100))
    ]
    # What is no prediction's measurement: siblings that waited, text where there are ids.
    rows += [{**rows[0], "name": "waited", "items": None, "ttft_p50_ms": 9e9}]
    rows += [{**rows[0], "name": "text", "prompts": "text", "ttft_p50_ms": 9e9}]
    files = []
    for name, part in (("results", rows[::2]), ("more", rows[1::2])):
        content = {"schema": "slmperf.bench/1", "kind": "serve", "rows": part}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    mine = tmp_path / "mine.json"
    code, out, _ = slmperf("plan", "fit", *files, "--out", mine)
    assert code == 0 and "error %" in out
    assert LatencyModel.load(mine).token_us == pytest.approx(h100.token_us, rel=1e-3)
    asked = ("plan", "--target-ttft-ms", 100, "--context", "8k", "--gpu", mine, "--tp", 2)
    code, out, _ = slmperf(*asked)
    assert code == 0 and "fitted within" in out and "measurements" in out


def test_the_command_lists_writes_and_draws(slmperf, tmp_path):
    plot, recipe = tmp_path / "plan.svg", tmp_path / "recipe.yaml"
    code, out, _ = slmperf(
        "plan", "--target-ttft-ms", 185, "--context", "16k", "--gpu", "h100",
        "--tp", 4, "--base", "3b", "--scheme", "fp8", "--plot", plot, "--write", recipe,
    )  # fmt: skip
    assert code == 0 and "members per" in out
    assert plot.read_text().count("<path") > 10
    parsed = Recipe.load(recipe)
    jobs = jobs_of(parsed)
    last = jobs[-1]
    assert last.quantised and last.shape.hidden == 3072
    assert f"{last.shape.intermediate:,}" in out
    assert f"{last.shape.heads}/{last.shape.kv_heads}" in out


BAD = {
    "no target": ([], "--target-ttft-ms is missing"),
    "context 0": (["--target-ttft-ms", 9, "--context", 0], "context is '0'"),
    "target 0": (["--target-ttft-ms", 0], "target_ttft_ms is 0.0, expected a number > 0"),
    "base": (["--target-ttft-ms", 9, "--base", "9b"], "9b is no known shape"),
    "gpu": (["--target-ttft-ms", 9, "--gpu", "b200"], "no preset 'b200', expected one of a100"),
    "tp": (["--target-ttft-ms", 9, "--tp", 7], "which divides no shape of 8b, 3b, 1b"),
    "tp 0": (["--target-ttft-ms", 9, "--tp", 0], "tensor_parallel is 0, expected at least 1"),
    "endless": (["--target-ttft-ms", "inf"], "target_ttft_ms is inf, expected a number > 0"),
    "no base": (["--target-ttft-ms", 9, "--base", ","], "base is ',', expected at least one"),
    "price": (["--target-ttft-ms", 9, "--usd-per-gpu-hour", -1], "usd_per_gpu_hour is -1.0"),
    "tokens": (["--target-ttft-ms", 9, "--item-tokens", "x"], "item tokens is 'x', expected"),
    "scheme": (["--target-ttft-ms", 9, "--scheme", "int3"], "scheme is 'int3', expected one of"),
    "items": (["--target-ttft-ms", 9, "--items", 0], "items is 0"),
    "item tokens": (["--target-ttft-ms", 9, "--context", 64], "item_tokens is 128, expected 1 to"),
    "plot": (["--target-ttft-ms", 900, "--plot", "a.txt"], "ends in .png, .svg, .pdf"),
    "choice": (["--target-ttft-ms", 900, "--write", "a.yaml", "--choice", 99], "choice is 99"),
    "nothing": (["--target-ttft-ms", 9, "--write", "a.yaml"], "nothing to write: no shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(slmperf, monkeypatch, tmp_path, case):
    monkeypatch.chdir(tmp_path)
    arguments, complaint = BAD[case]
    code, _, err = slmperf("plan", *arguments)
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content,complaint",
    [
        ("", "no JSON"),
        ("[]", "schema is 'list'"),
        ('{"schema": "slmperf.bench/2"}', "schema is 'slmperf.bench/2', expected"),
        ('{"schema": "slmperf.bench/1", "kind": "ops", "rows": []}', "kind is 'ops'"),
        ('{"schema": "slmperf.bench/1", "kind": "serve", "rows": []}', "no measurement has"),
        ('{"schema": "slmperf.bench/1", "kind": "serve", "rows": [{"name": "a", "shape": "3b"}]}',
         "row 'a': no context"),
        ('{"schema": "slmperf.bench/1", "kind": "serve"}', "expected rows, each a mapping"),
        ('{"shapes": {}, "ttft": []}', "expected ttft: table -> model"),
        ('{"shapes": {"a": {"base": "8b"}}, "ttft": {"m1_k1_16k": {"a": []}}}', "expected ttft"),
    ],
)  # fmt: skip
def test_other_files_are_no_measurements(slmperf, tmp_path, content, complaint):
    path = tmp_path / "results.json"
    path.write_text(content)
    code, _, err = slmperf("plan", "fit", path, "--out", tmp_path / "m.json")
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "m.json").exists()


def test_a_model_file_that_is_none(tmp_path):
    path = tmp_path / "model.json"
    for content, complaint in (
        ("{", "no JSON"),
        ("{}", "schema is None"),
        ('{"schema": "slmperf.latency/1"}', "not a latency model"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=complaint):
            LatencyModel.load(path)


def test_a_written_recipe_runs_as_it_is(slmperf, tmp_path):
    """Two cuts of the neurons, one of the heads, fp8: on models small enough to train here."""
    base = tmp_path / "base"
    base.mkdir()
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 512}
    (base / "config.json").write_text(json.dumps(config))
    asked = ("--context", 96, "--base", base, "--item-tokens", 8, "--items", 3, "--scheme", "fp8")
    model = LatencyModel.preset("h100")
    slow = replace(model, gemm_tflops={"fp8": 1e-6}, attention_tflops=1e-6)
    slow.save(tmp_path / "slow.json")
    written = tmp_path / "planned.yaml"
    code, out, err = slmperf(
        "plan", "--target-ttft-ms", 1500, *asked, "--gpu",
        tmp_path / "slow.json", "--write", written,
    )  # fmt: skip
    assert code == 0, err
    stages = [stage["stage"] for stage in yaml.safe_load(written.read_text())["stages"]]
    assert stages.count("prune_mlp") == 2 and stages.count("distil") == 3, out
    assert "prune_attention" in stages and stages[-1] == "quantise"
    generator = np.random.default_rng(0)
    rows = [
        f"{member},{generator.integers(1, 40)},{generator.integers(1, 6)},{1000 + place}"
        for member in range(1, 41)
        for place in range(15)
    ]
    data = tmp_path / "ratings"
    data.mkdir()
    (data / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    titles = [f"{item},Film {item} (1999),Drama" for item in range(1, 40)]
    (data / "movies.csv").write_text("\n".join(["movieId,title,genres", *titles]))
    out_folder = tmp_path / "out"
    code, _, err = slmperf("run", written, "--out", out_folder, "--data", data)
    assert code == 0, err
    assert (out_folder / "report.md").is_file()
    assert (out_folder / "fp8" / "model.safetensors").is_file()
