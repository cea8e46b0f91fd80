"""GPTQ checkpoints, made here bit by bit, come back as the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import IDS, llama

from slmperf.check import InputError
from slmperf.models import QuantizedLinear, load, save
from slmperf.models.quantized import decoder_linears


class Gptq(NamedTuple):
    """A checkpoint in `folder` and the dequantised weights of its layers."""

    folder: Path
    weights: dict[str, torch.Tensor]

    def change(self, **config: Any) -> None:
        """Replace keys of the quantization_config."""
        path = self.folder / "config.json"
        fields = json.loads(path.read_text())
        fields["quantization_config"] |= config
        path.write_text(json.dumps(fields))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the checkpoint's file holds."""
        return load_file(self.folder / "model.safetensors")

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the checkpoint's file."""
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})


def words(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n, m) -> (n * bits / 32, m) int32, column by column as whole numbers of Python."""
    packed = []
    for column in unsigned.T.tolist():
        stream = sum(code << (index * bits) for index, code in enumerate(column))
        count = len(column) * bits // 32
        packed.append([(stream >> (32 * word)) % 2**32 for word in range(count)])
    values = torch.tensor(packed, dtype=torch.int64).T
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32).contiguous()


def stored_zeros(zeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """Zero points (groups, out) as they are stored: version 1 takes 1 from each field, from whole
    words where no field straddles two, so that a 0 borrows from the field above."""
    if version == 1 and bits == 3:
        zeros = (zeros - 1) % 8
    packed = words(zeros.T, bits).T.contiguous()
    if version == 1 and bits != 3:
        ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
        packed = packed.view(torch.int32) - ones  # wraps around
    return packed


def checkpoint(
    folder: Path, *, bits: int = 4, group: int = 16, symmetric: bool = True, version: int = 1
) -> Gptq:
    """A small Llama in GPTQ's layout; version 1 stores zero points less one."""
    model = llama(
        hidden_size=32, intermediate_size=64, num_key_value_heads=8, attention_bias=True
    ).half()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    make = torch.Generator().manual_seed(bits)
    weights = {}
    for name, layer in decoder_linears(model):
        outputs, inputs = layer.weight.shape
        size = inputs if group == -1 else group
        codes = torch.randint(0, 2**bits, (inputs, outputs), generator=make)
        scales = torch.rand(inputs // size, outputs, generator=make).half() / 50 + 0.001
        zeros = torch.full((inputs // size, outputs), 2 ** (bits - 1))
        if not symmetric:
            zeros = torch.randint(0, 2**bits, zeros.shape, generator=make)
        spread = torch.arange(inputs) // size
        weights[name] = ((codes - zeros[spread]) * scales.float()[spread]).T
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = words(codes, bits)
        tensors[f"{name}.qzeros"] = stored_zeros(zeros, bits, version)
        tensors[f"{name}.scales"] = scales
        tensors[f"{name}.g_idx"] = spread.to(torch.int32)
    made = Gptq(folder, weights)
    made.write(tensors)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"damp_percent": 0.05},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return made


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": 2},
        {"symmetric": False},
        {"symmetric": False, "version": 2, "bits": 8},
        {"symmetric": False, "bits": 8},
        {"symmetric": False, "bits": 2},
        {"bits": 3, "group": 32, "symmetric": False},
        {"bits": 2, "group": -1},
        {"bits": 8, "group": -1},
    ],
)
def test_weights_are_those_that_the_codes_stand_for(options: dict, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "gptq", **options)
    model = load(tmp_path / "gptq")
    layers = {
        name: layer for name, layer in model.named_modules() if type(layer) is QuantizedLinear
    }
    assert layers.keys() == made.weights.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dequantized(), made.weights[name], rtol=1e-6, atol=0)
        assert layer.scheme.weights.bits == options.get("bits", 4)
        assert layer.scheme.weights.symmetric == options.get("symmetric", True)
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() >= 0
    # Saved, it is a checkpoint of the other format.
    save(model, None, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_group_numbers_may_be_missing_or_say_what_is_usual(tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "gptq")
    usual = logits(load(made.folder))
    made.change(checkpoint_format=None, format="gptq")
    assert torch.equal(logits(load(made.folder)), usual)
    made.change(desc_act=True)  # with static groups: g_idx is as without
    assert torch.equal(logits(load(made.folder)), usual)
    made.write({name: value for name, value in made.tensors().items() if "g_idx" not in name})
    assert torch.equal(logits(load(made.folder)), usual)


def test_what_older_writers_add_is_left_out(tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "gptq")
    usual, whole = logits(load(made.folder)), made.tensors()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    down = "model.layers.0.mlp.down_proj.bias"  # a layer without one
    made.write(whole | frequencies | {down: torch.zeros(32)})
    assert torch.equal(logits(load(made.folder)), usual)
    made.write(whole | {down: torch.ones(32)})
    with pytest.raises(InputError, match=f"has an unknown tensor {down}"):
        load(made.folder)


def test_what_is_not_read_is_one_line(tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "gptq")
    whole = made.tensors()
    up = "model.layers.1.mlp.up_proj"

    def refused(message: str, **tensors: torch.Tensor | None) -> None:
        changed = whole | {f"{up}.{part}": value for part, value in tensors.items()}
        made.write({name: value for name, value in changed.items() if value is not None})
        with pytest.raises(InputError, match=message) as caught:
            load(made.folder)
        assert "\n" not in str(caught.value)

    shuffled = whole[f"{up}.g_idx"].flip(0).contiguous()
    refused(
        rf"gptq: {up}: g_idx: groups of inputs that are not neighbours .desc_act", g_idx=shuffled
    )
    refused(rf"lacks tensor {up}.qzeros", qzeros=None)
    refused(rf"lacks tensor {up}.weight", qweight=None)
    refused(rf"{up}: scales is \(1, 64\), expected \(2, 64\)", scales=whole[f"{up}.scales"][:1])
    refused(rf"{up}: qweight is torch.int64", qweight=whole[f"{up}.qweight"].long())
    refused(rf"{up}: g_idx is \(3,\), expected \(32,\)", g_idx=shuffled[:3].clone())
    made.write(whole)
    for message, change in [
        (
            "checkpoint_format is 'marlin', wanted 'gptq' or 'gptq_v2'",
            {"checkpoint_format": "marlin"},
        ),
        ("pack_dtype is 'int16'", {"pack_dtype": "int16"}),
        ("checkpoint_format is 'gptq', but format 'gptq_v2'", {"format": "gptq_v2"}),
        ("dynamic: settings of single layers", {"dynamic": {"-:.*up": {}}}),
        ("bits: wanted 2, 3, 4 or 8, found 5", {"bits": 5}),
        ("wanted numbers bits and group_size, found '4'", {"bits": "4"}),
        ("expected .*", {"bits": 8}),
        (r"qzeros is \(2, ", {"group_size": 32}),
    ]:
        made.change(**change)
        refused(message)
        made.change(
            format=None,
            checkpoint_format="gptq",
            pack_dtype="int32",
            dynamic=None,
            bits=4,
            group_size=16,
        )
    load(made.folder)
