"""Facts, prompts, tokenizer: what a prompt says, that it fits, that nothing leaks into it.

Over 400 lines: the proofs that no later row shows belong beside the layout that they hold for.
"""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import build, some

from slmperf.check import InputError
from slmperf.data import (
    Interactions,
    Prompt,
    PromptBuilder,
    Split,
    prompt_texts,
    split,
    tasks_for,
    train_tokenizer,
    training_texts,
)
from slmperf.data.facts import COLUMNS, FACT_WORDS, SHARES, SURPLUSES, facts
from slmperf.data.sequences import windows
from slmperf.data.template import CONTROL_WORDS, WORDS, clean, item_text
from slmperf.data.tokenizer import SMALLEST_VOCABULARY


@pytest.fixture(scope="module")
def small():
    return some()


@pytest.fixture(scope="module")
def tokenizer(small):
    return train_tokenizer(training_texts(small, split(small), tasks_for(small)), 600)


# ------------------------------------------------------------------------------------------ facts


def nearest(steps, value):
    return sum(value >= (a + b) / 2 for a, b in itertools.pairwise(steps))


def facts_by_hand(data, parts, task):
    """The formula of slmperf.data.facts, row by row."""
    labels, rating = task.labels(data), data.rating.astype(float) * 10 / data.scale
    sides = ((data.item, 5), (data.member, 3))

    def earlier(row, group=None):
        return [
            r
            for r in range(len(data))
            if parts.history[r]
            and data.time[r] < data.time[row]
            and (group is None or group[r] == group[row])
        ]

    def mean(row, side):
        group, strength = sides[side]
        known, mine = earlier(row), earlier(row, group)
        middle = (sum(rating[r] for r in known) + 5) / (len(known) + 1)
        return (sum(rating[r] for r in mine) + strength * middle) / (len(mine) + strength)

    words = np.empty((len(data), 4), int)
    for row in range(len(data)):
        known = earlier(row)
        prior = (sum(labels[r] for r in known) + 1) / (len(known) + 2)
        for side, (group, strength) in enumerate(sides):
            mine = earlier(row, group)
            surplus = sum(round((rating[r] - mean(r, 1 - side)) * 2**20) for r in mine) / 2**20
            share = (sum(labels[r] for r in mine) + strength * prior) / (len(mine) + strength)
            words[row, 2 * side] = nearest(SURPLUSES, surplus / (len(mine) + strength))
            words[row, 2 * side + 1] = nearest(SHARES, 100 * share)
    return words + np.cumsum([0, *map(len, COLUMNS[:-1])])


@st.composite
def data_and_row(draw):
    """Small data with many equal times, a split drawn at random, and one of its rows."""
    count = draw(st.integers(1, 24))
    row = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 10), st.integers(0, 8))
    data = build(draw(st.lists(row, min_size=count, max_size=count)), members=4, items=5)
    kind = np.array(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    return data, Split(history=kind >= 2, candidate=kind == 1), draw(st.integers(0, count - 1))


@settings(max_examples=60, deadline=None)
@given(data_and_row())
def test_facts_equal_the_formula(case):
    data, parts, _ = case
    for task in tasks_for(data):
        assert np.array_equal(facts(data, parts, task), facts_by_hand(data, parts, task))


def test_facts_words_say_what_is_true():
    rows = [(m, 0, 10 if m < 7 else 1, m) for m in range(8)] + [(0, 1, 10, 100), (0, 0, 3, 100)]
    data = build(rows)
    parts = Split(history=np.arange(10) < 8, candidate=np.arange(10) >= 8)
    words = [[FACT_WORDS[w] for w in row] for row in facts(data, parts, tasks_for(data)[0])]
    # Nothing is known: half and half.
    assert words[0] == [" [item +0.0]", " [item 50%]", " [member +0.0]", " [member 50%]"]
    # Item 0: (7 + 5 * 0.8) / (8 + 5) = 85%; the member: (1 + 3 * 0.8) / (1 + 3) = 85%.
    assert words[9][1::2] == [" [item 85%]", " [member 85%]"]
    # Its raters had no earlier rows, so their mean is everybody's, 5 at first and 9.4 at last:
    # (5 + 2.5 + 1.67 + 1.25 + 1 + 0.83 + 0.71 - 8.38) / (8 + 5) = 0.35.
    assert words[9][0] == " [item +0.4]"
    assert words[8][:2] == [" [item +0.0]", " [item 80%]"]  # unrated: everybody's share


@settings(max_examples=60, deadline=None)
@given(data_and_row(), st.data())
def test_facts_do_not_see_rows_that_are_not_strictly_earlier(case, draw):
    data, parts, row = case
    later = data.time >= data.time[row]
    changed = data.rating.copy()
    hidden = np.flatnonzero(later | ~parts.history)
    changed[hidden] = draw.draw(
        st.lists(st.integers(1, 10), min_size=len(hidden), max_size=len(hidden))
    )
    gone = np.zeros(len(data), bool)
    gone[hidden] = draw.draw(st.lists(st.booleans(), min_size=len(hidden), max_size=len(hidden)))
    gone[row] = False
    kept = ~gone
    other = Interactions(
        data.member[kept],
        data.item[kept],
        changed[kept],
        data.time[kept],
        data.scale,
        data.member_names,
        data.item_texts,
    )
    other_parts = Split(history=parts.history[kept], candidate=parts.candidate[kept])
    for task in tasks_for(data):
        before = facts(data, parts, task)[row]
        after = facts(other, other_parts, task)[np.cumsum(kept)[row] - 1]
        assert np.array_equal(before, after)


# --------------------------------------------------------------------------------------- prompts


def everything(builder, data, parts):
    """Every training sequence and prompt of all tasks."""
    return (
        [s for task in builder.tasks for s in builder.sequences(data, parts, task)],
        [p for task in builder.tasks for p in builder.prompts(data, parts, task)],
    )


@settings(max_examples=25, deadline=None)
@given(draw=st.data())
def test_no_candidates_rating_reaches_any_token(draw, small, tokenizer):
    parts = split(small)
    builder = PromptBuilder(tokenizer, tasks_for(small), 512)
    changed = small.rating.copy()
    count = int(parts.candidate.sum())
    changed[parts.candidate] = draw.draw(
        st.lists(st.integers(1, 10), min_size=count, max_size=count)
    )
    first, second = (
        everything(builder, data, parts) for data in (small, replace(small, rating=changed))
    )
    for one, two in zip(first[0], second[0], strict=True):
        assert np.array_equal(one.input_ids, two.input_ids)
    for one, two in zip(first[1], second[1], strict=True):
        assert np.array_equal(one.prefix, two.prefix)
        for left, right in zip(one.candidates, two.candidates, strict=True):
            assert np.array_equal(left, right)
        task = next(task for task in builder.tasks if task.name == two.task)
        assert two.labels.tolist() == (changed[two.rows] >= task.threshold).astype(int).tolist()


@settings(max_examples=25, deadline=None)
@given(draw=st.data())
def test_nothing_later_reaches_a_rows_question(draw, small, tokenizer):
    """Whatever is rated at or after a row's time, the tokens up to its answer stay as they are."""
    parts = split(small)
    builder = PromptBuilder(tokenizer, tasks_for(small), 128)
    row = draw.draw(st.integers(0, len(small) - 1))
    changed = small.rating.copy()
    later = small.time >= small.time[row]
    count = int(later.sum())
    changed[later] = draw.draw(st.lists(st.integers(1, 10), min_size=count, max_size=count))
    questions = []
    for data in (small, replace(small, rating=changed)):
        member = [small.member[row]]
        seen = []
        for task in builder.tasks:
            for sequence in builder.sequences(data, parts, task, member):
                if row in sequence.rows[sequence.row[sequence.answer]]:
                    place = sequence.rows.tolist().index(row)
                    seen.append(sequence.input_ids[: np.flatnonzero(sequence.row == place)[-1]])
            for prompt in builder.prompts(data, parts, task, member):
                if row in prompt.rows:
                    seen.append(prompt.prefix)
                    seen.append(prompt.candidates[prompt.rows.tolist().index(row)])
        questions.append([ids.tolist() for ids in seen])
    assert questions[0] == questions[1] and len(questions[0]) >= 2


def test_a_prompt_as_a_reader_sees_it():
    rows = [(0, i, rating, i) for i, rating in enumerate([10, 3, 8, 9, 2, 7, 9, 1, 8, 5])]
    data = build(rows)
    parts = split(data, history=0.3)
    tasks = tasks_for(data)
    tokenizer = train_tokenizer(training_texts(data, parts, tasks), 600)
    [prompt] = PromptBuilder(tokenizer, tasks, 256).prompts(data, parts, tasks[0])
    assert tokenizer.decode([*prompt.prefix, *prompt.candidates[1]]) == (
        "<s>Will the member rate this at least 8 of 10?\n"
        "Member m0\n"
        "Film 0 (1900) | Drama [item +0.0] [item 50%] [member +0.0] [member 50%] -> Yes\n"
        "Film 1 (1901) | Drama [item +0.0] [item 66%] [member +1.4] [member 75%] -> No\n"
        "Film 2 (1902) | Drama [item +0.0] [item 50%] [member +0.1] [member 50%] -> Yes\n"
        "Film 4 (1904) | Drama [item +0.0] [item 62%] [member +0.4] [member 62%] ->"
    )
    assert prompt.labels.tolist() == [1, 0, 0, 1, 0, 1, 0]
    [plain] = PromptBuilder(tokenizer, tasks, 256, facts=False).prompts(data, parts, tasks[1])
    assert tokenizer.decode([*plain.prefix, *plain.candidates[0]]) == (
        "<s>Will the member rate this 10 of 10?\nMember m0\n"
        "Film 0 (1900) | Drama -> Yes\nFilm 1 (1901) | Drama -> No\n"
        "Film 2 (1902) | Drama -> No\nFilm 3 (1903) | Drama ->"
    )


def test_candidates_share_one_token_prefix(small, tokenizer):
    """The text of prefix + candidate, tokenised as a whole, begins with the shared prefix's ids."""
    parts = split(small)
    builder = PromptBuilder(tokenizer, tasks_for(small), 400)
    _, prompts = everything(builder, small, parts)
    assert len(prompts) == 2 * len(small.member_names)
    rows = np.concatenate([prompt.rows for prompt in prompts])
    assert sorted(rows) == sorted(np.flatnonzero(parts.candidate).tolist() * 2)
    for prompt in prompts:
        assert len(prompt.candidates) == len(prompt.labels) == len(prompt.rows) > 1
        assert np.array_equal(small.member[prompt.rows], [prompt.member] * len(prompt.rows))
        for candidate, label, row in zip(
            prompt.candidates, prompt.labels, prompt.rows, strict=True
        ):
            ids = np.concatenate([prompt.prefix, candidate])
            again = tokenizer(tokenizer.decode(ids))["input_ids"]
            assert again == ids.tolist() and again[: len(prompt.prefix)] == prompt.prefix.tolist()
            assert len(ids) <= builder.context
            task = next(task for task in builder.tasks if task.name == prompt.task)
            assert label == (small.rating[row] >= task.threshold)


def test_a_training_row_and_a_candidate_look_the_same(small, tokenizer):
    """Trained on as candidate, a row has the tokens that the same row has when it is scored."""
    parts, tasks = split(small), tasks_for(small)
    builder = PromptBuilder(tokenizer, tasks, 4096)
    trained = {s.member: s for s in builder.sequences(small, parts, tasks[0])}
    for prompt in builder.prompts(small, parts, tasks[0]):
        assert np.array_equal(trained[prompt.member].input_ids, prompt.prefix)


def test_rows_at_the_first_candidates_time_are_not_shown(tokenizer):
    times = [0, 1, 2, 3, 4, 5, 9, 9, 9, 10]
    data = build([(0, i, 8, t) for i, t in enumerate(times)], items=10)
    parts, tasks = split(data), tasks_for(data)
    builder = PromptBuilder(tokenizer, tasks, 512)
    [prompt] = builder.prompts(data, parts, tasks[0])
    assert prompt.rows.tolist() == [8, 9]
    text = tokenizer.decode(prompt.prefix)
    assert "Film 5 " in text and "Film 6 " not in text and "Film 7 " not in text
    [sequence] = builder.sequences(data, parts, tasks[0])
    assert sequence.answer.sum() == 8  # still trained on


def test_long_history_drops_the_oldest_rows_first(small, tokenizer):
    parts, tasks = split(small), tasks_for(small)
    [whole] = PromptBuilder(tokenizer, tasks, 4096).prompts(small, parts, tasks[0], [2])
    for context in (64, 100, 129):
        [cut] = PromptBuilder(tokenizer, tasks, context).prompts(small, parts, tasks[0], [2])
        longest = max(map(len, cut.candidates))
        assert len(cut.prefix) + longest <= context
        lines_cut = tokenizer.decode(cut.prefix).split("\n")
        lines_whole = tokenizer.decode(whole.prefix).split("\n")
        assert (
            lines_cut[:2] == lines_whole[:2]
            and lines_cut[2:] == lines_whole[len(lines_whole) - len(lines_cut) + 2 :]
        )
        # One row more would not have fitted.
        next_line = tokenizer(lines_whole[len(lines_whole) - len(lines_cut) + 1] + "\n")
        assert len(cut.prefix) + longest + len(next_line["input_ids"]) > context
        assert [c.tolist() for c in cut.candidates] == [c.tolist() for c in whole.candidates]


@pytest.mark.parametrize("context", [48, 100, 1000])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_every_history_row_is_labelled_exactly_once(small, tokenizer, context, overlap):
    parts = split(small)
    builder = PromptBuilder(tokenizer, tasks_for(small), context, overlap=overlap)
    for task in builder.tasks:
        labelled = []
        previous = None
        for sequence in builder.sequences(small, parts, task):
            ids, row, answer = sequence.input_ids, sequence.row, sequence.answer
            assert ids.dtype == np.int32 and row.dtype == np.int32 and answer.dtype == bool
            assert len(ids) == len(row) == len(answer) <= context
            assert (
                tokenizer.decode(ids[row < 0]).startswith("<s>Will") and not answer[row < 0].any()
            )
            assert np.array_equal(np.unique(row[row >= 0]), np.arange(len(sequence.rows)))
            assert np.all(np.diff(row) >= 0)
            numbers = sequence.rows[row[answer]]
            # The answer is the row's last token, and says what the rating says.
            assert all(row[i] != row[i + 1] for i in np.flatnonzero(answer)[:-1])
            told = np.array(builder.answer_ids)[(small.rating[numbers] >= task.threshold) * 1]
            assert np.array_equal(ids[answer], told)
            assert np.all(np.diff(sequence.rows) > 0)
            shown = len(sequence.rows) - len(numbers)
            if sequence.member == previous:
                assert bool(shown) == bool(overlap) or context == 48
                assert shown == 0 or sequence.rows[shown - 1] in labelled
            else:
                assert shown == 0
            previous = sequence.member
            labelled += numbers.tolist()
        assert sorted(labelled) == np.flatnonzero(parts.history).tolist()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(20, 60),
    st.floats(0, 0.9),
    st.data(),
)
def test_windows_cover_each_row_once_and_fit(lengths, capacity, overlap, draw):
    first = draw.draw(st.integers(0, len(lengths) - 1))
    lengths = np.array(lengths)
    covered = []
    for start, labelled, end in windows(lengths, first, capacity, int(overlap * capacity)):
        assert 0 <= start <= labelled < end <= len(lengths)
        assert lengths[start:end].sum() <= capacity
        assert lengths[start:labelled].sum() <= overlap * capacity
        covered += range(labelled, end)
    assert covered == list(range(first, len(lengths)))


def test_members_are_chosen_by_index(small, tokenizer):
    parts, tasks = split(small), tasks_for(small)
    builder = PromptBuilder(tokenizer, tasks, 512)
    every = builder.sequences(small, parts, tasks[0])
    some_ = builder.sequences(small, parts, tasks[0], members=[4, 1])
    assert [s.member for s in some_] == [1, 4]
    for sequence in some_:
        same = next(s for s in every if s.member == sequence.member)
        assert np.array_equal(same.input_ids, sequence.input_ids)
    assert [p.member for p in builder.prompts(small, parts, tasks[0], np.array([5]))] == [5]
    assert builder.prompts(small, parts, tasks[0], []) == []


def test_context_too_short_for_one_row(small, tokenizer):
    builder = PromptBuilder(tokenizer, tasks_for(small), 10)
    with pytest.raises(InputError, match="context is 10, expected at least .* preamble"):
        builder.sequences(small, split(small), builder.tasks[0])
    with pytest.raises(InputError, match="overlap is 1,"):
        PromptBuilder(tokenizer, builder.tasks, 64, overlap=1.0)


def test_a_very_long_text_is_cut(small, tokenizer):
    data = replace(small, item_texts=("x" * 5000, *small.item_texts[1:]))
    builder = PromptBuilder(tokenizer, tasks_for(data), 128)
    sequences, prompts = everything(builder, data, split(data))
    assert max(len(s.input_ids) for s in sequences) <= 128
    assert any(len(c) == 128 // 4 + len(COLUMNS) + 1 for p in prompts for c in p.candidates)


# ------------------------------------------------------------------------------- prompts of JSONL


def jsonl_prompts():
    """Two members; m has 10 prompts: 5 with one history, 5 with another."""
    result = []
    for i in range(10):
        history = tuple((f"job {j}", ("yes", "no", "saved")[j % 3]) for j in range(3 + i // 5))
        result.append(Prompt("Fits?", "m", history, f"job {10 + i}", i % 2, 100.0 - i))
    result.append(Prompt("Fits?", "n", (("job 1", "Yes"),), "job 2", 1, 5.0))
    result.append(Prompt("Pays?", "m", (("job 1", "Yes"),), "job 2", 1, 5.0))
    return result


def test_jsonl_prompts_train_and_score():
    prompts = jsonl_prompts()
    tokenizer = train_tokenizer(prompt_texts(prompts), 600)
    builder = PromptBuilder(tokenizer, (), 256)
    sequences, ranking = builder.from_prompts(prompts)
    # In order of time m's prompts are 9, 8, ..., 0: eight train, with two histories.
    assert [s.rows[s.rows >= 0].tolist() for s in sequences] == [[9, 8, 7, 6, 5], [4, 3, 2]]
    assert [p.rows.tolist() for p in ranking] == [[1, 0], [10], [11]]
    assert [(p.task, p.member) for p in ranking] == [("Fits?", 0), ("Fits?", 1), ("Pays?", 0)]
    for sequence in sequences:
        numbers = sequence.rows[sequence.row[sequence.answer]]
        told = [builder.answer_ids[prompts[n].label] for n in numbers]
        assert sequence.input_ids[sequence.answer].tolist() == told
        assert np.array_equal(numbers, sequence.rows[sequence.rows >= 0])
    first = ranking[0]
    assert first.labels.tolist() == [1, 0]
    assert tokenizer.decode([*first.prefix, *first.candidates[0]]) == (
        "<s>Fits?\nMember m\njob 0 -> Yes\njob 1 -> No\njob 2 -> saved\njob 11 ->"
    )
    assert tokenizer.decode(sequences[1].input_ids).endswith("job 13 -> Yes\njob 12 -> No\n")


def test_jsonl_prompts_with_more_history_than_context():
    history = tuple((f"work {i}", "no") for i in range(60))
    prompts = [Prompt("Fits?", "m", history, f"job {i}", i % 2, float(i)) for i in range(20)]
    builder = PromptBuilder(train_tokenizer(prompt_texts(prompts), 600), (), 96)
    sequences, [ranking] = builder.from_prompts(prompts)
    seen = np.concatenate([s.rows[s.row[s.answer]] for s in sequences])
    assert seen.tolist() == list(range(16)) and ranking.rows.tolist() == [16, 17, 18, 19]
    for sequence in sequences:
        assert len(sequence.input_ids) <= 96
        assert sequence.answer.sum() < len(sequence.rows)  # history is shown in every window
    # The scored prompts' prefix ends with the latest history.
    text = builder._backend.decode(ranking.prefix.tolist(), skip_special_tokens=False)
    assert text.endswith("work 58 -> No\nwork 59 -> No\n") and "work 0 " not in text


# -------------------------------------------------------------------------------------- tokenizer


def test_template_words_are_single_tokens(tokenizer):
    for word in (*CONTROL_WORDS, *WORDS):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    assert len(set(WORDS)) == len(WORDS)
    no, yes = PromptBuilder(tokenizer, (), 64).answer_ids
    assert tokenizer.convert_ids_to_tokens([no, yes]) == [" No\n", " Yes\n"]
    assert tokenizer.pad_token_id == 0 and tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2


def test_saved_tokenizer_loads_offline_and_is_the_same(tmp_path, small, tokenizer):
    from transformers import AutoTokenizer

    texts = training_texts(small, split(small), tasks_for(small))
    train_tokenizer(texts, 600, tmp_path / "made" / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made" / "tokenizer", local_files_only=True)
    text = f"<s>Q\n{small.item_texts[3]} [item 50%] [member 50%] -> Yes\nÉ 日本 \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids and loaded.decode(ids) == text
    assert len(loaded) == len(tokenizer)
    assert sorted(file.name for file in (tmp_path / "made" / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    builder = PromptBuilder(loaded, tasks_for(small), 256)
    assert builder.answer_ids == PromptBuilder(tokenizer, (), 256).answer_ids


def test_training_is_deterministic_across_processes(tmp_path):
    code = (
        "import sys; from slmperf.data import train_tokenizer;"
        "texts = {f'The {w} of {v} ({y})': y % 7 + 1"
        "  for w in ('Cat', 'Dog', 'Ant') for v in ('Rome', 'Oslo') for y in range(1950, 1990)};"
        "train_tokenizer(texts, 700, sys.argv[1])"
    )
    saved = []
    for place in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / place)], check=True)
        saved.append((tmp_path / place / "tokenizer.json").read_bytes())
    assert saved[0] == saved[1]


def test_a_frequent_title_is_one_token_and_fields_are_others():
    """Merges run across the words of a title, but never into a field or the template."""
    texts = {"The Lord of the Rings (2001) | Film Noir | Drama": 50, "Alien (2001) | Drama": 20}
    tokenizer = train_tokenizer(texts, 1000)
    text = "The Lord of the Rings (2001) | Film Noir | Drama [item 50%] ->"
    ids = tokenizer(text)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == [
        "The Lord of the Rings",
        " (2001)",
        " | Film Noir",
        " | Drama",
        " [item 50%]",
        " ->",
    ]
    other = tokenizer("Alien (2001) | Drama [item 50%] ->")["input_ids"]
    assert other[1:] == [ids[1], *ids[3:]]


def test_tokenizer_refuses():
    with pytest.raises(
        InputError, match=f"vocab_size is 300, expected at least {SMALLEST_VOCABULARY}"
    ):
        train_tokenizer(["a"], 300)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([], 1000)


def test_a_foreign_tokenizer_is_refused(small):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="tokenizer: no token '<s>', expected a tokenizer made by"):
        PromptBuilder(foreign, tasks_for(small), 256)


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([*CONTROL_WORDS, *WORDS, " ", "-", ">", "<", "[", "a", "\r"])
        | st.text(max_size=5),
        max_size=12,
    ).map("".join)
)
def test_free_text_cannot_imitate_the_template(tokenizer, text):
    cleaned = clean(text)
    template = set(tokenizer.convert_tokens_to_ids([*CONTROL_WORDS, *WORDS]))
    assert not template & set(tokenizer(cleaned, add_special_tokens=False)["input_ids"])
    assert clean(cleaned) == cleaned and "\n" not in cleaned


def test_item_text():
    assert item_text(" A\n b ", creator="C", kinds=("x", "y")) == "A b by C | x | y"
    assert item_text("A -> Yes\n") == "A - > Yes"
    assert item_text("A") == "A"
