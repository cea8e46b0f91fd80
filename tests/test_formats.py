"""Quantised checkpoints: their layout, who reads them, and what is no such checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_quantized import SCHEMES, assert_near, by_reference, quantized
from test_shrink import IDS, logits, made, neurons
from torch import nn

from slmperf.models import PrunedForCausalLM, QuantizedLinear, load, save, shrink
from slmperf.models.formats.compressed_tensors import quantization_config, read_schemes
from slmperf.models.kv_scales import has_kv_scales
from slmperf.models.quantized import LinearScheme

DTYPES = (torch.float32, torch.bfloat16)
STOCK = [name for name in SCHEMES if "asymmetric" not in name]
SMALL = {"num_hidden_layers": 1}
# Inputs in groups of 32 or 128, and outputs that blocks of 128 do not divide.
BLOCKS = SMALL | {"hidden_size": 256, "intermediate_size": 128}
BLOCKS |= {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}


def dense(
    folder: Path, dtype: torch.dtype, family: str = "llama-biased", **sizes: Any
) -> nn.Module:
    """A model as it comes from a checkpoint of this dtype (rotary frequencies stay in fp32)."""
    save(made(family, **sizes).to(dtype), None, folder / "dense")
    return load(folder / "dense", dtype=dtype)


def stock(folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The checkpoint as Transformers reads it."""
    pytest.importorskip("compressed_tensors")
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    assert type(read).__module__.startswith("transformers.") or options
    return read.eval()


def same_files(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, bit for bit, and the same configuration."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]


def same_logits(
    theirs: nn.Module, ours: nn.Module, scheme: LinearScheme, dtype: torch.dtype
) -> None:
    """To the bit by the reference, but for inputs in bf16, which they round twice."""
    wanted = logits(theirs).float()
    with by_reference():
        found = logits(ours).float()
    if dtype == torch.float32 or scheme.activations is None:
        assert torch.equal(found, wanted)
    for one in (found, logits(ours).float()):
        assert_near(one, wanted, 1e-3 if dtype == torch.float32 else 0.1)


# ---- who reads what we write


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_reloaded_checkpoints_compute_the_same_logits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    wide = name == "fp8-block" or "32" in name
    family, sizes = ("mistral", BLOCKS) if wide else ("llama-biased", SMALL)
    model = quantized(dense(tmp_path, dtype, family, **sizes), SCHEMES[name], kv_cache=True)
    save(model, None, tmp_path / "quantized")
    back = load(tmp_path / "quantized", dtype=dtype)
    assert torch.equal(logits(back), logits(model))
    assert not any(tensor.is_meta for tensor in back.state_dict().values())
    save(back, None, tmp_path / "again")
    same_files(tmp_path / "quantized", tmp_path / "again")
    if name in STOCK:
        same_logits(stock(tmp_path / "quantized", dtype), model, SCHEMES[name], dtype)


@pytest.mark.parametrize(
    "family", ["llama-tied", "mistral", "qwen2", "qwen3", "refused", "gemma", "gemma2"]
)
def test_every_family_reloads(family: str, tmp_path: Path) -> None:
    mixed = {"q_proj": SCHEMES["fp8"], "k_proj": SCHEMES["fp8"], "v_proj": SCHEMES["fp8"]}
    mixed |= {"gate_proj": SCHEMES["w4a16"], "up_proj": SCHEMES["w4a16"]}
    mixed |= {"down_proj": SCHEMES["w8a8"]}
    model = (
        small_gemma(family) if family.startswith("gemma") else made(family, intermediate_size=48)
    )
    save(model, None, tmp_path / "dense")
    model = quantized(load(tmp_path / "dense"), mixed, kv_cache=True)
    save(model, None, tmp_path / "quantized")
    back = load(tmp_path / "quantized")
    assert torch.equal(logits(back), logits(model))
    read = stock(tmp_path / "quantized", torch.float32)
    if model.config.tie_word_embeddings:
        assert back.lm_head.weight is back.model.embed_tokens.weight
    start = {"input_ids": IDS[:1, :4], "max_new_tokens": 4, "do_sample": False}
    with by_reference():
        assert torch.equal(logits(read), logits(model))
        assert torch.equal(back.generate(**start), read.generate(**start))  # through the cache


def small_gemma(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind = {"gemma": "Gemma", "gemma2": "Gemma2"}[family]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kept", [[24, 24, 24], [24, 40, 8]])
def test_shrunk_models_reload(kept: list[int], tmp_path: Path) -> None:
    model = made("qwen2")
    heads = [[0, 1, 2, 3]] * 3 if len(set(kept)) == 1 else [[0, 2, 3], [0, 1], [0, 1, 4, 6, 7]]
    model = shrink(model, mlp=neurons(model, kept), query_heads=heads)
    save(model, None, tmp_path / "dense")
    model = quantized(load(tmp_path / "dense"), {"up_proj": SCHEMES["w8a8"]}, kv_cache=True)
    save(model, None, tmp_path / "quantized")
    back = load(tmp_path / "quantized")
    assert torch.equal(logits(back), logits(model)) and type(back) is type(model)
    if type(model) is PrunedForCausalLM:
        assert len(set(kept)) > 1
        return
    same_logits(stock(tmp_path / "quantized", torch.float32), model, SCHEMES["w8a8"], torch.float32)


@pytest.mark.parametrize("name", ["fp8-static", "w8a8", "w4a16", "w4a16-channel"])
@pytest.mark.parametrize(("stored", "asked"), [DTYPES, DTYPES[::-1]])
def test_another_dtype_than_the_stored_one(
    name: str, stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    save(quantized(dense(tmp_path, stored), SCHEMES[name], kv_cache=True), None, tmp_path / "q")
    back = load(tmp_path / "q", dtype=asked)
    read = stock(tmp_path / "q", asked)
    assert back.model.layers[0].mlp.up_proj.scales.scale.dtype == asked
    same_logits(read, back, SCHEMES[name], asked)


def test_asymmetric_weights_reload_dequantised_in_stock_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantized(dense(tmp_path, torch.float32, **SMALL), SCHEMES["w4a16-asymmetric"])
    save(model, None, tmp_path / "q")
    assert "asymmetric packed weights: engines load them; Transformers" in caplog.text
    how = transformers.CompressedTensorsConfig(dequantize=True)
    read = stock(tmp_path / "q", torch.float32, quantization_config=how)
    assert torch.equal(logits(read), logits(model))


def test_scales_of_the_cache_alone(tmp_path: Path) -> None:
    model = quantized(dense(tmp_path, torch.float32, **SMALL), {}, kv_cache=True)
    del model.config.quantization_config  # the layers say what the checkpoint is
    save(model, None, tmp_path / "q")
    back = load(tmp_path / "q")
    assert torch.equal(logits(back), logits(model)) and has_kv_scales(
        back.model.layers[0].self_attn
    )
    assert torch.equal(logits(stock(tmp_path / "q", torch.float32)), logits(model))


def test_shards_and_generation_settings(tmp_path: Path) -> None:
    model = quantized(small_models.llama(), SCHEMES["w4a16"])
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path / "q", max_shard_size="10KB")
    assert len(list((tmp_path / "q").glob("model-*.safetensors"))) > 2
    back = load(tmp_path / "q")
    assert torch.equal(logits(back), logits(model))
    assert back.generation_config.eos_token_id == 7
    assert torch.equal(logits(stock(tmp_path / "q", torch.float32)), logits(model))


# ---- the layout


def test_tensors_and_configuration_are_those_of_the_layout(tmp_path: Path) -> None:
    model = quantized(dense(tmp_path, torch.bfloat16, **SMALL), SCHEMES["w4a16"], kv_cache=True)
    save(model, None, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    down = "model.layers.0.mlp.down_proj"
    parts = {name.removeprefix(down): value for name, value in tensors.items() if down in name}
    found = {name: (value.dtype, list(value.shape)) for name, value in parts.items()}
    assert found == {
        ".bias": (torch.bfloat16, [48]),
        ".weight_packed": (torch.int32, [48, 5]),
        ".weight_scale": (torch.bfloat16, [48, 5]),
        ".weight_shape": (torch.int64, [2]),
    }
    assert parts[".weight_shape"].tolist() == [48, 40]
    assert tensors["model.layers.0.self_attn.k_scale"].shape == (1,)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_configuration_of_one_scheme(tmp_path: Path) -> None:
    model = quantized(small_models.llama(num_hidden_layers=1), SCHEMES["w4a16"], kv_cache=True)
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    cache = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    assert model.config.quantization_config == {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments | {"group_size": 8, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "format": "pack-quantized",
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": cache | {"group_size": None, "dynamic": False},
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "moe_sparsity_config": None,
        "version": "0.20.0",
    }


def test_configuration_of_several_schemes_names_every_layer() -> None:
    mixed = {"gate_proj": SCHEMES["w8a8"], "up_proj": SCHEMES["w8a8"], "o_proj": SCHEMES["fp8"]}
    model = quantized(small_models.llama(), mixed)
    config = model.config.quantization_config
    assert config["format"] == "mixed-precision" and config["kv_cache_scheme"] is None
    first, second = config["config_groups"].values()
    layers = "model.layers.0.", "model.layers.1."
    escaped = r"re:model\.layers\.0\.", r"re:model\.layers\.1\."
    assert first["targets"] == [f"{layer}self_attn.o_proj" for layer in layers]
    # Patterns where engines run several layers as one, which they look for by either name.
    both = [rf"{layer}mlp\.(gate_proj|up_proj|gate_up_proj)$" for layer in escaped]
    assert second["targets"] == both
    assert (first["format"], second["format"]) == ("float-quantized", "int-quantized")
    three = [rf"{layer}self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$" for layer in escaped]
    left = {*three, *(f"{layer}mlp.down_proj" for layer in layers), "lm_head"}
    assert set(config["ignore"]) == left and len(config["ignore"]) == 5
    alone = quantized(small_models.llama(), {"q_proj": SCHEMES["w8a8"], "k_proj": SCHEMES["fp8"]})
    groups = alone.model.config.quantization_config["config_groups"]
    assert groups["group_0"]["targets"] == [f"{layer}self_attn.q_proj" for layer in layers]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(["none", *SCHEMES]), min_size=1, max_size=5), kv=st.booleans()
)
def test_schemes_come_back_from_the_configuration(names: list[str], kv: bool) -> None:
    linears = [f"layers.{index}.proj" for index in range(len(names))] + ["lm_head"]
    schemes = {
        linear: SCHEMES[name]
        for linear, name in zip(linears, names, strict=False)
        if name != "none"
    }
    config = quantization_config(schemes, linears=linears, kv_cache=kv)
    back, kv_cache = read_schemes(json.loads(json.dumps(config)), linears)
    assert kv_cache == kv
    plain = {name: one.scheme for name, one in back.items()}
    assert plain.keys() == schemes.keys()
    again = quantization_config(plain, linears=linears, kv_cache=kv)
    assert again == config
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError:
        return
    QuantizationConfig.model_validate(config)  # refuses arguments that it does not know


def test_layers_are_matched_by_name_then_pattern_then_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    config = {
        "config_groups": {
            "class": group(8, "Linear"),
            "pattern": group(4, "re:.*up_proj$"),
            "name": group(2, "layers.1.up_proj"),
        },
        "ignore": ["re:.*head", "layers.0.o_proj"],
    }
    linears = [
        "layers.0.up_proj",
        "layers.1.up_proj",
        "layers.0.o_proj",
        "layers.1.o_proj",
        "lm_head",
    ]
    schemes, kv_cache = read_schemes(config, linears)
    found = {name: one.scheme.weights.bits for name, one in schemes.items()}
    assert found == {"layers.0.up_proj": 4, "layers.1.up_proj": 2, "layers.1.o_proj": 8}
    assert not kv_cache


# ---- checkpoints of others

PRESETS = [
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
    "W8A8",
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W3A16",
    "W4A8",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_compressed_tensors_exports_comes_back_as_it_was(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    exported = export(preset, tmp_path)
    back = load(tmp_path / "theirs", dtype=torch.bfloat16)
    layers = [layer for layer in back.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 7 and all(map(has_kv_scales, [back.model.layers[0].self_attn]))
    save(back, None, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and tensor.shape == ours[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name
    if preset != "W4A16_ASYM":
        with by_reference():
            found = logits(back)
        if preset in ("W4A16", "W8A16", "W3A16", "W4A8"):
            assert torch.equal(found, exported)
        assert_near(found, exported, 0.1)


def export(preset: str, folder: Path) -> torch.Tensor:
    """Have compressed-tensors quantise a model, round to nearest, into `theirs`; its logits."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = dense(folder, torch.bfloat16, "mistral", **BLOCKS)
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    config = QuantizationConfig(
        config_groups={preset: ["Linear"]}, ignore=["lm_head"], kv_cache_scheme=cache
    )
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if hasattr(layer, "k_scale"):
            layer.k_scale.data.fill_(0.01)
            layer.v_scale.data.fill_(0.02)
        if scheme is None or scheme.weights is None:
            continue
        args, weight = scheme.weights, layer.weight.data
        parts = weight[None]
        if args.strategy == "channel":
            parts = weight[:, None]
        elif args.strategy == "group":
            parts = weight.unflatten(1, (-1, args.group_size))
        elif args.strategy == "block":
            down, across = args.block_structure
            rows = -weight.shape[0] % down
            whole = nn.functional.pad(weight, (0, 0, 0, rows)).unflatten(0, (-1, down))
            parts = whole.unflatten(2, (-1, across)).transpose(1, 2).flatten(2)
        if args.strategy == "tensor":
            low, high = weight.min(), weight.max()
        else:
            low, high = parts.amin(-1), parts.amax(-1)
        scale, zero_point = calculate_qparams(low, high, args)
        layer.weight_scale.data.copy_(scale)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data.copy_(zero_point)
        if hasattr(layer, "input_scale"):
            layer.input_scale.data.fill_(0.02)
    logits_before = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "theirs")
    compressor.update_config(folder / "theirs")
    return logits_before
