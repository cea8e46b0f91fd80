"""The recipes of the paper's pruning ablations, at toy size, and text of other kinds."""

import json

import pytest
from small_recipes import RECIPES, toy

from slmperf.recipe import Recipe, run
from slmperf.recipe.results import COMPARISONS

pytestmark = pytest.mark.usefixtures("one_thread")

ABLATIONS = ["one_shot", "gradual", "attention", "calibration"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_file_with_its_table(name):
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    [(kind, rows)] = recipe.tables.items()
    assert kind == name and tuple(rows) == COMPARISONS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_shot", "gradual", "attention"])
def test_ablations_run(name, tmp_path):
    results = run(toy(name, tmp_path), tmp_path / "out")
    [table] = results.comparisons
    assert [row.role for row in table.rows] == list(COMPARISONS[name])
    assert ("prune_gradual" in {one.kind for one in results.stages}) == (name == "gradual")
    base = results.stage("base")
    assert all(
        one.parameters < base.parameters
        for one in results.stages
        if one.kind != "floor" and one.name != "base"
    )


def test_calibration_text_is_read_told_apart_and_watched(tmp_path, capsys):
    recipe, out = toy("calibration", tmp_path), tmp_path / "out"
    results = run(recipe, out)
    assert "calibrated" in (out / "report.md").read_text()
    assert [row.role for row in results.comparisons[0].rows] == list(COMPARISONS["calibration"])

    def manifest(stage: str) -> dict:
        return json.loads((out / stage / "manifest.json").read_text())

    assert "calibration_text" in manifest("generic-16")["inputs"]
    assert "calibration_text" not in manifest("domain-16")["inputs"]
    assert manifest("generic-16")["pruning"]["source"] == "generic: text.md"
    assert manifest("domain-16")["pruning"]["source"].startswith("in-domain: ")
    assert manifest("generic-16")["pruning"]["tokens"] == 16 * 128  # plain text fills the context
    kept = [
        (out / stage / "model.safetensors").read_bytes() for stage in ("domain-16", "generic-16")
    ]
    assert kept[0] != kept[1]
    capsys.readouterr()
    (tmp_path / "text.md").write_text("another text " * 3000)
    run(recipe, out)
    said = capsys.readouterr().out
    assert said.count("made from other inputs, made again") == 2  # the generic ones alone
    assert "domain-16: finished before" in said
