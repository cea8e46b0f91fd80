"""Evaluation during a training: against logits, over ranks, and what it leaves as it was."""

import copy
import json
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import llama
from transformers import Gemma2Config, Gemma2ForCausalLM

from slmperf.check import InputError
from slmperf.distill import evaluation
from slmperf.distill.config import DistillationConfig
from slmperf.distill.evaluation import check_evaluation, sample, validation
from slmperf.distill.packing import PackedBatches
from slmperf.distill.teachers import ModelTeacher
from slmperf.evaluate import auc
from slmperf.ops import JSD, divergence_reference

NO, YES = 5, 6


def texts(count=13):
    """Texts of 4 to 15 tokens, the last two of which are an answer: no or yes, then an end."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        ids = rng.integers(7, 64, int(rng.integers(4, 16)))
        ids[-2:] = [YES if index % 3 == 0 else NO, 2]
        answer = np.zeros(len(ids), bool)
        answer[-2:] = True
        found.append({"input_ids": ids, "answer": answer, "key": f"text {index}"})
    return found


def config(folder, **changes):
    sizes = {"context": 32, "per_device_eval_batch_size": 1, "divergence": "jsd", "beta": 0.3}
    return DistillationConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        **(sizes | {"temperature": 2.0} | changes),
    )


@pytest.fixture(scope="module")
def models():
    student, teacher = llama(), llama(hidden_size=48, num_attention_heads=4)
    return student, teacher


def softcapped():
    """A model that caps its logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return Gemma2ForCausalLM(
        Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0, initializer_range=0.3)
    ).eval()


@torch.no_grad()
def expected(student, teacher, examples):
    """Each text alone, from whole logits: mean cross entropy and divergence of answers, and AUC."""
    entropies, divergences, scores, labels = [], [], [], []
    for one in examples:
        ids = torch.from_numpy(one["input_ids"])[None]
        logits, taught = student(ids).logits[0].double(), teacher(ids).logits[0].double()
        for at in np.flatnonzero(one["answer"]):
            token = int(ids[0, at])
            entropies.append(-float(logits[at - 1].log_softmax(-1)[token]))
            both = logits[at - 1 : at], taught[at - 1 : at]
            divergences.append(float(divergence_reference(*both, kind=JSD(0.3), temperature=2.0)))
            if token in (NO, YES):
                scores.append(float(logits[at - 1, YES] - logits[at - 1, NO]))
                labels.append(token == YES)
    figures = auc(np.array(scores), np.array(labels))
    return float(np.mean(entropies)), float(np.mean(divergences)), figures


@pytest.mark.parametrize("cap", [False, True])
def test_it_is_what_whole_logits_give(models, tmp_path, cap):
    student, teacher = models
    student = softcapped() if cap else student
    settings = config(tmp_path)
    batches = PackedBatches(texts(), settings, once=True)
    assert len(batches) > 2 and "attention_mask" in batches[0]
    found = validation(
        student, batches, config=settings, teacher=ModelTeacher(teacher), label_tokens=(NO, YES)
    )
    loss, divergence, area = expected(student, teacher, texts())
    assert found["loss"] == pytest.approx(loss, rel=2e-6)
    assert found["kd"] == pytest.approx(divergence, rel=2e-5)
    assert found["auc"] == area and 0 < area < 1
    assert found["tokens"] == 26
    # Without a teacher and labels, and in bf16, the same measure.
    alone = validation(student, batches, config=settings)
    assert alone == {"loss": pytest.approx(loss, rel=2e-6), "tokens": 26}
    half = validation(student, batches, config=config(tmp_path, bf16=True))
    assert half["loss"] == pytest.approx(loss, rel=0.02) and half["loss"] != alone["loss"]


def test_the_objective_does_not_change_the_measure(models, tmp_path):
    changed = config(tmp_path, divergence="reverse_kl", sequence_sample=0.1, answer_weight=0.1)
    found = [
        validation(models[0], PackedBatches(texts(), one, once=True), config=one)
        for one in (config(tmp_path), changed)
    ]
    assert found[0] == found[1]


class Ranks:
    """torch.distributed of so many threads: sums meet at a barrier, in the order of the ranks."""

    def __init__(self, number):
        self.number, self.here = number, threading.local()
        self.barrier, self.given = threading.Barrier(number), [None] * number

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.here.rank

    def get_world_size(self):
        return self.number

    def all_reduce(self, tensor):
        self.given[self.here.rank] = tensor.clone()
        self.barrier.wait(30)
        tensor.copy_(torch.stack(self.given).sum(0))
        self.barrier.wait(30)

    def run(self, task):
        found = [None] * self.number

        def one(rank):
            self.here.rank = rank
            found[rank] = task()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_any_number_of_ranks_gives_the_same_bits(models, tmp_path, monkeypatch):
    settings = config(tmp_path)

    def task():
        student, teacher = (copy.deepcopy(one) for one in models)
        batches = PackedBatches(texts(), settings, once=True)
        return validation(
            student, batches, config=settings, teacher=ModelTeacher(teacher), label_tokens=(NO, YES)
        )

    alone = task()
    batches = len(PackedBatches(texts(), settings, once=True))
    for number in (3, batches + 2):  # two ranks have nothing to do
        assert batches % 3
        ranks = Ranks(number)
        monkeypatch.setattr(evaluation, "dist", ranks)
        assert ranks.run(task) == [alone] * number


def test_it_leaves_everything_as_it_was(models, tmp_path):
    student = copy.deepcopy(models[0]).train()
    student.model.layers[1].eval()
    modes = [one.training for one in student.modules()]
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    settings = config(tmp_path)
    batches = PackedBatches(texts(), settings, once=True)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    validation(student, batches, config=settings)
    sample(student, batches, count=2, path=tmp_path / "samples.jsonl", step=1, new_tokens=3)
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(now[0], states[0]) and now[1:] == states[1:]
    assert [one.training for one in student.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert all(one.grad is None for one in student.parameters())
    with pytest.raises(RuntimeError, match="planted"):
        student.model.layers[0].register_forward_hook(fail)
        validation(student, batches, config=settings)
    assert [one.training for one in student.modules()] == modes


def fail(*_):
    raise RuntimeError("planted")


def test_what_cannot_be_measured_is_refused(models, tmp_path):
    settings = config(tmp_path)
    same = [one for one in texts() if YES not in one["input_ids"]]
    batches = PackedBatches(same, settings, once=True)
    check_evaluation(batches, None)
    with pytest.raises(InputError, match=r"no answer is the label token 6, expected both of \(5, "):
        check_evaluation(batches, (NO, YES))
    with pytest.raises(InputError, match="every one of the 8 labels is 0"):
        validation(models[0], batches, config=settings, label_tokens=(NO, YES))
    silent = SimpleNamespace(ids=np.array([NO, 9, 9]), answers=np.array([True, False, False]))
    silent.lengths = np.array([3])  # nothing predicts a first token
    with pytest.raises(InputError, match="no token is an answer"):
        check_evaluation(silent, None)


class Tokenizer:
    eos_token_id = 2

    def decode(self, ids):
        return " ".join(map(str, ids))


@torch.no_grad()
def greedy(model, ids, tokens, stop):
    ids, found = list(ids), []
    for _ in range(tokens):
        found.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(found[-1])
        if found[-1] == stop:
            break
    return found


def test_samples_are_the_greedy_text_of_each_prompt(models, tmp_path):
    student = models[0]
    batches = PackedBatches(texts(), config(tmp_path), once=True)
    path = tmp_path / "samples.jsonl"
    stop = greedy(student, batches.prompt(1), 3, None)[2]  # one text ends early
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = stop
    for step in (5, 10, 5):  # the run was taken up again from before step 10
        sample(student, batches, count=3, path=path, step=step, tokenizer=tokenizer, new_tokens=6)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [5] * 3 + [10] * (3 if step == 10 else 0)
    for index, line in enumerate(lines):
        prompt = batches.prompt(index)
        assert line["example"] == f"text {index}"
        assert line["tokens"] == greedy(student, prompt, 6, stop)
        assert line["prompt"] == tokenizer.decode(prompt)
        assert line["continuation"] == tokenizer.decode(line["tokens"])
        assert line["reference"] == tokenizer.decode(texts()[index]["input_ids"][-2:])
    assert lines[1]["tokens"][-1] == stop and len(lines[1]["tokens"]) <= 3


def test_samples_stop_at_the_last_known_position(tmp_path):
    student = llama(max_position_embeddings=16)
    long = {"input_ids": np.full(16, 9), "answer": np.arange(16) == 13}
    batches = PackedBatches([long], config(tmp_path, context=16), once=True)
    sample(student, batches, count=1, path=tmp_path / "s.jsonl", step=0)
    (line,) = (tmp_path / "s.jsonl").read_text().splitlines()
    assert len(json.loads(line)["tokens"]) == 3 and "prompt" not in json.loads(line)
