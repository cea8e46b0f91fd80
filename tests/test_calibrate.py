"""Gram matrices, calibrate and BlockStream: against sums by hand, however the tokens come in.

Over 400 lines: one model and one calibration set serve all of these tests.
"""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import ended, start_ranks
from stories260k import batches, load_stories260k, story_tokens
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from slmperf.calibrate import (
    BlockStream,
    Calibration,
    Gram,
    calibrate,
    check_tokenizer,
    fingerprint,
    pruned_layers,
    text_hash,
)
from slmperf.calibrate.watch import expert_inputs
from slmperf.check import InputError

O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"
BOTH = (O_PROJ, DOWN)
LAYERS = 3


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def mixtral(**changes: object) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.5,
    }
    return MixtralForCausalLM(MixtralConfig(**(sizes | changes))).eval()


def sequences(seed: int = 1) -> list[Tensor]:
    """Nine of unequal length."""
    make = torch.Generator().manual_seed(seed)
    lengths = (30, 17, 5, 24, 1, 30, 12, 8, 21)
    return [torch.randint(0, 96, (length,), generator=make) for length in lengths]


def batches_of(
    rows: list[Tensor], size: int = 4, left: bool = False, padding: int = 0, filler: int = 0
) -> list[dict[str, Tensor]]:
    """Batches of `size` sequences, padded (by `padding` places more than needed) with a mask."""
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(map(len, part)) + padding
        ids = torch.full((len(part), width), filler)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(part):
            place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def by_hand(
    model: PreTrainedModel, rows: list[Tensor], names: list[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs (T, d) and outputs without bias (T, N) of named layers, a sequence at a time, fp64."""
    wide = copy.deepcopy(model).double()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for name in names:
        layer = wide.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: found[name].append(
                (given[0][0], given[0][0] @ torch.atleast_2d(layer.weight).T)
            )
        )
    with torch.no_grad():
        for tokens in rows:
            wide(tokens[None])
    return found


def close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Elements within a share of the largest."""
    assert found is not None and found.shape == wanted.shape and found.dtype == torch.float64
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


# ---- Gram


def test_gram_is_exact_weighted_and_ignores_padding() -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 8, generator=make)
    weights = torch.rand(3, 50, generator=make)
    weights[0, 10:] = 0
    x[0, 10:] = torch.nan
    gram = Gram(8)
    gram.add(x, weights)
    rows = x.double().nan_to_num().reshape(-1, 8)
    wanted = rows.T @ (rows * weights.double().reshape(-1, 1))
    torch.testing.assert_close(gram.matrix, wanted, rtol=1e-5, atol=1e-5)
    assert gram.tokens == 110 and gram.weight == pytest.approx(float(weights.sum()), rel=1e-6)
    assert gram.finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_halves_are_exact(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3000, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(40)
    gram.add(x)
    rows = x.double().reshape(-1, 40)
    close(gram.matrix, rows.T @ rows, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_batches_give_the_same_bits(dtype: torch.dtype) -> None:
    # More than two products, cut at places that have nothing to do with theirs.
    x = torch.randn(10000, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = Gram(9)
    whole.add(x)
    for sizes in ([1, 4095, 4096, 1808], [5000, 5000], [100] * 100, [0, 9999, 1]):
        parts = Gram(9)
        for part in x.split(sizes):
            parts.add(part)
        assert torch.equal(parts.matrix, whole.matrix)
    padded = Gram(9)
    wide = torch.full((10, 1300, 9), torch.nan, dtype=dtype)
    wide[:, 200:1200] = x.view(10, 1000, 9)
    mask = torch.zeros(10, 1300)
    mask[:, 200:1200] = 1
    for start in range(0, 10, 3):
        padded.add(wide[start : start + 3], mask[start : start + 3])
    assert torch.equal(padded.matrix, whole.matrix) and padded.tokens == 10000
    assert whole.matrix is not whole.matrix and torch.equal(whole.matrix, whole.matrix.T)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_minitrons(size: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(3)
    x = torch.randn(5, 40, 12, generator=make).to(dtype)
    before = x.clone()
    mask = torch.rand(5, 40, generator=make) < 0.6
    mask[2] = False  # a sequence of padding alone
    gram = Gram(12, group_size=size)
    for part in (slice(0, 2), slice(2, 5)):
        gram.add(x[part], mask[part])
    squares = torch.zeros(12 // size, dtype=torch.float64)
    for row in (0, 1, 3, 4):
        norms = x[row][mask[row]].double().unflatten(1, (-1, size)).norm(dim=2)
        squares += norms.mean(0).square()
    close(gram.scores, squares.sqrt(), 1e-6)
    assert torch.equal(x, before)
    weighted = Gram(12, group_size=size)
    weights = mask * torch.rand(5, 40, generator=make)
    weighted.add(x, weights)
    one = weights[0].double()
    first = Gram(12, group_size=size)
    first.add(x[0], weights[0])
    norms = x[0].double().unflatten(1, (-1, size)).norm(dim=2)
    close(first.scores, (one[:, None] * norms).sum(0) / one.sum(), 1e-6)
    assert Gram(12).scores is None


def test_targets_are_products_with_the_outputs() -> None:
    make = torch.Generator().manual_seed(4)
    x, y = (torch.randn(2, 3000, n, generator=make) for n in (6, 5))
    weights = (torch.rand(2, 3000, generator=make) - 0.3).clamp(min=0)
    gram = Gram(6, outputs=5)
    for row in range(2):
        gram.add(x[row], weights[row], y[row])
    left = y.double().reshape(-1, 5) * weights.double().reshape(-1, 1)
    close(gram.target, left.T @ x.double().reshape(-1, 6))
    with pytest.raises(InputError, match="wanted the outputs"):
        gram.add(x)


def test_merging_is_having_seen_both() -> None:
    x, y = (torch.randn(4, 2000, n, generator=torch.Generator().manual_seed(n)) for n in (6, 5))

    def seen(rows: slice) -> Gram:
        gram = Gram(6, group_size=2, outputs=5)
        gram.add(x[rows], None, y[rows])
        return gram

    both, one, two = seen(slice(4)), seen(slice(3)), seen(slice(3, 4))
    one.merge(two)
    close(one.matrix, both.matrix, 1e-6)
    close(one.target, both.target, 1e-6)
    close(one.scores, both.scores, 1e-6)
    assert (one.tokens, one.weight) == (both.tokens, both.weight) == (8000, 8000.0)
    with pytest.raises(InputError, match=r"= \(6, 2, 5\) to merge, found \(6, 2, None\)"):
        one.merge(Gram(6, group_size=2))


def test_a_saved_gram_comes_back_and_goes_on(tmp_path: Path) -> None:
    x = torch.randn(3, 100, 300, generator=torch.Generator().manual_seed(0))
    gram = Gram(300, group_size=3)
    gram.add(x, torch.rand(3, 100))
    gram.save(tmp_path / "gram.safetensors")
    back = Gram.load(tmp_path / "gram.safetensors")
    assert torch.equal(back.matrix, gram.matrix) and torch.equal(back.scores, gram.scores)
    assert (back.tokens, back.weight, back.group_size) == (gram.tokens, gram.weight, 3)
    assert back.target is None
    back.add(x)  # the file stays what it was
    gram.add(x)
    assert torch.equal(back.matrix, gram.matrix)
    assert Gram.load(tmp_path / "gram.safetensors").tokens == 300
    (tmp_path / "cut").write_bytes((tmp_path / "gram.safetensors").read_bytes()[:1000])
    for name in ("cut", "none"):
        with pytest.raises(InputError, match=f"{name}: wanted a Gram matrix"):
            Gram.load(tmp_path / name)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([1.0, -2.0, 0.0]), "finite numbers >= 0, found -2.0"),
        (torch.tensor([1.0, torch.nan, 0.0]), "finite numbers >= 0, found nan"),
        (torch.ones(4), r"token weights: wanted \(1, 3\), found \(4,\)"),
    ],
)
def test_weights_that_are_none(weights: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gram(2).add(torch.ones(3, 2), weights)


def test_group_sizes_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="group_size 5 does not divide 12"):
        Gram(12, group_size=5)


# ---- calibrate


def test_calibrate_against_sums_by_hand() -> None:
    model, rows = llama(attention_bias=True, mlp_bias=True), sequences()
    made = calibrate(model, batches_of(rows), source="in-domain: nine sequences")
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in BOTH]
    assert list(made) == names
    assert made.manifest == {
        "batches": 3,
        "sequences": 9,
        "tokens": 148,
        "source": "in-domain: nine sequences",
        "tokenizer": "",
        "model": fingerprint(model),
    }
    json.dumps(made.manifest)
    for name, given in by_hand(model, rows, names).items():
        inputs = torch.cat([x for x, _ in given])
        close(made[name].matrix, inputs.T @ inputs)
        assert made[name].tokens == 148 and made[name].weight == 148.0
        size = 8 if name.endswith("o_proj") else 1  # two heads of 4 read one KV head
        assert made[name].group_size == size
        means = torch.stack([x.unflatten(1, (-1, size)).norm(dim=2).mean(0) for x, _ in given])
        close(made[name].scores, means.square().sum(0).sqrt())


@pytest.mark.parametrize(
    "how", [{"size": 1}, {"size": 9}, {"left": True}, {"padding": 7}, {"filler": 55, "padding": 3}]
)
def test_batches_and_padding_leave_the_gram_unchanged(how: dict[str, Any]) -> None:
    model, rows = llama(), sequences()
    wanted = calibrate(model, batches_of(rows))
    found = calibrate(model, iter(batches_of(rows, **how)))
    for name, gram in wanted.items():
        close(found[name].matrix, gram.matrix, 1e-6)
        close(found[name].scores, gram.scores, 1e-6)
        assert found[name].tokens == gram.tokens == 148
    assert found.manifest | {"batches": 0} == wanted.manifest | {"batches": 0}


def test_token_weights_select_tokens() -> None:
    model = llama()
    batch = batches_of(sequences())[0]
    name = "model.layers.1.mlp.down_proj"
    chosen = torch.zeros(batch["input_ids"].shape)
    chosen[:, 4] = 1
    gram = calibrate(model, [batch | {"token_weights": chosen}], [name])[name]
    assert gram.tokens == 4
    doubled = calibrate(model, [batch | {"token_weights": 2 * chosen}], [name])[name]
    close(doubled.matrix, 2 * gram.matrix, 1e-6)
    assert doubled.weight == 8.0
    everywhere = {"token_weights": torch.ones_like(chosen)}
    padded = calibrate(model, [batch | everywhere], [name])[name]
    assert padded.tokens == int(batch["attention_mask"].sum()) < chosen.numel()
    with pytest.raises(InputError, match=f"at least one calibration token for {name}"):
        calibrate(model, [batch | {"token_weights": chosen * 0.0}], [name])


def test_the_models_mode_comes_back_and_its_head_is_not_run() -> None:
    model = llama()
    model.lm_head.forward = lambda hidden: pytest.fail("the head was run")  # type: ignore[method-assign]
    model.train()
    calibrate(model, batches_of(sequences())[:1])
    assert model.training and not model.model.layers[0].mlp.down_proj._forward_pre_hooks


def test_what_calibrate_refuses() -> None:
    model, data = llama(), batches_of(sequences())
    with pytest.raises(InputError, match="has no layer model.layers.9"):
        calibrate(model, data, ["model.layers.9.mlp.down_proj"])
    with pytest.raises(InputError, match="at least one calibration batch"):
        calibrate(model, [])
    with pytest.raises(InputError, match="wanted input_ids or inputs_embeds"):
        calibrate(model, [{"attention_mask": torch.ones(2, 3)}])
    model.model.layers[1].mlp.gate_proj.weight.data[5] = torch.inf
    with pytest.raises(InputError, match="layers.1.mlp.down_proj: wanted finite inputs"):
        calibrate(model, data)
    stream = BlockStream(model, model.model.layers, data)
    with pytest.raises(InputError, match="layers.1.mlp.down_proj: wanted finite inputs"):
        stream.grams(1, [DOWN])


@pytest.mark.parametrize("wrong", [-1, 96])
def test_ids_of_another_vocabulary_are_refused_before_anything_runs(wrong: int) -> None:
    model, data = llama(), batches_of(sequences())
    data[-1]["input_ids"][0, 0] = wrong
    model.forward = lambda **given: pytest.fail("the model was run")  # type: ignore[method-assign]
    with pytest.raises(InputError, match=rf"ids in 0..95, .* found {wrong}: is the text's token"):
        calibrate(model, data)
    with pytest.raises(InputError, match="ids in 0..95"):
        BlockStream(model, model.model.layers, data)


def test_tokenizers_of_other_models_are_told() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from transformers import PreTrainedTokenizerFast

    def tokenizer(*words: str) -> PreTrainedTokenizerFast:
        ids = {word: index for index, word in enumerate(words)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, words[0])))

    one, same, other = tokenizer("a", "b"), tokenizer("a", "b"), tokenizer("b", "a")
    check_tokenizer(one, same)
    assert text_hash(one) == text_hash(same) != text_hash(other)
    with pytest.raises(InputError, match=r"found another \(2 tokens\): 'a' is 0 there and 1 here"):
        check_tokenizer(one, other)
    with pytest.raises(InputError, match=r"\(3 tokens\): 'c' is None there and 2 here"):
        check_tokenizer(one, tokenizer("a", "b", "c"))
    same.pad_token = "b"  # as is often done for batches: ids of text stay
    check_tokenizer(one, same)
    same.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(InputError, match="another of the same 2 tokens, which splits text other"):
        check_tokenizer(one, same)
    made = calibrate(llama(), batches_of(sequences())[:1], tokenizer=one)
    assert made.manifest["tokenizer"] == text_hash(one)


def test_calibrations_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    model, rows = llama(), sequences()
    whole = calibrate(model, batches_of(rows), source="one + two")
    one = calibrate(model, batches_of(rows[:3]), source="one")
    two = calibrate(model, batches_of(rows[3:]), source="two")
    one.save(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["one"]
    back = Calibration.load(tmp_path / "one")
    assert back.manifest == one.manifest and list(back) == list(one)
    back.merge(two)
    assert back.manifest == whole.manifest
    for name, gram in whole.items():
        close(back[name].matrix, gram.matrix, 1e-6)
        close(back[name].scores, gram.scores, 1e-6)
    other = llama()
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    assert fingerprint(other) != fingerprint(model) == fingerprint(llama())
    with pytest.raises(InputError, match="wanted the same model"):
        back.merge(calibrate(other, batches_of(rows)))
    with pytest.raises(InputError, match="wanted the same layers, found model.layers.0.mlp"):
        back.merge(calibrate(model, batches_of(rows), [f"model.layers.0.{O_PROJ}"]))
    with pytest.raises(InputError, match="manifest.json: wanted a calibration as slmperf saves"):
        Calibration.load(tmp_path)


# ---- BlockStream


def test_a_blocks_own_forward_stays() -> None:
    """Such as accelerate's hooks, which put one into the instance."""
    model, data = llama(), batches_of(sequences())
    block = model.model.layers[1]
    calls: list[int] = []

    def own(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return type(block).forward(block, *given, **named)

    block.forward = own
    stream = BlockStream(model, model.model.layers, data)
    assert block.forward is own and "forward" not in vars(model.model.layers[0]) and not calls
    stream.advance(0)
    stream.advance(1)
    assert len(calls) == len(data)


@pytest.mark.parametrize("long", [False, True])
def test_block_stream_follows_the_model_exactly(long: bool) -> None:
    model, rows = llama(), sequences()
    if long:  # masks are then larger than the hidden states, and made again
        rows = [torch.cat([*rows, rows[0]])[:180], rows[0]]
    data = batches_of(rows)
    whole = calibrate(model, data)
    stream = BlockStream(model, model.model.layers, data, source="generic: nine")
    assert stream.manifest == whole.manifest | {"source": "generic: nine"}
    assert (stream._arguments[0] is None) == long
    for index in range(LAYERS):
        grams = stream.grams(index, BOTH, {"o_proj": 8, DOWN: 1})
        for name in BOTH:
            wanted = whole[f"model.layers.{index}.{name}"]
            assert torch.equal(grams[name].matrix, wanted.matrix)
            assert torch.equal(grams[name].scores, wanted.scores)
            assert grams[name].target is None
            again = stream.grams(index, [name])[name]
            assert torch.equal(again.matrix, wanted.matrix) and again.scores is None
        stream.advance(index)
    with torch.no_grad():
        last = model.model(**data[0], use_cache=False).last_hidden_state
        assert torch.equal(model.model.norm(stream.hidden[0]), last)


def test_no_more_of_a_block_runs_than_is_watched() -> None:
    model = llama()
    stream = BlockStream(model, model.model.layers, batches_of(sequences()))
    block = model.model.layers[0]
    block.mlp.forward = lambda hidden: pytest.fail("the MLP was run")  # type: ignore[method-assign]
    stream.grams(0, [O_PROJ])
    del block.mlp.forward
    block.mlp.down_proj.forward = lambda hidden: pytest.fail("down_proj was run")  # type: ignore[method-assign]
    stream.grams(0, BOTH)


@pytest.mark.parametrize("dense_target", [False, True])
def test_only_the_block_at_hand_is_in_memory(dense_target: bool) -> None:
    whole, data = llama(), batches_of(sequences())
    wanted = BlockStream(whole, whole.model.layers, data)
    model = llama()
    blocks = model.model.layers
    for block in blocks:
        block.to("meta")
    stream = BlockStream(model, blocks, data, dense_target=dense_target)
    assert stream.manifest["model"] == ""
    for index, block in enumerate(blocks):
        block.to_empty(device="cpu")
        block.load_state_dict(whole.model.layers[index].state_dict())
        for name in BOTH:
            found = stream.grams(index, [name])[name]
            assert torch.equal(found.matrix, wanted.grams(index, [name])[name].matrix)
        stream.advance(index)
        wanted.advance(index)
        block.to("meta")
    assert torch.equal(stream.hidden[0], wanted.hidden[0])


def test_a_dense_target_makes_the_hidden_states_those_of_the_unchanged_model() -> None:
    model, rows = llama(attention_bias=True, mlp_bias=True), sequences()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    dense = copy.deepcopy(model)
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in BOTH]
    added_to = {O_PROJ: "input_layernorm", DOWN: "post_attention_layernorm"}
    names += [f"model.layers.{i}.{norm}" for i in range(LAYERS) for norm in added_to.values()]
    wanted = by_hand(dense, rows, names)
    stream = BlockStream(model, model.model.layers, batches_of(rows), dense_target=True)
    drifts = []
    for index, block in enumerate(model.model.layers):
        for name, changed in ((O_PROJ, block.self_attn.v_proj), (DOWN, block.mlp.up_proj)):
            layer, norm = (f"model.layers.{index}.{one}" for one in (name, added_to[name]))
            gram = stream.grams(index, [name])[name]
            now = by_hand(model, rows, [layer, norm])
            inputs = torch.cat([x for x, _ in now[layer]])
            outputs = torch.cat([y for _, y in wanted[layer]])
            drift = torch.cat([x for x, _ in wanted[norm]]) - torch.cat([x for x, _ in now[norm]])
            close(gram.matrix, inputs.T @ inputs)
            close(gram.target, (outputs + drift).T @ inputs)
            drifts.append(float(drift.norm() / outputs.norm()))
            with torch.no_grad():
                changed.weight[:4] = 0  # the pruned prefix goes its own way
        stream.advance(index)
    assert drifts[0] < 1e-5 and min(drifts[1:]) > 0.05


def test_real_activations_against_fp64(shared_data: Path) -> None:
    model = load_stories260k(shared_data)
    stories = story_tokens(shared_data, "calib", 12)
    wanted = by_hand(model, stories, names := [f"model.layers.4.{name}" for name in BOTH])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        made = calibrate(copy.deepcopy(model).to(dtype), batches(stories, 5))
        assert len(made) == 10
        for name in names:
            inputs = torch.cat([x for x, _ in wanted[name]])
            close(made[name].matrix, inputs.T @ inputs, tolerance)
            assert float(torch.linalg.eigvalsh(made[name].matrix).min()) > -1e-6 * float(
                made[name].matrix.diagonal().mean()
            )


# ---- files in place of memory


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if ".spill-" in line]


@pytest.mark.parametrize("dense_target", [False, True])
def test_spilled_is_the_same(tmp_path: Path, dense_target: bool) -> None:
    model, data = llama(), batches_of(sequences())
    here = BlockStream(model, model.model.layers, data, dense_target=dense_target)
    there = BlockStream(
        model, model.model.layers, data, dense_target=dense_target, spill=tmp_path / "spilled"
    )
    assert mapped_files()
    for index in range(2):
        one, two = (stream.grams(index, BOTH) for stream in (here, there))
        for name in BOTH:
            assert torch.equal(one[name].matrix, two[name].matrix)
            if dense_target:
                assert torch.equal(one[name].target, two[name].target)
        here.advance(index)
        there.advance(index)
    whole = calibrate(model, data, spill=tmp_path / "spilled")
    name = f"model.layers.0.{DOWN}"
    assert torch.equal(whole[name].matrix, calibrate(model, data)[name].matrix)
    assert os.listdir(tmp_path / "spilled") == []  # they have no names
    del here, there, one, two, whole
    assert mapped_files() == []


def test_a_folder_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="spill: wanted 1 MiB in .*, found: No space left"):
        Gram(360, spill=tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="Not a directory|File exists"):
        (tmp_path / "file").write_text("")
        Gram(400, spill=tmp_path / "file")


# ---- experts


def expert_rows(
    model: MixtralForCausalLM, rows: list[Tensor]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Per expert the inputs of its down_proj (n, F) and the router's weights (n,), fp64."""
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(index: int) -> Any:
        def before(experts: nn.Module, given: tuple[Tensor, ...]) -> None:
            hidden, chosen, router = given
            for expert in range(4):
                token, place = (chosen == expert).nonzero().unbind(1)
                both = hidden[token] @ experts.gate_up_proj[expert].T
                gate, up = both.chunk(2, dim=1)
                name = f"model.layers.{index}.mlp.experts.{expert}.down_proj"
                values = (experts.act_fn(gate) * up, router[token, place])
                found.setdefault(name, []).append(values)

        return before

    for index, block in enumerate(wide.model.layers):
        block.mlp.experts.register_forward_pre_hook(hook(index))
    with torch.no_grad():
        for tokens in rows:
            wide(tokens[None])
    return found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_expert_has_its_own_tokens(implementation: str) -> None:
    model, rows = mixtral(), sequences()
    model.set_experts_implementation(implementation)
    made = calibrate(model, batches_of(rows))
    wanted = expert_rows(model, rows)
    assert [name for name in made if "experts" in name] == list(wanted)
    assert pruned_layers(model.model.layers[0])[1] == "mlp.experts.0.down_proj"
    stream = BlockStream(model, model.model.layers, batches_of(rows))
    for index in range(2):
        grams = stream.grams(index, pruned_layers(model.model.layers[index]), {"down_proj": 1})
        for name in list(grams)[1:]:
            full = f"model.layers.{index}.{name}"
            inputs, router = (torch.cat(part) for part in zip(*wanted[full], strict=True))
            close(made[full].matrix, (inputs * router[:, None] ** 2).T @ inputs)
            assert made[full].tokens == len(inputs)
            assert made[full].weight == pytest.approx(float(router.square().sum()), rel=1e-5)
            close(grams[name].matrix, made[full].matrix, 1e-6)
            close(grams[name].scores, made[full].scores, 1e-6)
            means = [
                (r[:, None] ** 2 * x.abs()).sum(0) / r.square().sum()
                for x, r in wanted[full]
                if len(x)
            ]
            close(made[full].scores, torch.stack(means).square().sum(0).sqrt())
        stream.advance(index)
    tokens = [made[name].tokens for name in wanted]
    assert sum(tokens[:4]) == sum(tokens[4:]) == 2 * 148


def test_an_expert_without_tokens_is_no_error_but_all_of_them_are() -> None:
    model, data = mixtral(), batches_of(sequences())
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight.zero_()  # of equal experts the same two are always taken
    names = pruned_layers(model.model.layers[0])
    for dense_target in (False, True):
        stream = BlockStream(model, model.model.layers, data, dense_target=dense_target)
        grams = stream.grams(0, names, {"down_proj": 1})
        experts = list(grams.values())[1:]
        assert sorted(gram.tokens for gram in experts) == [0, 0, 148, 148]
        for gram in experts:
            assert (float(gram.matrix.abs().max()) > 0) == (gram.tokens > 0) == bool(gram.weight)
            assert (float(gram.scores.max()) > 0) == (gram.tokens > 0)
    nothing = [batch | {"attention_mask": batch["attention_mask"] * 0} for batch in data]
    with pytest.raises(InputError, match="token for model.layers.0.mlp.experts, found none"):
        BlockStream(model, model.model.layers, nothing).grams(0, names[1:])


def test_dense_targets_of_experts() -> None:
    model, rows = mixtral(), sequences()
    dense = copy.deepcopy(model)
    stream = BlockStream(model, model.model.layers, batches_of(rows), dense_target=True)
    for index, block in enumerate(model.model.layers):
        grams = stream.grams(index, pruned_layers(block))
        for expert in range(4):
            gram = grams[f"mlp.experts.{expert}.down_proj"]
            weight = block.mlp.experts.down_proj[expert].detach().double()
            if index == 0:  # nothing is pruned yet: the target is what the layer makes
                close(gram.target, weight @ gram.matrix)
        with torch.no_grad():
            block.mlp.experts.down_proj[:, :, :12] = 0
        stream.advance(index)
    # The second block, by hand: inputs and the stream of both models, routing of the changed one.
    index, experts = 1, model.model.layers[1].mlp.experts
    target = torch.zeros(experts.down_proj.shape, dtype=torch.float64)
    matrix = torch.zeros(4, *2 * target.shape[2:], dtype=torch.float64)
    for tokens in rows:
        (stream_now, given, chosen, router), (stream_dense, dense_given, _, _) = (
            experts_see(one, index, tokens) for one in (model, dense)
        )
        for expert in range(4):
            share = (router * (chosen == expert)).sum(1).double()
            x = expert_inputs(experts, expert, given).double()
            y = expert_inputs(dense.model.layers[1].mlp.experts, expert, dense_given).double()
            y = y @ dense.model.layers[1].mlp.experts.down_proj[expert].double().T
            y += (stream_dense - stream_now).double()
            matrix[expert] += (x * share[:, None] ** 2).T @ x
            target[expert] += (y * share[:, None] ** 2).T @ x
    for expert in range(4):
        close(grams[f"mlp.experts.{expert}.down_proj"].matrix, matrix[expert].detach())
        close(grams[f"mlp.experts.{expert}.down_proj"].target, target[expert].detach())


@torch.no_grad()
def experts_see(model: PreTrainedModel, index: int, tokens: Tensor) -> list[Tensor]:
    """What the MLP of a block is added to (T, D), and what its experts are given."""
    block, found = model.model.layers[index], []
    handles = [
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, given: found.append(given[0][0])
        ),
        block.mlp.experts.register_forward_pre_hook(lambda _, given: found.extend(given[:3])),
    ]
    model(tokens[None])
    for handle in handles:
        handle.remove()
    return found


# ---- workers


def job(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, data = llama(), batches_of(sequences(), size=2)
    mine = data[:4] if rank == 0 else data[4:]
    calibrate(model, mine).save(folder / f"one-{rank}")
    calibrate(model, data if rank else []).save(folder / f"alone-{rank}")
    stream = BlockStream(model, model.model.layers, mine, dense_target=True)
    stream.grams(0, BOTH)
    stream.advance(0)
    Calibration(stream.grams(1, BOTH), stream.manifest).save(folder / f"stream-{rank}")
    try:
        calibrate(model, [])
    except InputError as error:
        (folder / f"none-{rank}").write_text(str(error))


def test_workers_have_the_sum_of_all(tmp_path: Path) -> None:
    assert ended(start_ranks(job, tmp_path)) == [0, 0]
    model, data = llama(), batches_of(sequences(), size=2)
    whole = calibrate(model, data)
    for name in ("one", "alone", "stream"):
        found = [Calibration.load(tmp_path / f"{name}-{rank}") for rank in (0, 1)]
        assert found[0].manifest == found[1].manifest == whole.manifest
        for layer, gram in found[0].items():
            wanted = whole[layer if name != "stream" else f"model.layers.1.{layer}"]
            assert torch.equal(gram.matrix, found[1][layer].matrix)
            close(gram.matrix, wanted.matrix, 1e-6)
            assert gram.tokens == wanted.tokens == 148
            if name == "stream":
                weight = model.get_submodule(f"model.layers.1.{layer}").weight.detach().double()
                close(gram.target, weight @ gram.matrix)
            else:
                close(gram.scores, wanted.scores, 1e-6)
    assert "at least one calibration batch" in (tmp_path / "none-0").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("spilled", [False, True])
def test_the_same_on_a_device(tmp_path: Path, spilled: bool) -> None:
    model, data = llama(), batches_of(sequences())
    wanted = calibrate(model, data)
    found = calibrate(model.cuda(), data, spill=tmp_path if spilled else None)
    for name, gram in wanted.items():
        close(found[name].matrix.cpu(), gram.matrix, 1e-4)
        close(found[name].scores.cpu(), gram.scores, 1e-4)
