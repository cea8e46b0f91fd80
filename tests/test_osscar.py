"""osscar against brute force, and prune_model on random and on real models.

Over 400 lines: the brute force and its problems serve all of these tests.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stories260k import batches, load_stories260k, perplexity, story_tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slmperf.calibrate import BlockStream, Gram, calibrate
from slmperf.check import InputError
from slmperf.models import parameters, save, shrink
from slmperf.prune import osscar, prune_model


def problem(seed: int, inputs: int, outputs: int = 5, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A Gram matrix of correlated inputs of unequal size, and a weight; fp64."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=make, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=make, dtype=torch.float64) @ mix
    x *= torch.rand(inputs, generator=make, dtype=torch.float64) + 0.1
    return x.T @ x, torch.randn(outputs, inputs, generator=make, dtype=torch.float64)


def objective(
    gram: Tensor, weight: Tensor, columns: list[int], damping: float
) -> tuple[float, Tensor]:
    """The damped objective at its optimum over `columns`, and that optimum, by a direct solve."""
    mu = damping * gram.diagonal().mean()
    damped = gram + mu * torch.eye(len(gram), dtype=gram.dtype)
    kept = torch.tensor(columns, dtype=torch.int64)
    best = torch.linalg.solve(damped[kept][:, kept], (weight @ damped)[:, kept].T).T
    difference = weight.clone()
    difference[:, kept] -= best
    return float((difference @ damped * difference).sum() / 2), best


def columns_of(groups: list[int], size: int) -> list[int]:
    return [group * size + i for group in groups for i in range(size)]


def exhaustive_greedy(
    gram: Tensor, weight: Tensor, size: int, keep: int, damping: float
) -> tuple[list[int], list[float]]:
    """Remove, one at a time, the group whose removal costs least, trying them all."""
    left = list(range(len(gram) // size))
    order, curve = [], []
    while len(left) > keep:
        tried = {
            group: objective(
                gram, weight, columns_of([g for g in left if g != group], size), damping
            )[0]
            for group in left
        }
        group = min(tried, key=tried.__getitem__)
        order.append(group)
        curve.append(tried[group])
        left.remove(group)
    return order, curve


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_stepwise_exhaustive_search(size: int, damping: float, seed: int) -> None:
    gram, weight = problem(seed, 12)
    keep = 12 // size // 3
    order, curve = exhaustive_greedy(gram, weight, size, keep, damping)
    result = osscar(gram, weight, group_size=size, keep=keep, damping=damping)
    assert result.order.tolist() == order
    torch.testing.assert_close(
        result.curve, torch.tensor(curve, dtype=torch.float64), rtol=1e-9, atol=0
    )
    kept = columns_of(result.kept.tolist(), size)
    _, best = objective(gram, weight, kept, damping)
    torch.testing.assert_close(result.weight, best, rtol=1e-9, atol=1e-11)
    difference = weight.clone()
    difference[:, kept] -= result.weight
    error = float((difference @ gram * difference).sum() / 2)
    assert result.error == pytest.approx(error, rel=1e-12)
    assert result.relative_error == pytest.approx(error / float((weight @ gram * weight).sum() / 2))


@pytest.mark.parametrize("size", [1, 3])
def test_cost_of_one_removal_is_the_closed_form(size: int) -> None:
    gram, weight = problem(9, 12)
    inverse = gram.inverse()
    costs = []
    for group in range(12 // size):
        part = slice(group * size, (group + 1) * size)
        block = weight[:, part]
        costs.append(float((block @ inverse[part, part].inverse() * block).sum() / 2))
    result = osscar(gram, weight, group_size=size, keep=12 // size - 1, damping=0.0)
    assert float(result.curve[0]) == pytest.approx(min(costs), rel=1e-10)
    assert int(result.order[0]) == costs.index(min(costs))


def test_beats_random_sets_and_comes_close_to_the_best_set() -> None:
    ratios = []
    for seed in range(12):
        gram, weight = problem(seed, 10)
        best = min(
            objective(gram, weight, list(kept), 0.0)[0]
            for kept in itertools.combinations(range(10), 6)
        )
        ratios.append(osscar(gram, weight, keep=6, damping=0.0).error / best)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.5


def test_curve_ends_where_the_blocked_updates_end() -> None:
    # More removals than one block of updates holds, and groups that do not divide it.
    for inputs, size, keep in ((200, 1, 20), (210, 3, 8)):
        gram, weight = problem(3, inputs, outputs=7, tokens=400)
        result = osscar(gram, weight, group_size=size, keep=keep)
        final, best = objective(gram, weight, columns_of(result.kept.tolist(), size), 0.01)
        assert float(result.curve[-1]) == pytest.approx(final, rel=1e-8)
        torch.testing.assert_close(result.weight, best, rtol=1e-8, atol=1e-9)


def test_orders_are_nested_and_none_orders_everything() -> None:
    gram, weight = problem(5, 24)
    everything = osscar(gram, weight)
    assert sorted(everything.order.tolist()) == list(range(24))
    assert everything.kept.tolist() == list(range(24)) and torch.equal(everything.weight, weight)
    assert everything.error == 0.0
    for keep in (1, 10, 20, 24):
        part = osscar(gram, weight, keep=keep)
        assert part.order.tolist() == everything.order.tolist()[: 24 - keep]
        assert sorted(part.kept.tolist() + part.order.tolist()) == list(range(24))
        assert torch.equal(part.curve, everything.curve[: 24 - keep])


def test_keeping_all_changes_nothing() -> None:
    gram, weight = problem(6, 12)
    result = osscar(gram, weight.float(), keep=12)
    assert torch.equal(result.weight, weight.float())
    assert result.error == 0.0 and len(result.curve) == 0


def test_weights_that_cancel_are_not_taken_for_dead() -> None:
    gram, weight = problem(7, 12, outputs=4)
    weight[:, 3] = torch.tensor([50.0, -50.0, 25.0, -25.0])
    result = osscar(gram, weight, keep=9)
    assert len(result.kept) == 9 and 3 in result.kept


def test_zero_first_output_column_loses_nothing() -> None:
    gram, weight = problem(8, 12, outputs=4)
    weight[0] = 0.0
    result = osscar(gram, weight, keep=11)
    assert len(result.kept) == 11 and result.weight.shape == (4, 11)
    assert (result.weight[0] == 0).all() and (result.weight[1:] != 0).all()


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("keep", [30, 24, 20, 6])
def test_dead_inputs_go_first_and_are_free(keep: int, damping: float) -> None:
    live = 20
    gram, weight = problem(10, live)
    big = torch.zeros(32, 32, dtype=torch.float64)
    spots = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:live]
    big[spots[:, None], spots] = gram
    wide = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide[:, spots] = weight
    result = osscar(big, wide, keep=keep, damping=damping)
    assert len(result.kept) == keep
    dead = set(range(32)) - set(spots.tolist())
    first = result.order[: len(dead)].tolist()
    assert set(first) <= dead and (result.curve[: len(first)] == 0).all()
    sizes = wide.square().sum(0)
    assert first == sorted(first, key=lambda index: float(sizes[index]))
    if keep >= live:
        assert result.error == 0.0
        assert torch.equal(result.weight, wide[:, result.kept])
    else:
        # The damping is a share of the mean diagonal, dead inputs included.
        alone = osscar(gram, weight, keep=keep, damping=damping * live / 32)
        assert spots[alone.kept].sort().values.tolist() == result.kept.tolist()
        assert result.error == pytest.approx(alone.error, rel=1e-9)


def test_half_dead_groups_and_a_layer_without_input() -> None:
    gram, weight = problem(11, 12)
    weight[:, 2::4] *= 100  # weights that multiply nothing
    gram[2::4] = 0
    gram[:, 2::4] = 0
    for damping in (0.0, 0.01):
        result = osscar(gram, weight, group_size=2, keep=3, damping=damping)
        zeroed = weight.clone()
        zeroed[:, 2::4] = 0
        same = osscar(gram, zeroed, group_size=2, keep=3, damping=damping)
        assert len(result.kept) == 3 and result.order.tolist() == same.order.tolist()
        torch.testing.assert_close(result.curve, same.curve)
        assert result.error == pytest.approx(same.error)
    nothing = osscar(torch.zeros(6, 6), torch.ones(2, 6), keep=4)
    assert len(nothing.kept) == 4 and nothing.error == 0.0 and nothing.relative_error == 0.0


@pytest.mark.parametrize("apart", [1e-4, 3e-6])
@pytest.mark.parametrize("damping", [0.0, 1e-10, 1e-8, 1e-6, 1e-2])
def test_near_singular_gram_against_least_squares_on_the_inputs(
    damping: float, apart: float
) -> None:
    # Every input has a twin that hardly differs: half of them can go for almost nothing.
    make = torch.Generator().manual_seed(2)
    x = torch.randn(500, 30, generator=make, dtype=torch.float64)
    x = torch.cat([x, x + apart * torch.randn(500, 30, generator=make, dtype=torch.float64)], 1)
    weight = torch.randn(6, 60, generator=make, dtype=torch.float64)
    result = osscar(x.T @ x, weight, keep=30, damping=damping)
    assert sorted(index % 30 for index in result.kept.tolist()) == list(range(30))
    truth = torch.linalg.lstsq(x[:, result.kept], x @ weight.T)
    residual = x @ weight.T - x[:, result.kept] @ truth.solution
    least = float(residual.square().sum() / 2)
    assert result.error >= least * (1 - 1e-3)
    if damping <= 0.01 * apart**2:
        assert result.error <= least * 1.001
    assert result.relative_error <= 1e-8 + damping * 0.01


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("damping", [0.0, 1e-9])
def test_singular_gram_is_solved_and_never_nan(size: int, damping: float) -> None:
    # Fewer tokens than inputs, and exact twins.
    make = torch.Generator().manual_seed(3)
    x = torch.randn(25, 20, generator=make, dtype=torch.float64)
    x = torch.cat([x, x], 1)
    weight = torch.randn(6, 40, generator=make, dtype=torch.float64)
    for gram in (x.T @ x, (x.T @ x).float()):
        result = osscar(gram, weight, group_size=size, keep=20 // size, damping=damping)
        assert len(result.kept) == 20 // size
        assert torch.isfinite(result.weight).all() and torch.isfinite(result.curve).all()
        assert result.relative_error < (1e-6 if gram.dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_one_exact_twin_is_one_input_twice(seed: int) -> None:
    # Rounding may leave such a matrix a factor of noise: costs taken from it are percents off.
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 20, generator=make, dtype=torch.float64)
    x = x @ torch.randn(20, 20, generator=make, dtype=torch.float64)
    weight = torch.randn(6, 21, generator=make, dtype=torch.float64)
    twice = torch.cat([x, x[:, :1]], 1)
    result = osscar(twice.T @ twice, weight, keep=10, damping=0.0)
    assert float(result.curve[-1]) == pytest.approx(result.error, rel=1e-5)
    once = weight[:, :20].clone()
    once[:, 0] += weight[:, 20]
    assert result.error == pytest.approx(osscar(x.T @ x, once, keep=10, damping=0.0).error)


def test_target_is_fitted_first() -> None:
    make = torch.Generator().manual_seed(4)
    x = torch.randn(60, 10, generator=make, dtype=torch.float64)
    y = x @ torch.randn(10, 3, generator=make, dtype=torch.float64)
    y += torch.randn(60, 3, generator=make, dtype=torch.float64)
    weight = torch.randn(3, 10, generator=make, dtype=torch.float64)
    result = osscar(x.T @ x, weight, keep=6, target=y.T @ x, damping=0.0)
    direct = torch.linalg.lstsq(x[:, result.kept], y).solution.T
    torch.testing.assert_close(result.weight, direct, rtol=1e-9, atol=1e-10)
    best = torch.linalg.lstsq(x, y).solution
    excess = (y - x[:, result.kept] @ direct.T).square().sum() - (y - x @ best).square().sum()
    assert result.error == pytest.approx(float(excess) / 2, rel=1e-8)
    own = osscar(x.T @ x, weight, keep=6, target=weight @ (x.T @ x))
    plain = osscar(x.T @ x, weight, keep=6)
    assert own.order.tolist() == plain.order.tolist()
    torch.testing.assert_close(own.weight, plain.weight)


def test_damping_pulls_to_the_original_weights() -> None:
    gram, weight = problem(12, 8)
    kept = osscar(gram, weight, keep=5, damping=1e9)
    torch.testing.assert_close(kept.weight, weight[:, kept.kept], rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 12),
    size=st.integers(1, 3),
    share=st.floats(0, 1),
    damping=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    tokens=st.integers(1, 60),
)
def test_properties(
    seed: int, groups: int, size: int, share: float, damping: float, tokens: int
) -> None:
    gram, weight = problem(seed, groups * size, tokens=tokens)
    keep = 1 + round(share * (groups - 1))
    result = osscar(gram, weight, group_size=size, keep=keep, damping=damping)
    assert len(result.kept) == keep and len(result.order) == len(result.curve) == groups - keep
    assert result.weight.shape == (5, keep * size) and torch.isfinite(result.weight).all()
    assert (result.curve.diff() >= 0).all() and (result.curve >= 0).all()
    assert 0 <= result.relative_error <= 1 + 1e-9
    if tokens >= groups * size + 5:  # a singular Gram matrix has ties, which an order may break
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
        columns = torch.tensor(columns_of(order.tolist(), size))
        moved = osscar(
            gram[columns][:, columns],
            weight[:, columns],
            group_size=size,
            keep=keep,
            damping=damping,
        )
        assert order[moved.order].tolist() == result.order.tolist()
        torch.testing.assert_close(moved.curve, result.curve, rtol=1e-6, atol=1e-9)
        assert moved.error == pytest.approx(result.error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep in 1..6, found 0"),
        ({"keep": 7}, "keep in 1..6, found 7"),
        ({"group_size": 4}, "group_size 4 does not divide 6"),
        ({"gram": torch.eye(5)}, r"gram is \(5, 5\), wanted \(6, 6\)"),
        ({"gram": torch.full((6, 6), float("nan"))}, "gram holds values that are not finite"),
        ({"gram": -torch.eye(6)}, "not positive semi-definite"),
        ({"gram": torch.ones(6, 6) - torch.eye(6)}, "not positive semi-definite"),
        ({"gram": torch.ones(6, 6) * 9 - 8 * torch.eye(6)}, "not positive semi-definite"),
        ({"damping": -1.0}, "damping >= 0, found -1.0"),
        ({"target": torch.ones(3, 6)}, r"target is \(3, 6\), wanted \(2, 6\)"),
    ],
)
def test_bad_input_is_one_line(change: dict, message: str) -> None:
    arguments = {"gram": torch.eye(6), "weight": torch.ones(2, 6), "keep": 3} | change
    gram, weight = arguments.pop("gram"), arguments.pop("weight")
    with pytest.raises(InputError, match=message) as caught:
        osscar(gram, weight, **arguments)
    assert "\n" not in str(caught.value)


# ---- prune_model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    with torch.no_grad():  # correlated inputs, as trained models have: embeddings of rank 6
        model.model.embed_tokens.weight.copy_(torch.randn(96, 6) @ torch.randn(6, 32) / 6)
    return model


def random_batches(vocabulary: int = 96, padding: bool = True) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(1)
    result = []
    for length in (30, 17):
        ids = torch.randint(0, vocabulary, (4, length), generator=make)
        mask = torch.ones_like(ids)
        if padding:
            mask[1, length // 2 :] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def masked_difference(first: Tensor, second: Tensor, mask: Tensor) -> float:
    return float(((first - second).square().sum(-1) * mask).sum())


def test_gram_is_exact_weighted_and_ignores_padding() -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, 8, generator=make)
    weights = torch.rand(3, 50, generator=make)
    weights[0, 10:] = 0
    gram = Gram(8)
    gram.add(x, weights)
    rows = x.double().reshape(-1, 8)
    wanted = rows.T @ (rows * weights.double().reshape(-1, 1))
    torch.testing.assert_close(gram.matrix, wanted, rtol=1e-5, atol=1e-5)
    assert gram.tokens == 110 and gram.weight == pytest.approx(float(weights.sum()), rel=1e-6)
    half = Gram(8)
    half.add(x.bfloat16())
    exact = x.bfloat16().double().reshape(-1, 8)
    torch.testing.assert_close(half.matrix, exact.T @ exact, rtol=1e-5, atol=1e-5)


def test_block_stream_follows_the_model_exactly() -> None:
    model = llama()
    data = random_batches()
    names = [
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    whole = calibrate(model, data, names)
    stream = BlockStream(model, model.model.layers, data)
    for index, block in enumerate(model.model.layers):
        grams = stream.grams(index, {"o": block.self_attn.o_proj, "d": block.mlp.down_proj})
        for key, name in (("o", "self_attn.o_proj"), ("d", "mlp.down_proj")):
            assert torch.equal(grams[key].matrix, whole[f"model.layers.{index}.{name}"].matrix)
        stream.advance(index)
    assert sum(int(batch["attention_mask"].sum()) for batch in data) == grams["d"].tokens
    with torch.no_grad():
        last = model.model(**data[0], output_hidden_states=True, use_cache=False)
        normed = model.model.norm(stream.hidden[0])
    assert torch.equal(normed, last.last_hidden_state)
    # Garbage in padded places must not matter.
    noisy = [dict(batch) for batch in data]
    for batch in noisy:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    again = calibrate(model, noisy, names[:1])[names[0]]
    torch.testing.assert_close(again.matrix, whole[names[0]].matrix)


def test_token_weights_select_tokens() -> None:
    model = llama()
    batch = random_batches()[0]
    name = "model.layers.1.mlp.down_proj"
    chosen = torch.zeros_like(batch["attention_mask"])
    chosen[:, 5] = 1
    gram = calibrate(model, [batch | {"token_weights": chosen.float()}], [name])[name]
    assert gram.tokens == 4
    padded = calibrate(model, [batch | {"token_weights": torch.ones(4, 30)}], [name])[name]
    assert padded.tokens == int(batch["attention_mask"].sum()) < 120
    with pytest.raises(InputError, match="at least one calibration token"):
        calibrate(model, [batch | {"token_weights": chosen * 0.0}], [name])
    with pytest.raises(InputError, match="has no layer model.layers.9"):
        calibrate(model, [batch], ["model.layers.9.mlp.down_proj"])


@pytest.mark.parametrize("settings", [{"mlp": 40}, {"kv_heads": 2}, {"mlp": 40, "kv_heads": 2}])
def test_pruned_model_shrinks_loads_and_beats_dropping(settings: dict, tmp_path) -> None:
    dense = llama()
    data = random_batches()
    model = copy.deepcopy(dense)
    seen = []
    report = prune_model(model, data, **settings, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.parameters_before == parameters(dense)
    assert report.parameters_after == parameters(model) < parameters(dense)
    assert report.tokens == sum(int(batch["attention_mask"].sum()) for batch in data)

    def kept(part: str) -> list[tuple[int, ...]] | None:
        return [layer.kept for layer in report.layers if layer.name.endswith(part)] or None

    dropped = shrink(copy.deepcopy(dense), mlp=kept("down_proj"), kv_groups=kept("o_proj"))
    with torch.no_grad():
        wanted, mask = dense(**data[0]).logits, data[0]["attention_mask"]
        refitted = masked_difference(model(**data[0]).logits, wanted, mask)
        plain = masked_difference(dropped(**data[0]).logits, wanted, mask)
    assert 0 < refitted < 0.8 * plain
    for layer in report.layers:
        assert 0 < layer.relative_error <= layer.curve[-1] < 1
        assert len(layer.curve) == layer.groups - len(layer.kept)

    save(model, None, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert stock.config.intermediate_size == settings.get("mlp", 64)
    assert stock.config.num_key_value_heads == settings.get("kv_heads", 4)
    assert stock.config.num_attention_heads == 2 * settings.get("kv_heads", 4)
    assert stock.config.head_dim == 4
    with torch.no_grad():
        assert torch.equal(stock(**data[0]).logits, model(**data[0]).logits)


def test_blocks_see_inputs_from_pruned_blocks() -> None:
    model = llama()
    data = random_batches()
    original = copy.deepcopy(model)
    report = prune_model(model, data, mlp=40)
    # The second block's choice, recomputed from a model in which only the first block is pruned.
    half = copy.deepcopy(original)
    half.model.layers[0].mlp = model.model.layers[0].mlp
    name = "model.layers.1.mlp.down_proj"
    gram = calibrate(half, data, [name])[name].matrix
    alone = osscar(gram, original.model.layers[1].mlp.down_proj.weight, keep=40)
    assert tuple(alone.kept.tolist()) == report.layers[1].kept
    assert torch.equal(alone.weight, model.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    "family", ["llama-bias", "mistral", "mistral-plain", "qwen2", "qwen2-plain", "qwen3"]
)
def test_other_families(family: str, tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    if family.endswith("plain"):  # no explicit head size: readers would infer 48 / 6
        del sizes["head_dim"]
        sizes["hidden_size"] = 48
    if family == "llama-bias":
        sizes |= {"attention_bias": True, "mlp_bias": True}
    config, kind = {
        "llama-bias": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "mistral-plain": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen2-plain": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    model = kind(config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    # 3 key/value heads mean 6 heads, which divides the hidden size 24.
    prune_model(model, random_batches(), mlp=20, kv_heads=3)
    save(model, None, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = random_batches()[0]
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, model(**batch).logits)
        generated = stock.generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_heads": 5}, "kv_heads: wanted 5 key/value heads, the model has 4"),
        ({"kv_heads": 0}, "kv_heads: wanted 0 key/value heads, the model has 4"),
        ({"mlp": 65}, "mlp: wanted 65 neurons, the model has intermediate_size 64"),
        ({}, "wanted mlp or kv_heads, found neither"),
        (
            {"kv_heads": 3},
            r"wanted 3 of 4 .* LlamaConfig refuses it .*hidden size \(32\).*it takes 1, 2$",
        ),
    ],
)
def test_impossible_sizes_change_nothing(settings: dict, message: str) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        prune_model(model, random_batches(), **settings)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_tokens_and_other_architectures_are_refused() -> None:
    model = llama()
    with pytest.raises(InputError, match="at least one calibration batch"):
        prune_model(model, [], mlp=40)
    empty = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.zeros(1, 4)}
    with pytest.raises(InputError, match="at least one calibration token"):
        prune_model(model, [empty], mlp=40)
    experts = small_models.mixtral()
    with pytest.raises(
        InputError, match=r"MixtralForCausalLM: layer 0: wanted nn.Linear mlp.gate_proj"
    ):
        prune_model(experts, random_batches(32), mlp=8)


def test_real_model_keeps_its_language(shared_data) -> None:
    dense = load_stories260k(shared_data)
    held_out = batches(story_tokens(shared_data, "eval", 30))
    calibration = batches(story_tokens(shared_data, "calib", 40))
    assert perplexity(dense, held_out) < 4.1
    model = copy.deepcopy(dense)
    report = prune_model(model, calibration, mlp=129)
    dropped = shrink(copy.deepcopy(dense), mlp=[layer.kept for layer in report.layers])
    norms = [block.mlp.down_proj.weight.square().sum(0) for block in dense.model.layers]
    smallest = shrink(
        copy.deepcopy(dense), mlp=[norm.topk(129).indices.sort().values for norm in norms]
    )
    refitted, plain = perplexity(model, held_out), perplexity(dropped, held_out)
    magnitude = perplexity(smallest, held_out)
    assert refitted < 7.0, (refitted, plain, magnitude)
    assert refitted < 0.85 * plain < 0.6 * magnitude, (refitted, plain, magnitude)
    heads = copy.deepcopy(dense)
    prune_model(heads, calibration, kv_heads=2)
    assert perplexity(heads, held_out) < 7.5
