"""What can be known to be wrong is one clear error before training, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from small_training import (
    CONTEXT,
    NO,
    VOCABULARY,
    YES,
    make_labelled,
    make_model,
    one_thread,
    settings,
    young_garbage,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from slmperf import models
from slmperf.check import InputError
from slmperf.distill import DistillationTrainer, TeacherCache
from slmperf.distill.cache import hash_of_tokenizer
from slmperf.distill.on_policy import OnPolicySampler


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


def tokenizer(*first: str) -> PreTrainedTokenizerFast:
    """Of whole words, the first ones as given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*first, *(f"w{number}" for number in range(VOCABULARY - len(first)))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def cache_of(folder, teacher, examples, **changes):
    texts = [
        {"input_ids": torch.tensor(one["input_ids"])[None], "keys": [number]}
        for number, one in enumerate(examples)
    ]
    settings = {"tokenizer_hash": None, "top_k": 5} | changes
    TeacherCache.write(folder, teacher, texts, **settings)
    expected = {"model_hash": None, "tokenizer_hash": None, "vocabulary": None}
    return TeacherCache(folder, **expected)


def refusals(tmp_path):
    """name -> (what is refused when a training is set up with it, a part of the message)."""
    good, student = make_labelled(6), make_model()
    other = make_model(seed=1)
    wide = make_model(seed=1, vocab_size=VOCABULARY + 1)
    models.save(other, tokenizer("a", "b"), tmp_path / "teacher")
    beside = models.load(tmp_path / "teacher")
    beside.name_or_path = str(tmp_path / "teacher")
    whole = cache_of(tmp_path / "whole", other, good)
    lacking = cache_of(tmp_path / "lacking", other, good[:4])
    tokens = cache_of(tmp_path / "tokens", other, make_labelled(6, seed=4))
    of_wide = cache_of(tmp_path / "wide", wide, good)
    named = cache_of(
        tmp_path / "named", other, good, tokenizer_hash=hash_of_tokenizer(tokenizer("a"))
    )
    ids, labels = good[0]["input_ids"], good[0]["labels"]
    silent = [{**one, "labels": [-100] * len(one["labels"])} for one in good]
    first = {"input_ids": ids, "answer": [True] + [False] * (len(ids) - 1)}

    def example(**changes):
        return {"train_dataset": [{**good[0], **changes}, *good[1:]]}

    def config(**changes):
        return lambda: {"args": settings(tmp_path / "run", **changes)}

    evaluated = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    return {
        "teacher of another vocabulary": ({"teacher": wide}, "97"),
        "teacher beside another tokenizer": (
            {"teacher": beside, "processing_class": tokenizer("b", "a")}, "another tokenizer",
        ),
        "teacher that is the student": (
            {"teacher": student, "model": student}, "the student itself",
        ),
        "teacher of another kind": ({"teacher": "gpt-5"}, "teacher is a str"),
        "cache of another vocabulary": ({"teacher": of_wide}, "vocabulary of 97"),
        "cache of another tokenizer": (
            {"teacher": named, "processing_class": tokenizer("b")}, "written with the tokenizer",
        ),
        "cache of other examples": ({"teacher": lacking}, "4"),
        "cache of other tokens": ({"teacher": tokens}, "tokens"),
        "cache and the student's own text": (
            {"teacher": whole, "on_policy": OnPolicySampler(0.5)}, "the teacher does not read all",
        ),
        "the student's own text and no teacher": (
            {"on_policy": OnPolicySampler(0.5)}, "there is no teacher",
        ),
        "fraction above 1": (lambda: {"on_policy": OnPolicySampler(1.01)}, "fraction is 1.01"),
        "fraction below 0": (lambda: {"on_policy": OnPolicySampler(-0.1)}, "fraction is -0.1"),
        "fraction NaN": (lambda: {"on_policy": OnPolicySampler(float("nan"))}, "fraction is nan"),
        "no answers": ({"train_dataset": silent}, "none of 6 examples has an answer"),
        "an answer nothing predicts": ({"train_dataset": [first]}, "has an answer"),
        "no examples": ({"train_dataset": []}, "no examples"),
        "an example without tokens": (example(input_ids=[], labels=[]), "example 0"),
        "no input_ids": ({"train_dataset": [{"text": "a"}]}, "input_ids"),
        "labels that differ": (example(labels=[*labels[:-1], 5]), "label 5"),
        "labels of another length": (example(labels=labels[1:]), "equal numbers"),
        "fractions for tokens": (example(input_ids=[one + 0.5 for one in ids]), "example 0"),
        "a batch for an example": (example(input_ids=[ids, ids]), "example 0"),
        "too large a token": (
            example(input_ids=[*ids[:-1], VOCABULARY], labels=[*labels[:-1], VOCABULARY]),
            "token 96",
        ),
        "a negative token": (example(input_ids=[-1, *ids[1:]]), "token -1"),
        "too long": (
            {"train_dataset": [{"input_ids": [12] * (CONTEXT + 1)}]},
            f"at most context = {CONTEXT}",
        ),
        "positions that the model has not": (
            {"model": make_model(max_position_embeddings=CONTEXT - 1)}, "47 positions",
        ),
        "rows that do not divide": (config(rows_per_step=8, gradient_accumulation_steps=3), "8"),
        "evaluation without answers": ({"eval_dataset": silent}, "answer"),
        "evaluation without both labels": (
            lambda: {
                "args": settings(tmp_path / "run", label_tokens=(NO, YES)), "eval_dataset": good,
            },
            "label token",
        ),
        "best by what is not measured": (
            lambda: {
                "args": settings(tmp_path / "run", metric_for_best_model="eval_auc", **evaluated),
                "eval_dataset": good,
            },
            "eval_auc",
        ),
        "best of a set that has a name": (
            lambda: {"args": settings(tmp_path / "run", **evaluated), "eval_dataset": {"a": good}},
            "eval_a_loss",
        ),
        "not a configuration": ({"args": None}, "DistillationConfig"),
    }  # fmt: skip


def test_bad_input_is_one_line_before_anything_is_written(tmp_path):
    good = make_labelled(6)
    for name, (given, message) in refusals(tmp_path).items():
        with pytest.raises(InputError) as raised:
            given = given() if callable(given) else given
            base = {
                "model": make_model(), "args": settings(tmp_path / "run"), "train_dataset": good,
            }  # fmt: skip
            DistillationTrainer(**(base | given)).train()
        told = str(raised.value)
        assert message in told and "\n" not in told and len(told) < 400, (name, told)
        assert not (tmp_path / "run").exists(), name


def test_three_ranks_do_not_divide_eight_rows(tmp_path, monkeypatch):
    config = settings(tmp_path / "run", rows_per_step=8)
    monkeypatch.setattr(type(config), "world_size", property(lambda self: 3))
    with pytest.raises(InputError, match="rows_per_step is 8, wanted a multiple of 3 = 3 ranks"):
        DistillationTrainer(make_model(), config, make_labelled(6))
    assert not (tmp_path / "run").exists()


def test_packing_what_must_not_be_packed_is_refused(tmp_path):
    """Transformers forgets a sliding window where it is given a mask of four dimensions."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
    }  # fmt: skip

    def mistral(window):
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=window))

    def run(model, teacher=None, **changes):
        config = settings(tmp_path / "run", max_steps=1, **changes)
        DistillationTrainer(model, config, make_labelled(8), teacher=teacher).train()

    run(mistral(CONTEXT))
    run(mistral(4), packing=False)
    for model, teacher in ((mistral(4), None), (make_model(), mistral(4))):
        with pytest.raises(InputError, match="packing") as raised:
            run(model, teacher)
        assert "\n" not in str(raised.value)


def test_a_model_that_states_no_positions_trains(tmp_path):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    trainer = DistillationTrainer(
        BloomForCausalLM(config), settings(tmp_path, packing=False), make_labelled(8)
    )
    trainer.train()
    assert trainer.losses[-1] < trainer.losses[0]


def test_resuming_as_another_training_is_refused(tmp_path):
    def trainer(examples=None, **changes):
        config = settings(tmp_path, save_strategy="steps", save_steps=2, **changes)
        return DistillationTrainer(make_model(), config, examples or make_labelled(8))

    trainer().train()
    before = sorted(tmp_path.iterdir())
    fewer = make_labelled(8)
    fewer[0]["labels"][-1] = -100
    cases = [
        {"examples": make_labelled(8, seed=1)},
        {"examples": make_labelled(9)},
        {"examples": fewer},
        {"seed": 1},
        {"per_device_train_batch_size": 3},
        {"context": CONTEXT - 8},
        {"packing": False},
        {"sequence_sample": 0.5},
    ]
    for changes in cases:
        with pytest.raises(InputError, match="was written with other") as raised:
            trainer(**changes).train(resume_from_checkpoint=True)
        assert "\n" not in str(raised.value)
    empty = tmp_path / "other" / "checkpoint-1"
    empty.mkdir(parents=True)
    with pytest.raises(InputError, match="wanted a checkpoint"):
        trainer().train(resume_from_checkpoint=str(empty))
    empty.rmdir()
    empty.parent.rmdir()
    assert sorted(tmp_path.iterdir()) == before
    # The same rows of a step, cut otherwise, are the same training.
    trainer(per_device_train_batch_size=2, gradient_accumulation_steps=2).train(
        resume_from_checkpoint=True
    )
