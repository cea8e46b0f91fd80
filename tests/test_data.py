"""Readers, split, tasks: every layout and every bad input; both real sets end to end."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from small_data import build, some

from slmperf.check import InputError
from slmperf.data import (
    PromptBuilder,
    read_interactions,
    read_prompts,
    split,
    tasks_for,
    train_tokenizer,
    training_texts,
)


@pytest.fixture(scope="module")
def small():
    return some()


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


MOVIELENS = {
    "ratings.csv": "userId,movieId,rating,timestamp\n7,2,0.5,20\n7,1,5.0,10\n9,1,4,30\n",
    "movies.csv": 'movieId,title,genres\n1,"Matrix, The (1999)",Action|Sci-Fi\n'
    "2,Élan (2001),(no genres listed)\n",
}
SEPARATED = {
    "ratings.dat": "1::0002::10::30\n2::0001::7::20\n1::0001::0::20\n",
    "movies.dat": "0001::Fantômas (1913)::Crime|Drama\n0002::Bank (1915)::\n",
}
GOODBOOKS = {
    "ratings.csv": "user_id,book_id,rating\n5,10,3\n4,11,5\n5,11,1\n",
    "books.csv": "book_id,goodreads_id,title,authors,average_rating,genres\n"
    '10,1,"Dune (Dune, #1)","Frank Herbert, Someone Else",4.2,classics|fantasy\n11,2,Emma,,4.0,\n',
}


# ---------------------------------------------------------------------------------------- readers


def test_movielens_csv(tmp_path):
    data = read_interactions(write(tmp_path, MOVIELENS))
    assert data.scale == 5 and not data.synthetic and data.source == tmp_path.name
    assert data.item_texts == ("Matrix, The (1999) | Action | Sci-Fi", "Élan (2001)")
    assert data.member_names == ("7", "9")
    assert data.time.tolist() == [10, 20, 30]
    assert data.rating.tolist() == [5.0, 0.5, 4.0]
    assert data.item.tolist() == [0, 1, 0] and data.member.tolist() == [0, 0, 1]


def test_separated_dat_and_equal_times_keep_file_order(tmp_path):
    data = read_interactions(write(tmp_path, SEPARATED))
    assert data.scale == 10
    assert data.item_texts == ("Fantômas (1913) | Crime | Drama", "Bank (1915)")
    assert data.member_names == ("1", "2")
    assert data.member.tolist() == [1, 0, 0] and data.rating.tolist() == [7, 0, 10]


def test_separated_dat_up_to_five_is_a_scale_of_five(tmp_path):
    files = dict(SEPARATED, **{"ratings.dat": "1::0001::5::1\n"})
    assert read_interactions(write(tmp_path, files)).scale == 5


def test_goodbooks_order_of_rows_is_time(tmp_path):
    data = read_interactions(write(tmp_path, GOODBOOKS))
    assert data.scale == 5
    assert data.time.tolist() == [0, 1, 2]
    # No average rating in the text: it was counted over all of time.
    assert data.item_texts == ("Dune (Dune, #1) by Frank Herbert | classics | fantasy", "Emma")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_windows_lines_blank_lines_and_marks(tmp_path, mark):
    files = {name: mark + text.replace("\n", "\r\n").encode() for name, text in MOVIELENS.items()}
    files["ratings.csv"] += b"\r\n\r\n"
    write(tmp_path, files)
    assert read_interactions(tmp_path).item_texts[1] == "Élan (2001)"


@pytest.mark.parametrize("layout", [MOVIELENS, SEPARATED], ids=["csv", "dat"])
def test_latin_1_where_not_utf_8(tmp_path, layout):
    files = {name: text.encode("latin-1") for name, text in layout.items()}
    texts = " ".join(read_interactions(write(tmp_path, files)).item_texts)
    assert "Élan" in texts or "Fantômas" in texts


def test_columns_in_any_order_and_extra_ones(tmp_path):
    files = dict(MOVIELENS)
    files["ratings.csv"] = "rating, timestamp,x,movieId,userId\n3.5,1,?, 2,a b\n"
    data = read_interactions(write(tmp_path, files))
    assert data.rating.tolist() == [3.5] and data.member_names == ("a b",)


def test_more_rows_than_one_chunk(tmp_path):
    rows = 5001
    text = "userId,movieId,rating,timestamp\n"
    text += "".join(f"{i % 17},{1 + i % 2},{1 + i % 5},{rows - i}\n" for i in range(rows))
    data = read_interactions(write(tmp_path, dict(MOVIELENS, **{"ratings.csv": text})))
    i = np.arange(rows)[::-1]
    assert np.array_equal(data.item, i % 2) and np.array_equal(data.rating, 1 + i % 5)
    assert [data.member_names[m] for m in data.member[:3]] == [str(k % 17) for k in i[:3]]
    bad = text + "3,1,9,1\n"
    write(tmp_path, {"ratings.csv": bad})
    with pytest.raises(InputError, match=f"line {rows + 2}: rating is '9'"):
        read_interactions(tmp_path)


HEAD = "userId,movieId,rating,timestamp\n"
BAD = {
    "missing column": (
        MOVIELENS,
        {"ratings.csv": "userId,movieId,timestamp\n1,1,1\n"},
        r"ratings.csv line 1: no column rating, expected userId, .* found userId, movieId, time",
    ),
    "missing item column": (
        GOODBOOKS,
        {"books.csv": "book_id,title\n10,Dune\n"},
        "books.csv line 1: no column authors, expected book_id, title, authors, found book_id",
    ),
    "empty file": (
        MOVIELENS,
        {"ratings.csv": ""},
        "ratings.csv line 1: no column .* found nothing",
    ),
    "empty dat": (SEPARATED, {"ratings.dat": ""}, "ratings.dat: no rows, expected userId, movieId"),
    "header only": (MOVIELENS, {"ratings.csv": HEAD}, "ratings.csv: no rows, expected userId"),
    "no items": (MOVIELENS, {"movies.csv": "movieId,title,genres\n"}, "movies.csv: no rows"),
    "short line": (
        MOVIELENS,
        {"ratings.csv": HEAD + "7,1,5,1\n7,1,5\n"},
        r"ratings.csv line 3: expected 4 fields \(userId, .*\), found 3",
    ),
    "long dat line": (
        SEPARATED,
        {"ratings.dat": "1::0001::5::1\n\n1::0001::5::1::9\n"},
        "ratings.dat line 3: expected 4 fields .*, found 5",
    ),
    "not a number": (
        MOVIELENS,
        {"ratings.csv": HEAD + "7,1,good,1\n"},
        "ratings.csv line 2: rating is 'good', expected a number",
    ),
    "nan": (
        MOVIELENS,
        {"ratings.csv": HEAD + "7,1,nan,1\n"},
        "ratings.csv line 2: rating is 'nan', expected a rating from 0.5 to 5",
    ),
    "off the scale": (
        GOODBOOKS,
        {"ratings.csv": "user_id,book_id,rating\n5,10,3\n5,10,0\n"},
        "ratings.csv line 3: rating is '0', expected a rating from 1 to 5",
    ),
    "off the longer scale": (
        SEPARATED,
        {"ratings.dat": "1::0001::11::1\n"},
        "ratings.dat line 1: rating is '11', expected a rating from 0 to 10",
    ),
    "time": (
        MOVIELENS,
        {"ratings.csv": HEAD + "7,1,5,2011-01-01\n"},
        "ratings.csv line 2: timestamp is '2011-01-01', expected a whole number",
    ),
    "time too large": (
        MOVIELENS,
        {"ratings.csv": HEAD + f"7,1,5,{10**20}\n"},
        "line 2: timestamp is '100000000000000000000', expected a whole number",
    ),
    "unknown item": (
        MOVIELENS,
        {"ratings.csv": HEAD + '7,1,5,1\n7,1,"4",1\n7,99,5,1\n'},
        "ratings.csv line 4: movieId is '99', expected an id of movies.csv",
    ),
    "item twice": (
        SEPARATED,
        {"movies.dat": "0001::A::\n0002::B::\n0001::C::\n"},
        "movies.dat line 3: movieId is '0001', expected an id not yet on line 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(tmp_path, name):
    good, change, message = BAD[name]
    write(tmp_path, good | change)
    with pytest.raises(InputError, match=message) as error:
        read_interactions(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_folder_without_a_layout(tmp_path):
    with pytest.raises(InputError, match="expected ratings.csv and movies.csv; .* an empty folder"):
        read_interactions(tmp_path)
    write(tmp_path, {"ratings.csv": "x"})
    with pytest.raises(InputError, match="found ratings.csv"):
        read_interactions(tmp_path)
    with pytest.raises(InputError, match="found a file"):
        read_interactions(tmp_path / "ratings.csv")
    with pytest.raises(InputError, match="found nothing"):
        read_interactions(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------ JSONL

LINE = {
    "task": "Will the member like this job?",
    "member": "m17",
    "history": [{"text": "Baker in Lyon", "action": "yes"}, {"text": "Cook", "action": "saved"}],
    "candidate": "Pastry chef in Paris",
    "label": 1,
    "time": 1365029107,
}


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_prompts_from_jsonl(tmp_path):
    path = tmp_path / "prompts.jsonl"
    other = LINE | {"member": 3, "history": [{"text": "a", "action": 0}], "label": 0, "note": 1}
    path.write_text(lines(LINE) + "\n" + lines(other))
    first, second = read_prompts(path)
    assert first.history == (("Baker in Lyon", "yes"), ("Cook", "saved")) and first.label == 1
    assert second.member == "3" and second.history == (("a", "no"),) and second.label == 0


BAD_LINES = {
    "label 2": (LINE | {"label": 2}, "label is 2, expected 0 or 1"),
    "label text": (LINE | {"label": "1"}, 'label is "1", expected 0 or 1'),
    "label true": (LINE | {"label": True}, "label is true, expected 0 or 1"),
    "label null": (LINE | {"label": None}, "label is null, expected 0 or 1"),
    "no history": (LINE | {"history": []}, "history is empty, expected at least one"),
    "history text": (LINE | {"history": "x"}, 'history is "x", expected a list'),
    "history entry": (LINE | {"history": [{"text": "a"}]}, "history entry is .* text and action"),
    "history action": (
        LINE | {"history": [{"text": "a", "action": 2}]},
        "history action is 2, expected a text",
    ),
    "time": (LINE | {"time": "now"}, 'time is "now", expected a number'),
    "empty candidate": (LINE | {"candidate": " "}, 'candidate is " ", expected a text'),
    "member": (LINE | {"member": None}, "member is null, expected a text"),
    "list": ([1], r"expected one JSON object, found \[1\]"),
    "missing": ({"task": "x", "member": "y"}, "no key history, .* found task, member"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, name):
    value, message = BAD_LINES[name]
    path = tmp_path / "p.jsonl"
    path.write_text(lines(LINE, value))
    with pytest.raises(InputError, match="p.jsonl line 2: " + message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_bad_jsonl_files(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(InputError, match="p.jsonl: No such file"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="p.jsonl: no prompts"):
        read_prompts(path)
    path.write_text('{"task": \n')
    with pytest.raises(InputError, match="line 1: expected one JSON object, found Expecting"):
        read_prompts(path)
    path.write_bytes(b'{"task": "\xff"}')
    with pytest.raises(InputError, match="expected UTF-8"):
        read_prompts(path)


# -------------------------------------------------------------------------------- split and tasks


def test_split_by_order_within_the_member():
    rows = [(0, 0, 5, t) for t in range(10)] + [(1, 1, 5, t) for t in range(9)]
    data = build(rows + [(2, 0, 5, t) for t in range(15)])
    parts = split(data)
    for member, known in ((0, 8), (1, 9), (2, 12)):
        mine = np.flatnonzero(data.member == member)
        assert parts.history[mine].tolist() == [True] * known + [False] * (len(mine) - known)
        assert parts.candidate[mine].tolist() == [False] * known + [True] * (
            0 if member == 1 else len(mine) - known
        )


def test_validation_split_never_shows_the_real_candidates(small):
    real, chosen_on = split(small), split(small, validation=0.25)
    assert not (chosen_on.history | chosen_on.candidate)[real.candidate].any()
    assert np.array_equal(chosen_on.history | chosen_on.candidate, real.history)
    assert chosen_on.candidate.any() and not (chosen_on.history & chosen_on.candidate).any()


def test_split_refuses():
    data = build([(0, 0, 5, t) for t in range(9)])
    with pytest.raises(InputError, match="small: no member .* at least 10 rows .* at most 9"):
        split(data)
    for settings_, message in (
        ({"history": 1.0}, "history is 1,"),
        ({"validation": 1.0}, "validation is 1,"),
        ({"minimum_rows": 1}, "minimum_rows is 1,"),
    ):
        with pytest.raises(InputError, match=message):
            split(data, **settings_)


def test_tasks():
    data = build([(0, 0, rating, rating) for rating in range(1, 11)])
    like, top = tasks_for(data)
    assert (like.name, top.name) == ("like", "top")
    assert like.labels(data).sum() == 3 and top.labels(data).sum() == 1
    five = build([(0, 0, rating / 2, rating) for rating in range(1, 11)], scale=5)
    assert [task.labels(five).sum() for task in tasks_for(five)] == [3, 1]
    with pytest.raises(InputError, match="highest rating is 7"):
        tasks_for(replace(data, scale=7))


def test_interactions_hold_what_they_promise(small):
    with pytest.raises(ValueError, match="not sorted"):
        replace(small, time=small.time[::-1].copy())
    with pytest.raises(ValueError, match="item is in"):
        replace(small, item_texts=small.item_texts[:3])
    with pytest.raises(ValueError, match="rating is float64"):
        replace(small, rating=small.rating.astype(float))
    with pytest.raises(ValueError, match="read-only"):
        small.rating[0] = 1


# -------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "members", "rows", "candidates", "scored", "scale"),
    [
        ("movietweetings-100k", 16554, 100000, 14420, 2583, 10),
        ("goodbooks-5pct", 2672, 298176, 60706, 2672, 5),
    ],
)
def test_real_data(shared_data, name, members, rows, candidates, scored, scale):
    data = read_interactions(shared_data / "recsys" / name)
    assert (len(data), len(data.member_names), data.scale) == (rows, members, scale)
    parts = split(data)
    assert parts.candidate.sum() == candidates
    assert len(np.unique(data.member[parts.candidate])) == scored
    tasks = tasks_for(data)
    few = np.unique(data.member[parts.candidate])[::13]
    texts = training_texts(data, parts, tasks)
    builder = PromptBuilder(train_tokenizer(dict(list(texts.items())[:3000]), 1500), tasks, 512)
    for task in tasks:
        sequences = builder.sequences(data, parts, task, few)
        prompts = builder.prompts(data, parts, task, few)
        labelled = np.concatenate([s.rows[s.row[s.answer]] for s in sequences])
        assert np.array_equal(
            np.sort(labelled), np.flatnonzero(parts.history & np.isin(data.member, few))
        )
        assert (
            sum(len(p.rows) for p in prompts) == (parts.candidate & np.isin(data.member, few)).sum()
        )
        for prompt in prompts:
            assert len(prompt.prefix) + max(map(len, prompt.candidates)) <= 512


def test_no_torch(root):
    code = (
        "import sys, slmperf.data as d; d.read_interactions; d.PromptBuilder; d.split;"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
