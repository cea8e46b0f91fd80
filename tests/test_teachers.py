"""slmperf.distill.teachers, .server and .teacher_text: whatever the teacher is, the loss is the
same, and what cannot give it is refused before anything is trained.

Over 400 lines: one data set, its models and their server serve all of these tests.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import signal
import time
import warnings

import numpy as np
import pytest
import small_models
import torch
from fake_teacher import FakeTeacher

from slmperf.check import InputError
from slmperf.distill import http
from slmperf.distill.cache import TeacherCache, TeacherCacheWriter, hash_of_tokenizer
from slmperf.distill.cache.files import CachedHead, hash_of_model
from slmperf.distill.cache.fill import top_k_of
from slmperf.distill.config import DistillationConfig
from slmperf.distill.heads import additive_mask
from slmperf.distill.packing import PackedBatches, inputs_of
from slmperf.distill.server import CompletionServer
from slmperf.distill.step import batch_loss, token_weights
from slmperf.distill.teacher_text import read_teacher_text, write_teacher_text
from slmperf.distill.teachers import (
    CachedTeacher,
    ModelTeacher,
    ServerTeacher,
    as_teacher,
)
from slmperf.distill.trainer import DistillationTrainer
from slmperf.ops import TeacherTopK

VOCABULARY, CONTEXT, K = 64, 32, 6
STYLES = ("vllm", "sglang", "echo")
KINDS = ("hidden", "top_k", *STYLES)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def models():
    """Student and teacher, of different widths."""
    student = small_models.llama(hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
    return student, small_models.llama()


def data(count=14, seed=0, vocabulary=VOCABULARY):
    """Texts of 2 to 15 tokens, of which some are answers."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(random.integers(2, 16))
        answer = random.random(length) < 0.4
        answer[-1] = True
        found.append({"input_ids": random.integers(0, vocabulary, length), "answer": answer})
    return found


def config(folder, **changes):
    settings = {
        "max_steps": 3,
        "context": CONTEXT,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return DistillationConfig(output_dir=str(folder), **(settings | changes))


def padded(examples, keys=None):
    """A batch for TeacherCache.write: one example a row."""
    width = max(len(one["input_ids"]) for one in examples)
    ids, mask = torch.zeros(len(examples), width, dtype=torch.int64), None
    mask = torch.zeros_like(ids)
    for row, one in enumerate(examples):
        ids[row, : len(one["input_ids"])] = torch.from_numpy(one["input_ids"])
        mask[row, : len(one["input_ids"])] = 1
    keys = list(range(len(examples))) if keys is None else keys
    return {"input_ids": ids, "attention_mask": mask, "keys": keys}


def cached(folder, teacher, examples, keys=None, **settings):
    settings = {"tokenizer_hash": None, "model_hash": "files:a", **settings}
    TeacherCache.write(folder, teacher, [padded(examples, keys)], **settings)
    return TeacherCache(folder, model_hash=None, tokenizer_hash=None)


def one_of(kind, folder, teacher, examples, url=None, **settings):
    """A teacher of this kind that says what the model says."""
    if kind == "hidden":
        return as_teacher(cached(folder, teacher, examples))
    if kind == "top_k":
        return as_teacher(cached(folder, teacher, examples, top_k=VOCABULARY))
    return ServerTeacher(url, top_k=VOCABULARY, **settings)


def loss_and_gradient(student, teacher, batch, settings):
    student = copy.deepcopy(student)
    loss = batch_loss(student, teacher, batch, settings).loss
    loss.backward()
    return loss.item(), torch.cat([one.grad.flatten() for one in student.parameters()])


# --- the same teacher in every form -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "alone"])
def test_every_kind_gives_the_loss_and_gradient_of_the_model(tmp_path, models, kind, packing):
    student, model = models
    settings = config(tmp_path, packing=packing, divergence="jsd", sequence_sample=0.4)
    examples = data()
    batches = PackedBatches(examples, settings)
    with FakeTeacher(model, kind if kind in STYLES else "vllm") as server:
        teacher = one_of(kind, tmp_path / "cache", model, examples, server.url)
        teacher.check(student, batches, None)
        teacher.to("cpu")
        several = 0
        for number in range(2):
            batch = batches[number]
            several += len(batch["examples"]) > len(batch["input_ids"])
            wanted = loss_and_gradient(student, ModelTeacher(model), batch, settings)
            found = loss_and_gradient(student, teacher, batch, settings)
            assert found[0] == pytest.approx(wanted[0], rel=1e-5)
            assert (found[1] - wanted[1]).abs().max() < 1e-5 * wanted[1].abs().max()
            other = loss_and_gradient(student, ModelTeacher(student), batch, settings)
            assert abs(other[0] - wanted[0]) > 1e-2  # the test can fail
    assert several == 2 * packing


def test_hidden_states_of_a_packed_batch_come_back_bit_for_bit(tmp_path, models):
    student, model = models
    batches = PackedBatches(data(), config(tmp_path))
    teacher, batch = ModelTeacher(model), batches[0]
    wanted = teacher.rows(batch)
    head = CachedHead(wanted.weight, wanted.bias, wanted.softcap, wanted.scale)
    with TeacherCacheWriter(
        tmp_path / "c", head, model_hash="files:a", tokenizer_hash=None
    ) as file:
        examples = batch["examples"].tolist()
        ends = np.cumsum(batches.lengths)
        tokens = [batches.ids[ends[one] - batches.lengths[one] : ends[one]] for one in examples]
        file.append(examples, batch["counts"], batch["places"], wanted.hidden, tokens)
    read = CachedTeacher(TeacherCache(tmp_path / "c", model_hash=None, tokenizer_hash=None))
    read._batches = batches
    found = read.rows(batch)
    assert torch.equal(found.hidden, wanted.hidden) and torch.equal(found.weight, wanted.weight)
    assert not found.hidden.requires_grad and not wanted.hidden.requires_grad
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_a_servers_likeliest_tokens_are_those_of_the_model(tmp_path, models, style):
    student, model = models
    batches = PackedBatches(data(), config(tmp_path))
    batch = batches[0]
    with torch.no_grad():
        wanted = top_k_of(ModelTeacher(model).rows(batch), K)
    with FakeTeacher(model, style) as server:
        teacher = ServerTeacher(server.url, top_k=K, tail="bucket")
        teacher.check(student, batches, None)
        found = teacher.rows(batch)
    assert isinstance(found, TeacherTopK) and found.tail == "bucket"
    assert torch.equal(found.indices, wanted.indices)
    assert (found.log_probs - wanted.log_probs).abs().max() < 1e-5
    assert found.log_probs.dtype == torch.float32


def test_a_batch_narrowed_to_its_answers_gives_their_rows(tmp_path, models):
    """Evaluation wants rows at answers alone."""
    student, model = models
    examples, settings = data(), config(tmp_path)
    batches = PackedBatches(examples, settings, once=True)
    batch = dict(batches[0])
    owner = torch.repeat_interleave(torch.arange(len(batch["counts"])), batch["counts"])
    kept = batch["answer"]
    batch["counts"] = torch.bincount(owner[kept], minlength=len(batch["counts"]))
    for name in ("positions", "targets", "places"):
        batch[name] = batch[name][kept]
    whole = ModelTeacher(model).rows(batches[0]).hidden
    with FakeTeacher(model) as server:
        for kind in ("hidden", "vllm"):
            teacher = one_of(kind, tmp_path / kind, model, examples, server.url)
            teacher.check(student, batches, None)
            found = teacher.rows(batch)
            if kind == "hidden":
                assert (found.hidden - whole[kept]).abs().max() < 1e-5
            else:
                assert len(found.indices) == int(kept.sum())


def trained(folder, student, teacher):
    """Losses of two epochs, and an evaluation on other texts."""
    settings = config(folder, normalization="examples", num_train_epochs=2, max_steps=-1)
    trainer = DistillationTrainer(
        copy.deepcopy(student), settings, data(), data(4, seed=1), teacher=teacher
    )
    trainer.train()
    return trainer.losses, trainer.evaluate()


@pytest.fixture(scope="module")
def training(tmp_path_factory, models):
    return trained(tmp_path_factory.mktemp("model"), *models)


@pytest.mark.parametrize("kind", ["hidden", "top_k", "vllm"])
def test_trainings_from_every_kind_are_the_same(tmp_path, models, training, kind):
    student, model = models
    with FakeTeacher(model) as server:
        teacher = one_of(kind, tmp_path / "cache", model, data(), server.url)
        if kind in ("hidden", "top_k"):
            teacher = teacher.cache  # as a user gives it
        losses, evaluated = trained(tmp_path, student, teacher)
    assert len(losses) >= 4 and losses[-1] < losses[0]
    assert losses == pytest.approx(training[0], rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(training[1]["eval_loss"], rel=1e-4)
    if kind == "vllm":  # each text once, over all epochs
        assert len(server.requests) == len(data()) + 4
        assert evaluated["eval_kd"] == pytest.approx(training[1]["eval_kd"], rel=1e-4)
    else:  # a cache knows nothing of other texts
        assert "eval_kd" in training[1] and "eval_kd" not in evaluated


# --- refused before training --------------------------------------------------------------------


def test_other_vocabularies_positions_and_the_student_itself_are_refused(tmp_path, models):
    student, model = models
    examples, settings = data(), config(tmp_path)
    for teacher, told in {
        small_models.llama(vocab_size=65): "the teacher has a vocabulary of 65, expected the stud",
        small_models.llama(max_position_embeddings=16): "the teacher knows 16 positions, expected",
        student: "the teacher is the student itself, expected another",
        cached(tmp_path / "c", small_models.llama(vocab_size=65), examples): (
            r"train: the cache .* has a vocabulary of 65, expected the student's 64"
        ),
        "teacher": "teacher is a str, expected a model, a TeacherCache",
        CompletionServer("http://127.0.0.1:9"): "teacher is a CompletionServer, expected",
    }.items():
        with pytest.raises(InputError, match=told):
            DistillationTrainer(student, settings, examples, teacher=teacher)
    assert as_teacher(None) is None


def tokenizer(folder, words):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=words[0], bos_token=words[1], eos_token=words[2]
    )
    made.save_pretrained(folder)
    return made


WORDS = [f"w{at:02}" for at in range(VOCABULARY)]  # none within another


def test_another_tokenizer_is_refused(tmp_path, models):
    student, _ = models
    own = tokenizer(tmp_path / "own", WORDS)
    small_models.llama().save_pretrained(tmp_path / "teacher")
    swapped = [*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]]
    tokenizer(tmp_path / "teacher", swapped)
    teacher = type(student).from_pretrained(tmp_path / "teacher")
    examples, settings = data(), config(tmp_path)

    def made(teacher, processing_class):
        return DistillationTrainer(
            student, settings, examples, teacher=teacher, processing_class=processing_class
        )

    told = "another tokenizer: its token 7 is 'w08', expected processing_class's 'w07'"
    with pytest.raises(InputError, match=told):
        made(teacher, own)
    made(teacher, None)  # not known
    other = tokenizer(tmp_path / "teacher", WORDS)
    other.add_special_tokens({"pad_token": "w03"})  # as users do: no token has another meaning
    made(teacher, other)

    hashes = {"tokenizer_hash": hash_of_tokenizer(tmp_path / "own")}
    cache = cached(tmp_path / "c", teacher, examples, **hashes)
    made(cache, own)
    with pytest.raises(InputError, match=r"was written with the tokenizer \w{12}\.\.\., expected"):
        made(cache, tokenizer(tmp_path / "swapped", swapped))


def test_a_tokenizer_is_found_where_the_teacher_came_from(tmp_path, models, monkeypatch):
    """In any form that Transformers reads, in a folder or the hub's cache; else nothing is said of
    another, but that.
    """
    import transformers
    from huggingface_hub import constants

    student, model = models
    examples, settings = data(), config(tmp_path)

    def made(teacher, processing_class):
        return DistillationTrainer(
            student, settings, examples, teacher=teacher, processing_class=processing_class
        )

    own = tokenizer(tmp_path / "own", WORDS)
    swapped = [*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]]
    folder = tmp_path / "bert"  # a vocabulary in text, and no tokenizer.json
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(swapped))
    names = {"tokenizer_class": "BertTokenizer", "unk_token": "w00", "pad_token": "w01"}
    names |= {"cls_token": "w02", "sep_token": "w03", "mask_token": "w04"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    told = "has another tokenizer: its token 7 is 'w08', expected processing_class's 'w07'"
    teacher = copy.deepcopy(model)
    teacher.config._name_or_path = str(folder)
    with pytest.raises(InputError, match=told):
        made(teacher, own)

    hub, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    stored = hub / "models--some--teacher" / "snapshots" / commit
    stored.mkdir(parents=True)
    model.save_pretrained(stored)
    tokenizer(stored, swapped)
    teacher.config._name_or_path, teacher.config._commit_hash = "some/teacher", commit
    with pytest.raises(InputError, match=told):
        made(teacher, own)

    (tmp_path / "blank").mkdir()  # of such a one Transformers makes a tokenizer without words
    (tmp_path / "blank" / "config.json").write_text('{"model_type": "qwen2"}')
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "blank").get_vocab()
    teacher.config._commit_hash = None
    for name in ("other/teacher", str(tmp_path / "blank"), ""):
        teacher.config._name_or_path = name
        with pytest.warns(UserWarning, match="found no tokenizer beside .*: not compared") as seen:
            made(teacher, own)
        assert sum("not compared" in str(one.message) for one in seen) == 1
    cache = cached(tmp_path / "c", model, examples)
    with pytest.warns(UserWarning, match="has no hash of a tokenizer: not compared"):
        made(cache, own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made(teacher, None)
        made(cache, None)


SIZES = [(64, 70), (70, 64)]  # vocabularies of student and teacher, before one tokenizer of 60


@pytest.fixture(params=SIZES, ids=["larger-teacher", "larger-student"])
def padded_models(request, tmp_path):
    """Student, teacher in a folder with its tokenizer, that tokenizer."""
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    student = small_models.llama(vocab_size=request.param[0], **sizes)
    teacher = small_models.llama(vocab_size=request.param[1])
    with torch.no_grad():
        teacher.lm_head.weight[60:] = 0  # far from the likeliest
    teacher.save_pretrained(tmp_path / "teacher")
    own = tokenizer(tmp_path / "teacher", WORDS[:60])
    return student, type(teacher).from_pretrained(tmp_path / "teacher"), own


@pytest.mark.parametrize("kind", ["exact", "model", "hidden", "top_k"])
def test_rows_beyond_the_smaller_vocabulary_are_left_out(tmp_path, padded_models, kind):
    student, model, own = padded_models
    examples, settings = data(vocabulary=60), config(tmp_path, ce_weight=0.3)
    if kind == "exact":
        student, model = student.double(), model.double()
    given = model
    if kind in ("hidden", "top_k"):
        changes = {"top_k": 12} if kind == "top_k" else {}
        given = cached(
            tmp_path / "c", model, examples, tokenizer_hash=hash_of_tokenizer(own), **changes
        )
    trainer = DistillationTrainer(
        student, settings, examples, examples, teacher=given, processing_class=own
    )
    batch = PackedBatches(examples, settings)[0]
    assert len(batch["examples"]) > len(batch["input_ids"])  # packed
    found = batch_loss(student, trainer.teacher, batch, settings)
    found.loss.backward()

    def logits(model):
        whole = model(**inputs_of(batch) | additive_mask(model, inputs_of(batch))).logits
        return whole.flatten(0, 1)[batch["positions"]][:, :64]

    with torch.no_grad():
        wanted = logits(model)
        if kind == "top_k":
            least = wanted.topk(12).values[:, -1:]
            wanted = wanted.masked_fill(wanted < least, -torch.inf)
        p, log_q = wanted.softmax(-1), logits(student).log_softmax(-1)
        kd = (torch.xlogy(p, p) - p * log_q).sum(-1)
        ce = -log_q.gather(1, batch["targets"][:, None])[:, 0]
        weights = token_weights(batch, settings).to(kd)
        wanted = float(weights @ (0.9 * kd + 0.3 * ce))
    near = 1e-7 if kind == "exact" else 1e-5  # weights are fp32
    assert found.loss.item() == pytest.approx(wanted, rel=near)
    gradient = student.lm_head.weight.grad
    assert bool((gradient[64:] == 0).all()) and bool((gradient[:64] != 0).any(dim=1).all())
    evaluated = trainer.evaluate()
    assert 0 < evaluated["eval_kd"] < 20 and 0 < evaluated["eval_loss"] < 20


def test_other_sizes_without_a_known_tokenizer_are_refused(tmp_path, padded_models):
    student, model, own = padded_models
    examples, settings = data(vocabulary=60), config(tmp_path)

    def made(teacher, given=examples, processing_class=own):
        return DistillationTrainer(
            student, settings, given, teacher=teacher, processing_class=processing_class
        )

    assert made(model).teacher.any_text == (model.config.vocab_size == 70)
    sizes = f"{model.config.vocab_size}, expected the student's {student.config.vocab_size}"
    with pytest.raises(InputError, match=sizes + ", .* one tokenizer: processing_class, and a tok"):
        made(model, processing_class=None)
    made(model, processing_class=tokenizer(tmp_path / "all", WORDS))
    more = tokenizer(tmp_path / "more", [*WORDS, "w64"])
    with pytest.raises(InputError, match="every token below both, found 64"):
        made(model, processing_class=more)
    tokenizer(tmp_path / "teacher", [*WORDS, "w64"])
    with pytest.raises(InputError, match="every token below both, found 64"):
        made(model)
    tokenizer(tmp_path / "teacher", WORDS[:60])
    beyond = [*examples, {"input_ids": [1, 66], "answer": [False, True]}]
    with pytest.raises(InputError, match="the token 66|every token below both, found 66"):
        made(model, beyond)
    (tmp_path / "teacher" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=sizes):
        made(model)
    cache = cached(tmp_path / "c", model, examples)
    with pytest.raises(InputError, match=sizes + ", .* was written with its tokenizer_hash"):
        made(cache)
    if student.config.vocab_size == 64:  # padding among the likeliest
        with torch.no_grad():
            model.lm_head.weight.zero_()
        hashes = {"tokenizer_hash": hash_of_tokenizer(own)}
        cache = cached(tmp_path / "k", model, examples, top_k=68, **hashes)
        with pytest.raises(InputError, match=r"expects the token \d+, expected ids below the stud"):
            made(cache)


def test_a_cache_of_other_examples_is_refused(tmp_path, models):
    student, model = models
    settings, examples = config(tmp_path), data()

    def made(cache, given=examples, **changes):
        changed = config(tmp_path, **changes) if changes else settings
        return DistillationTrainer(student, changed, given, teacher=cache)

    some = cached(tmp_path / "some", model, examples[:-1])
    with pytest.raises(InputError, match="no example 13 among its 13"):
        made(some)
    changed = [*examples[:-1], {**examples[-1], "input_ids": examples[-1]["input_ids"] ^ 1}]
    whole = cached(tmp_path / "whole", model, examples)
    with pytest.raises(InputError, match="example 13 was written from other tokens"):
        made(whole, changed)
    named = [{**one, "key": f"text {at}"} for at, one in enumerate(examples)]
    with pytest.raises(InputError, match="no example 'text 0' among its 14"):
        made(whole, named)
    keys = [one["key"] for one in reversed(named)]
    teacher = made(cached(tmp_path / "named", model, examples[::-1], keys), named).teacher
    with pytest.raises(InputError, match="the student's own text with a cached teacher"):
        teacher.rows(PackedBatches(examples, settings).collate(examples[:1]))
    # Of another data set with the same texts, or with others.
    again = PackedBatches([dict(one) for one in named], settings, once=True)
    assert torch.equal(teacher.of(again).rows(again[0]).weight, model.lm_head.weight)
    other = PackedBatches(data(seed=5), settings)
    assert teacher.of(other) is None
    with pytest.raises(InputError, match=r"example 'text \d+' was written from other tokens"):
        teacher.rows(other[0])
    assert teacher.of(again) is teacher.of(again) and not teacher.any_text

    batch = padded(examples)
    batch["token_weight"] = torch.zeros_like(batch["input_ids"])
    for row, one in enumerate(examples):
        batch["token_weight"][row, : len(one["answer"]) - 1] = torch.from_numpy(one["answer"][1:])
    hashes = {"tokenizer_hash": None, "model_hash": "files:a"}
    TeacherCache.write(tmp_path / "answers", model, [batch], **hashes)
    answers = TeacherCache(tmp_path / "answers", model_hash=None, tokenizer_hash=None)
    made(answers, sequence_weight=0.0)  # it asks for answers alone, as evaluation does
    assert CachedTeacher(answers).of(PackedBatches(examples, settings, once=True)) is not None
    with pytest.raises(InputError, match=r"has positions \([\d, ]*\), expected \d+ among"):
        made(answers)
    batch["token_weight"] = batch["attention_mask"].clone()
    batch["token_weight"][:, 1:] = 0  # the first place alone
    TeacherCache.write(tmp_path / "few", model, [batch], tokenizer_hash=None, model_hash="files:a")
    few = TeacherCache(tmp_path / "few", model_hash=None, tokenizer_hash=None)
    with pytest.raises(InputError, match=r"example \d+ has positions \(0\), expected \d+ among"):
        made(few)
    with pytest.raises(InputError, match=r"model is 'files:a', expected 'parameters:"):
        TeacherCache(tmp_path / "few", model_hash=hash_of_model(model), tokenizer_hash=None)


@pytest.mark.parametrize(
    "tail,changes,told",
    [
        ("renormalise", {"divergence": "reverse_kl"}, "'renormalise', expected 'bucket' for rever"),
        ("zero", {"divergence": "jsd"}, "'zero', expected 'renormalise' or 'bucket' for jsd"),
        ("bucket", {"temperature": 2.0}, "'bucket', expected 'renormalise' at temperature 2.0"),
        ("rest", {}, "tail is 'rest', expected renormalise or zero or bucket"),
    ],
)
def test_tails_that_the_loss_cannot_take_are_refused(tmp_path, models, tail, changes, told):
    student, model = models
    batches = PackedBatches(data(), config(tmp_path, **changes))
    cache = cached(tmp_path / "c", model, data(), top_k=K)
    for make in (
        lambda: CachedTeacher(cache, tail),
        lambda: ServerTeacher("http://127.0.0.1:9", top_k=K, tail=tail),
    ):
        with pytest.raises(InputError, match=told):
            make().check(student, batches, None)


# --- servers ------------------------------------------------------------------------------------

SHOWN = r"server http://127\.0\.0\.1:\d+"


@pytest.mark.parametrize(
    "style,fault,told",
    [
        ("vllm", "down", r"/v1/completions: status 500 .*out\\nof memory.* \(3 times\)$"),
        ("sglang", "400", r"/generate: status 400 Bad Request: .*max_logprobs is 20\"\}\}$"),
        ("vllm", "silent", r"/v1/completions: silent for 0.1 s \(3 times\)$"),
        ("vllm", "json", r"/v1/completions: answers .*choices.*, expected a JSON object$"),
        ("vllm", "list", r"/v1/completions: answers '\[1\]', expected a JSON object$"),
        *((style, "short", r": tells of 14 places of a prompt, expected 15$") for style in STYLES),
        *((style, "few", r": tells 5 tokens at a place, expected top_k = 6$") for style in STYLES),
        *((style, "other", r": read \d+ at place 15 of a prompt, expected \d+, as was sent$")
          for style in STYLES),
        *((style, "more", r": read 1 at place 16 of a prompt, expected its end, as was sent$")
          for style in STYLES),
        ("echo", "hot", r": tells probabilities that sum to \d.*, expected at most 1$"),
        ("sglang", "nan", r": tells probabilities that sum to nan, expected at most 1$"),
        *((style, "none", r"tells no log-probabilities of a prompt") for style in STYLES),
    ],
)  # fmt: skip
def test_what_a_server_does_wrong_is_told_before_training(tmp_path, models, style, fault, told):
    student, model = models
    examples = [{"input_ids": np.arange(3, 19)}]
    batches = PackedBatches(examples, config(tmp_path))
    with FakeTeacher(model, style, fault=fault) as server:
        teacher = ServerTeacher(server.url, top_k=K, timeout_s=0.1 if fault == "silent" else 10.0)
        with pytest.raises(InputError, match=SHOWN) as raised:
            teacher.check(student, batches, None)
    assert "\n" not in str(raised.value)
    assert re.search(told, str(raised.value)), raised.value


def test_wrong_addresses_models_and_contexts_are_refused(tmp_path, models):
    student, model = models
    batches = PackedBatches(data(), config(tmp_path))
    for url in ("127.0.0.1:80", "ftp://a", "http://:80", "http://a:b"):
        with pytest.raises(InputError, match=f"server is '{url}', expected http://HOST:PORT"):
            ServerTeacher(url)
    with pytest.raises(InputError, match="top_k is 65, expected at most the student's vocab"):
        ServerTeacher("http://127.0.0.1:9", top_k=65).check(student, batches, None)
    with pytest.raises(InputError, match="parallel is 0, retries 2 and timeout_s 120"):
        CompletionServer("http://127.0.0.1:9", parallel=0)
    with FakeTeacher(model, name="large") as server:
        with pytest.raises(InputError, match=f"{SHOWN}: serves large, expected model 'small'$"):
            ServerTeacher(server.url, "small", top_k=K).check(student, batches, None)
        longest = int(batches.lengths.max())
        server.context = longest
        with pytest.raises(InputError, match=rf"reads {longest} tokens at most, .* {longest} \+ 1"):
            ServerTeacher(server.url, top_k=K).check(student, batches, None)
        server.context = longest + 1
        ServerTeacher(f"{server.url}/v1/", "large", top_k=K).check(student, batches, None)
        small = small_models.llama(vocab_size=32)
        with pytest.raises(InputError, match=r"expects the token \d\d, expected ids below"):
            few = PackedBatches(data(vocabulary=32), config(tmp_path))
            ServerTeacher(server.url, top_k=K).check(small, few, None)
    with pytest.raises(InputError, match=rf"{SHOWN}/v1/models: connection refused \(3 times\)$"):
        CompletionServer(server.url).check()
    with FakeTeacher(model, key="secret") as server:
        with pytest.raises(InputError, match="status 401 Unauthorized") as raised:
            ServerTeacher(server.url, top_k=K, api_key="guess").check(student, batches, None)
        assert "guess" not in str(raised.value)
        ServerTeacher(server.url, top_k=K, api_key="secret").check(student, batches, None)


@pytest.mark.parametrize("fault", ["500", "429", "hang up"])
def test_a_request_that_fails_once_is_repeated(models, fault, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_S", 0.05)
    with FakeTeacher(models[1], fault=fault, healthy=2) as server:
        ask = CompletionServer(server.url, parallel=1)
        sequences = [[at, 2, 3] for at in range(4)]
        before = time.monotonic()
        found = ask.prompt_logprobs(sequences, 2)
        assert len(server.requests) == 5
        # A kept connection that was closed tells nothing of the server: asked again at once.
        assert fault == "hang up" or time.monotonic() - before >= 0.05
        server.requests.clear()
        wanted = CompletionServer(server.url).prompt_logprobs(sequences, 2)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(found, wanted, strict=True))


def test_requests_go_out_together_over_few_connections_and_keep_their_order(models):
    random = np.random.default_rng(0)
    sequences = [random.integers(0, VOCABULARY, int(random.integers(2, 9))) for _ in range(40)]
    with FakeTeacher(models[1], delay_s=0.005) as server:
        ask = CompletionServer(server.url, parallel=4)
        for _ in range(2):
            found = ask.prompt_logprobs(sequences, 3)
        assert 2 <= server.most_under_way <= 4 and server.connections <= 5
    for ids, one in zip(sequences, found, strict=True):
        with torch.no_grad():
            wanted = models[1](torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(-1).topk(3)
        assert torch.equal(one.indices, wanted.indices)
        assert (one.log_probs - wanted.values).abs().max() < 1e-5


def test_answers_are_remembered_within_bounds(tmp_path, models):
    student, model = models
    batches = PackedBatches(data(), config(tmp_path))
    with FakeTeacher(model) as server:
        for remembered, again in ((1.0, 0), (0.0, 1)):
            teacher = ServerTeacher(server.url, top_k=K, remember_mib=remembered)
            teacher.check(student, batches, None)
            first = teacher.rows(batches[0])
            before = len(server.requests)
            second = teacher.rows(batches[0])
            assert len(server.requests) - before == again * len(batches[0]["examples"])
            assert torch.equal(first.indices, second.indices)
        assert not teacher._known and teacher._room == 0


@pytest.mark.parametrize("style", STYLES)
def test_servers_write_what_the_model_writes(models, style):
    prompts = [[1, 2, 3], [4, 5], [6]]
    with FakeTeacher(models[1], style) as server:
        ask = CompletionServer(server.url)
        assert ask.complete([], new_tokens=[], seeds=[]) == []
        greedy = ask.complete(prompts, new_tokens=[4, 5, 6], temperature=0.0, seeds=[0, 0, 0])
        drawn = ask.complete(prompts, new_tokens=[12] * 3, seeds=[1, 2, 3], top_p=0.9)
        assert drawn == ask.complete(prompts, new_tokens=[12] * 3, seeds=[1, 2, 3], top_p=0.9)
        assert drawn != ask.complete(prompts, new_tokens=[12] * 3, seeds=[4, 5, 6], top_p=0.9)
        end = drawn[0][5]
        ended = ask.complete(
            prompts, new_tokens=[12] * 3, seeds=[1, 2, 3], top_p=0.9, stop=frozenset({end})
        )
        with pytest.raises(InputError, match="a prompt is empty"):
            ask.complete([[]], new_tokens=[1], seeds=[0])
    for prompt, text, size in zip(prompts, greedy, (4, 5, 6), strict=True):
        ids = list(prompt)
        for _ in range(size):
            with torch.no_grad():
                ids.append(int(models[1](torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids == prompt + text
    for text, whole in zip(ended, drawn, strict=True):
        assert text == (whole[: whole.index(end) + 1] if end in whole else whole)
    with FakeTeacher(models[1], style, fault="none") as server:
        with pytest.raises(InputError, match="answers without token ids: .*, expected token_ids"):
            CompletionServer(server.url).complete([[1]], new_tokens=[2], seeds=[0])
    with FakeTeacher(models[1], style, fault="choices") as server:
        with pytest.raises(InputError, match=r"answers \{'choices': \[\]\}, expected one choice"):
            CompletionServer(server.url).complete([[1]], new_tokens=[2], seeds=[0])


def test_a_server_of_another_tokenizer_writes_through_text(tmp_path, models):
    own = tokenizer(tmp_path / "own", WORDS)
    with FakeTeacher(models[1], "text") as server:
        server.tokenizer = tokenizer(tmp_path / "other", [*WORDS[40:], *WORDS[:40]])
        ask = CompletionServer(server.url, tokenizer=own)
        for seed, ends in ((0, False), (3, False), (5, True)):
            asked = {"new_tokens": [12], "seeds": [seed]}
            (whole,) = ask.complete([[1, 5, 9]], **asked)
            (text,) = ask.complete([[1, 5, 9]], **asked, stop=frozenset({2, 9}))
            request = server.requests[-1]
            assert request["prompt"] == "w05 w09"  # the other one puts its own beginning
            ids = server.tokenizer.encode(request["prompt"], add_special_tokens=False)
            with torch.no_grad():
                wanted, ended = server.sample(ids, request)
            words = server.tokenizer.convert_ids_to_tokens(wanted[: len(wanted) - ended])
            wanted = own.convert_tokens_to_ids(words)
            assert ended == ends and whole == wanted
            wanted += [2] * ended  # it ended, in the student's tokens
            assert text == (wanted[: wanted.index(2) + 1] if 2 in wanted else wanted)
        assert ask.complete([[1, 5, 9]], new_tokens=[2], seeds=[5]) == [text[:2]]
        with pytest.raises(InputError, match="expected tokenizer=None"):
            ask.prompt_logprobs([[1, 2]], 2)


# --- the teacher's text -------------------------------------------------------------------------


class Drawn:
    """A generator whose text is a function of prompt and seed."""

    def __init__(self, delay_s=0.0):
        self.delay_s, self.asked = delay_s, 0

    def generate(self, prompts, *, new_tokens, temperature, top_p, seeds, stop):
        texts = []
        for prompt, most, seed in zip(prompts, new_tokens, seeds, strict=True):
            random = np.random.default_rng([seed, *prompt])
            texts.append(random.integers(0, VOCABULARY, random.integers(1, most + 1)).tolist())
            self.asked += 1
            time.sleep(self.delay_s)
        return texts


def write(folder, source=None, examples=None, **changes):
    settings = {"teacher": "small", "new_tokens": 9, "seed": 3, "context": CONTEXT, "at_once": 4}
    return write_teacher_text(
        source or Drawn(), examples or data(40), folder / "t.jsonl", **(settings | changes)
    )


def test_text_comes_back_as_examples(tmp_path):
    examples = data(6)
    examples[2]["key"] = "third"
    examples[3] = list(range(5))  # a prompt
    examples[4] = {"input_ids": np.arange(7)}  # one too: nothing in it is marked
    found = read_teacher_text(write(tmp_path, examples=examples))
    assert [one["key"] for one in found] == [0, 1, "third", 3, 4, 5]
    for place, (given, one) in enumerate(zip(examples, found, strict=True)):
        shown = int((~one["answer"]).sum())
        ids = given if isinstance(given, list) else given["input_ids"]
        assert one["input_ids"][:shown].tolist() == list(ids)[:shown]
        assert one["answer"][shown:].all() and 1 <= len(one["input_ids"]) - shown <= 9
        if place in (3, 4):
            assert shown == len(ids)
        else:  # a first token is predicted by nothing: it is no answer
            assert shown == int(given["answer"][1:].argmax()) + 1
    assert found[0]["input_ids"].dtype == np.int64
    source = Drawn()
    write(tmp_path, source, examples)
    assert source.asked == 0  # it is whole


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    wanted = write(tmp_path / "undisturbed").read_bytes()
    folder, part = tmp_path / "killed", tmp_path / "killed" / "t.jsonl.part"
    sizes = []
    for texts in (5, 17):
        process = multiprocessing.get_context("fork").Process(
            target=write, args=(folder, Drawn(0.01))
        )
        process.start()
        while not part.exists() or part.read_bytes().count(b"\n") <= texts:
            assert process.is_alive()
            time.sleep(0.001)
        with pytest.raises(InputError, match="another process is writing it"):
            write(folder)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        sizes.append(part.read_bytes().count(b"\n") - 1)
        with pytest.raises(InputError, match=r"found an unfinished one, t\.jsonl\.part"):
            read_teacher_text(folder / "t.jsonl")
    torn = b'{"key":39,"prompt_tokens":1,"input_ids":[' + b"1," * 5000
    part.write_bytes(part.read_bytes() + torn)  # killed within a line
    with pytest.raises(InputError, match=r"its new_tokens is 9, expected 8"):
        write(folder, new_tokens=8)
    source = Drawn()
    assert write(folder, source).read_bytes() == wanted
    assert 0 < sizes[0] < sizes[1] and source.asked == 40 - sizes[1]
    assert not part.exists()


def test_files_and_prompts_that_are_wrong_are_refused(tmp_path):
    path = write(tmp_path)
    for changes, told in (
        ({"seed": 4}, "its seed is 3, expected 4"),
        ({"teacher": "large"}, "its teacher is 'small', expected 'large'"),
        ({"teacher": None}, "teacher is None and the source a Drawn, expected the name"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"stop": frozenset({2})}, r"its stop is \[\], expected \[2\]"),
        ({"examples": data(39)}, "its examples is 40, expected 39"),
        ({"examples": data(40, seed=1)}, "its prompts is "),
    ):
        with pytest.raises(InputError, match=told):
            write(tmp_path, **changes)
    with pytest.raises(InputError, match="the prompt of 0 is empty"):
        write(tmp_path / "b", examples=[[]])
    with pytest.raises(InputError, match=r"the prompt of 0 has 32 tokens, expected room .* 32"):
        write(tmp_path / "b", examples=[list(range(32))])
    lines = path.read_bytes().split(b"\n")
    for content, told in (
        (b"\n".join(lines[:-2]) + b"\n", "truncated: expected 40 texts, found 39"),
        (b"\n".join([*lines[:3], b"[]", *lines[4:]]), r"line 4: b'\[\]', expected key, prompt"),
        (b"\n".join(lines[1:]), "expected the settings of a file of teacher's text"),
        (b"", "begins with b'', expected the settings"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=told):
            read_teacher_text(path)
    with pytest.raises(InputError, match="wanted a file of teacher's text, found none"):
        read_teacher_text(tmp_path / "c")


def test_a_student_learns_a_servers_text(tmp_path, models):
    """Sequence-level distillation, from prompts to a trained student; the server fails half-way."""
    student, model = copy.deepcopy(models[0]), models[1]
    path, prompts = tmp_path / "t.jsonl", [[at, 5] for at in range(32)]
    settings = {"new_tokens": 8, "temperature": 0.3, "at_once": 8}
    with FakeTeacher(model, fault="down", healthy=20) as server:
        source = CompletionServer(server.url)
        with pytest.raises(InputError, match="status 500"):
            write_teacher_text(source, prompts, path, **settings)
        server.fault, before = None, len(server.requests)
        write_teacher_text(source, prompts, path, **settings)
        asked = [one["prompt"] for one in server.requests[before:]]
        # Two parts of eight were there.
        assert all(one in asked for one in prompts[16:])
        assert not any(one in asked for one in prompts[:16])
    examples = read_teacher_text(path)
    header = json.loads(path.read_text().splitlines()[0])
    assert header["teacher"] == f"teacher at {server.url}"
    assert {len(one["input_ids"]) for one in examples} == {10}
    trainer = DistillationTrainer(
        student, config(tmp_path, max_steps=20, learning_rate=2e-2), examples, examples
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
