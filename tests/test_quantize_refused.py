"""Quantisations of whole models that cannot be as asked for: noted in the report, or refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from small_pruning import model_of, random_batches, state_of
from test_quantize_model import W4, by_name
from torch import nn

from slmperf.check import InputError
from slmperf.ops.weight_spec import Int4
from slmperf.quant import SCHEMES, QuantReport, quantize_model, scheme_named

# ---- what goes wrong on the way


def overflowing() -> nn.Module:
    """One layer whose neuron 5 is beyond fp32."""
    model = model_of(num_hidden_layers=1)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[0].mlp.get_submodule(name).weight[5] *= 1e30
    return model


def test_inputs_that_are_not_finite_round_to_nearest() -> None:
    model, data = overflowing(), random_batches()
    rows = by_name(quantize_model(model, calibration=data, **W4))
    lost = rows["model.layers.0.mlp.down_proj"]
    assert lost.method == "rtn" and lost.relative_error is None and "\n" not in lost.note
    assert "down_proj: wanted finite inputs" in lost.note and "rounded to nearest" in lost.note
    others = [row for name, row in rows.items() if not name.endswith("down_proj")]
    assert {row.method for row in others} == {"gptq+quantease"}
    assert {row.note for row in others} == {""}


def test_what_cannot_be_smoothed_is_not() -> None:
    model, data = overflowing(), random_batches()
    rows = by_name(quantize_model(model, "w8a8", data))
    down = rows.pop("model.layers.0.mlp.down_proj")
    assert {row.note for row in rows.values()} == {""}  # they are searched for all the same
    assert down.alpha is None and down.method == "rtn"
    assert down.note.startswith("not smoothed: model.layers.0.mlp.down_proj")
    assert down.note.endswith("rounded to nearest") and "\n" not in down.note


def test_fixed_scales_are_of_what_is_finite() -> None:
    model, data = overflowing(), random_batches()
    rows = by_name(quantize_model(model, "fp8-static", data, kv_cache=True))
    down = rows.pop("model.layers.0.mlp.down_proj")
    assert "inputs: wanted finite values" in down.note and "scale is of the others" in down.note
    assert {row.note for row in rows.values()} == {""}
    scale = model.model.layers[0].mlp.down_proj.input_scale
    assert bool(torch.isfinite(scale)) and float(scale) > 0


def test_nothing_finite_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    data = random_batches()
    for overrides in ({}, {"*.self_attn.[qkv]_proj": None}):
        model = model_of(num_hidden_layers=2)
        with torch.no_grad():  # finite weights whose products overflow: all behind them is NaN
            model.model.layers[1].input_layernorm.weight.fill_(3e38)
            model.model.layers[1].self_attn.v_proj.weight.mul_(1e4)
        caplog.clear()
        report = quantize_model(
            model, "fp8-static", data, kv_cache=True, smooth=True, overrides=overrides
        )
        rows = by_name(report)
        down, value = (rows.get(f"model.layers.1.{name}") for name in
                       ("mlp.down_proj", "self_attn.v_proj"))  # fmt: skip
        assert down.method == "rtn" and "inputs: " in down.note and "a scale of 1" in down.note
        assert model.model.layers[1].mlp.down_proj.input_scale == 1
        assert model.model.layers[1].self_attn.v_scale == 1
        if value is not None:
            assert "self_attn: values: " in value.note
        else:  # the layer has no row
            assert any("self_attn: values: " in one.message for one in caplog.records)
        assert QuantReport.from_json(report.to_json()) == report


@pytest.mark.parametrize("method", ["gptq", "gptq+quantease", "quantease"])
def test_too_little_text_is_no_failure(method: str) -> None:
    few = [{"input_ids": torch.full((1, 3), 5)}]  # one token: Gram matrices of rank 1
    report = quantize_model(model_of(), calibration=few, method=method, damping=0.0, **W4)
    for row in report.layers:
        assert row.relative_error <= row.relative_error_rtn * (1 + 1e-6) + 1e-12
        assert row.method in (method, "rtn")
    if method != "quantease":
        raised = [row for row in report.layers if row.damping]
        assert raised and all(row.note for row in raised)


def test_generic_text_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    data = random_batches()
    for source, count in (("generic: c4.jsonl", 1), ("in-domain: own.jsonl", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "slmperf"):
            report = quantize_model(model_of(), "fp8", data, source=source)
        assert [source in record.message for record in caplog.records] == [True] * count
        assert report.calibration["source"] == source


def test_reports_are_json() -> None:
    seen: list[tuple[int, int]] = []
    data = random_batches()
    model = model_of("mistral")
    report = quantize_model(model, calibration=data, held_out=data, **W4,
                            progress=lambda *now: seen.append(now))  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert QuantReport.from_json(report.to_json()) == report
    assert report.peak_mib > 0 and report.seconds > report.calibration_seconds > 0
    assert sum(row.seconds for row in report.layers) < report.seconds
    plain = quantize_model(model_of(), "fp8")
    assert plain.calibration is None and plain.tokens == 0
    assert {row.relative_error for row in plain.layers} == {None}
    assert QuantReport.from_json(plain.to_json()) == plain
    for text in ("{}", "[]", '{"layers": [{"name": "x"}]}', "nothing"):
        with pytest.raises(InputError, match="wanted what to_json wrote"):
            QuantReport.from_json(text)


# ---- what is refused


def _nan(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")


def _quantised(model: nn.Module) -> None:
    quantize_model(model, "fp8")


BAD = {
    "no pattern": ({"overrides": {"*.q_proj*": "w4a16", "*.lm_head": None}}, "matches none"),
    "parted q and k": (
        {"overrides": {"model.layers.2.self_attn.k_proj": None}},
        r"overrides: .*model\.layers\.2\.self_attn\.q_proj and k_proj.*found w4a16-g8 and none",
    ),
    "parted gate and up": (
        {"overrides": {"*.up_proj": "w8a8"}},
        r"model\.layers\.0\.mlp\.gate_proj and up_proj.*found w4a16-g8 and w8a8",
    ),
    "everything left": ({"overrides": {"*": None}}, "at least one layer to quantise"),
    "unknown override": ({"overrides": {"*": "w5a16"}}, "wanted one of fp8, .*'w5a16'"),
    "unknown scheme": ({"scheme": "int4"}, "scheme: wanted one of fp8, .* found 'int4'"),
    "unknown method": ({"method": "awq"}, "method: wanted one of rtn, .* found 'awq'"),
    "group": (
        {"group_size": 24},
        r"model\.layers\.0\.self_attn\.q_proj: group_size 24 does not divide 32 inputs",
    ),
    "default group": (
        {"group_size": None},
        r"layers\.0\.self_attn\.q_proj: group_size 128 does not divide 32 inputs",
    ),
    "group without groups": (
        {"scheme": "fp8"}, "group_size: wanted none with scheme fp8, found 8"
    ),
    "groups of inputs": (
        {"scheme": "fp8", "group_size": None, "overrides": {"*.down_proj": "fp8-block"}},
        r"layers\.0\.mlp\.down_proj: activations: groups of 128 do not divide 64 inputs",
    ),
    "blocks of outputs": (
        {"scheme": "fp8-block", "group_size": None},
        r"layers\.0\.self_attn\.q_proj: blocks of 128 outputs do not divide its 32 outputs",
    ),
    "damping": ({"damping": -1.0}, "damping: wanted a number >= 0, found -1.0"),
    "damping of nothing": (
        {"damping": 0.1, "method": "rtn"}, "damping: wanted a method that uses it .*found only rtn"
    ),
    "two schemes of one name": (
        {"overrides": {"*.mlp.*": replace(scheme_named("w4a16", 16), name="w4a16-g8")}},
        "overrides: wanted a name of its own for every scheme, found 'w4a16-g8' for two",
    ),
    "no text": ({"calibration": None}, "wanted text for scheme w4a16-g8 by method gptq"),
    "no text, static": (
        {"calibration": None, "scheme": "fp8-static", "group_size": None},
        "calibration: wanted text for scheme fp8-static",
    ),
    "no text, cache": (
        {"calibration": None, "method": "rtn", "kv_cache": True}, "wanted text for kv_cache"
    ),
    "no text, smoothing": (
        {"calibration": None, "scheme": "w8a8", "group_size": None, "method": "rtn",
         "smooth": True},
        "wanted text for smoothing",
    ),
    "smoothed weights only": ({"smooth": True}, "smooth: wanted a scheme with quantised inputs"),
    "empty": ({"calibration": []}, "at least one calibration batch, found none"),
    "nothing counts": (
        {"calibration": [{"input_ids": torch.ones(1, 4, dtype=torch.int64),
                          "attention_mask": torch.zeros(1, 4)}]},
        "calibration: wanted at least one token that counts",
    ),
    "held-out empty": ({"held_out": []}, "at least one calibration batch, found none"),
    "other vocabulary": ({"calibration": [{"input_ids": torch.full((1, 4), 96)}]}, "0..95"),
    "not finite": (
        {"spoil": _nan}, r"quantize_model: model\.layers\.1\.mlp\.up_proj\.weight holds values"
    ),
    "quantised": ({"spoil": _quantised}, "wanted floating weights, found a quantised model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case: str) -> None:
    changes, message = BAD[case]
    settings = {"calibration": random_batches(), **W4} | changes
    model = model_of()
    settings.pop("spoil", lambda model: None)(model)
    before, kinds = state_of(model), [type(one) for one in model.modules()]
    with pytest.raises(InputError, match=message) as caught:
        quantize_model(model, **settings)
    assert "\n" not in str(caught.value)
    assert kinds == [type(one) for one in model.modules()]
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), (
            name
        )  # NaN, too


def test_mixtures_and_models_elsewhere_are_refused() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.mlp, found a mixture of experts"):
        quantize_model(model_of("mixtral"), "fp8")
    with torch.device("meta"):
        absent = model_of()
    with pytest.raises(InputError, match="quantize_model: wanted the model in memory"):
        quantize_model(absent, "fp8")


def test_schemes_by_name() -> None:
    assert list(SCHEMES) == ["fp8", "fp8-static", "fp8-block", "w8a8", "w4a16"]
    assert scheme_named("w4a16", -1).linear.weights == Int4(group_size=-1)
    assert scheme_named("w4a16").linear.weights.group_size == 128
    assert [name for name, one in SCHEMES.items() if one.static] == ["fp8-static"]
    with pytest.raises(InputError, match="group_size: wanted none with scheme w8a8, found 64"):
        scheme_named("w8a8", 64)
