"""Round-to-nearest int8: the numbers, the checkpoint's layout, and exact reloading."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import IDS
from stories260k import batches, load_stories260k, perplexity, story_tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from slmperf.check import InputError
from slmperf.models import QuantizedLinear, load, parameters, save, weight_bytes
from slmperf.quant import Int8, quantize_model, rtn


def llama(**changes: object) -> LlamaForCausalLM:
    return small_models.llama(attention_bias=True, **changes)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-6, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rounding_is_to_the_nearest_code_of_the_stored_scale(
    seed: int, exponent: int, dtype: torch.dtype
) -> None:
    make = torch.Generator().manual_seed(seed)
    weight = (torch.randn(5, 33, generator=make) * 10.0**exponent).to(dtype)
    codes, scale = rtn(weight, Int8())
    assert codes.dtype == torch.int8 and codes.shape == (5, 33)
    assert scale.dtype == dtype and scale.shape == (5, 1)
    grid = torch.arange(-128, 128, dtype=torch.float64)[:, None, None] * scale.double()
    nearest = (grid - weight.double()).abs().amin(0)
    found = (codes.double() * scale.double() - weight.double()).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=0)
    if scale.min() > torch.finfo(dtype).tiny:  # below, scales are coarse
        assert (codes.int().abs().amax(1) >= 126).all()


def test_known_codes() -> None:
    weight = torch.tensor([[127.5, -127.5, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = rtn(weight, Int8())
    assert codes.tolist() == [[127, -128, 0, 1], [0, 0, 0, 0]]
    assert scale[0, 0] == 1.0 and scale[1, 0] == torch.finfo(torch.float32).eps
    with pytest.raises(InputError, match="not finite"):
        rtn(torch.tensor([[float("inf")]]), Int8())
    with pytest.raises(NotImplementedError, match="supported: Int8"):
        rtn(weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_reloaded_checkpoint_computes_the_same_logits(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    save(llama(tie_word_embeddings=tied), None, tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=dtype)
    dense, count = logits(model), parameters(model)
    report = quantize_model(model, Int8())
    assert report.layers == 14 and parameters(model) == count
    assert report.bytes_after == weight_bytes(model) < report.bytes_before
    assert not isinstance(model.lm_head, QuantizedLinear)
    assert 0 < (logits(model) - dense).abs().max() < 0.1 * dense.abs().max()
    save(model, None, tmp_path / "int8")
    back = load(tmp_path / "int8", dtype=dtype)
    assert torch.equal(logits(back), logits(model))
    assert weight_bytes(back) == weight_bytes(model) and parameters(back) == count
    save(back, None, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()


def test_layout_of_the_checkpoint(tmp_path: Path) -> None:
    model = llama()
    quantize_model(model, Int8())
    save(model, None, tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype == torch.int8
    assert tensors[f"{name}.weight"].shape == (32, 48)
    assert tensors[f"{name}.weight_scale"].shape == (32, 1)
    assert tensors[f"{name}.weight_scale"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.float32
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert tensors["lm_head.weight"].dtype == torch.float32
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert set(config) == {
        "config_groups",
        "format",
        "quant_method",
        "quantization_status",
        "ignore",
        "kv_cache_scheme",
        "global_compression_ratio",
        "sparsity_config",
        "transform_config",
        "moe_sparsity_config",
        "version",
    }
    group = config["config_groups"]["group_0"]
    assert set(group) == {"targets", "weights", "input_activations", "output_activations", "format"}
    assert group["input_activations"] is None and group["weights"]["strategy"] == "channel"
    # Keys that the readers' validation knows; an unknown one is a load failure there.
    known = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
    assert set(group["weights"]) == known


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="no compressed-tensors installed"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_transformers_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    save(llama(), None, tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=dtype)
    quantize_model(model, Int8())
    save(model, None, tmp_path / "int8")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=dtype).eval()
    assert torch.equal(logits(stock), logits(model))


def test_bad_checkpoints_are_one_line(tmp_path: Path) -> None:
    model = llama()
    quantize_model(model, Int8())
    folder = tmp_path / "int8"
    save(model, None, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, whole = config.read_text(), weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)

    config.write_text(good.replace("int-quantized", "pack-quantized"))
    refused("format 'pack-quantized', wanted 'compressed-tensors' and 'int-quantized'")
    changed = json.loads(good)
    changed["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8
    }
    config.write_text(json.dumps(changed))
    refused("group_0 quantises activations, wanted input_activations null")
    config.write_text(good.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    refused(
        r"is \(48, 32\), config.json wants \(40, 32\)|is \(32, 48\), config.json wants \(32, 40\)"
    )
    config.write_text(good.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused("lacks tensor model.layers.2")
    config.write_text(good)
    weights.write_bytes(whole[:-7])
    refused(f"truncated: wanted {len(whole)} bytes, found {len(whole) - 7}")


def test_models_that_cannot_be_quantised() -> None:
    model = llama()
    quantize_model(model, Int8())
    with pytest.raises(InputError, match="found a quantised one"):
        quantize_model(model, Int8())
    experts = small_models.mixtral()
    with pytest.raises(InputError, match="wanted nn.Linear mlp.gate_proj"):
        quantize_model(experts, Int8())
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before = copy.deepcopy(broken)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: rtn: weight holds"):
        quantize_model(broken, Int8())
    assert [type(m) for m in broken.modules()] == [type(m) for m in before.modules()]


def test_real_model_loses_nothing_in_int8(shared_data: Path) -> None:
    model = load_stories260k(shared_data)
    held_out = batches(story_tokens(shared_data, "eval", 20))
    before = perplexity(model, held_out)
    report = quantize_model(model, Int8())
    after = perplexity(model, held_out)
    assert after < 1.005 * before, (before, after)
    assert report.bytes_after < 0.42 * report.bytes_before
