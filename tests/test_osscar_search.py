"""osscar beside the plain recurrence, with swaps and with families; the op under its loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.eliminate import eliminate
from slmperf.ops.routing import MISSING
from slmperf.prune import osscar
from slmperf.prune.layer.refit import Problem, keep_groups
from slmperf.testing.recurrence import layer_problem, recurrence
from slmperf.testing.timing import peak_mib

KINDS = ("random", "glu", "correlated")
needs_native = pytest.mark.skipif(bool(MISSING["native"]), reason=MISSING["native"])


def damped_error(
    gram: Tensor, weight: Tensor, kept: Tensor, damping: float, size: int = 1
) -> float:
    """f at its optimum for the kept groups, by a direct solve."""
    columns = (kept[:, None] * size + torch.arange(size)).reshape(-1)
    mu = damping * gram.diagonal().mean()
    damped = gram + mu * torch.eye(len(gram), dtype=gram.dtype)
    best = torch.linalg.solve(damped[columns][:, columns], (weight @ damped)[:, columns].T).T
    difference = weight.clone()
    difference[:, columns] -= best
    return float((difference @ damped * difference).sum() / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_recurrence_past_many_rounds(kind: str) -> None:
    # Far more removals than rows are current at a time.
    gram, weight = layer_problem(kind, 1, 640, 96, 1500)
    kept, fitted = recurrence(gram, weight, 130)
    result = osscar(gram, weight, keep=130)
    assert torch.equal(result.kept, kept)
    torch.testing.assert_close(result.weight, fitted, rtol=1e-8, atol=1e-10)
    assert result.error == pytest.approx(keep_groups(gram, weight, kept).error, rel=1e-6)
    assert float(result.curve[-1]) == pytest.approx(damped_error(gram, weight, kept, 0.01))
    in_fp32 = osscar(gram.float(), weight.float(), keep=130)
    assert in_fp32.error == pytest.approx(result.error, rel=1e-3)


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_fewer_tokens_than_inputs(damping: float) -> None:
    """Within 1% of the plain recurrence in fp64, and of it from sums in fp32 as far as these carry.

    Below 1e-4 an fp32 Gram matrix is another matrix: its rounding is larger than the damping.
    """
    make = torch.Generator().manual_seed(4)
    mix = torch.randn(96, 160, generator=make, dtype=torch.float64)
    x = torch.randn(120, 96, generator=make, dtype=torch.float64) @ mix
    x += 0.3 * torch.randn(120, 160, generator=make, dtype=torch.float64)
    weight = torch.randn(24, 160, generator=make, dtype=torch.float64)
    exact = x.T @ x
    kept, fitted = recurrence(exact, weight, 80, damping=damping)

    def error(kept: Tensor, fitted: Tensor) -> float:
        return float((x @ weight.T - x[:, kept] @ fitted.double().T).square().sum() / 2)

    grams = [exact] if damping < 1e-4 else [exact, x.float().T @ x.float()]
    for gram in grams:
        result = osscar(gram, weight.float(), keep=80, damping=damping)
        assert error(result.kept, result.weight) <= 1.01 * error(kept, fitted)


def compare(kind: str, seed: int, damping: float) -> tuple[float, float, float]:
    """f of one at a time, of ten at a time, and of one at a time with swaps."""
    inputs = 48 if seed % 2 else 96
    keep = inputs * 5 // 8 if seed % 3 else inputs * 3 // 4
    gram, weight = layer_problem(kind, seed, inputs, 24, 200)
    sets = (
        osscar(gram, weight, keep=keep, damping=damping).kept,
        recurrence(gram, weight, keep, step=10, damping=damping)[0],
        osscar(gram, weight, keep=keep, damping=damping, swaps=1000).kept,
    )
    one, ten, swapped = (damped_error(gram, weight, kept, damping) for kept in sets)
    return one, ten, swapped


@pytest.mark.parametrize(
    "problems", [24, pytest.param(201, marks=pytest.mark.slow)], ids=["a few", "201"]
)
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_against_ten_at_a_time(problems: int, damping: float) -> None:
    worse = 0
    for number in range(problems):
        one, ten, swapped = compare(KINDS[number % 3], number // 3, damping)
        worse += one > ten * (1 + 1e-9)
        assert one <= 1.01 * ten
        assert swapped <= min(one, ten) * (1 + 1e-9)
    assert worse <= 0.05 * problems


def best_set(gram: Tensor, weight: Tensor, keep: int, size: int = 1) -> float:
    groups = range(len(gram) // size)
    sets = (torch.tensor(kept) for kept in itertools.combinations(groups, keep))
    return min(damped_error(gram, weight, kept, 0.01, size) for kept in sets)


def test_diagonal_gram_is_solved_exactly() -> None:
    make = torch.Generator().manual_seed(8)
    for swaps in (0, 20):
        gram = torch.diag(torch.rand(11, generator=make, dtype=torch.float64) + 0.1)
        weight = torch.randn(4, 11, generator=make, dtype=torch.float64)
        result = osscar(gram, weight, keep=5, swaps=swaps)
        found = damped_error(gram, weight, result.kept, 0.01)
        assert found == pytest.approx(best_set(gram, weight, 5))


@pytest.mark.parametrize(("size", "keep"), [(1, 6), (3, 2)])
def test_swaps_come_close_to_the_best_set(size: int, keep: int) -> None:
    ratios = []
    for seed in range(8):
        inputs = 10 if size == 1 else 12
        gram, weight = layer_problem("correlated", seed, inputs, 5, 40)
        result = osscar(gram, weight, keep=keep, swaps=50, group_size=size)
        found = damped_error(gram, weight, result.kept, 0.01, size)
        ratios.append(found / best_set(gram, weight, keep, size))
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) <= 1.05


def test_every_swap_lowers_the_objective_and_the_weights_are_optimal() -> None:
    gram, weight = layer_problem("correlated", 3, 60, 12, 90)
    before = float("inf")
    for swaps in range(8):
        result = osscar(gram, weight, keep=30, swaps=swaps, damping=1e-3)
        now = damped_error(gram, weight, result.kept, 1e-3)
        assert now <= before
        before = now
        damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(60, dtype=torch.float64)
        difference = weight.clone()
        difference[:, result.kept] -= result.weight
        left = (difference @ damped)[:, result.kept]
        assert left.abs().max() <= 1e-8 * (weight @ damped).abs().max()
    first = osscar(gram, weight, keep=30, damping=1e-3)
    assert before < damped_error(gram, weight, first.kept, 1e-3)
    assert torch.equal(first.order, result.order) and torch.equal(first.curve, result.curve)


def test_dead_inputs_leave_for_live_ones() -> None:
    # Four dead inputs stay because only two may go: no swap can make them cost anything.
    gram, weight = layer_problem("random", 2, 12, 4, 40)
    gram[:6], gram[:, :6] = 0.0, 0.0
    result = osscar(gram, weight, keep=8, swaps=10)
    assert result.error == 0.0 and set(range(6, 12)) <= set(result.kept.tolist())
    assert torch.equal(result.weight, weight[:, result.kept])


@pytest.mark.parametrize("swaps", [0, 10])
def test_families_lose_as_many_each(swaps: int) -> None:
    family = torch.tensor([3, 3, 3, 1, 1, 1, 7, 7, 7])
    gram, weight = layer_problem("correlated", 5, 18, 6, 60)
    result = osscar(gram, weight, keep=6, group_size=2, families=family, swaps=swaps)
    assert family[result.kept].unique(return_counts=True)[1].tolist() == [2, 2, 2]
    best = min(
        damped_error(gram, weight, torch.tensor(sorted(kept)), 0.01, 2)
        for kept in itertools.product(*([(0, 1), (0, 2), (1, 2)],) * 3)
        for kept in [[f * 3 + i for f, pair in enumerate(kept) for i in pair]]
    )
    found = damped_error(gram, weight, result.kept, 0.01, 2)
    assert best * (1 - 1e-9) <= found <= best * 1.2
    free = osscar(gram, weight, keep=6, group_size=2)
    assert damped_error(gram, weight, free.kept, 0.01, 2) <= found * (1 + 1e-9)


def test_all_sizes_of_families_from_one_order() -> None:
    family = torch.tensor([0, 0, 0, 1, 1, 1])
    gram, weight = layer_problem("correlated", 5, 12, 6, 60)
    gram[:2], gram[:, :2] = 0.0, 0.0  # a dead group goes first of its family
    everything = osscar(gram, weight, group_size=2, families=family)
    assert everything.error == 0.0 and int(everything.order[0]) == 0
    assert sorted(everything.order.tolist()) == list(range(6))
    for removed in (2, 4, 6):
        assert family[everything.order[:removed]].bincount().tolist() == [removed // 2] * 2
    assert bool((everything.curve.diff() >= 0).all()) and len(everything.curve) == 6


def test_memory_stays_under_three_matrices() -> None:
    gram, weight = layer_problem("glu", 1, 1024, 384, 1100)
    found = peak_mib(lambda: osscar(gram, weight, keep=640), "cpu")
    assert 2 * 8 <= found <= 3 * 8  # MiB; M and Q are 8 each


def test_dead_groups_of_one_family_are_not_all_free() -> None:
    gram, weight = layer_problem("random", 6, 8, 3, 30)
    gram[:3], gram[:, :3] = 0.0, 0.0
    family = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    result = osscar(gram, weight, keep=4, families=family)
    assert family[result.kept].bincount().tolist() == [2, 2]
    assert set(result.order[:2].tolist()) <= {0, 1, 2} and 3 in result.kept.tolist()


def test_scale_does_not_matter() -> None:
    gram, weight = layer_problem("correlated", 12, 40, 6, 90)
    plain = osscar(gram, weight, keep=20, swaps=5)
    for tokens, outputs in ((1e9, 1.0), (1e-9, 1e3)):
        scaled = osscar(gram * tokens, weight * outputs, keep=20, swaps=5)
        assert torch.equal(scaled.kept, plain.kept) and torch.equal(scaled.order, plain.order)
        torch.testing.assert_close(scaled.weight, plain.weight * outputs, rtol=1e-8, atol=1e-10)
        assert scaled.error == pytest.approx(plain.error * tokens * outputs**2, rel=1e-8)
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-8)


def test_keep_groups_refits_what_others_chose() -> None:
    gram, weight = layer_problem("glu", 7, 24, 6, 80)
    kept = torch.tensor([0, 1, 5])
    fitted = keep_groups(gram, weight, kept, group_size=4)
    plain = keep_groups(gram, weight, kept, group_size=4, refit=False)
    columns = (kept[:, None] * 4 + torch.arange(4)).reshape(-1)
    assert torch.equal(plain.weight, weight[:, columns])
    assert fitted.error < plain.error and len(fitted.order) == len(fitted.curve) == 0
    assert float((fitted.error, plain.error)[0]) > 0
    chosen = osscar(gram, weight, keep=3, group_size=4)
    same = keep_groups(gram, weight, chosen.kept, group_size=4)
    torch.testing.assert_close(same.weight, chosen.weight, rtol=1e-9, atol=1e-12)
    assert same.error == pytest.approx(chosen.error) and same.relative_error < 1
    for wrong in ([], [0, 0], [6], [-1]):
        with pytest.raises(InputError, match="keep_groups: "):
            keep_groups(gram, weight, torch.tensor(wrong, dtype=torch.int64), group_size=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_error_is_of_the_weight_as_rounded(dtype: torch.dtype) -> None:
    gram, weight = layer_problem("correlated", 9, 40, 8, 90)
    result = osscar(gram, weight.to(dtype), keep=30)
    assert result.weight.dtype == dtype
    difference = weight.to(dtype).double()
    difference[:, result.kept] -= result.weight.double()
    exact = float((difference @ gram * difference).sum() / 2)
    assert result.error == pytest.approx(exact, rel=1e-9)
    assert result.relative_error == pytest.approx(
        exact / float((weight.to(dtype).double() @ gram * weight.to(dtype).double()).sum() / 2)
    )


def state_of(inputs: int, size: int = 1) -> dict[str, Tensor]:
    gram, weight = layer_problem("correlated", 11, inputs, 7, 2 * inputs)
    problem = Problem("test", gram, weight, group_size=size, target=None, damping=0.01)
    inverse, square = problem.inverse(), problem.square()[0]
    groups = inputs // size
    index = torch.arange(groups)
    blocks = (
        x.view(groups, size, groups, size)[index, :, index].clone() for x in (inverse, square)
    )
    return {
        "inverse": inverse,
        "square": square,
        **dict(zip(("blocks_m", "blocks_q"), blocks, strict=True)),
        "order": index.clone(),
        "place": index.clone(),
        "alive": torch.ones(groups, dtype=torch.bool),
        "family": index % 2,
        "quota": torch.tensor([groups // 4, groups // 3]),
    }


@needs_native
def test_the_loop_in_cpp_is_the_reference() -> None:
    one, other = state_of(90), state_of(90)
    fast = eliminate(**one, start=0, steps=52, active=90, impl="cpu")
    plain = eliminate(**other, start=0, steps=52, active=90, impl="reference")
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-8, atol=1e-10)
    assert one["quota"].tolist() == [0, 0] and int(one["alive"].sum()) == 90 - 52
    assert torch.equal(one["order"][one["place"]], torch.arange(90))


@needs_native
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_row_that_is_not_current_ends_the_call(impl: str) -> None:
    state = state_of(40)
    costs = state["blocks_q"] / state["blocks_m"]
    first, second = costs.reshape(-1).argsort()[:2].tolist()
    order = [first, *(g for g in range(40) if g not in (first, second)), second]
    state["order"] = torch.tensor(order)
    state["place"] = torch.tensor(order).argsort()
    for name in ("inverse", "square"):
        state[name] = state[name][state["order"]].contiguous()
    made = eliminate(**state, start=0, steps=10, active=39, impl=impl)
    done = int(made.isfinite().sum())
    assert 1 <= done < 10 and bool(made[done:].isinf().all())
    assert int(state["order"][0]) == first and int(state["order"][39]) == second
    whole = state_of(40)
    everything = eliminate(**whole, start=0, steps=10, active=40, impl=impl)
    torch.testing.assert_close(made[:done], everything[:done])
    assert int(whole["order"][done]) == second


@needs_native
def test_a_block_without_definiteness_is_nan() -> None:
    for impl in ("cpu", "reference"):
        state = state_of(20)
        state["blocks_m"][7] = -1e-12
        assert bool(eliminate(**state, start=0, steps=3, active=20, impl=impl)[0].isnan())


@needs_native
@pytest.mark.parametrize(("impl", "size"), [("cpu", 1), ("reference", 1), ("reference", 2)])
def test_the_operator_is_registered_as_it_behaves(impl: str, size: int) -> None:
    arguments = (*state_of(12, size).values(), 0, 3, 12 // size)
    torch.library.opcheck(getattr(torch.ops.slmperf.eliminate, impl), arguments)


def test_wrong_arguments_of_the_operator() -> None:
    state = state_of(12)
    with pytest.raises(ValueError, match="do not fit 12 groups"):
        eliminate(**state, start=0, steps=13, active=12)
    with pytest.raises(ValueError, match="order is"):
        eliminate(**(state | {"order": state["order"][:5]}), start=0, steps=1, active=12)
    with pytest.raises(RuntimeError, match="family names more families than the 2 of quota"):
        eliminate(**(state | {"family": state["family"] + 5}), start=0, steps=1, active=12)
    with pytest.raises(NotImplementedError, match="takes groups of 1 column"):
        eliminate(**state_of(12, 2), start=0, steps=1, active=6, impl="cpu")
    with pytest.raises(NotImplementedError, match="float32"):
        eliminate(**{k: v.float() if v.is_floating_point() else v for k, v in state.items()},
                  start=0, steps=1, active=12)  # fmt: skip


@needs_native
def test_no_bit_depends_on_threads() -> None:
    gram, weight = layer_problem("glu", 2, 1300, 16, 400)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            state = {
                "inverse": gram + torch.eye(1300, dtype=torch.float64),
                "square": weight.T @ weight if count == 1 else found[0][1],
            }
            square = state["square"].clone()
            state["square"] = square.clone()
            index = torch.arange(1300)
            state |= {
                "blocks_m": state["inverse"].diagonal().clone().view(-1, 1, 1),
                "blocks_q": square.diagonal().clone().view(-1, 1, 1),
                "order": index.clone(), "place": index.clone(),
                "alive": torch.ones(1300, dtype=torch.bool),
                "family": torch.zeros_like(index), "quota": torch.tensor([60]),
            }  # fmt: skip
            made = eliminate(**state, start=0, steps=60, active=1300, impl="cpu")
            found.append((made, square, state["inverse"], state["square"]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answer_on_a_gpu(kind: str) -> None:
    gram, weight = layer_problem(kind, 1, 640, 96, 1500)
    for more in ({"keep": 130}, {"keep": 10, "group_size": 32}, {"keep": 300, "swaps": 5}):
        here = osscar(gram, weight, **more)
        there = osscar(gram.cuda(), weight.cuda(), **more)
        assert torch.equal(here.kept, there.kept) and torch.equal(here.order, there.order)
        torch.testing.assert_close(here.weight, there.weight.cpu(), rtol=1e-7, atol=1e-9)
        assert there.error == pytest.approx(here.error, rel=1e-7)
