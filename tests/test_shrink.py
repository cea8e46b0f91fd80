"""Models that shrink: the logits of the masked dense model, in a checkpoint that loads.

Over 400 lines: one set of small models and their masked doubles serve all of these tests.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import IDS

from slmperf.check import InputError
from slmperf.models import PrunedForCausalLM, load, save, shrink
from slmperf.models.masked import from_masked
from slmperf.models.shapes import shape_of
from slmperf.models.structure import experts_of, heads_of, sizes_of
from slmperf.ops.head_map import HeadMap

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
}
# Six heads, of three groups, do not divide this hidden size: LlamaConfig refuses them.
REFUSED = ("Llama", {"hidden_size": 40, "head_dim": 4})


def made(family: str, **changes: object) -> transformers.PreTrainedModel:
    """A model with random weights, biases and norms, so that none of them is neutral."""
    torch.manual_seed(0)
    name, own = FAMILIES.get(family, REFUSED)
    config = getattr(transformers, f"{name}Config")(**(SIZES | own | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("bias"):
                tensor.normal_()
            elif "norm" in key:
                tensor.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, **arguments: object) -> torch.Tensor:
    return model(input_ids=IDS, **arguments).logits


def some(count: int, size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(size, generator=generator)[:count].tolist())


def neurons(model: torch.nn.Module, counts: list[int]) -> list:
    """Per layer that many neurons to keep; for experts, others in each."""
    kept: list = []
    for layer, (block, count) in enumerate(zip(model.model.layers, counts, strict=True)):
        experts = experts_of(block)
        number = 0 if experts is None else experts.down_proj.shape[0]
        one = [some(count, SIZES["intermediate_size"], 10 * layer + e) for e in range(number or 1)]
        kept.append(one if number else one[0])
    return kept


@torch.no_grad()
def masked(model: torch.nn.Module, mlp: list | None, query_heads: list | None) -> torch.nn.Module:
    """The dense model with the columns of all other neurons and query heads zeroed."""
    model = copy.deepcopy(model)
    for layer, block in enumerate(model.model.layers):
        if mlp is not None:
            experts = experts_of(block)
            pairs = (
                [(block.mlp.down_proj.weight, mlp[layer])]
                if experts is None
                else [(experts.down_proj[e], kept) for e, kept in enumerate(mlp[layer])]
            )
            for weight, kept in pairs:
                gone = [index for index in range(weight.shape[1]) if index not in kept]
                weight[:, gone] = 0
        if query_heads is not None:
            weight, size = block.self_attn.o_proj.weight, block.self_attn.head_dim
            for head in range(weight.shape[1] // size):
                if head not in query_heads[layer]:
                    weight[:, head * size : (head + 1) * size] = 0
    return model


def whole_groups(groups: list[list[int]]) -> list[list[int]]:
    """The query heads of groups of two."""
    return [[head for group in kept for head in (2 * group, 2 * group + 1)] for kept in groups]


STOCK = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in Path(sys.argv[1]).iterdir():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({type(model).__name__: logits.contiguous()}, folder / "logits.safetensors")
assert not any(name.startswith("slmperf") for name in sys.modules)
"""


def test_uniform_sizes_load_in_stock_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every family, and a Llama whose configuration refuses 6 heads over a hidden size of 40."""
    wanted = {}
    for family in (*FAMILIES, "refused"):
        model = made(family)
        mlp, groups = neurons(model, [24] * 3), [[0, 2, 3], [0, 1, 2], [1, 2, 3]]
        zeroed = logits(masked(model, mlp, whole_groups(groups)))
        parameters = dict(model.named_parameters())
        small = shrink(model, mlp=mlp, kv_groups=groups)
        torch.testing.assert_close(logits(small), zeroed, rtol=0, atol=1e-5)
        assert sizes_of(small) == (24, 6, 3)
        assert small.model.norm.weight is parameters["model.norm.weight"]
        assert tied(small) == model.config.tie_word_embeddings
        if family == "refused":
            name = "MistralForCausalLM"
            assert "LlamaConfig refuses 6 heads" in small.pruning_note
            assert small.pruning_note in caplog.text and name in small.pruning_note
        else:
            name = type(model).__name__
            notes = {"qwen2": "vLLM loads Qwen2", "mixtral": "SGLang does not load Mixtral"}
            assert small is model and small.pruning_note.startswith(notes.get(family, ""))
            assert small.pruning_note in caplog.text and bool(small.pruning_note) == (
                family in notes
            )
        save(small, None, tmp_path / family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["head_dim"] == small.model.layers[0].self_attn.head_dim
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
        assert config["intermediate_size"] == 24
        assert torch.equal(logits(load(tmp_path / family)), logits(small))
        wanted[family] = {name: logits(small)}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path), json.dumps(IDS.tolist())],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for family, expected in wanted.items():
        stock = load_file(tmp_path / family / "logits.safetensors")
        torch.testing.assert_close(stock, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_their_own_sizes(family: str, tmp_path: Path) -> None:
    """Whole groups in the first layer, single query heads in the second, nothing in the third."""
    model = made(family)
    dense = copy.deepcopy(model)
    mlp, queries = neurons(model, [24, 40, 3]), [[0, 1, 4, 5, 6, 7], [1, 4, 5, 6], list(range(8))]
    small = shrink(model, mlp=mlp, query_heads=queries)
    assert type(small) is PrunedForCausalLM and "PrunedForCausalLM" in small.pruning_note
    zeroed = masked(dense, mlp, queries)
    torch.testing.assert_close(logits(small), logits(zeroed), rtol=0, atol=1e-5)
    wanted = ([24, 40, 3], [6, 4, 8], [3, 3, 4])
    assert sizes_of(small) == wanted
    assert heads_of(small.model.layers[1]) == HeadMap((1, 2, 1))
    assert tied(small) == dense.config.tie_word_embeddings

    from_zeros = from_masked(zeroed)
    assert type(from_zeros) is PrunedForCausalLM and sizes_of(from_zeros) == wanted
    assert same_tensors(from_zeros, small)

    save(small, None, tmp_path / "small")
    for back in (
        load(tmp_path / "small"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
        PrunedForCausalLM.from_pretrained(tmp_path / "small"),
    ):
        assert type(back) is PrunedForCausalLM and sizes_of(back) == wanted
        assert same_tensors(back, small) and tied(back) == tied(small)
        torch.testing.assert_close(logits(back), logits(small), rtol=0, atol=1e-6)
    save(back, None, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()
    prompt = IDS[:, :5]
    with_cache = small.generate(prompt, max_new_tokens=4, do_sample=False)
    without = small.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    cache = small(prompt, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == wanted[2]


def tied(model: torch.nn.Module) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def free_model() -> PrunedForCausalLM:
    return shrink(made("llama"), query_heads=[[0, 2, 3, 6], [1, 4, 5, 6], [0, 1, 2, 3]])


def test_biases_have_no_other_class_where_llama_refuses(tmp_path: Path) -> None:
    model = made("refused", attention_bias=True)
    zeroed = logits(masked(model, None, whole_groups([[0, 2, 3]] * 3)))
    small = shrink(model, kv_groups=[[0, 2, 3]] * 3)
    assert type(small) is PrunedForCausalLM and sizes_of(small) == (40, 6, 3)
    save(small, None, tmp_path / "small")
    assert "per_layer_config" not in json.loads((tmp_path / "small" / "config.json").read_text())
    for one in (small, load(tmp_path / "small")):
        torch.testing.assert_close(logits(one), zeroed, rtol=0, atol=1e-5)


def test_a_long_context_keeps_its_rope_in_another_class(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    model = made("refused", rope_parameters=rope)
    zeroed = logits(masked(model, None, whole_groups([[0, 2, 3]] * 3)))
    small = shrink(model, kv_groups=[[0, 2, 3]] * 3)
    assert type(small) is transformers.MistralForCausalLM
    torch.testing.assert_close(logits(small), zeroed, rtol=0, atol=1e-5)
    # And in the class of layers that differ; readers of Transformers 4 find their own fields.
    kept = [[0, 2], [1, 3], [0, 1, 3]]
    zeroed = logits(masked(made("refused", rope_parameters=rope), None, whole_groups(kept)))
    small = shrink(made("refused", rope_parameters=rope), kv_groups=kept)
    assert type(small) is PrunedForCausalLM
    save(small, None, tmp_path / "small")
    for one in (small, load(tmp_path / "small")):
        torch.testing.assert_close(logits(one), zeroed, rtol=0, atol=1e-5)
    fields = json.loads((tmp_path / "small" / "config.json").read_text())
    assert fields["rope_theta"] == 500000.0 and fields["rope_scaling"]["factor"] == 8.0


def test_dtype_mode_and_frozen_tensors_stay() -> None:
    model = made("llama").to(torch.bfloat16).train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.gradient_checkpointing_enable()
    small = shrink(model, query_heads=[[0, 2, 3, 6], [1, 4, 5, 6], [0, 1, 2, 3]])
    assert {tensor.dtype for tensor in small.parameters()} == {torch.bfloat16}
    assert small.training
    assert all(block.gradient_checkpointing for block in small.model.layers)
    frozen = [name for name, tensor in small.named_parameters() if not tensor.requires_grad]
    assert frozen == ["model.layers.0.mlp.up_proj.weight"]


def test_shrinking_step_by_step_ends_in_the_stock_class() -> None:
    once = shrink(made("qwen3"), mlp=[[1, 2, 4]] * 3, query_heads=[[2, 3, 4, 5]] * 3)
    step = shrink(
        made("qwen3"),
        mlp=[[1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 4]],
        query_heads=[[2, 3, 4, 5, 6]] * 3,
    )
    assert type(step) is PrunedForCausalLM
    step = shrink(step, mlp=[[0, 1, 2], [0, 1, 3], [1, 2, 3]], kv_groups=[[0, 1]] * 3)
    assert type(step) is type(once) is transformers.Qwen3ForCausalLM
    assert step.pruning_note == "" and step.config.to_dict() == once.config.to_dict()
    assert same_tensors(step, once) and torch.equal(logits(step), logits(once))


def test_head_maps_work_in_every_attention_and_in_training() -> None:
    model = free_model()
    expected = logits(model)
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    masked_out = logits(model, attention_mask=padded)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    eager = logits(model, attention_mask=padded)
    torch.testing.assert_close(eager[0, 3:], masked_out[0, 3:], rtol=0, atol=1e-5)
    copied = copy.deepcopy(model)

    def gradients(one: torch.nn.Module) -> list[torch.Tensor]:
        loss = one(input_ids=IDS, labels=IDS).loss
        return list(torch.autograd.grad(loss, list(one.parameters())))

    plain = gradients(model)
    copied.gradient_checkpointing_enable()
    copied.train()
    torch.testing.assert_close(gradients(copied), plain, rtol=1e-4, atol=1e-6)


def test_masked_checkpoints_are_read(tmp_path: Path) -> None:
    """From a folder, in its dtype; weights that cancel are no zeros; and all layers alike."""
    dense = made("llama-biased")
    with torch.no_grad():
        half = dense.model.layers[0].mlp.down_proj.weight[:, 0]
        half[::2], half[1::2] = 1.0, -1.0
        # Zeros of their own in the last layer: one neuron's up row, one value head.
        last = dense.model.layers[2]
        last.mlp.up_proj.weight[1], last.mlp.up_proj.bias[1] = 0, 0
        last.self_attn.v_proj.weight[:6], last.self_attn.v_proj.bias[:6] = 0, 0
    mlp = [list(range(20)), list(range(20, 40)), list(range(20))]
    zeroed = masked(dense, mlp, whole_groups([[0, 1], [1, 2], [0, 3]])).to(torch.bfloat16)
    save(zeroed, None, tmp_path / "masked")
    exact = from_masked(tmp_path / "masked")
    assert exact.dtype == torch.bfloat16
    assert sizes_of(exact) == ([20, 20, 19], [4, 4, 2], [2, 2, 1])
    alike = from_masked(tmp_path / "masked", alike=True)
    assert type(alike) is transformers.LlamaForCausalLM and sizes_of(alike) == (20, 4, 2)
    for small in (exact, alike):
        torch.testing.assert_close(logits(small), logits(zeroed), rtol=0, atol=0.1)


def test_a_model_of_zeros_keeps_one_of_each() -> None:
    model = made("mixtral")
    with torch.no_grad():
        for tensor in model.model.layers[1].parameters():
            tensor.zero_()
    small = from_masked(model)
    assert sizes_of(small) == ([40, 1, 40], [8, 1, 8], [4, 1, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp": [[0, 1]]}, "mlp: wanted kept indices for 3 layers, found 1"),
        ({"mlp": [[0, 40]] * 3}, r"mlp: layer 0: wanted indices in 0\.\.39, found 40"),
        ({"mlp": [[0, 1], [0, 0], [0, 1]]}, "mlp: layer 1: an index is named twice"),
        ({"mlp": [[]] * 3}, "mlp: layer 0: wanted at least one index to keep, found none"),
        ({"mlp": [[0.5]] * 3}, "mlp: layer 0: wanted a list of whole numbers, found torch.float32"),
        ({"kv_groups": [[4]] * 3}, r"kv_groups: layer 0: wanted indices in 0\.\.3, found 4"),
        (
            {"kv_groups": [[0, 1]] * 3, "query_heads": [[0, 1]] * 3},
            "layer 0: no kept query head reads key/value head 1",
        ),
        (
            {"kv_groups": [[0]] * 3, "query_heads": [[0, 2]] * 3},
            "layer 0: query head 2 reads key/value head 1, which is not kept",
        ),
        ({"query_heads": [[0, 3, 1]] * 3}, "layer 0: wanted query heads in the order of"),
    ],
)
def test_impossible_shrinks_are_one_line_and_change_nothing(arguments: dict, message: str) -> None:
    model = made("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message) as caught:
        shrink(model, **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_experts_keep_equally_many() -> None:
    with pytest.raises(InputError, match="layer 0: expert 1 keeps 1, expert 0 keeps 2: wanted one"):
        shrink(made("mixtral"), mlp=[[[0, 1], [0], [0, 1]]] * 3)
    with pytest.raises(InputError, match="layer 0: wanted kept indices for 3 experts, found 2"):
        shrink(made("mixtral"), mlp=[[[0, 1], [0, 1]]] * 3)


def test_other_models_are_refused_by_name() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)
    with pytest.raises(InputError, match="^GPT2LMHeadModel: cannot be pruned; wanted LlamaForC"):
        shrink(transformers.GPT2LMHeadModel(config))
    ranking = transformers.LlamaForSequenceClassification(made("llama").config)
    with pytest.raises(InputError, match="^LlamaForSequenceClassification: cannot be pruned"):
        shrink(ranking)


def test_broken_configurations_are_one_line(tmp_path: Path) -> None:
    save(free_model(), None, tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    good = json.loads(file.read_text())

    def refused(message: str, **changes: object) -> None:
        file.write_text(json.dumps(good | changes))
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / "small")
        assert "\n" not in str(caught.value)

    layers = good["per_layer_config"]
    refused("base_model_type is 'gpt2', wanted one of llama", base_model_type="gpt2")
    broken = {**layers, "1": layers["1"] | {"head_map": [1, 1, 1]}}
    refused(
        "layer 1: head_map has 3 query and 3 key/value heads, wanted 4 and 3",
        per_layer_config=broken,
    )
    broken = {**layers, "1": layers["1"] | {"head_map": [1, 0, 3]}}
    refused("layer 1: HeadMap: wanted one or more query heads", per_layer_config=broken)
    broken = {**layers, "1": layers["1"] | {"head_map": 4}}
    refused("layer 1: head_map is 4, wanted a list of whole numbers", per_layer_config=broken)
    refused("format_version is 2, this slmperf reads 1", format_version=2)
    refused("small", per_layer_config={"9": {"head_map": [1]}})
    with pytest.raises(InputError, match="layers differ"):
        shape_of(tmp_path / "small")
