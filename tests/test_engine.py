"""engine: a cached prefix, the bulk path and whole prompts give the same probabilities."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from slmperf.check import InputError
from slmperf.data import RankingPrompt
from slmperf.engine import Engine, layer_split, prefill_latency, rank_latency, score_prompts
from slmperf.engine.measure import PARTS

ANSWERS = (5, 9)
VOCABULARY = 97
LENGTH = 128


def make_model(kind: str, attention: str = "sdpa", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=kind == "llama",
        # Large weights, so that attention is sharp and a wrong position or mask shows.
        initializer_range=0.3,
        attn_implementation=attention,
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    experts = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="grouped_mm")
    return MixtralForCausalLM(MixtralConfig(**{**settings, **experts, **changes})).eval()


def make_prompt(rng, prefix: int, lengths: list[int], member: int = 0) -> RankingPrompt:
    return RankingPrompt(
        task="like",
        member=member,
        prefix=rng.integers(0, VOCABULARY, prefix).astype(np.int32),
        candidates=tuple(rng.integers(0, VOCABULARY, one).astype(np.int32) for one in lengths),
        labels=np.zeros(len(lengths), np.int8),
        rows=np.arange(len(lengths), dtype=np.int32),
    )


def one_by_one(model: torch.nn.Module, prompt: RankingPrompt) -> np.ndarray:
    """The definition: every prompt alone through the whole model."""
    scores = []
    for candidate in prompt.candidates:
        ids = torch.from_numpy(np.concatenate([prompt.prefix, candidate])).long()[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, -1, list(ANSWERS)].double()
        scores.append(torch.softmax(logits, 0)[1].item())
    return np.array(scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("candidates", [1, 32])
def test_cached_uncached_and_bulk_agree(kind, attention, candidates):
    model = make_model(kind, attention)
    rng = np.random.default_rng(candidates)
    prompt = make_prompt(rng, 60, rng.integers(1, 20, candidates).tolist())
    want = one_by_one(model, prompt)
    engine = Engine(model, ANSWERS)
    opened = engine.open(prompt.prefix)
    found = engine.score(opened, prompt.candidates)
    assert found.dtype == np.float64 and found.shape == (candidates,)
    np.testing.assert_allclose(found, want, atol=1e-5)
    np.testing.assert_array_equal(engine.score(opened, prompt.candidates), found)
    np.testing.assert_allclose(
        engine.score_uncached(prompt.prefix, prompt.candidates, batch_tokens=300), want, atol=1e-5
    )
    np.testing.assert_allclose(score_prompts(model, [prompt], ANSWERS)[0], want, atol=1e-5)
    if candidates > 1:
        assert want.std() > 0.05, "scores that hardly differ would prove nothing"


def test_the_prefix_is_not_computed_again():
    model = make_model("llama")
    engine = Engine(model, ANSWERS)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    rng = np.random.default_rng(0)
    prompt = make_prompt(rng, 100, [3, 7, 5])
    opened = engine.open(prompt.prefix)
    engine.score(opened, prompt.candidates)
    engine.score(opened, prompt.candidates[:1])
    assert [shape[1] for shape in seen] == [100, 15, 3]
    assert opened.length == 100
    assert all(keys.shape == (1, 2, 100, 8) for keys in opened.keys)
    assert opened.bytes == 2 * 2 * 100 * 2 * 8 * 4


def test_long_candidate_lists_are_cut(monkeypatch):
    monkeypatch.setattr("slmperf.engine.engine.PASS_TOKENS", 24)
    monkeypatch.setattr("slmperf.engine.bulk.ROW_TOKENS", 40)
    model = make_model("llama")
    rng = np.random.default_rng(0)
    prompt = make_prompt(rng, 10, [30, *rng.integers(1, 12, 20).tolist()])
    want = one_by_one(model, prompt)
    engine = Engine(model, ANSWERS)
    found = engine.score(engine.open(prompt.prefix), prompt.candidates)
    np.testing.assert_allclose(found, want, atol=1e-5)
    np.testing.assert_allclose(score_prompts(model, [prompt], ANSWERS)[0], want, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 200, None])
def test_bulk_many_members(batch_tokens):
    model = make_model("llama").train()
    rng = np.random.default_rng(1)
    prompts = [
        make_prompt(
            rng,
            int(rng.integers(1, 90)),
            rng.integers(1, 20, rng.integers(0, 8)).tolist(),
            member=member,
        )
        for member in range(23)
    ]
    ticks = []
    found = score_prompts(
        model,
        prompts,
        ANSWERS,
        batch_tokens=batch_tokens,
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert model.training
    assert [len(one) for one in found] == [len(prompt.candidates) for prompt in prompts]
    for prompt, one in zip(prompts, found, strict=True):
        np.testing.assert_allclose(one, one_by_one(model, prompt), atol=1e-5)
    tokens = sum(
        len(prompt.prefix) + sum(map(len, prompt.candidates))
        for prompt in prompts
        if prompt.candidates
    )
    assert ticks[-1] == (tokens, tokens)


def test_bf16_is_close():
    model = make_model("llama", initializer_range=0.1)
    rng = np.random.default_rng(2)
    prompts = [make_prompt(rng, 50, [4, 9, 2]) for _ in range(5)]
    half = score_prompts(model, prompts, ANSWERS, precision="bf16")
    full = score_prompts(model, prompts, ANSWERS)
    gap = np.abs(np.concatenate(half) - np.concatenate(full)).max()
    assert 0 < gap < 0.02
    with pytest.raises(InputError, match="precision is 'fp8'"):
        score_prompts(model, prompts, ANSWERS, precision="fp8")


def test_a_head_that_is_not_a_plain_linear():
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden)

    model = make_model("mixtral")
    prompt = make_prompt(np.random.default_rng(3), 20, [4, 9, 2])
    want = score_prompts(model, [prompt], ANSWERS)[0]
    model.set_output_embeddings(Wrapped(model.get_output_embeddings()))
    np.testing.assert_allclose(score_prompts(model, [prompt], ANSWERS)[0], want, atol=1e-6)


def test_no_candidates():
    engine = Engine(make_model("llama"), ANSWERS)
    prefix = np.arange(10)
    assert engine.score(engine.open(prefix), []).shape == (0,)
    assert engine.score_uncached(prefix, []).shape == (0,)
    assert score_prompts(engine.model, [], ANSWERS) == []


def test_refusals():
    model = make_model("llama")
    engine = Engine(model, ANSWERS)
    rng = np.random.default_rng(0)
    full = make_prompt(rng, LENGTH - 4, [4])
    engine.score(engine.open(full.prefix), full.candidates)
    long = make_prompt(rng, LENGTH - 4, [2, 5], member=12)
    for call in (
        lambda: engine.score(engine.open(long.prefix), long.candidates),
        lambda: engine.score_uncached(long.prefix, long.candidates),
        lambda: score_prompts(model, [full, long], ANSWERS),
    ):
        with pytest.raises(InputError, match=r"124 \+ 5 tokens, expected at most 128 .*trained"):
            call()
    with pytest.raises(InputError, match="candidate 1 is empty"):
        engine.score(engine.open(np.arange(3)), [np.arange(2), np.arange(0)])
    with pytest.raises(InputError, match="prefix is empty"):
        engine.open(np.arange(0))
    with pytest.raises(InputError, match=r"answer_ids are \(5, 97\)"):
        Engine(model, (5, VOCABULARY))
    with pytest.raises(NotImplementedError, match="sliding_window is 16"):
        Engine(make_model("mixtral", sliding_window=16), ANSWERS)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="flex_attention"):
        score_prompts(model, [full], ANSWERS)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_measurements(kind):
    model = make_model(kind)
    engine = Engine(model, ANSWERS)
    prefill = prefill_latency(engine, 64, repeats=3)
    assert prefill.context == 64 and 0 < prefill.median_ms <= prefill.p90_ms
    rank = rank_latency(engine, LENGTH, candidates=24, candidate_tokens=4, repeats=3)
    assert rank.prefix == LENGTH - 4
    assert 0 < rank.cached_ms < rank.uncached_ms
    split = layer_split(model, 64, repeats=2)
    assert tuple(split) == PARTS
    assert all(split[part] > 0 for part in PARTS[:-1])
    assert not any(module._forward_hooks for module in model.modules()), "hooks are taken off"
    with pytest.raises(InputError, match="prefill_latency: context is 129, expected 2 to 128"):
        prefill_latency(engine, LENGTH + 1)
    with pytest.raises(InputError, match="rank_latency: 0 candidates of 12"):
        rank_latency(engine, LENGTH, candidates=0)
