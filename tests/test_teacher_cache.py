"""slmperf.distill.cache: what is written comes back bit for bit, whoever wrote it and whatever
killed them, and what does not belong together is refused.

Over 400 lines: the same examples and their writer serve all of these tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from safetensors import safe_open

from slmperf.check import InputError
from slmperf.distill.cache import (
    CachedHead,
    CachedTopK,
    TeacherCache,
    TeacherCacheWriter,
    hash_of_model,
    hash_of_tokenizer,
)
from slmperf.distill.heads import teacher_head
from slmperf.ops import StudentHead, TeacherHead, TeacherTopK, kd_loss_reference

HASHES = {"model_hash": "files:a", "tokenizer_hash": "b"}
SIZE, VOCABULARY, K = 16, 40, 5
BFLOAT = torch.bfloat16


def examples(count: int = 30, kind: str = "hidden", dtype: torch.dtype = BFLOAT, seed: int = 0):
    """(key, positions, teacher, token ids) of examples with 0 to 6 rows, some empty."""
    found, generator = [], torch.Generator().manual_seed(seed)
    for key in range(count):
        length = int(torch.randint(1, 12, (), generator=generator))
        rows = min(length, int(torch.randint(0, 7, (), generator=generator)))
        positions = torch.randperm(length, generator=generator)[:rows].sort().values
        if kind == "hidden":
            teacher = torch.randn(rows, SIZE, generator=generator).to(dtype)
        else:
            logits = torch.randn(rows, VOCABULARY, generator=generator)
            top = logits.log_softmax(-1).topk(K)
            teacher = TeacherTopK(top.indices, top.values.to(dtype))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        found.append((key, positions, teacher, ids))
    return found


def contents(kind: str = "hidden", dtype: torch.dtype = BFLOAT):
    if kind == "top_k":
        return CachedTopK(K, VOCABULARY, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, SIZE, generator=generator).to(dtype)
    return CachedHead(weight, torch.ones(VOCABULARY, dtype=dtype), softcap=30.0, scale=0.5)


def join(chosen):
    """Arguments of append and of rows."""
    keys, positions, teachers, tokens = map(list, zip(*chosen, strict=True))
    counts = [len(one) for one in positions]
    if isinstance(teachers[0], TeacherTopK):
        teacher = TeacherTopK(
            torch.cat([one.indices for one in teachers]),
            torch.cat([one.log_probs for one in teachers]),
        )
    else:
        teacher = torch.cat(teachers)
    return keys, counts, torch.cat(positions), teacher, tokens


def fill(folder, chosen, held=None, batch: int = 4, **changes):
    settings = {**HASHES, "shard_bytes": 600, **changes}
    with TeacherCacheWriter(folder, held or contents(), **settings) as writer:
        return sum(
            writer.append(*join(chosen[first : first + batch]))
            for first in range(0, len(chosen), batch)
        )


def check(cache: TeacherCache, chosen) -> None:
    """Every bit of the examples, in an order of its own."""
    order = np.random.default_rng(3).permutation(len(chosen))
    keys, counts, positions, teacher, tokens = join([chosen[place] for place in order])
    rows = cache.rows(keys, tokens=tokens)
    assert rows.counts.tolist() == counts
    assert torch.equal(rows.positions, positions)
    if isinstance(teacher, TeacherTopK):
        assert rows.indices.dtype == torch.int64
        assert torch.equal(rows.indices, teacher.indices)
        assert torch.equal(rows.log_probs, teacher.log_probs)
        assert rows.log_probs.dtype == teacher.log_probs.dtype
    else:
        assert rows.hidden.dtype == teacher.dtype
        assert torch.equal(rows.hidden, teacher)


# --- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, kind, dtype):
    chosen = examples(kind=kind, dtype=dtype)
    assert fill(tmp_path, chosen, contents(kind, dtype)) == len(chosen)
    cache = TeacherCache(tmp_path, vocabulary=VOCABULARY, **HASHES)
    assert (cache.kind, cache.dtype, len(cache)) == (kind, dtype, len(chosen))
    assert len(cache.manifest["shards"]) > 3
    assert 7 in cache and len(chosen) not in cache and "7" not in cache
    check(cache, chosen)
    cache.verify()
    if kind == "hidden":
        head, wanted = cache.head(), contents(kind, dtype)
        assert torch.equal(head.weight, wanted.weight) and torch.equal(head.bias, wanted.bias)
        assert (head.softcap, head.scale) == (30.0, 0.5)
    else:
        with pytest.raises(InputError, match="kind is 'top_k', expected 'hidden'"):
            cache.head()
        with safe_open(next(tmp_path.glob("part-*.safetensors")), "pt") as stored:
            assert stored.get_tensor("indices").dtype == torch.int32


def test_keys_may_be_strings_and_come_twice_in_a_batch(tmp_path):
    chosen = [(f"doc/{key}", *rest) for key, *rest in examples()]
    fill(tmp_path, [*chosen, *chosen[:3]])  # samplers repeat examples to fill their last round
    cache = TeacherCache(tmp_path, **HASHES)
    assert len(cache) == len(chosen)
    check(cache, [*chosen, *chosen])
    with pytest.raises(InputError, match=r"no example 'doc/99' among its 30"):
        cache.rows(["doc/1", "doc/99"])


def test_empty_examples_and_empty_caches(tmp_path):
    nothing = [(key, torch.empty(0, dtype=torch.int64), torch.empty(0, SIZE).to(BFLOAT), [1]) for
               key in range(3)]  # fmt: skip
    fill(tmp_path / "examples", nothing)
    rows = TeacherCache(tmp_path / "examples", **HASHES).rows([2, 0])
    assert rows.counts.tolist() == [0, 0] and rows.hidden.shape == (0, SIZE)
    fill(tmp_path / "cache", [])
    cache = TeacherCache(tmp_path / "cache", **HASHES)
    assert len(cache) == 0 and 0 not in cache
    assert cache.rows([]).hidden.shape == (0, SIZE)
    with pytest.raises(InputError, match="no example 0"):
        cache.rows([0])


def test_an_example_larger_than_a_shard_is_a_shard_of_its_own(tmp_path):
    large = (5, torch.arange(100), torch.randn(100, SIZE).to(BFLOAT), list(range(100)))
    chosen = [*examples(5), large, *[(key + 6, *rest) for key, *rest in examples(5, seed=1)]]
    fill(tmp_path, chosen, batch=11)
    check(TeacherCache(tmp_path, **HASHES), chosen)


def test_some_of_the_positions(tmp_path):
    """An epoch that samples its tokens reads the rows it drew, from any shard."""
    chosen = examples(200)
    fill(tmp_path, chosen)
    cache = TeacherCache(tmp_path, **HASHES)
    random = np.random.default_rng(0)
    drawn = []
    for place in random.permutation(len(chosen)):
        key, positions, hidden, ids = chosen[place]
        kept = torch.from_numpy(random.random(len(positions)) < 0.5)
        drawn.append((key, positions[kept], hidden[kept], ids))
    keys, counts, positions, hidden, tokens = join(drawn)
    rows = cache.rows(keys, counts=counts, positions=positions, tokens=tokens)
    assert torch.equal(rows.hidden, hidden) and torch.equal(rows.positions, positions)
    assert rows.counts.tolist() == counts


# --- what does not belong together --------------------------------------------------------------


def test_other_teachers_tokenizers_vocabularies_are_refused(tmp_path):
    fill(tmp_path, examples())
    for name, changes in {
        "model is 'files:a', expected 'files:c'": {"model_hash": "files:c"},
        "tokenizer is 'b', expected 'c'": {"tokenizer_hash": "c"},
        "vocabulary is 40, expected 41": {"vocabulary": 41},
    }.items():
        with pytest.raises(InputError, match=rf"manifest\.json: {name}"):
            TeacherCache(tmp_path, **{**HASHES, **changes})
    TeacherCache(tmp_path, model_hash=None, tokenizer_hash=None)
    with pytest.raises(InputError, match="its model is 'files:a', expected 'files:c'"):
        fill(tmp_path, examples(), model_hash="files:c")
    with pytest.raises(InputError, match="its kind is 'hidden', expected 'top_k'"):
        fill(tmp_path, examples(kind="top_k"), contents("top_k"))


def test_other_positions_and_tokens_are_refused(tmp_path):
    chosen = examples()
    fill(tmp_path, chosen)
    cache = TeacherCache(tmp_path, **HASHES)
    key, positions, _, ids = next(one for one in chosen if 2 <= len(one[1]) < len(one[3]))
    for absent in (min(set(range(12)) - set(positions.tolist())), -1, 2**32 + int(positions[0])):
        told = rf"example {key} has positions \(.*expected {absent} among"
        with pytest.raises(InputError, match=told):
            cache.rows([key, key], counts=[1, 1], positions=torch.tensor([absent, positions[0]]))
    with pytest.raises(InputError, match="counts is of 0 examples and positions"):
        cache.rows([key], positions=positions)
    with pytest.raises(InputError, match=f"example {key} was written from other tokens"):
        cache.rows([0, key], tokens=[chosen[0][3], [*ids, 1]])
    with pytest.raises(InputError, match=f"example {key} comes with other tokens"):
        fill(tmp_path, [(key, *chosen[key][1:3], [*ids, 1])])
    with pytest.raises(InputError, match="example 0 comes with other tokens"):  # within a batch
        fill(tmp_path / "new", [chosen[0], (0, *chosen[1][1:])])


@pytest.mark.parametrize(
    "name,change",
    {
        r"hidden is \(3, 15\), expected \(3, 16\)": {"teacher": torch.zeros(3, 15).to(BFLOAT)},
        "hidden is torch.float32, expected the head's torch.bf": {"teacher": torch.zeros(3, SIZE)},
        "hidden of example 8: expected finite": {
            "teacher": torch.tensor([0, 0, torch.nan])[:, None].expand(3, SIZE).to(BFLOAT)
        },
        "positions of example 7: expected ascending": {"positions": torch.tensor([3, 3, 1])},
        r"positions is \(2,\) torch.int64, expected \(3,\)": {"positions": torch.tensor([3, 1])},
        "counts is of 1 examples, expected one for each of 2": {"counts": [3]},
        "keys holds -1, expected integers >= 0": {"keys": [7, -1]},
        "keys are float, int, expected all int or all str": {"keys": [7, 1.5]},
        "teacher is TeacherTopK, expected what CachedHead": {"teacher": examples(1, "top_k")[0][2]},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_appended_is_checked(tmp_path, name, change):
    given = {
        "keys": [7, 8],
        "counts": [2, 1],
        "positions": torch.tensor([1, 3, 2]),
        "teacher": torch.zeros(3, SIZE).to(BFLOAT),
    }
    with pytest.raises(InputError, match=name):
        with TeacherCacheWriter(tmp_path, contents(), **HASHES) as writer:
            writer.append(**{**given, **change})
    assert not list(tmp_path.glob("*.safetensors.*"))
    assert not (tmp_path / "manifest.json").exists()


def test_top_k_entries_are_checked(tmp_path):
    indices = torch.arange(K)[None]
    probabilities = torch.full((1, K), -2.0)
    with TeacherCacheWriter(tmp_path, contents("top_k"), **HASHES) as writer:
        for given, name in (
            (TeacherTopK(indices + 36, probabilities), "expected token ids from 0 to 39"),
            (TeacherTopK(indices, probabilities.neg()), "expected log-probabilities"),
        ):
            with pytest.raises(InputError, match=name):
                writer.append([0], [1], torch.tensor([0]), given)
        short = probabilities.clone()
        short[0, 3:] = -torch.inf  # a row of fewer tokens
        writer.append([0], [1], torch.tensor([0]), TeacherTopK(indices, short))
    cache = TeacherCache(tmp_path, **HASHES)
    teacher = cache.teacher(cache.rows([0]), tail="bucket")
    assert teacher.tail == "bucket" and torch.equal(teacher.log_probs, short.to(BFLOAT))


# --- damage, kills, several writers -------------------------------------------------------------


def test_truncated_corrupt_and_missing_shards_are_named(tmp_path):
    chosen = examples()
    fill(tmp_path, chosen)
    cache = TeacherCache(tmp_path, **HASHES, open_shards=1)
    victim = sorted(tmp_path.glob("part-*.safetensors"))[2]
    whole = victim.read_bytes()

    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{victim.name}: corrupt: expected SHA-256 .* found"):
        cache.verify()
    victim.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(InputError, match=rf"{victim.name}: not a whole safetensors file"):
        cache.rows(range(len(chosen)))
    victim.write_bytes(whole[:-10])
    size = len(whole)
    told = rf"{victim.name}: truncated: expected {size} bytes, found {size - 10}"
    for read in (
        lambda: cache.rows(range(len(chosen))),
        lambda: TeacherCache(tmp_path, **HASHES),
        lambda: fill(tmp_path, chosen),
    ):
        with pytest.raises(InputError, match=told):
            read()
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name}: wanted a safetensors file, found none"):
        TeacherCache(tmp_path, **HASHES)
    assert 0 < fill(tmp_path, chosen) < len(chosen)  # what it held is written again
    check(TeacherCache(tmp_path, **HASHES), chosen)


def write_slowly(folder: Path) -> None:
    with TeacherCacheWriter(folder, contents(), **HASHES, shard_bytes=600) as writer:
        for one in examples(400):
            writer.append(*join([one]))
            time.sleep(0.001)


def test_a_killed_writer_resumes(tmp_path):
    """kill -9 at five moments, each time in the middle of writing; then to the end."""
    chosen, stops = examples(400), np.random.default_rng(time.time_ns()).uniform(0.0, 0.3, 5)
    stops[-1] = 0.3  # long enough for some shards, too short for all examples
    lock, done = tmp_path / ".part-00000-of-00001.lock", []
    for stop in stops:
        process = multiprocessing.get_context("fork").Process(target=write_slowly, args=(tmp_path,))
        process.start()
        while not lock.is_file() or f"process {process.pid} on" not in lock.read_text():
            time.sleep(0.001)
        time.sleep(stop)
        told = f"part 0 of 1 is being written by process {process.pid} on "
        with pytest.raises(InputError, match=told):
            fill(tmp_path, chosen)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(InputError, match="wanted a finished cache's manifest, found none"):
            TeacherCache(tmp_path, **HASHES)
        done.append(len(list(tmp_path.glob("part-*.safetensors"))))
    assert done == sorted(done) and 0 < done[-1], stops
    assert 0 < fill(tmp_path, chosen) < len(chosen)
    assert not list(tmp_path.glob(".*.new-*"))
    cache = TeacherCache(tmp_path, **HASHES)
    check(cache, chosen)
    cache.verify()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert fill(tmp_path, chosen) == 0  # finishing twice changes nothing
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_shard_that_was_renamed_but_not_entered_is_found(tmp_path):
    chosen = examples()
    fill(tmp_path, chosen)
    state = tmp_path / "part-00000-of-00001.json"
    content = json.loads(state.read_text())
    content["shards"].pop()
    state.write_text(json.dumps(content))
    assert fill(tmp_path, chosen) == 0
    check(TeacherCache(tmp_path, **HASHES), chosen)


def test_an_exception_keeps_what_was_appended(tmp_path):
    chosen = examples()
    with pytest.raises(RuntimeError, match="teacher"):
        with TeacherCacheWriter(tmp_path, contents(), **HASHES) as writer:
            writer.append(*join(chosen[:9]))
            raise RuntimeError("the teacher failed")
    assert fill(tmp_path, chosen) == len(chosen) - 9
    check(TeacherCache(tmp_path, **HASHES), chosen)


def test_an_old_shard_is_finished_on_the_next_append(tmp_path):
    with TeacherCacheWriter(tmp_path, contents(), **HASHES, shard_seconds=0.0) as writer:
        for one in examples(3):
            writer.append(*join([one]))
        assert len(list(tmp_path.glob("part-*.safetensors"))) == 3


def test_parts_make_the_cache_of_one_writer(tmp_path):
    chosen = examples(60)
    fill(tmp_path / "one", chosen)
    for index in (2, 0, 1):
        assert not (tmp_path / "three" / "manifest.json").exists()
        own = chosen[index::3] + chosen[:2]  # padded, as samplers do
        fill(tmp_path / "three", own, part=(index, 3))
    one, three = (TeacherCache(tmp_path / name, **HASHES) for name in ("one", "three"))
    assert len(one) == len(three) == len(chosen)
    check(one, chosen)
    check(three, chosen)
    assert three.manifest["tokens"] == one.manifest["tokens"]
    with pytest.raises(InputError, match=r"part is \(3, 3\), expected"):
        fill(tmp_path / "three", chosen, part=(3, 3))


def test_a_run_goes_on_with_another_number_of_parts(tmp_path):
    chosen = examples(60)
    with pytest.raises(KeyboardInterrupt):
        with TeacherCacheWriter(tmp_path, contents(), **HASHES, part=(1, 4)) as writer:
            writer.append(*join(chosen[1::4]))
            raise KeyboardInterrupt
    assert fill(tmp_path, chosen[::2], part=(0, 2)) == 30
    assert fill(tmp_path, chosen[1::2], part=(1, 2)) == 15  # the others were there
    check(TeacherCache(tmp_path, **HASHES), chosen)
    # And with more examples, later.
    more = [(key + 60, *rest) for key, *rest in examples(10, seed=5)]
    old = TeacherCache(tmp_path, **HASHES)
    assert fill(tmp_path, [*chosen, *more]) == 10
    check(old, chosen)
    check(TeacherCache(tmp_path, **HASHES), [*chosen, *more])


# --- processes and threads ----------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    """What a training's own data set does: the cache is an attribute of it."""

    def __init__(self, cache, batches):
        self.cache, self.batches = cache, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return os.getpid(), self.cache.rows(self.batches[index])


def test_data_loader_workers(tmp_path):
    chosen = examples()
    fill(tmp_path, chosen)
    cache = TeacherCache(tmp_path, **HASHES, open_shards=2)
    check(cache, chosen)  # open in this process too
    cache._lock.acquire()  # as if another thread were reading at the very moment of the fork
    try:
        loader = torch.utils.data.DataLoader(
            Batches(cache, [[0, 9, 4], [1, 2], [29, 3], [20, 21, 22, 23]]),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
        )
        found = list(loader)
    finally:
        cache._lock.release()
    assert len({process for process, _ in found} - {os.getpid()}) == 2
    for (_, rows), keys in zip(found, loader.dataset.batches, strict=True):
        assert torch.equal(rows.hidden, torch.cat([chosen[key][2] for key in keys]))
    assert type(cache.teacher(found[0][1])) is TeacherHead


def test_threads_share_a_cache(tmp_path):
    chosen = examples()
    fill(tmp_path, chosen)
    cache = pickle.loads(pickle.dumps(TeacherCache(tmp_path, **HASHES, open_shards=2)))
    failed = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            keys = random.integers(0, len(chosen), 5).tolist()
            wanted = torch.cat([chosen[key][2] for key in keys])
            if not torch.equal(cache.rows(keys).hidden, wanted):
                failed.append(keys)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(cache._shards) <= 2


# --- from a model -------------------------------------------------------------------------------


def model_batches(ids, padded_left: bool = False):
    """Two rows a batch, the second one shorter, every third token counting."""
    for first in range(0, len(ids), 2):
        part = ids[first : first + 2].clone()
        mask = torch.ones_like(part)
        mask[1, slice(0, 4) if padded_left else slice(-4, None)] = 0
        weight = (torch.arange(part.shape[1]) % 3 == 1).float().expand(part.shape) * mask
        yield {
            "input_ids": part,
            "attention_mask": mask,
            "token_weight": weight,
            "keys": [first, first + 1],
        }


IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_from_the_cache_is_that_of_the_live_teacher(tmp_path, dtype):
    teacher = small_models.llama().to(dtype).train()
    written = TeacherCache.write(
        tmp_path / "hidden", teacher, model_batches(IDS), tokenizer_hash="b", shard_bytes=700
    )
    assert written == (6, 0, True) and teacher.training
    teacher.eval()
    TeacherCache.write(tmp_path / "all", teacher, model_batches(IDS), tokenizer_hash=None, top_k=64)
    wanted = {"model_hash": hash_of_model(teacher), "vocabulary": 64}
    hidden = TeacherCache(tmp_path / "hidden", tokenizer_hash="b", **wanted)
    every = TeacherCache(tmp_path / "all", tokenizer_hash=None, **wanted)

    def loss(one):
        generator = torch.Generator().manual_seed(4)
        rows = len(one.indices if isinstance(one, TeacherTopK) else one.hidden)
        student = StudentHead(
            torch.randn(rows, 8, generator=generator).requires_grad_(),
            torch.randn(64, 8, generator=generator),
        )
        result = kd_loss_reference(student, one).loss
        result.backward()
        return result, student.hidden.grad

    for batch in model_batches(IDS):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        (chosen,) = batch["token_weight"].flatten().nonzero(as_tuple=True)
        counts = (batch["token_weight"] != 0).sum(dim=1)
        live = teacher_head(teacher, inputs, positions=chosen)
        asked = {
            "counts": counts,
            "positions": chosen % 12,
            "tokens": [row[keep > 0] for row, keep in zip(*inputs.values(), strict=True)],
        }
        cached = hidden.teacher(hidden.rows(batch["keys"], **asked), device="cpu")
        assert torch.equal(cached.hidden, live.hidden)

        for one, other in zip(loss(live), loss(cached), strict=True):
            assert torch.equal(one, other)
        top = every.teacher(every.rows(batch["keys"], **asked))
        for one, other in zip(loss(live), loss(top), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_resumed_write_skips_the_model(tmp_path):
    teacher, calls = small_models.llama(), []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    settings = {"tokenizer_hash": "b", "shard_seconds": 0.0}

    def broken():
        yield from list(model_batches(IDS))[:2]
        raise OSError("the node went away")

    with pytest.raises(OSError, match="the node"):
        TeacherCache.write(tmp_path, teacher, broken(), **settings)
    calls.clear()
    assert TeacherCache.write(tmp_path, teacher, model_batches(IDS), **settings) == (2, 4, True)
    assert len(calls) == 2  # the last batch, and one token that tells the head
    other = small_models.llama(rms_norm_eps=1e-3)
    with pytest.raises(InputError, match="its model is 'parameters:"):
        TeacherCache.write(tmp_path, other, model_batches(IDS), **settings)
    with pytest.raises(InputError, match="example 0 comes with other tokens"):
        TeacherCache.write(tmp_path, teacher, model_batches(IDS + 1), **settings)


def test_padding_packing_and_labels_give_the_same_rows(tmp_path):
    """The same two examples of 12 and 8 tokens: padded right, padded left, packed, by labels."""
    teacher = small_models.llama().eval()
    first, second = IDS[0], IDS[1, :8]
    counting = torch.zeros(20)
    counting[[1, 4, 11, 13, 19]] = 1.0  # 11 and 19: the last tokens of the two

    def padded(left: bool):
        ids, mask, weight = torch.zeros(2, 12).long(), torch.ones(2, 12), torch.zeros(2, 12)
        place = slice(4, 12) if left else slice(0, 8)
        mask[1] = 0
        mask[1, place] = 1
        ids[0], ids[1, place] = first, second
        weight[0], weight[1, place] = counting[:12], counting[12:]
        return {"input_ids": ids, "attention_mask": mask.long(), "token_weight": weight}

    owner = torch.tensor([0] * 12 + [1] * 8)
    own = owner[:, None] == owner[None]
    packed = {
        "input_ids": torch.cat([first, second])[None],
        "position_ids": torch.cat([torch.arange(12), torch.arange(8)])[None],
        "attention_mask": own.tril()[None, None],
        "token_weight": counting[None],
        "example_of": owner[None],
        "keys": [0, 1],
    }
    left = padded(True)
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    labelled = padded(False)
    weight = labelled.pop("token_weight")
    labelled["labels"] = torch.full((2, 12), -100)
    labelled["labels"][:, 1:][weight[:, :-1] != 0] = 3
    rows = []
    for name, batch in (("right", padded(False)), ("left", left), ("packed", packed)):
        TeacherCache.write(tmp_path / name, teacher, [batch], tokenizer_hash=None)
        cache = TeacherCache(tmp_path / name, model_hash=None, tokenizer_hash=None)
        rows.append(cache.rows([0, 1], tokens=[first, second]))
        assert rows[-1].counts.tolist() == [3, 2]
        assert rows[-1].positions.tolist() == [1, 4, 11, 1, 7]
        torch.testing.assert_close(rows[-1].hidden, rows[0].hidden, rtol=1e-4, atol=1e-5)
    TeacherCache.write(tmp_path / "labels", teacher, [labelled], tokenizer_hash=None)
    cache = TeacherCache(tmp_path / "labels", model_hash=None, tokenizer_hash=None)
    # Nothing of an example follows its last token, so that no label can ask for it.
    assert cache.rows([0, 1]).positions.tolist() == [1, 4, 1]


def test_top_k_of_a_model_with_bias_and_softcap_in_chunks(tmp_path, monkeypatch):
    from slmperf.distill.cache import fill as filling

    monkeypatch.setattr(filling, "_LOGITS_BYTES", 3 * 4 * VOCABULARY)
    hidden = torch.randn(10, SIZE, generator=torch.Generator().manual_seed(0)).to(BFLOAT)
    head = contents().of(hidden)
    found = filling.top_k_of(head, K)
    logits = (hidden.double() @ head.weight.double().T + head.bias.double()) * head.scale
    logits = head.softcap * torch.tanh(logits / head.softcap)
    wanted = logits.log_softmax(-1).topk(K)
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.log_probs.double(), wanted.values, rtol=1e-5, atol=1e-5)


def test_workers_must_name_their_examples(tmp_path):
    batch = {"input_ids": IDS[:2]}
    with pytest.raises(InputError, match=r"a batch has no keys, expected them in part \(0, 2\)"):
        TeacherCache.write(
            tmp_path, small_models.llama(), [batch], tokenizer_hash=None, part=(0, 2)
        )
    with pytest.raises(InputError, match="a batch has 1 keys, expected one for each of 2 rows"):
        TeacherCache.write(
            tmp_path, small_models.llama(), [{**batch, "keys": [1]}], tokenizer_hash=None
        )


# --- hashes -------------------------------------------------------------------------------------


def test_hashes_of_models_and_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = small_models.llama()
    assert hash_of_model(model) == hash_of_model(small_models.llama())
    changed = small_models.llama()
    changed.lm_head.weight.data[3, 4] += 1e-3
    assert hash_of_model(changed) != hash_of_model(model)
    assert hash_of_model(small_models.llama(rope_theta=5.0)) != hash_of_model(model)
    assert hash_of_model(small_models.llama().bfloat16()) != hash_of_model(model)
    for name, one in (("a", model), ("b", model), ("c", changed)):
        one.save_pretrained(tmp_path / name)
    files = [hash_of_model(tmp_path / name) for name in "abc"]
    assert files[0] == files[1] != files[2] and files[0].startswith("files:")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert hash_of_model(loaded) == hash_of_model(model)
    with pytest.raises(InputError, match="wanted config.json and"):
        hash_of_model(tmp_path)

    def tokenizer(words):
        vocabulary = {word: index for index, word in enumerate(words)}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a", pad_token="b")

    one = tokenizer("abc")
    wanted = hash_of_tokenizer(one)
    one(["a", "c"], padding="max_length", truncation=True, max_length=7)
    one.save_pretrained(tmp_path / "tokenizer")
    assert hash_of_tokenizer(one) == hash_of_tokenizer(tmp_path / "tokenizer") == wanted
    assert hash_of_tokenizer(tokenizer("acb")) != wanted
