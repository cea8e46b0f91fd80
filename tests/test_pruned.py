"""A model whose layers differ goes wherever a stock one goes: training, int8, engine, caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_training import make_labelled, settings
from small_training import make_model as trainable
from stories260k import batches, load_stories260k, story_tokens
from test_engine import ANSWERS, make_prompt, one_by_one
from test_engine import make_model as rankable
from test_shrink import IDS, logits, made, masked, whole_groups
from transformers import MistralForCausalLM

from slmperf.distill import DistillationTrainer
from slmperf.engine import Engine
from slmperf.models import PrunedForCausalLM, load, save, shrink
from slmperf.models.structure import sizes_of
from slmperf.quant import quantize_model


def test_it_is_distilled(tmp_path: Path) -> None:
    model = trainable(num_attention_heads=4, num_key_value_heads=2)
    model = shrink(model, mlp=[range(16), range(8)], query_heads=[[0, 1, 2], [1, 3]])
    assert type(model) is PrunedForCausalLM
    trainer = DistillationTrainer(
        model, settings(tmp_path), make_labelled(20), teacher=trainable(seed=1)
    )
    trainer.train()
    assert trainer.losses[-1] < trainer.losses[0]
    save(trainer.model, None, tmp_path / "trained")
    assert torch.equal(logits(load(tmp_path / "trained")), logits(trainer.model.eval()))


def test_it_is_quantised(tmp_path: Path) -> None:
    model = shrink(made("qwen2"), mlp=[range(24), range(40), range(3)], query_heads=[[0, 2, 3]] * 3)
    quantize_model(model, "w8a8", method="rtn")
    save(model, None, tmp_path / "int8")
    back = load(tmp_path / "int8")
    assert type(back) is PrunedForCausalLM
    assert torch.equal(logits(back), logits(model))


def test_it_ranks_in_the_engine() -> None:
    model = shrink(rankable("llama"), query_heads=[[0, 1, 2], [1, 3]], mlp=[range(16), range(32)])
    prompt = make_prompt(np.random.default_rng(0), 20, [3, 4, 5])
    engine = Engine(model, ANSWERS)
    scores = engine.score(engine.open(prompt.prefix), prompt.candidates)
    np.testing.assert_allclose(scores, one_by_one(model, prompt), atol=1e-5)


def test_it_is_the_stock_model_where_layers_are_alike() -> None:
    """Loss, shifted positions and left padding, beside a stock class with the same tensors."""
    rows = [[0, 2, 3]] * 3
    stock = shrink(made("refused"), kv_groups=rows)
    biased = made("refused", attention_bias=True)
    same = made("refused").state_dict()
    with torch.no_grad():
        for name, tensor in biased.named_parameters():
            tensor.copy_(same.get(name, torch.zeros_like(tensor)))
    pruned = shrink(biased, kv_groups=rows)
    assert (type(stock), type(pruned)) == (MistralForCausalLM, PrunedForCausalLM)
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    for arguments in (
        {"attention_mask": padded, "labels": IDS},
        {"position_ids": torch.arange(12)[None] + 3, "logits_to_keep": 2},
        {"inputs_embeds": stock.model.embed_tokens(IDS), "input_ids": None},
        {"logits_to_keep": torch.tensor([1, 5])},
        {"output_hidden_states": True},
    ):
        found, wanted = (one(**({"input_ids": IDS} | arguments)) for one in (pruned, stock))
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.loss, wanted.loss)
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padded}
    assert torch.equal(pruned.generate(IDS, **settings), stock.generate(IDS, **settings))


def test_it_generates_with_a_static_cache() -> None:
    model = shrink(made("llama"), query_heads=[[0, 2, 3, 6], [1, 4, 5, 6], [0, 1, 2, 3]])
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 5)}
    expected = model.generate(IDS[:, :5], **settings)
    found = model.generate(IDS[:, :5], cache_implementation="static", **settings)
    assert torch.equal(found, expected)


def test_experts_of_odd_sizes_run_one_by_one(tmp_path: Path) -> None:
    """A grouped product wants rows of whole multiples of 16 bytes: 4 elements of fp32."""
    model = made("mixtral")
    mlp = [[[0, 2, 5], [1, 2, 3], [7, 8, 9]]] * 3
    zeroed = logits(masked(model, mlp, None))
    small = shrink(model, mlp=mlp)
    assert small is model and "experts run one by one" in small.pruning_note
    save(small, None, tmp_path / "small")
    for one in (small, load(tmp_path / "small")):
        torch.testing.assert_close(logits(one), zeroed, rtol=0, atol=1e-5)
    assert load(tmp_path / "small").config._experts_implementation == "eager"
    assert load(tmp_path / "small", dtype=torch.float64).config._experts_implementation == "eager"


def test_real_weights(shared_data: Path) -> None:
    """6 of stories260K's 8 query heads do not divide its hidden size of 64."""
    ids = batches(story_tokens(shared_data, "eval", 4))[0]["input_ids"]
    model = load_stories260k(shared_data)
    mlp, groups = [range(0, 172, 2)] * 5, [[0, 1, 3], [1, 2, 3], [0, 2, 3], [0, 1, 2], [0, 1, 3]]
    with torch.no_grad():
        expected = masked(model, mlp, whole_groups(groups))(input_ids=ids).logits
        small = shrink(model, mlp=mlp, kv_groups=groups)
        found = small(input_ids=ids).logits
    assert type(small) is MistralForCausalLM and sizes_of(small) == (86, 6, 3)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
