"""prune_model on random and on real models: sizes, modes, methods, reports, refusals.

Over 400 lines: one prune_model, in all that it is asked for.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pruning import (
    FAMILIES,
    by_part,
    logits,
    masked,
    model_of,
    random_batches,
    state_of,
    unchanged,
    weight_of,
)
from stories260k import batches, load_stories260k, perplexity, story_tokens
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
)

from slmperf.calibrate import Calibration, calibrate
from slmperf.check import InputError
from slmperf.models import load, parameters, save, shrink
from slmperf.prune import osscar, prune_model
from slmperf.prune.curves import error_curves, prune_sizes
from slmperf.prune.heads import plan_heads
from slmperf.prune.layer.methods import METHODS, highest
from slmperf.prune.results import PruneReport


@pytest.mark.parametrize(
    "sizes",
    [{"intermediate_size": 40}, {"key_value_heads": 2},
     {"intermediate_size": 40, "attention_heads": 4}],
)  # fmt: skip
def test_pruned_model_shrinks_loads_and_beats_dropping(sizes: dict, tmp_path: Path) -> None:
    dense = model_of()
    data = random_batches()
    seen: list[tuple[int, int]] = []
    report = prune_model(
        copy.deepcopy(dense), data, **sizes, progress=lambda done, of: seen.append((done, of))
    )
    model = report.model
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.parameters_before == parameters(dense)
    assert report.parameters_after == parameters(model) < parameters(dense)
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)

    def kept(part: str) -> list[tuple[int, ...]] | None:
        return [layer.kept for layer in by_part(report, part)] or None

    dropped = shrink(copy.deepcopy(dense), mlp=kept("down_proj"), kv_groups=kept("o_proj"))
    wanted = logits(dense, data[0])
    refitted = (logits(model, data[0]) - wanted).square().sum()
    plain = (logits(dropped, data[0]) - wanted).square().sum()
    assert 0 < refitted < 0.8 * plain
    for layer in report.layers:
        assert 0 < layer.relative_error <= layer.curve[-1] < 1
        assert len(layer.curve) == len(layer.order) == layer.groups - len(layer.kept)
        assert sorted(layer.kept + layer.order) == list(range(layer.groups))
        assert layer.tokens == report.tokens and layer.method == "osscar"
        assert list(layer.curve) == sorted(layer.curve)

    save(model, None, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    heads = 4 if len(sizes) == 2 or "key_value_heads" in sizes else 8
    assert stock.config.intermediate_size == sizes.get("intermediate_size", 64)
    assert stock.config.num_attention_heads == heads
    assert stock.config.num_key_value_heads == heads // 2 and stock.config.head_dim == 4
    assert torch.equal(logits(stock, data[0]), logits(model, data[0]))


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_equals_its_masked_model_and_loads(
    family: str, mode: str, tmp_path: Path
) -> None:
    dense = model_of(family, num_hidden_layers=2)
    data = random_batches()
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=40, key_value_heads=2, mode=mode
    )
    zeroed = masked(dense, report)
    for batch in data:
        found, wanted = logits(report.model, batch), logits(zeroed, batch)
        assert (found - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert not torch.equal(logits(dense, data[0]), logits(zeroed, data[0]))
    save(report.model, None, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert stock.config.num_key_value_heads == 2 and stock.config.intermediate_size == 40
    assert torch.equal(logits(stock, data[0]), logits(report.model, data[0]))
    ids = data[0]["input_ids"][:1, :4]
    assert stock.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [("uniform", {"attention_heads": 4}), ("free", {"attention_heads": 5}),
     ("kv_group", {"key_value_heads": 3}), ("kv_group", {"attention_heads": [4, 8, 2]})],
)  # fmt: skip
def test_heads_modes_equal_the_masked_model_and_reload(
    heads: str, sizes: dict, tmp_path: Path
) -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(copy.deepcopy(dense), data, **sizes, heads=heads)
    plan = plan_heads(dense.config, **sizes, heads=heads)
    for layer in report.layers:
        index = int(layer.name.split(".")[2])
        queries, _ = plan.groups(index).heads(torch.tensor(layer.kept))
        assert len(queries) == plan.attention_heads[index]
        if heads == "uniform":
            assert [head // 2 for head in layer.kept] == [0, 1, 2, 3]
    assert len(report.layers) == (2 if isinstance(sizes.get("attention_heads"), list) else 3)
    torch.testing.assert_close(
        logits(report.model, data[0]), logits(masked(dense, report), data[0]), rtol=0, atol=1e-5
    )
    save(report.model, None, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(logits(again, data[0]), logits(report.model, data[0]))
    assert not again.training and not report.model.training


def test_sizes_may_be_numpys_and_batches_may_ask_for_a_cache() -> None:
    data = random_batches()
    wanted = prune_model(model_of(), data, intermediate_size=40, key_value_heads=2)
    for sizes in (
        {"intermediate_size": np.int64(40), "key_value_heads": np.int32(2)},
        {"intermediate_size": np.full(3, 40), "key_value_heads": [None, 2, 2]},
    ):
        asked = [batch | {"use_cache": True} for batch in data]
        found = prune_model(model_of(), asked, **sizes)
        assert found.model.config.intermediate_size == wanted.model.config.intermediate_size
        json.loads(found.to_json())


def test_per_layer_sizes(tmp_path: Path) -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(copy.deepcopy(dense), data, intermediate_size=[40, 64, 24])
    assert [layer.name.split(".")[2] for layer in report.layers] == ["0", "2"]
    assert [len(layer.kept) for layer in report.layers] == [40, 24]
    kept = report.model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(kept, dense.model.layers[1].mlp.down_proj.weight)
    torch.testing.assert_close(
        logits(report.model, data[0]), logits(masked(dense, report), data[0]), rtol=0, atol=1e-5
    )


def test_a_pruned_model_is_pruned_again() -> None:
    data = random_batches()
    for first, second, kept in (
        ({"intermediate_size": [40, 64, 24]}, {"intermediate_size": 20}, [20, 20, 20]),
        ({"attention_heads": [4, 8, 2]}, {"attention_heads": 2}, [1, 1]),
        ({"attention_heads": 5, "heads": "free"}, {"intermediate_size": 20}, [20, 20, 20]),
        ({"key_value_heads": 3}, {"key_value_heads": 2}, [2, 2, 2]),
    ):
        once = prune_model(model_of(), data, **first).model
        before = copy.deepcopy(once)
        report = prune_model(once, data, **second)
        assert [len(layer.kept) for layer in report.layers] == kept
        torch.testing.assert_close(
            logits(report.model, data[0]), logits(masked(before, report), data[0]),
            rtol=0, atol=1e-5,
        )  # fmt: skip
    with pytest.raises(InputError, match="neurons in layer 2, found 30"):
        once = prune_model(model_of(), data, intermediate_size=[40, 64, 24]).model
        prune_model(once, data, intermediate_size=30)


def test_sequential_inputs_come_from_what_was_pruned_before() -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=40, key_value_heads=2, damping=0.02
    )
    # The second block's neurons, recomputed where the first block and its own heads are pruned.
    half = copy.deepcopy(dense)
    half.model.layers[0] = copy.deepcopy(report.model.model.layers[0])
    half.model.layers[1].self_attn = copy.deepcopy(report.model.model.layers[1].self_attn)
    name = "model.layers.1.mlp.down_proj"
    gram = calibrate(half, data, [name])[name].matrix
    alone = osscar(gram, weight_of(dense, name), keep=40, damping=0.02)
    assert tuple(alone.kept.tolist()) == report.layers[3].kept
    torch.testing.assert_close(alone.weight, weight_of(report.model, name), rtol=1e-4, atol=1e-5)


def test_one_pass_inputs_come_from_the_unpruned_model(tmp_path: Path) -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=40, key_value_heads=2, mode="one_pass"
    )
    made = calibrate(dense, data, source="in-domain: test")
    for layer in report.layers:
        keep, weight = len(layer.kept), weight_of(dense, layer.name)
        alone = osscar(made[layer.name].matrix, weight, group_size=layer.group_size, keep=keep)
        assert tuple(alone.kept.tolist()) == layer.kept
        assert torch.equal(alone.weight, weight_of(report.model, layer.name))
    # The same from a calibration that was made before, and from one that was written down.
    made.save(tmp_path / "grams")
    for calibration in (made, Calibration.load(tmp_path / "grams")):
        again = prune_model(
            copy.deepcopy(dense), calibration, intermediate_size=40, key_value_heads=2,
            mode="one_pass",
        )  # fmt: skip
        assert again.calibration["source"] == "in-domain: test"
        assert again.tokens == report.tokens
        assert torch.equal(logits(again.model, data[0]), logits(report.model, data[0]))


def test_dense_target_brings_the_hidden_states_back_to_those_of_the_unpruned_model() -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=40, mode="dense_target", damping=0.0
    )
    half = copy.deepcopy(dense)
    half.model.layers[0] = copy.deepcopy(report.model.model.layers[0])
    name, norm = (f"model.layers.1.{one}" for one in ("mlp.down_proj", "post_attention_layernorm"))

    def inputs(model: nn.Module, name: str) -> Tensor:
        found: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments: found.append(arguments[0])
        )
        for batch in data:
            logits(model, batch)
        handle.remove()
        masks = [batch["attention_mask"].bool() for batch in data]
        return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)]).double()

    x = inputs(half, name)
    y = inputs(dense, name) @ weight_of(dense, name).double().T
    y += inputs(dense, norm) - inputs(half, norm)  # what the first block lost
    best = torch.linalg.lstsq(x[:, report.layers[1].kept], y).solution.T
    torch.testing.assert_close(weight_of(report.model, name).double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dense_target_comes_closer_than_a_fit_to_the_pruned_stream(family: str) -> None:
    dense = model_of(family)
    data = random_batches(12)
    wanted, far = logits(dense, data[0]), {}
    for mode in ("sequential", "dense_target"):
        model = prune_model(copy.deepcopy(dense), data, intermediate_size=40, mode=mode).model
        far[mode] = float((logits(model, data[0]) - wanted).square().sum())
    assert far["dense_target"] < 0.95 * far["sequential"], far


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_pruned_changes_nothing(mode: str, method: str) -> None:
    model = model_of()
    before = state_of(model)
    report = prune_model(
        model, random_batches(), intermediate_size=64, attention_heads=8, mode=mode, method=method
    )
    assert report.model is model and report.layers == () and unchanged(model, before)
    assert report.parameters_after == report.parameters_before


def test_sizes_are_nested_and_curves_continue() -> None:
    dense = model_of()
    data = random_batches()
    before = state_of(dense)
    sizes = [48, 24, 40]
    reports = list(prune_sizes(dense, data, sizes))
    assert unchanged(dense, before)
    for size, report in zip(sizes, reports, strict=True):
        direct = prune_model(copy.deepcopy(dense), data, intermediate_size=size, mode="one_pass")
        assert report.model.config.intermediate_size == size
        for ours, theirs in zip(report.layers, direct.layers, strict=True):
            assert ours.kept == theirs.kept and ours.order == theirs.order
            assert ours.curve == pytest.approx(theirs.curve, rel=1e-9)
            assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-6)
        torch.testing.assert_close(
            logits(report.model, data[0]), logits(direct.model, data[0]), rtol=1e-4, atol=1e-4
        )
    wide, narrow, middle = reports
    for a, b, c in zip(narrow.layers, middle.layers, wide.layers, strict=True):
        assert set(a.kept) < set(b.kept) < set(c.kept)
        assert a.curve[: len(b.curve)] == pytest.approx(b.curve, rel=1e-9)
        assert b.curve[: len(c.curve)] == pytest.approx(c.curve, rel=1e-9)
        assert list(a.curve) == sorted(a.curve)
        assert a.relative_error > b.relative_error > c.relative_error


def test_error_curves_of_all_layers_change_nothing() -> None:
    dense = model_of()
    data = random_batches()
    before = state_of(dense)
    curves = error_curves(dense, data, prune=("mlp", "attention"))
    assert unchanged(dense, before)
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=24, key_value_heads=2, mode="one_pass"
    )
    assert list(curves) == [layer.name for layer in report.layers]
    for layer in report.layers:
        curve = curves[layer.name]
        assert len(curve) == layer.groups and list(curve) == sorted(curve)
        assert curve[: len(layer.curve)] == pytest.approx(layer.curve, rel=1e-5)
        assert curve[-1] == pytest.approx(1.0, abs=0.3)  # all gone: the energy, and the damping


@pytest.mark.parametrize("heads", ["kv_group", "uniform", "free"])
def test_error_curves_of_heads_are_those_of_the_pruning(heads: str) -> None:
    dense = model_of()  # 8 query heads on 4 key/value heads
    data = random_batches()
    curves = error_curves(dense, data, prune=("attention",), heads=heads)
    assert len(curves) == 3
    report = prune_model(dense, data, attention_heads=4, heads=heads, mode="one_pass")
    for layer in report.layers:
        curve = curves[layer.name]
        assert len(curve) == layer.groups and list(curve) == sorted(curve)
        assert curve[len(layer.order) - 1] == pytest.approx(layer.curve[-1], rel=1e-4)


def test_error_curves_of_what_cannot_be_pruned_are_refused() -> None:
    model, data = model_of(), random_batches()
    for wrong, found in ((("mlps",), "'mlps'"), ((), "none")):
        with pytest.raises(InputError, match=f"wanted some of mlp, attention, found {found}"):
            error_curves(model, data, prune=wrong)
    free = prune_model(model, data, attention_heads=5, heads="free").model
    with pytest.raises(InputError, match="'attention', found one in layer"):
        error_curves(free, data, prune=("attention",))
    assert len(error_curves(free, data)) == 3


def test_methods_rank_as_they_should() -> None:
    dense = model_of()
    data = random_batches(12)
    errors = {}
    for method in METHODS:
        report = prune_model(
            copy.deepcopy(dense), data, intermediate_size=24, method=method, mode="one_pass"
        )
        assert all(len(layer.kept) == 24 for layer in report.layers)
        assert report.settings["method"] == method
        errors[method] = [layer.relative_error for layer in report.layers]
    for better, worse in [
        ("osscar", "norm+refit"), ("osscar", "magnitude+refit"), ("norm+refit", "norm"),
        ("magnitude+refit", "magnitude"),
    ]:  # fmt: skip
        assert all(a < b for a, b in zip(errors[better], errors[worse], strict=True)), errors
    assert all(
        a <= b * (1 + 1e-6) for a, b in zip(errors["osscar+swaps"], errors["osscar"], strict=True)
    )
    # Not refitted means untouched.
    report = prune_model(copy.deepcopy(dense), data, intermediate_size=24, method="magnitude")
    first = report.layers[0]
    weight = weight_of(dense, first.name)
    assert torch.equal(weight_of(report.model, first.name), weight[:, list(first.kept)])
    norms = weight.square().sum(0)
    assert norms[list(first.kept)].min() > norms[list(first.order)].max()
    assert first.order == tuple(sorted(first.order, key=lambda i: norms[i].item()))


def test_norm_keeps_the_groups_of_the_largest_activation_scores() -> None:
    dense = model_of()
    data = random_batches()
    report = prune_model(
        copy.deepcopy(dense), data, intermediate_size=24, key_value_heads=2, method="norm",
        mode="one_pass",
    )  # fmt: skip
    for layer in report.layers[:2]:
        found: list[Tensor] = []
        handle = dense.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, arguments, found=found: found.append(arguments[0])
        )
        score = 0
        for batch in data:
            logits(dense, batch)
            groups = found.pop().unflatten(-1, (layer.groups, layer.group_size)).norm(dim=-1)
            mask = batch["attention_mask"][..., None]
            score = score + ((groups * mask).sum(1) / mask.sum(1)).square().sum(0)
        handle.remove()
        wanted = score.topk(len(layer.kept)).indices.sort().values
        assert tuple(wanted.tolist()) == layer.kept


def test_highest_takes_as_many_of_each_family() -> None:
    scores = torch.tensor([1.0, 9.0, 8.0, 7.0, 2.0, 3.0])
    kept, removed = highest(scores, 2)
    assert kept.tolist() == [1, 2] and removed.tolist() == [0, 4, 5, 3]
    kept, removed = highest(scores, 2, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert kept.tolist() == [1, 3] and removed.tolist() == [0, 4, 5, 2]
    assert highest(torch.zeros(4), 2)[0].tolist() == [0, 1]


def test_an_expert_without_tokens_keeps_its_largest_weights() -> None:
    dense = model_of("mixtral", num_hidden_layers=1)
    with torch.no_grad():  # the first channel is always positive, and keeps expert 3 from all
        dense.model.embed_tokens.weight[:, 0] = 1.0
        dense.model.layers[0].self_attn.o_proj.weight.zero_()
        dense.model.layers[0].mlp.gate.weight[:, 0] = torch.tensor([0.0, 0.0, 0.0, -1000.0])
    data = random_batches()
    for mode in ("sequential", "one_pass", "dense_target"):
        report = prune_model(copy.deepcopy(dense), data, intermediate_size=40, mode=mode)
        assert [layer.method for layer in report.layers] == ["osscar"] * 3 + ["magnitude"]
        last = report.layers[3]
        assert last.tokens == 0 and last.error == 0.0
        weight = weight_of(dense, last.name)
        wanted = weight.square().sum(0).topk(40).indices.sort().values
        assert last.kept == tuple(wanted.tolist())
        assert torch.equal(weight_of(report.model, last.name), weight[:, wanted])
        assert {layer.kept for layer in report.layers[:3]} != {report.layers[0].kept}


def test_reports_are_their_json(tmp_path: Path) -> None:
    report = prune_model(
        model_of(), random_batches(), intermediate_size=40, key_value_heads=2, source="generic: x"
    )
    again = PruneReport.from_json(report.to_json())
    assert again == report and again.model is None  # `model` is left out of comparisons
    broken = replace(report, settings={"perplexity": {"after": float("nan")}})
    assert json.loads(broken.to_json())["settings"] == {"perplexity": {"after": None}}
    assert report.settings["intermediate_size"] == 40 and report.settings["mode"] == "sequential"
    assert report.calibration["source"] == "generic: x"
    assert report.peak_mib > 1 and report.device_peak_mib is None
    spent = sum(layer.gram_seconds + layer.solve_seconds for layer in report.layers)
    assert 0 < spent + report.advance_seconds + report.calibration_seconds <= report.seconds
    assert report.forwards_seconds == 2 * report.advance_seconds > 0
    for text in ("{}", "[]", "no", '{"layers": [{}]}'):
        with pytest.raises(InputError, match="pruning report"):
            PruneReport.from_json(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_value_heads": 5}, "wanted 5 key/value heads, the model has 4"),
        ({"key_value_heads": 0}, "wanted 0 key/value heads, the model has 4"),
        ({"attention_heads": 5}, "nearest legal: .*4/2"),
        ({"attention_heads": 4, "key_value_heads": 4}, "nearest legal: .*4/2"),
        ({"intermediate_size": 65}, r"wanted 1\.\.64 neurons in layer 0, found 65"),
        ({"intermediate_size": 0}, r"wanted 1\.\.64 neurons in layer 0, found 0"),
        ({"intermediate_size": 40.0}, "intermediate_size: wanted whole numbers, found 40.0"),
        ({"intermediate_size": True}, "intermediate_size: wanted whole numbers, found True"),
        ({"intermediate_size": [40.5] * 3}, "intermediate_size: wanted whole numbers, found 40.5"),
        ({"attention_heads": 4.0}, "attention_heads: wanted whole numbers, found 4.0"),
        ({"intermediate_size": [40, 40]}, "one number for each of 3 layers, found 2"),
        ({}, "intermediate_size, attention_heads or key_value_heads, found none"),
        ({"intermediate_size": 40, "mode": "two_pass"}, "mode: wanted one of sequential, one_pass"),
        ({"intermediate_size": 40, "method": "obs"}, "method: wanted one of .* found 'obs'"),
        ({"intermediate_size": 40, "damping": -1.0}, "damping: .* found -1.0"),
        ({"intermediate_size": 40, "swaps": -1}, "swaps: .* found -1"),
        ({"intermediate_size": 40, "heads": "any"}, "heads: wanted one of kv_group"),
    ],
)  # fmt: skip
def test_impossible_requests_change_nothing(settings: dict, message: str) -> None:
    model = model_of()
    before = state_of(model)

    def never() -> object:
        raise AssertionError("the calibration set was read")
        yield

    with pytest.raises(InputError, match=message) as caught:
        prune_model(model, never(), **settings)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)


def test_unfit_calibrations_change_nothing() -> None:
    model = model_of()
    before = state_of(model)
    data = random_batches()
    empty = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4)}
    for mode in ("sequential", "one_pass", "dense_target"):
        for batches_, message in (
            ([], "calibration (batch|token)"),
            ([empty], "at least one calibration token"),
            ([{"input_ids": torch.full((1, 4), 96)}], "vocabulary"),
            (data[0], "wanted a list of batches, .* found a str in it"),
            ([{"input_ids": data[0]["input_ids"][0]}], r"tokens \(B, T\), found \(30,\)"),
            ([{"input_ids": data[0]["input_ids"][:0]}], r"tokens \(B, T\), found \(0, 30\)"),
            (
                [data[0] | {"token_weights": torch.ones(30, 4)}],
                r"wanted \(4, 30\), found \(30, 4\)",
            ),
            (
                [data[0] | {"attention_mask": torch.ones(4, 29)}],
                r"attention_mask: wanted \(4, 30\), found \(4, 29\)",
            ),
        ):
            with pytest.raises(InputError, match=message):
                prune_model(model, batches_, intermediate_size=40, mode=mode)
    made = calibrate(model, data)
    with pytest.raises(InputError, match="wanted batches in mode sequential"):
        prune_model(model, made, intermediate_size=40)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj: .*groups of 4 inputs"):
        prune_model(model, made, attention_heads=4, heads="uniform", mode="one_pass", method="norm")
    part = calibrate(model, data, ["model.layers.0.mlp.down_proj"])
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: wanted its Gram matrix"):
        prune_model(model, part, intermediate_size=40, mode="one_pass")
    other = calibrate(model_of(intermediate_size=48), data)
    with pytest.raises(InputError, match="wanted Gram matrices of this model"):
        prune_model(model, other, intermediate_size=40, mode="one_pass")
    assert unchanged(model, before)


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
def test_values_that_are_not_finite_are_named(mode: str) -> None:
    data = random_batches()
    model = model_of()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.down_proj\.weight") as caught:
        prune_model(model, data, intermediate_size=40, mode=mode)
    assert model.model.layers[0].mlp.down_proj.in_features == 64 and "\n" not in str(caught.value)
    # Finite weights whose products are not.
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    before = state_of(model)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj") as caught:
        prune_model(model, data, intermediate_size=40, mode=mode)
    if mode == "one_pass":
        assert unchanged(model, before)
    else:
        assert "1 layer before it is pruned already" in str(caught.value)


def test_a_refit_beyond_the_type_is_refused() -> None:
    model = model_of().half()
    with torch.no_grad():  # two neurons that nearly cancel, in a layer of very large weights
        for block in model.model.layers[:1]:
            block.mlp.down_proj.weight.fill_(60000.0)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: .* torch\.float16"):
        prune_model(model, random_batches(), intermediate_size=8, damping=0.0)


def test_other_architectures_are_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        prune_model(model, random_batches(), intermediate_size=8)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
def test_a_gpu_prunes_to_the_same(mode: str) -> None:
    data = random_batches()
    sizes = {"intermediate_size": 40, "key_value_heads": 2, "mode": mode}
    here = prune_model(model_of(), data, **sizes)
    there = prune_model(
        model_of().cuda(), [{k: v.cuda() for k, v in batch.items()} for batch in data], **sizes
    )
    assert [a.kept for a in there.layers] == [a.kept for a in here.layers]
    for ours, theirs in zip(there.layers, here.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3)
    assert there.device_peak_mib > 0
    torch.testing.assert_close(
        logits(there.model.cpu(), data[0]), logits(here.model, data[0]), rtol=1e-3, atol=1e-3
    )


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from small_pruning import model_of, random_batches
from slmperf.models import save
from slmperf.prune import prune_model
rank, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
report = prune_model(
    model_of(), random_batches()[rank:rank + 1], intermediate_size=40, key_value_heads=2, mode=mode)
torch.distributed.destroy_process_group()  # within one, Transformers writes on worker 0 alone
save(report.model, None, f"{{folder}}/{{rank}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
def test_two_workers_with_half_of_the_text_each_prune_to_the_same(
    mode: str, tmp_path: Path
) -> None:
    code = WORKER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code]
    workers = [subprocess.Popen([*command, str(n), mode, str(tmp_path)]) for n in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    data = random_batches()
    alone = prune_model(model_of(), data, intermediate_size=40, key_value_heads=2, mode=mode).model
    first, second = (load(tmp_path / str(n)) for n in range(2))
    assert torch.equal(logits(first, data[0]), logits(second, data[0]))
    torch.testing.assert_close(logits(first, data[0]), logits(alone, data[0]), rtol=1e-4, atol=1e-4)


def test_real_model_keeps_its_language(shared_data: Path) -> None:
    dense = load_stories260k(shared_data)
    held_out = batches(story_tokens(shared_data, "eval", 8))
    calibration = batches(story_tokens(shared_data, "calib", 20))
    assert perplexity(dense, held_out) < 4.2
    found, made = {}, calibrate(dense, calibration)
    for method in ("osscar", "norm+refit", "norm", "magnitude"):
        report = prune_model(
            copy.deepcopy(dense), made, intermediate_size=129, method=method, mode="one_pass"
        )
        error = sum(layer.relative_error for layer in report.layers)
        found[method] = error, perplexity(report.model, held_out)
    errors, perplexities = zip(*found.values(), strict=True)
    assert list(errors) == sorted(errors), found
    assert perplexities[0] < min(7.0, 1.03 * perplexities[1]), found
    assert perplexities[1] < 0.85 * perplexities[2] < 0.6 * perplexities[3], found
    heads = prune_model(dense, calibration, key_value_heads=2)
    assert perplexity(heads.model, held_out) < 7.5
