"""The logged loss of every configuration against the formula, computed again in float64.

The reference sees whole texts, one at a time, through a plain call of each model, and none of what
a batch says about them but which there were: no packing, no shares, no fused loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_training import (
    VOCABULARY,
    make_labelled,
    make_model,
    make_ranked,
    one_thread,
    settings,
    young_garbage,
)
from transformers import TrainerCallback

from slmperf.distill import DistillationTrainer, TeacherCache
from slmperf.distill.on_policy import OnPolicySampler
from slmperf.distill.packing import PackedBatches
from slmperf.distill.step import batch_loss
from slmperf.distill.teachers import CachedTeacher, as_teacher
from slmperf.testing.pairwise import cross, pairwise

TOP_K = 12
EXAMPLES = [*make_ranked(10), *make_labelled(10)]
DIVERGENCES = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("skew_forward_kl", 0.1),
    ("skew_reverse_kl", 0.3),
    ("total_variation", None),
]
# Ends of the range, and others inside: only where every combination is tried.
MORE = [
    ("jsd", 0.0),
    ("jsd", 0.9),
    ("jsd", 1.0),
    ("skew_forward_kl", 0.6),
    ("skew_reverse_kl", 0.0),
]
LOSS = {
    "divergence": DIVERGENCES,
    "temperature": [0.5, 1.0, 2.0],
    "kd_ce": [(0.9, 0.1), (1.0, 0.0), (0.0, 1.0), (2.0, 0.5)],
    "answer_sequence": [(0.95, 0.05), (1.0, 0.0), (0.0, 1.0), (3.0, 2.0)],
    "normalization": ["tokens", "examples"],
    "teacher": ["none", "model", "hidden", "top_k"],
    "bf16": [False, True],
    "packing": [True, False],
}
LOOP = {
    "accumulation": [1, 2],
    "fraction": [0.0, 0.5, 1.0],
    "student": ["llama", "mixtral"],
    "sequence_sample": [1.0, 0.4],
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


# --- the formula ------------------------------------------------------------------------------


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def divergence(p, q, name, weight):
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if name == "jsd" and weight not in (0.0, 1.0):
        m = weight * p + (1 - weight) * q
        return weight * kl(p, m) + (1 - weight) * kl(q, m)
    if name == "skew_forward_kl":
        return kl(p, weight * p + (1 - weight) * q)
    if name == "skew_reverse_kl" and weight > 0:
        return kl(q, (1 - weight) * p + weight * q)
    forward = name == "forward_kl" or (name, weight) == ("jsd", 0.0)
    return kl(p, q) if forward else kl(q, p)


def token_losses(student, teacher, ids, case, tail):
    """(L - 1,): of each token but the first, from logits (L, V) of both models."""
    z = student[:-1].double()
    ce = -z.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    if case["teacher"] == "none":
        return ce
    temperature = case["temperature"]
    q, t = (z / temperature).softmax(-1), teacher[:-1].double()
    p = (t / temperature).softmax(-1)
    if case["teacher"] == "top_k":
        likely = t.log_softmax(-1).topk(TOP_K)
        if tail == "bucket":
            chosen, q = likely.values.exp(), q.gather(1, likely.indices)
            p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (chosen, q))
        else:
            p = torch.zeros_like(p).scatter(
                1, likely.indices, (likely.values / temperature).softmax(-1)
            )
    kd_weight, ce_weight = case["kd_ce"]
    return kd_weight * divergence(p, q, *case["divergence"]) + ce_weight * ce


def step_loss(texts, case):
    """texts: of the whole step, (token losses (L - 1,), answer (L,), row (L,), scale (L,)), where
    scale is 0 for tokens that were not drawn and else what the sampling makes of them.
    """
    answer_weight, sequence_weight = case["answer_sequence"]
    parts = []  # of every answered row: loss of its answers, of all, and how many there are
    for losses, answer, row, scale in texts:
        row = np.where(np.arange(len(row)) == 0, -1, row)
        for number in range(row.max() + 1):
            (every,) = np.nonzero(row == number)
            answers = [at for at in every if answer[at]]
            if answers:
                of_answers = sum(float(losses[at - 1]) for at in answers)
                of_all = sum(float(losses[at - 1]) * scale[at] for at in every)
                parts.append((of_answers, len(answers), of_all, len(every)))
    if case["normalization"] == "tokens":
        a, n_a, s, n_s = map(sum, zip(*parts, strict=True))
        return answer_weight * a / n_a + sequence_weight * s / n_s
    means = [answer_weight * a / n_a + sequence_weight * s / n_s for a, n_a, s, n_s in parts]
    return sum(means) / len(means)


def marks(example):
    """ids, answer, row of an example, (L,) each."""
    if isinstance(example, dict):
        ids = np.array(example["input_ids"])
        return ids, np.array(example["labels"]) != -100, np.zeros(len(ids), int)
    return np.array(example.input_ids), example.answer, example.row


def texts_of(batch, batches, share):
    """ids, answer, row, scale of each text of a batch."""
    ends = batch["counts"].cumsum(0)
    flat, found = batch["input_ids"].flatten(), []
    for number, index in enumerate(batch["examples"].tolist()):
        end, count = int(ends[number]), int(batch["counts"][number])
        places = batch["places"][end - count : end].numpy() + 1
        if index >= 0:
            ids, answer, row = marks(EXAMPLES[index])
            scale = np.zeros(len(ids))
            scale[places] = np.where(answer[places], 1.0, 1.0 / share)
        else:  # the student's own: a prompt of the examples that belong here, then the answer
            start = int(batch["positions"][end - count]) - int(places[0] - 1)
            ids = flat[start : start + int(batch["lengths"][number])].numpy()
            answer = np.zeros(len(ids), bool)
            answer[places[batch["answer"][end - count : end].numpy()]] = True
            whose = batches[int(batch["number"])]["examples"].tolist()
            prompts = [batches.prompt(one).tolist() for one in whose]
            assert ids[~answer].tolist() in prompts
            assert answer[int((~answer).sum()) :].all() and answer.any()
            row, scale = np.zeros(len(ids), int), np.ones(len(ids))
        found.append((ids, answer, row, scale))
    return found


def logits_of(model, ids, bf16):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=torch.from_numpy(ids).long()[None]).logits[0]


def reference(model, teacher, window, batches, case, tail, logits=logits_of):
    # What a cache holds was computed in fp32, whatever the student runs in.
    narrow = case["bf16"] and case["teacher"] == "model"
    texts = []
    for batch in window:
        # What the student wrote itself is no target: there is no cross entropy of it.
        own = int(batch["examples"].max()) < 0
        weighed = {**case, "kd_ce": (case["kd_ce"][0], 0.0)} if own else case
        for ids, *rest in texts_of(batch, batches, case["sequence_sample"]):
            z, t = logits(model, ids, case["bf16"]), logits(teacher, ids, narrow)
            texts.append((token_losses(z, t, torch.from_numpy(ids).long(), weighed, tail), *rest))
    return step_loss(texts, case)


# --- what is compared with it -----------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return make_model("mixtral", seed=1).eval()


@pytest.fixture(scope="module")
def caches(teacher, tmp_path_factory):
    def text(number):
        ids = marks(EXAMPLES[number])[0]
        return {"input_ids": torch.from_numpy(ids).long()[None], "keys": [number]}

    found = {}
    for kind, top_k in (("hidden", None), ("top_k", TOP_K)):
        folder = tmp_path_factory.mktemp(kind)
        TeacherCache.write(
            folder, teacher, map(text, range(len(EXAMPLES))), tokenizer_hash=None, top_k=top_k
        )
        found[kind] = TeacherCache(
            folder, model_hash=None, tokenizer_hash=None, vocabulary=VOCABULARY
        )
    return found


def possible(case):
    """What there is no such training of becomes its neighbour: reverse KL needs a tail, which is
    known at temperature 1; the student's own text needs a teacher that reads any text.
    """
    if case["fraction"] == 1.0:
        weights = case["kd_ce"] if case["kd_ce"][0] else (0.9, 0.1)
        case = {**case, "teacher": "model", "kd_ce": weights}
    elif case["teacher"] != "model" or not case["kd_ce"][0]:
        case = {**case, "fraction": 0.0}
    if case["teacher"] == "top_k" and tail_of(case) == "bucket":
        case = {**case, "temperature": 1.0}
    return case


def tail_of(case):
    reverse = case["divergence"] in (("reverse_kl", None), ("jsd", 1.0), ("skew_reverse_kl", 0.0))
    return "bucket" if reverse else "renormalise"


def teacher_of(case, teacher, caches):
    kind = case["teacher"]
    if kind in caches:
        return CachedTeacher(caches[kind], tail_of(case))
    return teacher if kind == "model" else None


def config_of(case, folder, **changes):
    kind, weight = case["divergence"]
    weights = {} if weight is None else {"beta" if kind == "jsd" else "alpha": weight}
    return settings(
        folder,
        divergence=kind,
        temperature=case["temperature"],
        kd_weight=case["kd_ce"][0],
        ce_weight=case["kd_ce"][1],
        answer_weight=case["answer_sequence"][0],
        sequence_weight=case["answer_sequence"][1],
        normalization=case["normalization"],
        bf16=case["bf16"],
        packing=case["packing"],
        sequence_sample=case["sequence_sample"],
        **weights,
        **changes,
    )


class Formula(TrainerCallback):
    """The formula at every step, with the weights that the step began with."""

    def __init__(self, *given):
        self.given, self.found, self.own = given, [], 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        trainer, teacher, case = self.given
        window = trainer.window
        assert len(window) == case["accumulation"]
        self.own += sum(int(batch["examples"].max()) < 0 for batch in window)
        modes = model.training
        self.found.append(
            reference(model.eval(), teacher, window, trainer.batches, case, tail_of(case))
        )
        model.train(modes)


def tolerance(case):
    # bf16: the reference multiplies other shapes, so its products round differently.
    return 2e-2 if case["bf16"] else 3e-5


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_the_logged_loss_is_the_formula(seed, tmp_path, teacher, caches):
    """Every two settings stand together in one of the runs, of two steps each."""
    generated = 0
    for number, given in enumerate(pairwise(LOSS | LOOP, seed=seed)):
        case = possible(given)
        config = config_of(
            case,
            tmp_path / str(number),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=case["accumulation"],
        )
        sampler = OnPolicySampler(case["fraction"], new_tokens=5, seed=number)
        trainer = DistillationTrainer(
            make_model(case["student"], seed=2),
            config,
            EXAMPLES,
            teacher=teacher_of(case, teacher, caches),
            on_policy=sampler if case["fraction"] else None,
        )
        formula = Formula(trainer, teacher, case)
        trainer.add_callback(formula)
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        wanted = pytest.approx(formula.found, rel=tolerance(case), abs=tolerance(case) / 10)
        assert len(formula.found) == 2
        assert trainer.losses == wanted, case
        assert logged == wanted, case
        generated += formula.own
        share = formula.own / (2 * case["accumulation"])
        assert share == case["fraction"] or case["fraction"] == 0.5, case
    assert generated > 10


@pytest.mark.slow
def test_every_loss_there_is(teacher, caches, tmp_path):
    """The full cross of what the loss is made of, on one batch."""
    student, known, done = make_model(seed=2).eval(), {}, set()

    def logits(model, ids, bf16):
        key = (model is student, ids.tobytes(), bf16)
        if key not in known:
            known[key] = logits_of(model, ids, bf16)
        return known[key]

    grid = {**LOSS, "divergence": [*DIVERGENCES, *MORE]}
    for given in cross({**grid, "sequence_sample": [0.4], "fraction": [0.0]}):
        case = possible(given)
        if case["teacher"] == "none":  # nothing of the divergence enters
            case |= {name: grid[name][0] for name in ("divergence", "temperature", "kd_ce")}
        if str(case) in done:
            continue
        done.add(str(case))
        config = config_of(case, tmp_path, per_device_train_batch_size=2)
        batches, one = (
            PackedBatches(EXAMPLES, config),
            as_teacher(teacher_of(case, teacher, caches)),
        )
        if isinstance(one, CachedTeacher):
            one.check(student, batches, None)
        with torch.no_grad():
            found = float(batch_loss(student, one, batches[0], config).loss)
        wanted = reference(student, teacher, [batches[0]], batches, case, tail_of(case), logits)
        assert found == pytest.approx(wanted, rel=tolerance(case), abs=tolerance(case) / 10), case
    assert len(done) > 10_000
