"""osscar on small problems, against brute force and direct solves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slmperf.check import InputError
from slmperf.prune import osscar


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


def test_comes_close_to_the_best_set() -> None:
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


def test_any_layout_of_the_gram_is_the_same_gram() -> None:
    gram, weight = problem(6, 12)
    wide = torch.zeros(12, 24, dtype=torch.float64)
    wide[:, ::2] = gram
    for view in (gram.T.contiguous().T, wide[:, ::2]):
        result = osscar(view, weight, keep=5)
        assert torch.equal(result.kept, osscar(gram, weight, keep=5).kept)


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
        ({"gram": torch.eye(6) + torch.ones(6, 6).triu(1) * 1e-3}, "gram is not symmetric"),
        ({"weight": torch.full((2, 6), float("inf"))}, "weight holds values that are not finite"),
        ({"gram": torch.eye(6).half()}, "gram is torch.float16, wanted torch.float32 or"),
        ({"swaps": -1}, "swaps >= 0, found -1"),
        (
            {"families": torch.tensor([0, 0, 1, 1, 2])},
            r"families is \(5,\) torch.int64, wanted \(6,\)",
        ),
        ({"families": torch.zeros(6)}, r"families is \(6,\) torch.float32, wanted \(6,\) int64"),
        ({"keep": 3.0}, "keep in 1..6, found 3.0"),
        ({"weight": torch.ones(0, 6)}, r"weight is \(0, 6\), wanted \(N, d\), N >= 1"),
        ({"weight": torch.ones(2, 6).long()}, "weight is torch.int64, wanted float64, float32"),
        (
            {"gram": torch.eye(6).double() * 1e200, "weight": torch.ones(2, 6).double() * 1e60},
            "too large, wanted a finite error",
        ),  # fmt: skip
        ({"families": torch.tensor([0, 0, 0, 0, 1, 1])}, "keep is 3, wanted a multiple of the 2"),
        (
            {"families": torch.tensor([0, 0, 0, 0, 1, 1]), "keep": None},
            "families have 2 to 4 groups",
        ),
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
