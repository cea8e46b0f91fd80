"""Whole models quantised block by block: what each layer is solved with, and what is refused."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pruning import logits, model_of, random_batches
from small_smoothing import gemma
from stories260k import batches, load_stories260k, perplexity, story_tokens
from test_shrink import made, neurons
from torch import Tensor, nn

from slmperf.calibrate import BlockStream, Gram
from slmperf.check import InputError
from slmperf.models import PrunedForCausalLM, load, parameters, save, shrink, weight_bytes
from slmperf.models.quantized import LinearScheme, QuantizedLinear, held_weights
from slmperf.ops.weight_spec import Int4, WeightSpec
from slmperf.quant import (
    SCHEMES,
    LayerQuantized,
    QuantReport,
    Scheme,
    driver,
    quantize_model,
    quantize_weight,
    smooth,
)
from slmperf.quant.unit import Solved

# Groups of 8 of a model's 32 inputs; nothing is smoothed but where a test says so: it takes long.
W4 = {"scheme": "w4a16", "group_size": 8}


def counting(batch: dict[str, Tensor]) -> Tensor:
    """Which places (B, T) count."""
    return batch["attention_mask"] > 0


@torch.no_grad()
def gram_of(model: nn.Module, name: str, data: list[dict[str, Tensor]]) -> Tensor:
    """X'X / n of a layer's inputs, fp64, padding left out."""
    rows: list[Tensor] = []
    mask: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0][mask[-1]]))
    for batch in data:
        mask.append(counting(batch))
        model(**batch)
    handle.remove()
    inputs = torch.cat(rows).double()
    return inputs.T @ inputs / len(inputs)


def relative(weight: Tensor, made: Tensor, gram: Tensor) -> float:
    weight = weight.detach().double()
    error = weight - made.double()
    return float(((error @ gram) * error).sum() / ((weight @ gram) * weight).sum())


def by_name(report: QuantReport) -> dict[str, LayerQuantized]:
    return {layer.name: layer for layer in report.layers}


# ---- what layers are solved with


def test_layers_are_solved_behind_the_quantised_ones() -> None:
    dense, data, other = model_of("llama-bias"), random_batches(), random_batches(2)
    model = copy.deepcopy(dense)
    report = quantize_model(model, calibration=data, held_out=other, **W4)
    rows = by_name(report)
    assert [layer.name for layer in report.layers][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    # Of the first block every input is the dense model's, of later ones those of their first layers
    # what the quantised blocks before them make.
    of_dense = [f"model.layers.0.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")]
    behind = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1, 2) for name in "qkv"]
    for names, source in ((of_dense, dense), (behind, model)):
        for name in names:
            weight, layer = dense.get_submodule(name).weight, model.get_submodule(name)
            gram = gram_of(source, name, data)
            alone = quantize_weight(weight, gram.float(), Int4(group_size=8))
            # Solved as one with others of its inputs, from a Gram matrix with other rounding.
            assert (alone.codes != layer.codes).float().mean() < 0.02, name
            error = relative(weight, layer.dequantized(), gram)
            assert rows[name].relative_error == pytest.approx(error, rel=1e-3)
            assert rows[name].relative_error < rows[name].relative_error_rtn
            held_out = relative(weight, layer.dequantized(), gram_of(source, name, other))
            assert rows[name].held_out_error == pytest.approx(held_out, rel=1e-3)
    # Behind the dense blocks it would be another error: the test can tell.
    last = behind[-1]
    weight, made = dense.get_submodule(last).weight, model.get_submodule(last).dequantized()
    elsewhere = relative(weight, made, gram_of(dense, last, data))
    assert rows[last].relative_error != pytest.approx(elsewhere, rel=1e-3)


def test_gram_matrices_are_freed_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Gram] = weakref.WeakSet()
    taken, solve, found = BlockStream.grams, driver.quantize_unit, []

    def grams(*given: Any) -> dict[str, Gram]:
        made = taken(*given)
        alive.update(made.values())
        return made

    def counted(*given: Any, **named: Any) -> dict[str, Solved]:
        found.append(len(alive))
        return solve(*given, **named)

    monkeypatch.setattr(BlockStream, "grams", grams)
    monkeypatch.setattr(driver, "quantize_unit", counted)
    model, data = model_of(num_hidden_layers=1), random_batches()
    quantize_model(model, calibration=data, held_out=data, method="gptq", **W4)
    assert found == [3, 2, 1, 0]  # what is solved has its matrices in fp32 by then


def test_padding_does_not_count() -> None:
    data = random_batches()
    garbled = [
        batch | {"input_ids": torch.where(counting(batch), batch["input_ids"], 7)} for batch in data
    ]
    weighted = [
        {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"]),
         "token_weights": batch["attention_mask"].float()} for batch in data
    ]  # fmt: skip
    plain, other, third = (
        (model, quantize_model(model, calibration=text, method="gptq", **W4))
        for model, text in ((model_of(), one) for one in (data, garbled, weighted))
    )
    assert same(plain[0], other[0]) and plain[1].tokens == other[1].tokens
    tokens = sum(int(counting(batch).sum()) for batch in data)
    assert third[1].tokens == plain[1].tokens == tokens == plain[1].calibration["tokens"]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


def test_every_method_reduces_the_error_of_rounding() -> None:
    data, errors = random_batches(), {}
    for method in ("rtn", "gptq", "quantease", "gptq+quantease"):
        report = quantize_model(model_of(), calibration=data, method=method, **W4)
        rows = [row for row in report.layers if row.name.startswith("model.layers.0.")]
        errors[method] = sum(row.relative_error for row in rows)
        assert {row.method for row in report.layers} == {method}
        assert all(row.relative_error <= row.relative_error_rtn for row in report.layers)
        assert {row.damping for row in rows} == {{"rtn": None, "quantease": 0.0}.get(method, 0.01)}
    assert errors["rtn"] > errors["gptq"] > errors["gptq+quantease"]
    assert errors["rtn"] > errors["quantease"]
    damped = quantize_model(model_of(), calibration=data, damping=0.5, **W4)
    assert {row.damping for row in damped.layers} == {0.5}


def test_pruned_weights_keep_their_zeros() -> None:
    model = model_of()
    pruned, dense = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        for name, share in ((pruned, 0.5), (dense, 0.02)):
            weight = model.get_submodule(name).weight
            zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
            weight[zero] = 0.0
    zeros = {name: model.get_submodule(name).weight == 0 for name in (pruned, dense)}
    quantize_model(model, calibration=random_batches(), **W4)
    assert (model.get_submodule(pruned).dequantized()[zeros[pruned]] == 0).all()
    # The first is solved as one with the second: the pattern is each layer's own.
    assert (model.get_submodule(dense).dequantized()[zeros[dense]] != 0).any()


# ---- schemes and checkpoints


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_scheme_comes_back_from_its_checkpoint(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    sizes["num_key_value_heads"] = 8
    save(model_of("llama-bias", **sizes).to(dtype), None, tmp_path / "dense")
    dense, data = load(tmp_path / "dense", dtype=dtype), random_batches()
    model, before = copy.deepcopy(dense), weight_bytes(dense)
    report = quantize_model(model, name, data, smooth=False, kv_cache=True)
    assert report.settings["scheme"] == name and not report.settings["smooth"]
    assert parameters(model) == parameters(dense)
    assert report.bytes_before == before
    assert report.bytes_after == weight_bytes(model) < 0.7 * before
    for row in report.layers:
        layer = model.get_submodule(row.name)
        stored = sum(
            tensor.nbytes
            for name, tensor in layer.stored().items()
            if name.removeprefix("weight_") in ("weight", "packed", "scale")
        )
        assert row.bits == 8 * stored / layer.out_features / layer.in_features
    assert not isinstance(model.lm_head, QuantizedLinear)
    wrong = logits(model, data[0]) - logits(dense, data[0])
    limit = 0.6 if name == "w4a16" else 0.25
    assert 0 < wrong.float().norm() < limit * logits(dense, data[0]).float().norm()
    save(model, None, tmp_path / "quantised")
    back = load(tmp_path / "quantised", dtype=dtype)
    assert same(back, model)
    assert torch.equal(logits(back, data[0]), logits(model, data[0]))
    assert model.config.quantization_config == back.config.quantization_config


def test_one_scale_per_channel_is_a_group_size() -> None:
    model = model_of()
    report = quantize_model(model, "w4a16", method="rtn", group_size=-1)
    assert model.model.layers[0].mlp.down_proj.scales.scale.shape == (32, 1)
    assert by_name(report)["model.layers.0.mlp.down_proj"].bits == 4 + 32 / 64


def test_static_scales_are_one_for_what_engines_run_as_one() -> None:
    model = model_of(hidden_size=128)
    quantize_model(model, "fp8-static", random_batches())
    block = model.model.layers[1]
    for names in (("q", "k", "v"), ("gate", "up")):
        part = block.self_attn if "q" in names else block.mlp
        layers = [part.get_submodule(f"{name}_proj") for name in names]
        assert len({float(layer.scales.scale) for layer in layers}) == 1
        assert len({float(layer.input_scale) for layer in layers}) == 1
    assert block.mlp.down_proj.input_scale != block.mlp.up_proj.input_scale


def test_blocks_of_weights_are_each_layer_s_own() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 8}
    dense, data = model_of(**sizes), random_batches()
    with torch.no_grad():  # scales of one layer would be far off in the next
        dense.model.layers[0].self_attn.k_proj.weight *= 100
    quantised = copy.deepcopy(dense)
    rows = by_name(quantize_model(quantised, "fp8-block", data))
    for name in ("q", "k", "v"):
        full = f"model.layers.0.self_attn.{name}_proj"
        weight, layer = dense.get_submodule(full).weight, quantised.get_submodule(full)
        assert layer.scales.scale.shape == (1, 1)
        error = relative(weight, layer.dequantized(), gram_of(dense, full, data))
        assert rows[full].relative_error == pytest.approx(error, rel=1e-3) and error < 0.01


def test_schemes_differ_by_pattern(tmp_path: Path) -> None:
    model, data = model_of("qwen2"), random_batches()
    overrides = {
        "*.mlp.*": "w8a8",
        "model.layers.1.*": None,
        "model.layers.1.self_attn.o_proj": Scheme("w3", LinearScheme(WeightSpec(bits=3)), "gptq"),
    }
    report = quantize_model(model, "w4a16", data, group_size=16, overrides=overrides, smooth=False)
    rows = by_name(report)
    assert rows["model.layers.0.mlp.up_proj"].scheme == "w8a8"
    assert rows["model.layers.0.mlp.up_proj"].method == "gptq"
    assert rows["model.layers.0.self_attn.v_proj"].scheme == "w4a16-g16"
    assert rows["model.layers.1.self_attn.o_proj"].scheme == "w3"
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear and len(rows) == 15
    assert model.model.layers[0].self_attn.q_proj.scheme.weights.group_size == 16
    assert report.settings["overrides"]["model.layers.1.self_attn.o_proj"] == "w3"
    assert report.settings["methods"] == {
        "w4a16-g16": "gptq+quantease",
        "w8a8": "gptq",
        "w3": "gptq",
    }
    save(model, None, tmp_path / "mixed")
    assert torch.equal(logits(load(tmp_path / "mixed"), data[0]), logits(model, data[0]))


def test_smoothing_goes_before_and_only_once(tmp_path: Path) -> None:
    data = random_batches()[:1]
    model, plain = (model_of("mistral-plain", num_hidden_layers=1) for _ in range(2))
    with torch.no_grad():  # outliers that smoothing is for
        for one in (model, plain):
            one.model.layers[0].input_layernorm.weight[3] = 60.0
    report = quantize_model(model, "w8a8", data)
    rows = by_name(report)
    alpha = rows["model.layers.0.self_attn.q_proj"].alpha
    assert alpha is not None and 0.3 <= alpha <= 0.95 and report.settings["smooth"]
    assert rows["model.layers.0.self_attn.k_proj"].alpha == alpha
    unsmoothed = quantize_model(plain, "w8a8", data, smooth=False)
    assert {row.alpha for row in unsmoothed.layers} == {None}
    dense = model_of("mistral-plain", num_hidden_layers=1)
    with torch.no_grad():
        dense.model.layers[0].input_layernorm.weight[3] = 60.0
    wrong = [(logits(one, data[0]) - logits(dense, data[0])).norm() for one in (model, plain)]
    assert wrong[0] < 0.7 * wrong[1]
    save(model, None, tmp_path / "smoothed")
    assert load(tmp_path / "smoothed").config.slmperf_smoothed
    smooth(dense, data, alphas=(0.5,))
    with pytest.raises(InputError, match="smoothed before"):
        quantize_model(copy.deepcopy(dense), "w8a8", data, smooth=True)
    report = quantize_model(dense, "w8a8", data)  # smoothed already: that will do
    assert not report.settings["smooth"] and {row.alpha for row in report.layers} == {None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "heads", "layers"])
def test_other_models(family: str, tmp_path: Path) -> None:
    if family == "gemma":
        model = gemma()
    elif family == "heads":
        model = shrink(made("llama-biased"), query_heads=[[0, 2, 3, 5]] * 3)
    elif family == "layers":
        dense = made("qwen2")
        model = shrink(dense, mlp=neurons(dense, [16, 40, 24]), kv_groups=[[0], [1, 2], [3]])
    else:
        model = model_of(family)
    data = [{"input_ids": torch.arange(48).view(4, 12)}]
    report = quantize_model(model, "w8a8", data, smooth=False, kv_cache=True)
    assert len(report.layers) == 7 * len(model.model.layers)
    save(model, None, tmp_path / "quantised")
    back = load(tmp_path / "quantised")
    assert type(back) is type(model)
    assert isinstance(back, PrunedForCausalLM) == (family in ("heads", "layers"))
    with torch.no_grad():
        assert torch.equal(back(**data[0]).logits, model(**data[0]).logits)


def test_real_weights_lose_less_by_better_methods(shared_data: Path) -> None:
    text, other = (
        batches([one[:200] for one in story_tokens(shared_data, split, 16)], 8)
        for split in ("calib", "eval")
    )
    dense = load_stories260k(shared_data)
    found = {"dense": perplexity(dense, other)}
    for name, settings in {
        "fp8": {"scheme": "fp8", "calibration": None},
        "w8a8": {"scheme": "w8a8", "smooth": False},
        "w3 rtn": {"method": "rtn"},
        "w3 default": {},
    }.items():
        model = copy.deepcopy(dense)
        three_bits = Scheme("w3", LinearScheme(WeightSpec(bits=3, group_size=4)), "gptq+quantease")
        quantize_model(model, **({"scheme": three_bits, "calibration": text} | settings))
        with held_weights(model):
            found[name] = perplexity(model, other)
    assert found["fp8"] < 1.02 * found["dense"] and found["w8a8"] < 1.005 * found["dense"]
    lost = {name: value - found["dense"] for name, value in found.items()}
    assert lost["w3 default"] < 0.6 * lost["w3 rtn"], found
