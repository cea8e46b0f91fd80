"""What a user of Trainer expects around the steps: logs, evaluation, the best checkpoint, data."""

from __future__ import annotations

import json

import pytest
import torch
from small_training import (
    NO,
    VOCABULARY,
    YES,
    logs_of,
    make_labelled,
    make_model,
    make_ranked,
    one_thread,
    settings,
    young_garbage,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from slmperf.distill import DistillationTrainer, TeacherCache
from slmperf.evaluate import auc


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


class Heard(TrainerCallback):
    """What a user's callback is told."""

    def __init__(self):
        self.logs, self.metrics, self.weights = [], {}, {}

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append((state.global_step, dict(logs)))

    def on_evaluate(self, args, state, control, model=None, metrics=None, **_):
        self.metrics[state.global_step] = dict(metrics)
        named = model.named_parameters()
        self.weights[state.global_step] = {name: value.detach().clone() for name, value in named}


def steps_of(folder) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("metric", ["loss", "kd", "auc"])
def test_the_best_checkpoint_stays_and_loads_anywhere(metric, tmp_path):
    """Whichever step it comes at, also between two that are saved anyway."""
    config = settings(
        tmp_path,
        max_steps=9,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        load_best_model_at_end=True,
        label_tokens=(NO, YES),
        metric_for_best_model=metric,
    )
    heard, student = Heard(), make_model(spread=0.02)
    trainer = DistillationTrainer(
        student,
        config,
        make_ranked(12),
        make_ranked(8, seed=5),
        teacher=make_model(seed=1),
        callbacks=[heard],
    )
    trainer.train()
    values = {step: found[f"eval_{metric}"] for step, found in heard.metrics.items()}
    best = (max if metric == "auc" else min)(values, key=values.__getitem__)
    assert len(set(values.values())) > 1 and len(values) == 9
    assert trainer.state.best_global_step == best
    assert best in steps_of(tmp_path) and len(steps_of(tmp_path)) <= 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    for name, value in heard.weights[best].items():
        assert torch.equal(student.get_parameter(name), value), name
        assert torch.equal(plain.get_parameter(name), value), name
    assert plain.config.use_cache is True


def test_early_stopping_stops(tmp_path):
    config = settings(
        tmp_path,
        max_steps=50,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        early_stopping_patience=2,
        save_steps=50,
    )
    trainer = DistillationTrainer(make_model(), config, make_labelled(8), make_labelled(4, seed=2))
    trainer.train()
    losses = [entry["eval_loss"] for _, entry in logs_of(trainer, "eval_loss")]
    assert len(losses) == trainer.state.global_step < 50
    assert trainer.state.best_global_step == losses.index(min(losses)) + 1 == len(losses) - 2
    assert trainer.evaluate()["eval_loss"] == min(losses)  # the model is its best checkpoint


@pytest.mark.parametrize("limit", [1, 2, None])
def test_as_many_checkpoints_as_asked_for(limit, tmp_path):
    config = settings(
        tmp_path, max_steps=7, save_strategy="steps", save_steps=2, save_total_limit=limit
    )
    DistillationTrainer(make_model(), config, make_labelled(8)).train()
    assert steps_of(tmp_path) == ([2, 4, 6, 7] if limit is None else [2, 4, 6, 7][-limit:])


def test_an_epoch_is_one_of_the_examples(tmp_path):
    config = settings(
        tmp_path,
        max_steps=-1,
        num_train_epochs=3,
        packing=False,
        per_device_train_batch_size=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=None,
    )
    heard = Heard()
    trainer = DistillationTrainer(
        make_model(), config, make_labelled(8), make_labelled(4, seed=2), callbacks=[heard]
    )
    trainer.train()
    assert trainer.state.global_step == 12  # 3 epochs of 8 examples, 2 at a time
    assert steps_of(tmp_path) == list(heard.metrics) == [4, 8, 12]
    told = [(step, logs["epoch"]) for step, logs in heard.logs if "loss" in logs]
    assert told == [(4, 1.0), (8, 2.0), (12, 3.0)]


def test_callbacks_and_tensorboard_get_what_is_logged(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    config = settings(
        tmp_path / "run",
        max_steps=6,
        logging_steps=2,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=3,
    )
    heard = Heard()
    trainer = DistillationTrainer(
        make_model(), config, make_labelled(16), make_labelled(4, seed=2), callbacks=[heard]
    )
    trainer.train()
    losses = {step: logs["loss"] for step, logs in heard.logs if "loss" in logs}
    assert losses == {
        step: pytest.approx(sum(trainer.losses[step - 2 : step]) / 2) for step in (2, 4, 6)
    }
    (told,) = [logs for step, logs in heard.logs if step == 2]
    assert {"grad_norm", "learning_rate", "epoch", "tokens_per_second"} <= told.keys()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("train/loss")}
    assert curve == pytest.approx(losses)
    evaluated = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert evaluated == pytest.approx(
        {step: one["eval_loss"] for step, one in heard.metrics.items()}
    )
    assert list(evaluated) == [3, 6]


def test_evaluation_against_a_computation_by_hand(tmp_path):
    """Two data sets by name: cross entropy, AUC and the divergence of each, and text of each."""
    sets = {"near": make_ranked(5, seed=5), "far": make_ranked(4, seed=6)}
    model, teacher = make_model(), make_model(seed=1)
    config = settings(
        tmp_path, label_tokens=(NO, YES), sample_generations=2, divergence="reverse_kl"
    )
    trainer = DistillationTrainer(model, config, make_ranked(4), sets, teacher=teacher)
    model.train()
    found = trainer.evaluate()
    assert model.training
    for name, examples in sets.items():
        entropies, divergences, scores, labels = [], [], [], []
        for one in examples:
            ids = torch.from_numpy(one.input_ids).long()
            with torch.no_grad():
                z = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                t = teacher(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            for at in one.answer.nonzero()[0]:
                q, p = z[at - 1], t[at - 1]
                entropies.append(-float(q[ids[at]]))
                divergences.append(float((q.exp() * (q - p)).sum()))
                scores.append(float(q[YES] - q[NO]))
                labels.append(bool(ids[at] == YES))
        prefix = f"eval_{name}"
        assert found[f"{prefix}_tokens"] == len(entropies)
        assert found[f"{prefix}_loss"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert found[f"{prefix}_kd"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)
        wanted = auc(torch.tensor(scores).numpy(), torch.tensor(labels).numpy())
        assert found[f"{prefix}_auc"] == pytest.approx(wanted)
        lines = (tmp_path / f"samples-{name}.jsonl").read_text().splitlines()
        for line, one in zip(map(json.loads, lines), examples, strict=False):
            prompt = one.input_ids[: one.answer.argmax()].tolist()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + line["tokens"]])).logits[0]
            continued = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
            assert line["tokens"] == continued and len(continued) > 0
        assert len(lines) == 2


def test_a_mixture_that_shows_its_routers_writes_text(tmp_path):
    config = settings(tmp_path, sample_generations=1)
    trainer = DistillationTrainer(make_model("mixtral"), config, make_ranked(4), make_ranked(3))
    trainer.evaluate()
    assert json.loads((tmp_path / "samples.jsonl").read_text())["tokens"]
    assert trainer.model.config.output_router_logits is True


def test_a_cached_teacher_is_asked_about_the_evaluated_texts(tmp_path):
    """Texts of the evaluation, under keys that the training's texts have too."""
    teacher = make_model(seed=1)
    train, others = make_labelled(8), make_labelled(4, seed=2)
    named = [{**one, "key": f"other {number}"} for number, one in enumerate(others)]
    texts = [
        *({"input_ids": torch.tensor([one["input_ids"]]), "keys": [f"{n}"]}
          for n, one in enumerate(train)),
        *({"input_ids": torch.tensor([one["input_ids"]]), "keys": [one["key"]]} for one in named),
    ]  # fmt: skip
    TeacherCache.write(tmp_path / "cache", teacher, texts, tokenizer_hash=None)
    cache = TeacherCache(
        tmp_path / "cache", model_hash=None, tokenizer_hash=None, vocabulary=VOCABULARY
    )
    train = [{**one, "key": f"{number}"} for number, one in enumerate(train)]

    def kd(teacher, evaluated):
        trainer = DistillationTrainer(
            make_model(), settings(tmp_path / "run"), train, evaluated, teacher=teacher
        )
        return trainer.evaluate().get("eval_kd")

    assert kd(cache, named) == pytest.approx(kd(teacher, named), rel=1e-5)
    assert kd(cache, others) is None  # not under the keys 0, 1, ... of other texts


def test_data_of_the_datasets_library(tmp_path):
    from datasets import Dataset

    examples = make_labelled(12)
    losses = []
    for data in (examples, Dataset.from_list(examples)):
        trainer = DistillationTrainer(make_model(), settings(tmp_path), data, data)
        trainer.train()
        losses.append([*trainer.losses, trainer.evaluate()["eval_loss"]])
    assert losses[0] == losses[1]


def test_save_model_writes_what_loads_and_no_pickle(tmp_path):
    trainer = DistillationTrainer(make_model(), settings(tmp_path / "run"), make_labelled(8))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(plain.get_parameter(name), value), name
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} <= {".json", ".safetensors", ".log"}
