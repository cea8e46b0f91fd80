"""slmperf.data.world: the same for the same numbers, readable, and a world where taste decides."""

from __future__ import annotations

import time

import numpy as np
import pytest

from slmperf.check import InputError
from slmperf.data import PromptBuilder, split, tasks_for, train_tokenizer, training_texts, world
from slmperf.evaluate import auc, floors

SIZE = {"members": 1200, "items": 1000, "rows": 36_000}


@pytest.fixture(scope="module")
def small():
    return world(**SIZE, seed=0)


def test_same_numbers_make_the_same_world(small):
    again, other = world(**SIZE, seed=0), world(**SIZE, seed=1)
    for name in ("member", "item", "rating", "time"):
        assert np.array_equal(getattr(small, name), getattr(again, name)), name
    assert small.item_texts == again.item_texts and small.item_texts != other.item_texts
    assert not np.array_equal(small.rating, other.rating)


def test_numbers_are_as_asked(small):
    assert len(small) == SIZE["rows"] and small.scale == 10 and small.synthetic
    assert len(small.member_names) == SIZE["members"]
    assert len(set(small.item_texts)) == SIZE["items"]
    assert np.bincount(small.member).min() >= 10
    pairs = small.member.astype(np.int64) * SIZE["items"] + small.item
    assert len(np.unique(pairs)) == len(pairs)  # nobody rates an item twice
    assert set(np.unique(small.rating)) == set(range(1, 11))
    like, top = tasks_for(small)
    assert like.labels(small).mean() == pytest.approx(0.45, abs=0.01)
    assert top.labels(small).mean() == pytest.approx(0.15, abs=0.01)


def test_it_is_quick():
    start = time.process_time()
    world(members=8000, items=4000, rows=240_000)
    assert time.process_time() - start < 4.0  # about one second on an idle core


def test_texts_are_readable_and_short(small):
    title, rest = small.item_texts[0].split(" by ")
    maker, mood, genre = rest.split(" | ")
    assert all(word.isalpha() for word in (title, maker, mood, genre))
    tasks, parts = tasks_for(small), split(small)
    tokenizer = train_tokenizer(training_texts(small, parts, tasks), 1536)
    for text in small.item_texts[:50]:
        assert len(tokenizer.tokenize(text)) <= 6, text  # four words, some in two pieces
    builder = PromptBuilder(tokenizer, tasks, 256, facts=False)
    sequences = builder.sequences(small, parts, tasks[0])
    tokens = sum(len(one.input_ids) for one in sequences)
    assert tokens < 7 * sum(int(one.answer.sum()) for one in sequences)


def test_taste_decides_and_means_do_not(small):
    """What a member said of the genre before beats all that is known from means."""
    parts, task = split(small), tasks_for(small)[0]
    labels = task.labels(small)
    asked = parts.candidate
    known = {
        name: auc(scores, labels[asked]) for name, scores in floors(small, parts, task).items()
    }
    genres = np.unique([text.split(" | ")[-1] for text in small.item_texts], return_inverse=True)[1]
    cell = small.member.astype(np.int64) * (genres.max() + 1) + genres[small.item]

    def mean_of(group: np.ndarray, prior: np.ndarray, strength: float) -> np.ndarray:
        rows = parts.history
        size = group.max() + 1
        count = np.bincount(group[rows], minlength=size)
        liked = np.bincount(group[rows], labels[rows], minlength=size)
        return (liked[group] + strength * prior) / (count[group] + strength)

    member = mean_of(small.member, np.full(len(small), labels.mean()), 3.0)
    taste = auc(mean_of(cell, member, 1.0)[asked], labels[asked])
    assert known["item mean"] < 0.65
    assert taste > known["member mean"] + 0.01
    # The genre is one word of four, and its theme has two: a reader of the whole text knows more.
    print(f"\n  genre means {taste:.3f}, " + ", ".join(f"{k} {v:.3f}" for k, v in known.items()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 0}, "world: members 0, items 1000, expected at least 1 of each"),
        ({"rows": 100}, "world: rows is 100, expected at least one per member, 1200"),
        ({"items": 40}, "expected at most half of the 40 items"),
        ({"items": 1_000_000}, "world: items is 1000000, expected at most"),
    ],
)
def test_impossible_numbers_are_one_line(changes, message):
    with pytest.raises(InputError) as raised:
        world(**{**SIZE, **changes})
    assert message in str(raised.value) and "\n" not in str(raised.value)
