"""A checkpoint pruned block by block is the one pruned in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from small_models import llama
from small_quantized import SCHEMES, quantized, replace, set_cache_scales
from test_shrink import logits, made, neurons

from slmperf.check import InputError
from slmperf.models import load, save, shrink, weight_bytes
from slmperf.models.streaming import StreamedModel
from slmperf.models.structure import keep_heads, keep_neurons, sizes_of


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("llama-tied", [24, 24, 24]),
        ("refused", [24, 24, 24]),
        ("mixtral", [24, 24, 24]),
        ("mixtral", [24, 40, 4]),
        ("qwen3", [24, 40, 3]),
        ("llama-biased", [24, 40, 3]),
    ],
)
def test_streamed_equals_shrunk_in_memory(family: str, counts: list[int], tmp_path: Path) -> None:
    model = made(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    mlp = neurons(model, counts)
    groups = [[0, 1, 3], [1, 2, 3], [0, 1, 2]]
    small = shrink(model, mlp=mlp, kv_groups=groups)
    with StreamedModel(tmp_path / "dense", tmp_path / "small") as streamed:
        for index in reversed(range(3)):
            with streamed.block(index) as block:
                assert not any(tensor.is_meta for tensor in block.parameters())
                keep_neurons(block, mlp[index])
                kept = [head for group in groups[index] for head in (2 * group, 2 * group + 1)]
                keep_heads(block, kept, groups[index])
            assert all(tensor.is_meta for tensor in streamed.blocks.parameters())
        assert not (tmp_path / "small").exists()
    assert streamed.pruning_note == small.pruning_note
    back = load(tmp_path / "small")
    assert type(back) is type(small) and sizes_of(back) == sizes_of(small)
    torch.testing.assert_close(logits(back), logits(small), rtol=0, atol=1e-6)
    save(small, None, tmp_path / "whole")
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "small")
    ]
    assert configs[0] == configs[1]
    if len(set(counts)) == 1:
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        assert type(stock).__module__.startswith("transformers.")
        index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
        size = sum(tensor.nbytes for tensor in stock.parameters())
        assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2", "layers differ"])
def test_quantised_blocks_are_those_quantised_in_memory(family: str, tmp_path: Path) -> None:
    if family == "gemma2":
        config = transformers.Gemma2Config(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        model = transformers.Gemma2ForCausalLM(config).eval()
    else:
        model = made("qwen2" if family == "layers differ" else family)
    if family == "layers differ":
        heads = [[0, 2, 3], [0, 1], [0, 1, 4, 6, 7]]
        model = shrink(model, mlp=neurons(model, [24, 40, 3]), query_heads=heads)
    schemes = {"q_proj": SCHEMES["w4a16"], "up_proj": SCHEMES["w8a8"], "o_proj": SCHEMES["fp8"]}
    save(model, None, tmp_path / "dense")
    with StreamedModel(tmp_path / "dense", tmp_path / "small") as streamed:
        # Rotary frequencies and the like are stored nowhere, and blocks run with them.
        assert not any(buffer.is_meta for buffer in streamed.model.buffers())
        for index in range(3):
            with streamed.block(index) as block:
                set_cache_scales(block.self_attn, index)
                replace(block, schemes)
        streamed.model.config.is_marked = True
    assert streamed.pruning_note == ""
    whole = quantized(model, schemes, kv_cache=True)
    back = load(tmp_path / "small")
    assert back.config.is_marked and type(back) is type(whole)
    assert back.config.quantization_config == whole.config.quantization_config
    assert torch.equal(logits(back), logits(whole))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == weight_bytes(back)
    with pytest.raises(InputError, match="wanted floating weights, found a quantised checkpoint"):
        StreamedModel(tmp_path / "small", tmp_path / "again")


def test_blocks_that_nobody_touched_are_copied(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    with StreamedModel(tmp_path / "dense", tmp_path / "same", dtype=torch.bfloat16) as streamed:
        assert streamed.pruning_note == ""
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"
    same, dense = load(tmp_path / "same"), llama()
    for copied, original in zip(same.parameters(), dense.parameters(), strict=True):
        assert torch.equal(copied, original.bfloat16().float())
    assert (tmp_path / "same" / "tokenizer.json").read_text() == "{}"


def test_folders_beside_the_weights_are_left_out(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer").mkdir()
    with StreamedModel(tmp_path / "dense", tmp_path / "same"):
        pass
    assert not (tmp_path / "same" / "tokenizer").exists()
    assert (tmp_path / "same" / "config.json").is_file()


def test_nothing_is_written_on_an_error(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "dense")
    with pytest.raises(InputError, match="block 1 is written already"):
        with StreamedModel(tmp_path / "dense", tmp_path / "small") as streamed:
            for _ in range(2):
                with streamed.block(1):
                    pass
    assert [item.name for item in tmp_path.iterdir()] == ["dense"]


def test_wrong_checkpoints_are_one_line(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    good = json.loads(config.read_text())

    def refused(message: str, **changes: object) -> None:
        config.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=message) as caught:
            with StreamedModel(tmp_path / "dense", tmp_path / "small") as streamed:
                with streamed.block(0):
                    pass
        assert "\n" not in str(caught.value)

    refused("down_proj.weight is .32, 48., config.json wants .32, 40", intermediate_size=40)
    refused("the checkpoint lacks tensor model.layers.2", num_hidden_layers=3)
    refused("lm_head.weight is .64, 32., config.json wants .65, 32", vocab_size=65)
    refused("GPT2LMHeadModel: wanted decoder blocks in model.layers", model_type="gpt2")
    refused("wanted key model_type", model_type=None)
