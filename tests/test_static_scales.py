"""Static scales of fp8, and what they are found with: against what a plain forward has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pruning import random_batches
from small_quantized import SCHEMES
from small_smoothing import MODELS, stream_of, with_outliers
from small_training import ended, start_ranks
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from slmperf.calibrate import BlockStream
from slmperf.check import InputError
from slmperf.quant.plan import LINEARS
from slmperf.quant.smoothing import smooth_block
from slmperf.quant.statistics import input_peaks, kv_scales, static_input_scales


def garbled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same text with other ids where it is padded."""
    return [
        batch | {"input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 95)}
        for batch in batches
    ]


def test_each_input_gives_the_tokens_that_count():
    model = MODELS["qwen2"]()
    stream = stream_of(model, garbled(random_batches()))
    names = ["self_attn.k_proj", "post_attention_layernorm", "mlp.down_proj"]
    found: dict[tuple[str, int], Tensor] = {}
    stream.each_input(0, names, lambda name, inputs, batch: found.update({(name, batch): inputs}))
    assert list(found) == [(name, batch) for batch in range(2) for name in names]
    for number, batch in enumerate(random_batches()):
        assert stream.token_counts[number] == int(batch["attention_mask"].sum())
        wanted = inputs_of(model, [f"model.layers.0.{name}" for name in names], batch)
        for name in names:
            torch.testing.assert_close(found[name, number], wanted[f"model.layers.0.{name}"])
    with pytest.raises(InputError, match=r"no layer mlp\.other"):
        stream.each_input(0, ["mlp.other"], lambda *_: None)


@torch.no_grad()
def inputs_of(
    model: PreTrainedModel, names: list[str], batch: dict[str, Tensor], **arguments: object
) -> dict[str, Tensor]:
    """(n, d) of the tokens that count, as one plain forward has them."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: found.update({name: given[0][batch["attention_mask"] > 0]})

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    model(**batch, **arguments)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "pruned"])
@torch.no_grad()
def test_static_scales_are_those_of_the_text(name):
    model = MODELS[name]()
    peaks: dict[str, Tensor] = {}
    text = random_batches()
    for batch in text:
        batch["attention_mask"][:, 5:] = 0  # the largest values are those of padding
        cache = DynamicCache()  # without a config no layer forgets what its window has passed
        names = [f"model.layers.{index}.{part}" for index in range(3) for part in LINEARS]
        found = inputs_of(model, names, batch, past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            for kind, states in (("keys", layer.keys), ("values", layer.values)):
                found[f"{index}.{kind}"] = states.transpose(1, 2)[batch["attention_mask"] > 0]
        for key, rows in found.items():
            here = rows.abs().amax(0)
            peaks[key] = torch.maximum(peaks.get(key, here), here)
    stream = stream_of(model, text)
    for index in range(3):
        scales = static_input_scales(stream, index, LINEARS)
        for part in LINEARS:
            wanted = peaks[f"model.layers.{index}.{part}"]
            torch.testing.assert_close(scales[part].scale, wanted.max() / 448)
            torch.testing.assert_close(input_peaks(stream, index, [part])[part].largest, wanted)
        assert len({float(scales[f"self_attn.{part}_proj"].scale) for part in "qkv"}) == 1
        for scale, kind in zip(kv_scales(stream, index), ("keys", "values"), strict=True):
            torch.testing.assert_close(scale.scale, peaks[f"{index}.{kind}"].max() / 448)
            assert scale.note == ""
        stream.advance(index)


def test_half_precision_scales_are_fp32():
    stream = stream_of(MODELS["llama"]().bfloat16())
    assert static_input_scales(stream, 0, LINEARS)["mlp.down_proj"].scale.dtype == torch.float32
    assert all(one.scale.dtype == torch.float32 for one in kv_scales(stream, 0))


@torch.no_grad()
def test_values_that_are_not_finite_are_left_out_and_told_of():
    model = MODELS["llama"]()
    block = model.model.layers[0]
    names = ["mlp.up_proj", "mlp.down_proj"]
    before = input_peaks(stream_of(model), 0, names)["mlp.down_proj"]
    for name in ("gate_proj", "up_proj"):
        block.mlp.get_submodule(name).weight[5] *= 1e30
    stream = stream_of(model)
    peaks = input_peaks(stream, 0, names)
    others = torch.arange(64) != 5
    torch.testing.assert_close(peaks["mlp.down_proj"].largest[others], before.largest[others])
    assert bool(torch.isfinite(peaks["mlp.down_proj"].largest).all())
    assert peaks["mlp.up_proj"].note == before.note == ""
    assert peaks["mlp.down_proj"].note.startswith("model.layers.0.mlp.down_proj: inputs: wanted")
    scales = static_input_scales(stream, 0, names)
    found = scales["mlp.down_proj"]
    torch.testing.assert_close(found.scale, peaks["mlp.down_proj"].largest.max() / 448)
    assert found.note.endswith("the scale is of the others") and scales["mlp.up_proj"].note == ""
    block.self_attn.v_proj.weight.fill_(torch.nan)
    keys, values = kv_scales(stream, 0)
    assert keys.note == "" and float(keys.scale) > 0
    assert float(values.scale) == 1 and values.note.endswith(
        "self_attn: values: wanted finite values, found some that are not: a scale of 1"
    )


def static_scales(stream: BlockStream) -> Tensor:
    """All of block 0 in a row."""
    inputs = static_input_scales(stream, 0, LINEARS)
    return torch.stack([one.scale for one in (*inputs.values(), *kv_scales(stream, 0))])


def _worker(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = with_outliers(MODELS["llama"]())
    stream = stream_of(model, [random_batches()[rank]])
    scales = static_scales(stream)
    report = smooth_block(stream, 0, SCHEMES["w8a8"], [0.5, 0.8])
    errors = torch.tensor([report.relative_error, report.relative_error_unsmoothed])
    block = {name: value.contiguous() for name, value in stream.blocks[0].state_dict().items()}
    save_file(block | {"scales": scales, "errors": errors}, folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_workers_choose_what_one_would_with_all_of_the_text(tmp_path):
    assert ended(start_ranks(_worker, tmp_path)) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    stream = stream_of(with_outliers(MODELS["llama"]()))
    scales = static_scales(stream)
    torch.testing.assert_close(first["scales"], scales)
    report = smooth_block(stream, 0, SCHEMES["w8a8"], [0.5, 0.8])
    assert float(first["errors"][0]) == pytest.approx(report.relative_error, rel=1e-3)
    for name, value in stream.blocks[0].state_dict().items():
        torch.testing.assert_close(first[name], value)
