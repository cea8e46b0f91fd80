"""Checkpoints for serving engines: read as they read them, the logits are the model's."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from small_quantized import SCHEMES, quantized
from test_shrink import logits, made

from slmperf.check import InputError
from slmperf.models import QuantizedLinear, load, save, shrink
from slmperf.models.engines.decilm import decilm_layouts
from slmperf.models.engines.export import export_for_engine, permute_kv_heads
from slmperf.models.pruned import PrunedConfig
from slmperf.models.quantized import LinearScheme
from slmperf.models.structure import heads_of, sizes_of
from slmperf.ops.head_map import HeadMap
from slmperf.ops.weight_spec import Int4
from slmperf.serve.export import summary

# What vLLM 0.33 and SGLang 0.5.23 read of a DeciLM configuration, by attribute, in a process that
# does not know slmperf.
READ = """
import json, sys
from transformers import AutoConfig
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    layers = []
    for block in config.block_configs:
        assert not block.attention.no_op and not block.ffn.no_op
        layers.append({
            "kv_heads": config.num_attention_heads // block.attention.n_heads_in_group,
            "ffn_mult": block.ffn.ffn_mult if hasattr(block.ffn, "ffn_mult") else None,
            "size": getattr(block.ffn, "intermediate_size", None),
        })
    assert type(config).from_dict(config.to_dict()).block_configs == config.block_configs
    assert config.to_json_string()
    print(json.dumps({
        "type": config.model_type, "architecture": config.architectures[0], "layers": layers,
        "heads": config.num_attention_heads, "head_dim": config.head_dim,
        "bias": config.attention_bias, "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta, "rope": config.rope_parameters,
    }))
assert not any(name.startswith("slmperf") for name in sys.modules)
"""


def as_read(*folders: Path) -> list[SimpleNamespace]:
    """The configurations as an engine sees them."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, folders)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folders[0].parent / "cache")},
        cwd=folders[0],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    read = [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines()]
    for one in read:
        assert (one.type, one.architecture) == ("nemotron-nas", "DeciLMForCausalLM")
    return read


def rounded(ffn_mult: float, hidden: int) -> int:
    """Neurons as the engines compute them."""
    size = int(2 * ffn_mult * hidden / 3)
    return -(-size // 256) * 256


def as_written(folder: Path) -> SimpleNamespace:
    """The same of one configuration, of what `computed` needs, without a process of its own."""
    fields = json.loads((folder / "config.json").read_text())
    layers = [
        {
            "kv_heads": fields["num_attention_heads"] // block["attention"]["n_heads_in_group"],
            "ffn_mult": block["ffn"].get("ffn_mult"),
            "size": block["ffn"].get("intermediate_size"),
        }
        for block in fields["block_configs"]
    ]
    bias, rope = fields["attention_bias"], fields["rope_parameters"]
    return SimpleNamespace(layers=layers, bias=bias, mlp_bias=fields["mlp_bias"], rope=rope)


def computed(folder: Path, read: SimpleNamespace) -> torch.nn.Module:
    """The model that the engines' class builds from the checkpoint: Llama's layers, all biases of
    the attention or none."""
    fields = json.loads((folder / "config.json").read_text())
    for key in ("model_type", "architectures", "auto_map", "block_configs"):
        fields.pop(key)
    fields |= {"attention_bias": read.bias, "mlp_bias": read.mlp_bias, "rope_parameters": read.rope}
    layers = {
        index: {
            "num_key_value_heads": layer["kv_heads"],
            "intermediate_size": layer["size"] or rounded(layer["ffn_mult"], fields["hidden_size"]),
        }
        for index, layer in enumerate(read.layers)
    }
    same = folder.with_name(f"{folder.name}-read")
    PrunedConfig(**fields, per_layer_config=layers).save_pretrained(same)
    for file in folder.glob("*.safetensors*"):
        (same / file.name).symlink_to(file)
    return load(same)


def irregular(family: str) -> transformers.PreTrainedModel:
    """4 key/value heads with two query heads each, 1 with one, 2 with one and two."""
    queries = [list(range(8)), [5], [0, 2, 3]]
    return shrink(made(family), mlp=[range(24), range(40), range(3)], query_heads=queries)


def test_engines_read_layers_of_any_size(tmp_path: Path) -> None:
    models = {name: irregular(name) for name in ("llama-biased", "llama-tied", "qwen2", "mistral")}
    expected = {name: logits(model) for name, model in models.items()}
    for name, model in models.items():
        export_for_engine(model, None, tmp_path / name, engine="vllm", plugin=False)
        assert torch.equal(logits(model), expected[name])
    told = export_for_engine(
        models["llama-tied"], None, tmp_path / "sglang", engine="sglang", ranks=3, plugin=False
    )
    assert (told.written, told.plugin, told.neurons) == ("DeciLMForCausalLM", False, 3 * 768 - 67)
    assert (told.query_heads, told.kv_heads) == (3 * 12 - 12, 3 * 6 - 7)
    *for_vllm, sglang = as_read(*(tmp_path / name for name in (*models, "sglang")))
    for (name, model), read in zip(models.items(), for_vllm, strict=True):
        assert [layer["size"] for layer in read.layers] == [24, 40, 8]
        assert [layer["ffn_mult"] for layer in read.layers] == [None] * 3
        assert (read.heads, [layer["kv_heads"] for layer in read.layers]) == (8, [4, 1, 2])
        assert read.bias == (model.model.layers[0].self_attn.q_proj.bias is not None)
        assert read.rope_theta == model.config.rope_parameters["rope_theta"]
        engine = computed(tmp_path / name, read)
        torch.testing.assert_close(logits(engine), expected[name], rtol=0, atol=1e-5)

    # SGLang: one number of key/value heads, multiples of 256 neurons, and here of three ranks.
    assert [rounded(layer["ffn_mult"], 48) for layer in sglang.layers] == [768] * 3
    assert [layer["kv_heads"] for layer in sglang.layers] == [6] * 3 and sglang.heads == 12
    engine = computed(tmp_path / "sglang", sglang)
    torch.testing.assert_close(logits(engine), expected["llama-tied"], rtol=0, atol=1e-5)
    # Each rank's two key/value heads: the first layer's four are spread over three ranks.
    values = engine.model.layers[0].self_attn.v_proj.weight.view(3, 2, -1)
    assert [int((rank != 0).any(dim=1).sum()) for rank in values] == [2, 1, 1]


def test_fewer_kv_heads_than_ranks_are_repeated_by_the_engine() -> None:
    def sizes(counts: list[tuple[int, ...]], ranks: int, engine: str = "vllm") -> list:
        layouts = decilm_layouts([HeadMap(one) for one in counts], ranks, engine)
        return [len(layouts[0].query_heads), [len(layout.kv_heads) for layout in layouts]]

    assert sizes([(4, 4)], 4) == [8, [2]]
    assert sizes([(3, 3)], 4) == [8, [2]]  # 6 query heads do not divide by 4
    assert sizes([(3, 3, 3)], 4) == [12, [4]]  # nor do 3 key/value heads
    assert sizes([(3,) * 8, (3,) * 3], 1) == [24, [8, 3]]
    assert sizes([(3,) * 8, (3,) * 5], 1) == [24, [8, 6]]
    assert sizes([(3,) * 8, (3,) * 5], 1, engine="sglang") == [24, [8, 8]]


ZEROS = LinearScheme(Int4(group_size=-1, symmetric=False))  # of which a row shares one zero point


def test_quantised_layers_of_any_size(tmp_path: Path) -> None:
    """Codes and scales of heads of 16 channels, which are whole groups of 8 inputs; large values,
    whose mean would set the scale of o's inputs."""
    queries = [list(range(8)), [5], [0, 2, 3]]
    expected = {}
    for name in ("w8a8", "w4a16", "w4a16-asymmetric", "fp8", "fp8-static", "zeros"):
        model = made("llama", hidden_size=64, head_dim=16)
        model.model.layers[2].self_attn.v_proj.weight.data[:32] *= 30
        model = shrink(model, mlp=[range(24), range(40), range(16)], query_heads=queries)
        quantized(model, SCHEMES.get(name, ZEROS))
        expected[name] = logits(model)
        told = export_for_engine(
            model, None, tmp_path / name, engine="sglang", plugin=False, device="cpu"
        )
        assert (told.written, told.kv_heads) == ("DeciLMForCausalLM", 5)
        assert told.neurons == 3 * 256 - 80
    for name, wanted in expected.items():
        engine = computed(tmp_path / name, as_written(tmp_path / name))
        assert isinstance(engine.model.layers[1].mlp.up_proj, QuantizedLinear)
        torch.testing.assert_close(logits(engine), wanted, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a16-asymmetric", "w4a16-channel", "fp8"])
def test_neurons_are_filled_up_for_the_kernels(tmp_path: Path, scheme: str) -> None:
    model = shrink(made("llama", hidden_size=64), mlp=[range(24)] * 3)
    quantized(model, SCHEMES[scheme])
    how = {"engine": "vllm", "ranks": 4, "device": "cpu"}
    if scheme != "w8a8" and scheme != "fp8":
        with pytest.raises(InputError, match="neurons in multiples of 32, to which .*--pad"):
            export_for_engine(model, None, tmp_path / "no", **how)
    else:
        how |= {"engine": "sglang", "device": "cuda"}
    told = export_for_engine(model, None, tmp_path / "yes", **how, pad=True)
    assert told.written == "LlamaForCausalLM" and not told.plugin
    again = load(tmp_path / "yes")
    assert again.config.intermediate_size == (64 if scheme == "w8a8" else 32)
    assert told.neurons == 3 * (again.config.intermediate_size - 24)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_layers_that_are_alike_stay_as_they_are(tmp_path: Path) -> None:
    model = shrink(made("llama"), mlp=[range(32)] * 3, kv_groups=[[0, 2]] * 3)
    told = export_for_engine(model, None, tmp_path / "one", engine="vllm", ranks=2)
    assert (told.written, told.plugin, told.neurons) == ("LlamaForCausalLM", False, 0)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(stock), logits(model))

    # Qwen2 with fewer heads: vLLM's own class has no head size; a stock configuration all the same.
    qwen = shrink(made("qwen2"), kv_groups=[[0, 2]] * 3)
    told = export_for_engine(qwen, None, tmp_path / "two", engine="vllm")
    fields = json.loads((tmp_path / "two" / "config.json").read_text())
    assert told.plugin and fields["architectures"] == ["PrunedForCausalLM"]
    assert fields["model_type"] == "qwen2" and "label_token_ids" not in fields
    assert torch.equal(logits(load(tmp_path / "two")), logits(qwen))
    told = export_for_engine(tmp_path / "one", None, tmp_path / "three", engine="vllm", labels=[7])
    fields = json.loads((tmp_path / "three" / "config.json").read_text())
    assert told.plugin and fields["label_token_ids"] == [7]


def test_the_plugin_gets_heads_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    queries = [[0, 1, 2, 3, 4, 6], list(range(8)), [0, 1, 2, 3, 4, 6]]
    model = shrink(made("qwen3"), query_heads=queries, mlp=[range(24), range(40), range(8)])
    told = export_for_engine(model, None, tmp_path / "two", engine="sglang", ranks=2, device="cpu")
    assert (told.written, told.plugin, told.moved) == ("PrunedForCausalLM", True, 2)
    assert told.cache.wasted == 0
    again = load(tmp_path / "two")
    assert [heads_of(block).counts for block in again.model.layers][0] == (2, 1, 2, 1)
    assert sizes_of(again) == sizes_of(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    # Written again for one rank, from the folder, with its tokenizer or none.
    told = export_for_engine(tmp_path / "two", None, tmp_path / "one", engine="vllm")
    assert told.moved == 0 and torch.equal(logits(load(tmp_path / "one")), logits(again))

    fewer = shrink(made("llama"), kv_groups=[[0, 2], [0, 1, 2, 3], [1]])
    told = export_for_engine(fewer, None, tmp_path / "pool", engine="sglang")
    assert told.cache == (3 * 2 * 4 * 6 * 4, pytest.approx(5 / 12))
    told = export_for_engine(fewer, None, tmp_path / "pool", engine="vllm")
    assert told.cache == (7 * 2 * 6 * 4, 0)


def test_what_no_form_serves_is_refused(tmp_path: Path) -> None:
    def refused(message: str, model: torch.nn.Module, **how: object) -> None:
        with pytest.raises(InputError, match=message) as caught:
            export_for_engine(model, None, tmp_path / "no", **({"engine": "vllm"} | how))
        assert "\n" not in str(caught.value) and not (tmp_path / "no").exists()

    differ = {"mlp": [range(24), range(40), range(8)]}
    stock = {"plugin": False}
    experts = shrink(made("mixtral"), mlp=[[range(16)] * 3, [range(24)] * 3, [range(8)] * 3])
    refused("mixtures of experts", experts)
    refused("as DeciLM: qwen3 has parts", shrink(made("qwen3"), **differ), **stock)
    windows = shrink(made("mistral", sliding_window=8), **differ)
    refused("as DeciLM: the model has sliding windows", windows, **stock)
    refused("SGLang: sliding windows, which", windows, engine="sglang")
    biased = shrink(made("llama-biased"), **differ)
    refused("biases in its MLP", biased, engine="sglang", **stock)
    refused("biases in the MLP", biased, engine="sglang")
    refused("engine is 'tgi', wanted 'sglang' or 'vllm'", made("llama"), engine="tgi")
    refused("ranks is 0", made("llama"), ranks=0)
    refused("ranks is 0", irregular("llama"), ranks=0)
    refused("ranks is -1", irregular("llama"), ranks=-1)
    refused("hidden_act is 'gelu'", made("llama", hidden_act="gelu"))
    refused("do not divide by 3 ranks.*; wanted 1, 2, 4 or 8 tensor", made("llama"), ranks=3)
    refused("label_token_ids are read by slmperf's", made("llama"), labels=[3], **stock)
    refused("label_token_ids is .3, 64., wanted a list of different", made("llama"), labels=[3, 64])
    odd = shrink(made("llama", head_dim=4), query_heads=[[0, 1, 2, 3, 4, 6]] * 3)
    quantized(odd, SCHEMES["w4a16"])
    refused("o_proj: 8 channels share a scale, heads of 4", odd, ranks=2, device="cpu")


def test_a_checkpoint_whose_layers_are_not_said_is_refused(tmp_path: Path) -> None:
    save(irregular("llama"), None, tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"per_layer_config": None}))
    with pytest.raises(InputError, match="layer 0: mlp.gate_proj has 24 outputs, config.json says"):
        export_for_engine(tmp_path / "whole", None, tmp_path / "no", engine="vllm", device="cpu")
    path.write_text(json.dumps(fields | {"format_version": 2}))
    with pytest.raises(InputError, match="format_version is 2, this slmperf reads 1"):
        export_for_engine(tmp_path / "whole", None, tmp_path / "no", engine="vllm")
    for changed, message in (
        ({"num_hidden_layers": 2, "per_layer_config": None}, "have 3 layers, config.json says 2"),
        ({"hidden_size": 96}, "model.norm has 48 channels, config.json says hidden_size 96"),
        ({"hidden_size": None}, "config.json: hidden_size is None, wanted a whole number"),
        (
            {"per_layer_config": {"a": {}}},
            "per_layer_config\\['a'\\] is {}, wanted a layer's number",
        ),
        ({"per_layer_config": {"1": 5}}, "per_layer_config\\['1'\\] is 5, wanted a layer's number"),
        ({"per_layer_config": [{}]}, "per_layer_config is a list, wanted layers by number"),
        ({"label_token_ids": 5}, "label_token_ids is 5, wanted a list"),
        ({"label_token_ids": []}, "label_token_ids is .., wanted a list"),
    ):
        path.write_text(json.dumps(fields | changed))
        with pytest.raises(InputError, match=message) as caught:
            export_for_engine(tmp_path / "whole", None, tmp_path / "no", engine="vllm")
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    with pytest.raises(InputError, match="models of type 'gpt2' are not known, only llama"):
        export_for_engine(tmp_path / "whole", None, tmp_path / "no", engine="vllm")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_values_stay_what_they_are_stored_as(
    tmp_path: Path, dtype: torch.dtype, key: str | None
) -> None:
    """By the files, whatever config.json calls it, if anything."""
    model = made("llama").to(dtype)
    save(model, None, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    name = fields.pop("dtype")
    path.write_text(json.dumps(fields | ({} if key is None else {key: name})))
    told = export_for_engine(tmp_path / "model", None, tmp_path / "out", engine="vllm")
    assert told.cache.bytes_per_token == 3 * 2 * 4 * 6 * dtype.itemsize
    again = load(tmp_path / "out", dtype=dtype).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == dtype


def test_the_plugins_own_quantisation_is_told(tmp_path: Path) -> None:
    """What only it serves is said to need it; --pad fills up for it, not for kernels."""
    how = {"engine": "sglang", "ranks": 2}
    model = quantized(shrink(made("llama", hidden_size=64), mlp=[range(24)] * 3), SCHEMES["w4a16"])
    with pytest.raises(InputError, match="wanted another engine"):
        export_for_engine(model, None, tmp_path / "no", **how)
    own = how | {"quantization": "slmperf", "pad": True}
    told = export_for_engine(model, None, tmp_path / "own", **own)
    assert (told.written, told.plugin) == ("LlamaForCausalLM", True)
    assert told.quantization == "slmperf" and told.neurons == 3 * 8  # groups of 8, two ranks
    (first, *_) = summary(told)
    assert first.endswith(
        "slmperf installed beside the engine, started with --quantization slmperf"
    )
    assert "LlamaForCausalLM for 2 ranks: " in first
    with pytest.raises(InputError, match="wanted slmperf with the plug-in, found .* without it"):
        export_for_engine(model, None, tmp_path / "no", **own, plugin=False)
    told = export_for_engine(made("llama"), None, tmp_path / "plain", engine="vllm")
    assert summary(told)[0] == "LlamaForCausalLM for 1 rank: no plug-in"


# ---- heads over ranks


def test_kv_heads_are_permuted_for_even_ranks(tmp_path: Path) -> None:
    queries = [[0, 1, 2, 3, 4, 6], list(range(8)), [0, 1, 2, 5, 6, 7]]
    model = shrink(made("qwen2"), query_heads=queries)
    assert [heads_of(block).counts for block in model.model.layers] == [
        (2, 2, 1, 1),
        (2, 2, 2, 2),
        (2, 1, 1, 2),
    ]
    before, untouched = logits(model), model.model.layers[1].self_attn.q_proj.weight
    model = permute_kv_heads(model, 2)
    counts = [heads_of(block).counts for block in model.model.layers]
    assert all(sum(one[:2]) == sum(one[2:]) for one in counts)
    assert counts[1:] == [(2, 2, 2, 2), (2, 1, 1, 2)]
    assert model.model.layers[1].self_attn.q_proj.weight is untouched
    assert sizes_of(model) == (40, [6, 8, 6], 4)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    save(model, None, tmp_path / "even")
    torch.testing.assert_close(logits(load(tmp_path / "even")), before, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="layer 0 has 4 key/value heads, wanted at least one"):
        permute_kv_heads(model, 5)


def test_over_ranks_is_the_best_there_is() -> None:
    """Against all 105 ways of making four pairs of eight heads."""
    draw = random.Random(0)

    def best(counts: tuple[int, ...]) -> int:
        def pairs(heads: tuple[int, ...]) -> list[list[int]]:
            if not heads:
                return [[]]
            return [
                [counts[heads[0]] + counts[other], *rest]
                for place, other in enumerate(heads[1:], start=1)
                for rest in pairs(heads[1:place] + heads[place + 1 :])
            ]

        return min(max(loads) for loads in pairs(tuple(range(8))))

    for _ in range(60):
        counts = tuple(draw.randint(1, 4) for _ in range(8))
        owned = HeadMap(counts).over_ranks(4)
        assert sorted(itertools.chain(*owned)) == list(range(8))
        assert [len(heads) for heads in owned] == [2] * 4
        assert max(sum(counts[head] for head in heads) for heads in owned) == best(counts)


def test_head_maps() -> None:
    heads = HeadMap((3, 1, 2))
    assert (heads.query_heads, heads.kv_heads, heads.uniform) == (6, 3, False)
    assert heads.reads == (0, 0, 0, 1, 2, 2)
    assert HeadMap((2, 2)).uniform
    assert HeadMap((2,) * 5).over_ranks(2) == ((0, 1, 2), (3, 4))
    assert HeadMap((1, 1)).over_ranks(3) == ((0,), (1,), ())
    for counts in ((), (2, 0)):
        with pytest.raises(InputError, match="wanted one or more query heads for each"):
            HeadMap(counts)
