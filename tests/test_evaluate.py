"""evaluate: metrics against brute force, the bootstrap against explicit resampling, floors that
cannot peek.
"""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from slmperf import evaluate
from slmperf.check import InputError
from slmperf.data.interactions import Interactions, Task, split, tasks_for
from slmperf.evaluate import bootstrap

LIKE = Task("like", "?", 8.0)


def sample(rows: int = 400, members: int = 30, *, seed: int = 0, levels: int = 12) -> tuple:
    """Scores with many ties, labels that follow them loosely, members of unequal size."""
    rng = np.random.default_rng(seed)
    member = np.sort(rng.integers(0, members, rows) ** 2 // members)
    score = rng.integers(1, levels, rows) / levels
    label = (rng.random(rows) < 0.2 + 0.6 * score).astype(np.int8)
    return score, label, member


def brute_auc(score: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> float:
    weight = np.ones(len(score)) if weight is None else weight
    one, zero = label == 1, label == 0
    gap = score[one][:, None] - score[zero][None]
    pair = weight[one][:, None] * weight[zero][None]
    return float((pair * ((gap > 0) + 0.5 * (gap == 0))).sum() / pair.sum())


def test_auc_counts_ties_as_one_half():
    score, label, _ = sample()
    assert evaluate.auc(score, label) == pytest.approx(brute_auc(score, label), abs=1e-12)
    assert evaluate.auc(-score, label) == pytest.approx(1 - brute_auc(score, label), abs=1e-12)
    assert evaluate.auc(np.full(9, 0.3), np.arange(9) % 2) == 0.5
    assert evaluate.auc(np.array([0.1, 0.9]), np.array([0, 1])) == 1.0


def test_auc_within_members():
    score, label, member = sample(rows=90)
    each = [
        brute_auc(score[member == m], label[member == m])
        for m in np.unique(member)
        if 0 < label[member == m].mean() < 1
    ]
    assert len(each) < len(np.unique(member)), "the sample should hold members with one class"
    assert evaluate.auc_within(score, label, member) == pytest.approx(np.mean(each), abs=1e-12)
    assert math.isnan(evaluate.auc_within(score[:4], np.ones(4), member[:4]))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "auc: every one of the 2 labels is 1, expected both classes"),
        ([0.1, np.nan], [0, 1], "auc: 1 scores are not finite"),
        ([0.1, 0.2], [0, 2], "auc: a label is 2, expected 0 or 1"),
        ([0.1], [0, 1], r"auc: scores are \(1,\), labels \(2,\)"),
        ([], [], "auc: no candidates"),
    ],
)
def test_auc_refuses(scores, labels, message):
    with pytest.raises(InputError, match=message):
        evaluate.auc(np.array(scores), np.array(labels))


def test_log_loss_and_calibration_by_hand():
    probability, label = np.array([0.9, 0.2, 0.21, 1.0]), np.array([1, 0, 1, 0])
    want = -(math.log(0.9) + math.log(0.8) + math.log(0.21) + math.log(1e-7)) / 4
    assert evaluate.log_loss(probability, label) == pytest.approx(want, rel=1e-6)
    # Bins of 1/15: 0.2 and 0.21 share one (|1 - 0.41| = 0.59), 0.9 and 1.0 stand alone.
    assert evaluate.calibration_error(probability, label) == pytest.approx((0.1 + 0.59 + 1.0) / 4)
    with pytest.raises(InputError, match=r"log_loss: probabilities lie in \[-1, 2\]"):
        evaluate.log_loss(np.array([-1.0, 2.0]), np.array([0, 1]))


def test_tasks_are_averaged():
    run = {"like": sample(seed=1), "top": sample(seed=2)}
    metrics = evaluate.evaluate_tasks(run)
    assert metrics.auc == {task: evaluate.auc(*run[task][:2]) for task in run}
    assert metrics.auc_mean == pytest.approx(np.mean(list(metrics.auc.values())))
    assert metrics.log_loss == pytest.approx(
        np.mean([evaluate.log_loss(*part[:2]) for part in run.values()])
    )


def test_task_scores_orders_by_row():
    def prompt(task, member, rows):
        return SimpleNamespace(
            task=task,
            member=member,
            candidates=[None] * len(rows),
            labels=np.array([row % 2 for row in rows], np.int8),
            rows=np.array(rows, np.int32),
        )

    prompts = [prompt("like", 7, [5, 8]), prompt("top", 7, [5]), prompt("like", 3, [2, 6, 9])]
    scores = [np.array([0.5, 0.8]), np.array([0.55]), np.array([0.2, 0.6, 0.9])]
    run = evaluate.task_scores(prompts, scores)
    assert run["like"][0].tolist() == [0.2, 0.5, 0.6, 0.8, 0.9]
    assert run["like"][1].tolist() == [0, 1, 0, 0, 1]
    assert run["like"][2].tolist() == [3, 7, 3, 7, 3]
    assert run["top"][0].tolist() == [0.55]
    with pytest.raises(InputError, match=r"member 7 are \(1,\), expected \(2,\)"):
        evaluate.task_scores(prompts[:1], [np.zeros(1)])


def test_a_draw_is_the_auc_of_the_drawn_members(monkeypatch):
    run = {"like": sample(seed=1), "top": sample(seed=2)}
    members = np.unique(np.concatenate([part[2] for part in run.values()]))
    picked = np.random.default_rng(5).integers(len(members), size=(len(members), 7))
    fixed = SimpleNamespace(integers=lambda high, size: picked)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: fixed)
    drawn = bootstrap._draw(run, [run], 7, 0)
    for draw in range(7):
        count = dict(zip(*np.unique(members[picked[:, draw]], return_counts=True), strict=True))
        each = [
            brute_auc(score, label, np.array([count.get(m, 0) for m in member]))
            for score, label, member in run.values()
        ]
        assert drawn[draw] == pytest.approx(np.mean(each), abs=1e-6)


def test_intervals_are_paired_and_average_seeds():
    score, label, member = sample(rows=2000, members=200)
    rng = np.random.default_rng(1)

    def noisy(scale):
        return {"like": (score + rng.normal(0, scale, len(score)), label, member)}

    base, near = [noisy(0.1), noisy(0.1)], [noisy(0.12), noisy(0.12)]
    own = evaluate.auc_interval(near)
    assert own.low < own.value < own.high
    assert own.value == pytest.approx(np.mean([brute_auc(run["like"][0], label) for run in near]))
    gap = evaluate.difference(near, base)
    assert gap.high - gap.low < 0.5 * (own.high - own.low), "pairing should cancel the members"
    same = evaluate.difference(base, base)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    ratio = evaluate.delta(near, base)
    mean = [np.mean([brute_auc(run["like"][0], label) for run in runs]) for runs in (near, base)]
    assert ratio.value == pytest.approx(100 * (mean[0] / mean[1] - 1))
    assert ratio.low <= ratio.value <= ratio.high
    assert evaluate.delta(near, base) == ratio, "the same seed gives the same draws"


def test_the_interval_has_the_width_of_a_plain_bootstrap():
    score, label, member = sample(rows=600, members=40)
    rng = np.random.default_rng(3)
    known = np.unique(member)
    plain = []
    for _ in range(300):
        count = np.bincount(rng.integers(len(known), size=len(known)), minlength=len(known))
        plain.append(brute_auc(score, label, count[np.searchsorted(known, member)].astype(float)))
    found = evaluate.auc_interval([{"like": (score, label, member)}])
    assert found.standard_error == pytest.approx(np.std(plain), rel=0.2)


def test_runs_on_other_candidates_are_refused():
    score, label, member = sample()
    run = {"like": (score, label, member)}
    with pytest.raises(InputError, match="lies on other candidates"):
        evaluate.delta([run], [{"like": (score, 1 - label, member)}])
    with pytest.raises(InputError, match="task like has 399 candidates, expected 400"):
        evaluate.delta([run], [{"like": (score[1:], label[1:], member[1:])}])
    with pytest.raises(InputError, match=r"tasks are \['top'\], expected \['like'\]"):
        evaluate.difference([run], [{"top": run["like"]}])


def test_parity_by_hand():
    members = np.array([0, 0, 0, 0, 1, 1, 2])
    a = np.array([0.9, 0.8, 0.2, 0.1, 0.6, 0.5, 0.3])
    b = np.array([0.9, 0.1, 0.8, 0.2, 0.6, 0.5, 0.3])
    labels = np.array([1, 0, 1, 0, 1, 0, 0])
    found = evaluate.parity(a, b, members, labels)
    assert (
        found.top10_overlap == 0.75
    )  # member 0 shares 1 of 2, member 1 its one, member 2 has none
    assert found.largest_shift == pytest.approx(0.7)
    ranks = [np.argsort(np.argsort(one)) for one in (a, b)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.log_loss_b == evaluate.log_loss(b, labels)
    same = evaluate.parity_tasks({"like": (a, labels, members)}, {"like": (a, labels, members)})
    assert same[:3] == pytest.approx((1.0, 1.0, 0.0))


def test_parity_top_ten_of_many():
    members = np.zeros(40, int)
    a = np.linspace(1, 0, 40)
    b = a.copy()
    b[9], b[25] = a[25], a[9]
    assert evaluate.parity(a, b, members, np.arange(40) % 2).top10_overlap == 0.9


def tiny(seed: int = 0, members: int = 60, items: int = 25) -> Interactions:
    rng = np.random.default_rng(seed)
    rows = 1500
    member, item = rng.integers(0, members, rows), rng.integers(0, items, rows)
    taste = rng.normal(0, 1.2, members)[member] + rng.normal(0, 1.2, items)[item]
    return Interactions.from_rows(
        (
            member,
            item,
            np.clip(np.round(7.5 + taste + rng.normal(0, 1, rows)), 1, 10),
            np.arange(rows),
        ),
        scale=10,
        member_names=[str(m) for m in range(members)],
        item_texts=[str(i) for i in range(items)],
    )


def test_floors_see_history_only():
    data = tiny()
    parts = split(data)
    before = evaluate.floors(data, parts, LIKE)
    rating = data.rating.copy()
    rating[parts.candidate] = 11 - rating[parts.candidate]
    after = evaluate.floors(
        SimpleNamespace(member=data.member, item=data.item, rating=rating), parts, LIKE
    )
    assert list(before) == ["item mean", "member mean", "logistic member + item"]
    for name, scores in before.items():
        assert scores.shape == (parts.candidate.sum(),)
        assert np.array_equal(scores, after[name]), name
    label = LIKE.labels(data)[parts.candidate]
    found = {name: evaluate.auc(scores, label) for name, scores in before.items()}
    best = found.pop("logistic member + item")
    assert best > max(found.values()) + 0.02, (best, found)
    run = evaluate.floor_runs(data, parts, [LIKE])["item mean"]["like"]
    assert np.array_equal(run[0], before["item mean"]) and np.array_equal(run[1], label)


def test_the_logistic_floor_is_at_its_minimum():
    import torch

    from slmperf.evaluate.floors import _logistic

    data = tiny(members=20, items=12)
    label = LIKE.labels(data).astype(float)
    member, item = data.member.astype(int), data.item.astype(int)
    rows = np.arange(len(data))
    found = _logistic(member, item, label, rows[:900], rows, 0.4)
    bias = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (1, 20, 12)]
    optimiser = torch.optim.LBFGS(bias, max_iter=500, tolerance_grad=1e-10, tolerance_change=0)
    wanted = torch.from_numpy(label)

    def logits(upto):
        return bias[0] + bias[1][member[:upto]] + bias[2][item[:upto]]

    def loss():
        optimiser.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(
            logits(900), wanted[:900], reduction="sum"
        )
        value = fit + 0.2 * (bias[1].square().sum() + bias[2].square().sum())
        value.backward()
        return value

    optimiser.step(loss)
    want = torch.sigmoid(logits(len(data))).detach().numpy()
    assert np.abs(found - want).max() < 1e-4


def test_floors_on_movietweetings(shared_data):
    from slmperf.data import read_interactions

    data = read_interactions(shared_data / "recsys" / "movietweetings-100k")
    parts = split(data)
    start = time.process_time()
    run = evaluate.floor_runs(data, parts, tasks_for(data)[:1])["logistic member + item"]
    seconds = time.process_time() - start
    found = evaluate.evaluate_tasks(run)
    assert found.auc_mean == pytest.approx(0.803, abs=0.004), found
    assert found.auc_within == pytest.approx(0.742, abs=0.006), found
    assert seconds < 5
    start = time.process_time()
    interval = evaluate.auc_interval([run])
    assert time.process_time() - start < 3, "1000 draws of 14,420 rows"
    assert 0.003 < interval.standard_error < 0.008


def test_perplexity():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).train()
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50, length) for length in (5, 32, 1, 9, 2, 17)]
    total, count = 0.0, 0
    with torch.inference_mode():
        for one in sequences:
            logits = model(torch.from_numpy(one)[None]).logits[0, :-1].log_softmax(-1)
            total -= logits.gather(1, torch.from_numpy(one)[1:, None]).sum().item()
            count += len(one) - 1
    found = evaluate.perplexity(model, sequences)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    assert evaluate.perplexity(model, sequences, batch_tokens=20) == pytest.approx(found, rel=1e-5)
    assert model.training, "the model's mode is given back"
    with pytest.raises(InputError, match="a sequence has 33 tokens, expected at most 32"):
        evaluate.perplexity(model, [np.zeros(33, np.int64)])
    with pytest.raises(InputError, match="no sequence has two tokens"):
        evaluate.perplexity(model, [np.zeros(1, np.int64)])
