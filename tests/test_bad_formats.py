"""Quantised checkpoints that are broken or of another kind: one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from safetensors.torch import load_file, save_file
from small_quantized import SCHEMES, quantized

from slmperf.check import InputError
from slmperf.models import load, save
from slmperf.models.formats.compressed_tensors import read_schemes, write_config
from slmperf.models.kv_scales import set_kv_scales

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with four-bit weights and scales of keys and values."""
    save(quantized(small_models.llama(), SCHEMES["w4a16"], kv_cache=True), None, tmp_path / "q")
    return tmp_path / "q"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, f"q: the checkpoint lacks tensor {UP}.weight_scale$"),
        ("weight_packed", None, f"q: the checkpoint lacks tensor {UP}.weight_packed$"),
        ("weight_shape", None, f"lacks tensor {UP}.weight_shape"),
        ("weight_g_idx", torch.zeros(32), f"has an unknown tensor {UP}.weight_g_idx"),
        (
            "weight_scale",
            torch.ones(48, 2),
            r"weight_scale is \(48, 2\), config.json wants \(48, 4\)",
        ),
        (
            "weight_packed",
            torch.ones(48, 4),
            "weight_packed is torch.float32, .* wants torch.int32",
        ),
        ("weight_shape", torch.tensor([32, 48]), r"weight_shape says \[32, 48\], .* \[48, 32\]"),
        (
            "weight_scale",
            torch.full((48, 4), torch.inf),
            "weight_scale has values that are not fin",
        ),
    ],
)
def test_wrong_tensors(folder: Path, part: str, value: Any, message: str) -> None:
    tensors = load_file(folder / "model.safetensors") | {f"{UP}.{part}": value}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, message)


def test_wrong_scales_of_the_cache(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.0.self_attn.k_scale"
    save_file({key: value for key, value in whole.items() if key != name}, path)
    refused(folder, f"lacks tensor {name}")
    save_file(whole | {name: torch.ones(8)}, path)
    refused(folder, rf"{name} is \(8,\), config.json wants \(1,\)")
    save_file(whole | {name: torch.tensor(0.5)}, path)  # single numbers come in either shape
    assert load(folder).model.layers[0].self_attn.k_scale.tolist() == [0.5]
    change(folder, lambda config: config.update(kv_cache_scheme=None))
    refused(folder, f"has an unknown tensor {name} and 3 more")


def test_truncated_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    refused(folder, f"truncated: wanted {len(whole)} bytes, found {len(whole) - 7}")


def test_another_model_than_the_configuration_says(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text()
    path.write_text(good.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    refused(folder, r"down_proj.weight_packed is \(32, 6\), config.json wants \(32, 5\)")
    path.write_text(good.replace('"intermediate_size": 48', '"intermediate_size": 44'))
    refused(folder, r"config.json: model.layers.0.mlp.down_proj: .*group_size 8 does not divide 44")
    path.write_text(good.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused(folder, "lacks tensor model.layers.2")


def change(folder: Path, edit: Any) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    edit(fields["quantization_config"])
    path.write_text(json.dumps(fields))


WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 8}


def with_group(**changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"} | changes
    return {"config_groups": {"g": group}}


def with_weights(**changes: Any) -> dict[str, Any]:
    return with_group(weights=WEIGHTS | changes)


def with_inputs(**changes: Any) -> dict[str, Any]:
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True} | changes
    return with_group(input_activations=inputs, format="int-quantized")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config_groups: wanted an object, found None"),
        (
            {"config_groups": {"W8A8": ["Linear"]}},
            r"config_groups.W8A8: wanted an object, found \[",
        ),
        ({"quantization_status": "frozen"}, "status is 'frozen', wanted 'compressed'"),
        ({"transform_config": {"config_groups": {}}}, "transform_config is .*, wanted none"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is .*, wanted none",
        ),
        (
            with_group(targets="Linear"),
            r"config_groups.g.targets: wanted a list of names, found 'L",
        ),
        (with_group(targets=["re:("]), r"target 're:\(': no regular expression"),
        (with_group() | {"ignore": "lm_head"}, "ignore: wanted a list of names"),
        (with_group(format="marlin-24"), "format 'marlin-24', wanted 'pack-quantized' for such"),
        (with_group(format=None), "format None"),
        (with_group(format="int-quantized"), "format 'int-quantized', wanted 'pack-quantized'"),
        (with_group(weights=None), "config_groups.g.weights: wanted an object, found None"),
        (with_group(output_activations={}), "quantises outputs, wanted output_activations null"),
        (
            with_weights(actorder="group"),
            "actorder 'group': reordered groups .weight_g_idx. are not",
        ),
        (
            with_weights(strategy="tensor_group"),
            "strategy is 'tensor_group', wanted tensor, channel",
        ),
        (with_weights(strategy="attn_head"), "strategy is 'attn_head'"),
        (with_weights(num_bits=5), "g.weights: bits: wanted 2, 3, 4 or 8, found 5"),
        (with_weights(type="float"), "g.weights: bits: wanted 8, found 4"),
        (with_weights(type="fp"), "kind: wanted 'int' or 'float', found 'fp'"),
        (with_weights(group_size="8"), "group_size is '8', wanted a number or null"),
        (with_weights(group_size=-1), "strategy 'group' with group_size -1"),
        (with_weights(strategy="channel"), "strategy 'channel' with group_size 8"),
        (with_weights(block_structure=[8, 8]), r"strategy 'group' with block_structure \[8, 8\]"),
        (
            with_weights(strategy="block", group_size=None, block_structure=[8]),
            r"strategy 'block' with block_structure \[8\]",
        ),
        (with_weights(dynamic=True), "dynamic is True, wanted false"),
        (with_weights(scale_dtype="torch.uint8"), "scale_dtype is 'torch.uint8', wanted null"),
        (with_weights(surprise=1), "g.weights: unknown key 'surprise'"),
        (with_inputs(num_bits=4), "input_activations: num_bits is 4, wanted 8 for 'token'"),
        (with_inputs(symmetric=False), "symmetric is False, wanted True"),
        (with_inputs(dynamic=False), "dynamic is False, wanted True for 'token'"),
        (with_inputs(strategy="tensor"), "dynamic is True, wanted False for 'tensor'"),
        (with_inputs(strategy="group", group_size=64), "group_size is 64, wanted 128 for 'group'"),
        (with_inputs(strategy="channel", dynamic=False), "strategy: wanted 'token'"),
        (with_group() | {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme is"),
    ],
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_schemes(config, ["layers.0.up_proj", "lm_head"])
    assert "\n" not in str(caught.value)


def test_refusals_name_the_file(folder: Path) -> None:
    def method(config: dict[str, Any]) -> None:
        config["quant_method"] = "awq"

    change(folder, lambda config: config["config_groups"]["group_0"].update(targets=3))
    refused(
        folder, "q/config.json: quantization_config: config_groups.group_0.targets: wanted a list"
    )
    change(folder, method)
    refused(
        folder, "config.json: quantization_config has quant_method 'awq', wanted 'compr.* 'gptq'"
    )


def test_a_tied_head_is_not_quantised(tmp_path: Path) -> None:
    model = quantized(small_models.llama(tie_word_embeddings=True), SCHEMES["w4a16"])
    save(model, None, tmp_path)
    change(tmp_path, lambda config: config.update(ignore=[]))
    refused(tmp_path, "lm_head is quantised, but tied to the embeddings")


def test_a_mixture_of_experts_is_not_read(tmp_path: Path) -> None:
    model = small_models.mixtral()
    model.config.quantization_config = with_group() | {"quant_method": "compressed-tensors"}
    save(model, None, tmp_path)
    refused(tmp_path, "a quantised mixture of experts is not read")


def test_models_without_a_configuration_of_their_own() -> None:
    model = small_models.llama()
    with pytest.raises(InputError, match="wanted a model with quantised layers, found none"):
        write_config(model)
    scale = torch.tensor(0.1)
    set_kv_scales(model.model.layers[0].self_attn, scale, scale)
    with pytest.raises(
        InputError, match=r"in all layers or none, model\.layers\.1\.self_attn lacks"
    ):
        write_config(model)
