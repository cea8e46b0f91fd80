"""The stage that quantises: every scheme in one recipe, its table, and what it refuses."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from small_recipes import RECIPES, toy

from slmperf.check import InputError
from slmperf.models import load
from slmperf.models.quantized import QuantizedLinear
from slmperf.quant import METHODS, SCHEMES
from slmperf.recipe import Recipe, report, run
from slmperf.recipe.plan import plan
from slmperf.recipe.schema import QuantiseStage

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = RECIPES / "quantise.yaml"
# The last stage of the example, and of the toy its layers of two schemes.
W4 = "scheme: w4a16, calibration_rows: 32"
MIXED = "scheme: w4a16, overrides: {'*.o_proj': fp8}, kv_cache: true, calibration_rows: 32"
SCHEMES_RUN = {"w8a8": "w8a8", "w4a16": "w4a16, fp8, fp8 keys and values"}  # by stage


def manifest(out: Path, stage: str) -> dict:
    return json.loads((out / stage / "manifest.json").read_text())


def checked(out: Path, results) -> None:
    """Manifests, models and tables of the quantised stages."""
    report = (out / "report.md").read_text()
    table = report.partition("## Quantisation\n")[2].partition("\n## ")[0]
    assert table.count("\n| ") == 1 + 1 + 1 + len(SCHEMES_RUN)  # head, line, the student, each
    assert "| student | –" in table and "## Quantisation, the paper's" in report
    full = manifest(out, "student")["weight_bytes"]
    for name, schemes in SCHEMES_RUN.items():
        told, row = manifest(out, name)["quantization"], results.stage(name)
        assert told["scheme"] == row.quantization["scheme"] == schemes
        assert told["source"].startswith("in-domain: ") and told["tokens"] == 4 * 128
        assert told["bytes_after"] == manifest(out, name)["weight_bytes"] < full
        assert 0 < told["error_mean"] <= told["error_mean_rtn"] * 1.0001
        assert len(told["layers"]) == 14 and told["bits_mean"] == row.quantization["bits_mean"]
        layers = [one for one in load(out / name).modules() if isinstance(one, QuantizedLinear)]
        assert len(layers) == 14 and not list(out.glob("*.training"))
        line = next(line for line in table.splitlines() if line.startswith(f"| {row.title} |"))
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == told["scheme"] and "–" not in cells
        for place, mean in ((4, "error_mean"), (6, "held_out_error_mean")):
            assert float(cells[place]) == pytest.approx(100 * told[mean], rel=0.01)
        assert f"{row.mean('auc_mean'):.4f}" in cells and f"{row.latency.prefill_ms:.2f}" in cells


def test_schemes_side_by_side(tmp_path, monkeypatch):
    """Quality and latency of each stand in one table, beside the model with full weights."""
    monkeypatch.setattr(report, "_plots", lambda results: [])  # which take longer than all else
    recipe = toy("quantise", tmp_path)
    lines = [
        line
        for line in recipe.read_text().splitlines()
        if "stage: quantise" not in line or re.search(r"name: ([\w-]+),", line)[1] in SCHEMES_RUN
    ]
    text = "\n".join(lines).replace(W4, MIXED).replace("rows: 32", "rows: 4")
    out = tmp_path / "out"
    recipe.write_text(text.replace("*.o_proj", "*.k_proj"))
    with pytest.raises(InputError, match=r"stages \(w4a16\): overrides: wanted one scheme for"):
        run(recipe, out)  # before anything is trained
    assert not (out / "teacher").exists()
    recipe.write_text(text)
    checked(out, run(recipe, out))
    cache = load(out / "w4a16").config.quantization_config["kv_cache_scheme"]
    assert cache and manifest(out, "w4a16")["quantization"]["layers"][3]["scheme"] == "fp8"


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    recipe, out = toy("quantise", tmp_path), tmp_path / "out"
    results = run(recipe, out)
    stages = [one.name for one in results.stages if one.kind == "quantise"]
    schemes = {manifest(out, name)["quantization"]["scheme"] for name in stages}
    assert schemes == set(SCHEMES) and len(stages) == 9
    errors = {name: manifest(out, name)["quantization"]["error_mean"] for name in stages}
    four_bits = [errors[name] for name in stages if name.startswith("w4a16")]
    assert errors["w4a16"] == min(four_bits) and errors["w4a16-rtn"] == max(four_bits)


def test_a_recipe_knows_all_schemes_and_methods():
    """They are spelled out there, because reading a recipe imports no torch."""
    fields = QuantiseStage.model_fields
    assert get_args(fields["scheme"].annotation) == tuple(SCHEMES)
    assert set(get_args(get_args(fields["method"].annotation)[0])) == set(METHODS)
    told = {stage.scheme for stage in Recipe.load(RECIPE).stages if stage.stage == "quantise"}
    assert told == set(SCHEMES)


@pytest.mark.parametrize(
    "old,new,said",
    [
        ("scheme: fp8,", "scheme: int8,", "(fp8).scheme: expected 'fp8'"),
        ("scheme: fp8,", "scheme: fp8, overrides: {'*': int8},", "(fp8).overrides"),
        ("scheme: fp8,", "scheme: fp8, weights: int8,", "(fp8).weights: unknown key"),
        ("scheme: fp8,", "scheme: fp8, group_size: 64,", "(fp8): group_size is given, expected"),
        ("scheme: fp8,", "scheme: fp8, method: awq,", "(fp8).method: expected"),
        ("scheme: w4a16,", "scheme: w4a16, smooth: true,", "smooth is given, expected scheme fp8"),
        ("scheme: w4a16,", "scheme: w4a16, group_size: 0,", "(w4a16): group_size is 0, expected"),
        (
            "scheme: w4a16,",
            "scheme: w4a16, group_size: 96,",
            "(w4a16).group_size: groups of 96 do not divide the 128 of hidden in student",
        ),
        (
            "heads: 4, kv_heads: 4",
            "heads: 4, kv_heads: 2",
            "(fp8-block).scheme: groups of 128 do not divide the 64 of key/value heads in student",
        ),
        ("from: student, scheme: w8a8", "from: fp8, scheme: w8a8", "fp8 is quantised, expected"),
        (
            "scheme: fp8, ",
            "scheme: fp8, calibration_text: x.txt, subset: {members: 0.5}, ",
            "expected one of `subset` and `calibration_text`, found both",
        ),
    ],
)
def test_bad_stages_are_refused(old, new, said):
    text = RECIPE.read_text()
    assert old in text
    with pytest.raises(InputError) as refused:
        plan(Recipe.parse(text.replace(old, new)))
    assert said in str(refused.value) and "\n" not in str(refused.value)
