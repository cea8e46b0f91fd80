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
from safetensors.torch import load_file
from test_shrink import logits, made

from slmperf.check import InputError
from slmperf.models import PrunedForCausalLM, load, save, shrink
from slmperf.models.engines import _layouts, export_for_engine, permute_kv_heads
from slmperf.models.pruned import PrunedConfig
from slmperf.models.structure import heads_of, sizes_of
from slmperf.ops.head_map import HeadMap

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
    config = PrunedConfig(**fields, per_layer_config=layers)
    model = PrunedForCausalLM(config).eval()
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def irregular(family: str) -> transformers.PreTrainedModel:
    """4 key/value heads with two query heads each, 1 with one, 2 with one and two."""
    queries = [list(range(8)), [5], [0, 2, 3]]
    return shrink(made(family), mlp=[range(24), range(40), range(3)], query_heads=queries)


def test_engines_read_layers_of_any_size(tmp_path: Path) -> None:
    models = {name: irregular(name) for name in ("llama-biased", "llama-tied", "qwen2", "mistral")}
    expected = {name: logits(model) for name, model in models.items()}
    for name, model in models.items():
        export_for_engine(model, None, tmp_path / name, engine="vllm")
        assert torch.equal(logits(model), expected[name])
    export_for_engine(models["llama-tied"], None, tmp_path / "sglang", engine="sglang", ranks=3)
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
    def sizes(counts: list[tuple[int, ...]], ranks: int, same: bool = False) -> list:
        layouts = _layouts([HeadMap(one) for one in counts], ranks, same)
        return [len(layouts[0].query_heads), [len(layout.kv_heads) for layout in layouts]]

    assert sizes([(4, 4)], 4) == [8, [2]]
    assert sizes([(3, 3)], 4) == [8, [2]]  # 6 query heads do not divide by 4
    assert sizes([(3, 3, 3)], 4) == [12, [4]]  # nor do 3 key/value heads
    assert sizes([(3,) * 8, (3,) * 3], 1) == [24, [8, 3]]
    assert sizes([(3,) * 8, (3,) * 5], 1) == [24, [8, 6]]
    assert sizes([(3,) * 8, (3,) * 5], 1, same=True) == [24, [8, 8]]


def test_layers_that_are_alike_need_no_zeros(tmp_path: Path) -> None:
    model = shrink(made("llama"), mlp=[range(32)] * 3, kv_groups=[[0, 2]] * 3)
    export_for_engine(model, None, tmp_path / "engine", engine="vllm", ranks=2)
    stored = sum(
        tensor.numel()
        for file in (tmp_path / "engine").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert stored == sum(tensor.numel() for tensor in model.parameters())


def test_what_the_engines_do_not_compute_is_refused(tmp_path: Path) -> None:
    def refused(message: str, model: torch.nn.Module, engine: str = "vllm", ranks: int = 1) -> None:
        with pytest.raises(InputError, match=message) as caught:
            export_for_engine(model, None, tmp_path / "engine", engine=engine, ranks=ranks)
        assert "\n" not in str(caught.value) and not (tmp_path / "engine").exists()

    refused("mixtral has parts that DeciLMForCausalLM lacks", made("mixtral"))
    refused("qwen3 has parts", made("qwen3"))
    refused("sliding windows", made("mistral", sliding_window=8))
    refused(
        "sliding windows",
        made("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    )
    refused("biases in its MLP", made("llama-biased"), engine="sglang")
    refused("engine is 'tgi', wanted 'vllm' or 'sglang'", made("llama"), engine="tgi")
    refused("ranks is 0", made("llama"), ranks=0)
    refused("hidden_act is 'gelu'", made("llama", hidden_act="gelu"))


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
