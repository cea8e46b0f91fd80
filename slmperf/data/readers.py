"""Readers of rated interactions: MovieLens (csv and `::`), goodbooks, and what is in a folder.

| layout    | files                    | columns (a csv's other columns are ignored)             |
|-----------|--------------------------|---------------------------------------------------------|
| MovieLens | ratings.csv, movies.csv  | userId, movieId, rating 0.5..5, timestamp; movieId,     |
|           |                          | title, genres (A|B|C)                                   |
| `::`      | ratings.dat, movies.dat  | user::item::rating::time, rating 0..5, or 0..10 when    |
|           |                          | one is above 5; item::title::genres                     |
| goodbooks | ratings.csv, books.csv   | user_id, book_id, rating 1..5, in order of time;        |
|           |                          | book_id, title, authors; genres (A|B|C) where they exist  |

Files are UTF-8, or Latin-1 where they are not valid UTF-8. Blank lines are skipped. A wrong line
is an InputError that names file, line, what was wanted and what was found. Average ratings and
rating counts that an item file may state are never read: they were counted over all of time.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from slmperf.check import InputError
from slmperf.data.interactions import Interactions
from slmperf.data.template import clean, item_text

# Rows held as Python strings at a time. Small on purpose: with many lists alive the garbage
# collector, which walks them all again and again, takes most of the time (2.6x at 262144).
CHUNK = 2048


@dataclass(frozen=True)
class _Layout:
    name: str
    ratings: str
    items: str
    rating_columns: tuple[str, ...]  # member, item, rating and, where the layout has it, time
    item_columns: tuple[str, ...]
    lowest: float
    text: Callable[[dict[str, str]], str]


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(kind.strip() for kind in text.split("|"))
    return tuple(kind for kind in kinds if kind and kind != "(no genres listed)")


def _movie(row: dict[str, str]) -> str:
    return item_text(row["title"], kinds=_kinds(row["genres"]))


def _book(row: dict[str, str]) -> str:
    return item_text(
        row["title"],
        creator=row["authors"].split(",")[0],  # the others are mostly translators, illustrators
        kinds=_kinds(row.get("genres", "")),
    )


MOVIE_COLUMNS = ("movieId", "title", "genres")
LAYOUTS = (
    _Layout(
        "MovieLens csv",
        "ratings.csv",
        "movies.csv",
        ("userId", "movieId", "rating", "timestamp"),
        MOVIE_COLUMNS,
        0.5,
        _movie,
    ),
    _Layout(
        "goodbooks",
        "ratings.csv",
        "books.csv",
        ("user_id", "book_id", "rating"),
        ("book_id", "title", "authors"),
        1.0,
        _book,
    ),
    _Layout(
        "MovieLens ::",
        "ratings.dat",
        "movies.dat",
        ("userId", "movieId", "rating", "timestamp"),
        MOVIE_COLUMNS,
        0.0,
        _movie,
    ),
)


class _Table:
    """The rows of one file, as text.

    A csv names its columns in the first line; a .dat file has the columns of its layout.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.separated = path.suffix == ".dat"
        self.encoding = _encoding(path)
        self.wanted = columns
        self.columns = list(columns) if self.separated else self._header()

    def _header(self) -> list[str]:
        columns = [name.strip() for name in next(self._rows(), [])]
        for name in self.wanted:
            if name not in columns:
                raise InputError(
                    f"{self.path} line 1: no column {name}, expected {', '.join(self.wanted)}, "
                    f"found {', '.join(columns) or 'nothing'}"
                )
        return columns

    def _rows(self, ended: list[int] | None = None) -> Iterator[list[str]]:
        """Every row that is not blank, the header too; `ended` collects the line each ended on."""
        with self.path.open(encoding=self.encoding, newline="") as file:
            if self.separated:
                for number, line in enumerate(file, 1):
                    if line := line.rstrip("\r\n"):
                        if ended is not None:
                            ended.append(number)
                        yield line.split("::")
                return
            reader = csv.reader(file, skipinitialspace=True)
            try:
                if ended is None:
                    yield from filter(None, reader)
                    return
                for row in filter(None, reader):
                    ended.append(reader.line_num)
                    yield row
            except csv.Error as error:
                raise InputError(
                    f"{self.path} line {reader.line_num}: expected a csv row, found {error}"
                ) from None

    def line_of(self, row: int) -> int:
        """The line that row number `row` (from 0, without header) ends on.

        The file is read again for it, so that lines need not be counted where nothing is wrong.
        """
        ended: list[int] = []
        place = row if self.separated else row + 1
        next(itertools.islice(self._rows(ended), place, None))
        return ended[place]

    def chunks(self) -> Iterator[tuple[int, list[list[str]]]]:
        """Number of the first row, and at most CHUNK rows at a time, all of the header's width."""
        rows = self._rows()
        if not self.separated:
            next(rows, None)
        width = len(self.columns)
        done = 0
        while chunk := list(itertools.islice(rows, CHUNK)):
            if set(map(len, chunk)) != {width}:
                place, row = next((i, row) for i, row in enumerate(chunk) if len(row) != width)
                raise InputError(
                    f"{self.path} line {self.line_of(done + place)}: expected {width} fields "
                    f"({', '.join(self.columns)}), found {len(row)}"
                )
            yield done, chunk
            done += len(chunk)
        if not done:
            raise InputError(f"{self.path}: no rows, expected {', '.join(self.wanted)}")

    def column(self, chunk: list[list[str]], column: str) -> Iterator[str]:
        """The texts of one column."""
        return map(itemgetter(self.columns.index(column)), chunk)

    def numbers(
        self, chunk: list[list[str]], column: str, first: int, kind: type[int] | type[float]
    ) -> np.ndarray:
        """A column as int64 or float64; the first text that is no such number is an InputError."""
        try:
            return np.fromiter(map(kind, self.column(chunk, column)), np.dtype(kind), len(chunk))
        except (ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            for place, text in enumerate(self.column(chunk, column)):
                if not _reads_as(kind, text):
                    raise self.wrong(first + place, column, wanted, text) from None
            raise

    def wrong(self, row: int, column: str, wanted: str, found: str) -> InputError:
        """The error for one field."""
        return InputError(
            f"{self.path} line {self.line_of(row)}: {column} is {found!r}, expected {wanted}"
        )


def _reads_as(kind: type[int] | type[float], text: str) -> bool:
    try:
        np.fromiter([kind(text)], np.dtype(kind))
    except (ValueError, OverflowError):
        return False
    return True


def _encoding(path: Path) -> str:
    """utf-8 (with or without a mark at the start) if the whole file is valid, else latin-1."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "latin-1"
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a readable file") from None
    return "utf-8-sig"


def _read_items(path: Path, layout: _Layout) -> tuple[dict[str, int], list[str]]:
    """Item id -> index (in the order of the file), and the items' texts."""
    table = _Table(path, layout.item_columns)
    index: dict[str, int] = {}
    texts: list[str] = []
    for first, chunk in table.chunks():
        for place, values in enumerate(chunk):
            row = dict(zip(table.columns, values, strict=True))
            key = row[layout.item_columns[0]].strip()
            if key in index:
                other = table.line_of(index[key])
                raise table.wrong(
                    first + place, layout.item_columns[0], f"an id not yet on line {other}", key
                )
            index[key] = len(texts)
            texts.append(layout.text(row) or f"item {key}")
    return index, texts


def _layout_of(folder: Path) -> _Layout:
    for layout in LAYOUTS:
        if (folder / layout.ratings).is_file() and (folder / layout.items).is_file():
            return layout
    wanted = "; ".join(f"{layout.ratings} and {layout.items}" for layout in LAYOUTS)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"{folder}: expected a folder with {wanted}, found {found}")
    names = sorted(file.name for file in folder.iterdir())
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise InputError(f"{folder}: expected {wanted}, found {found or 'an empty folder'}")


def read_interactions(path: str | Path) -> Interactions:
    """Read a folder of one of the layouts above; the layout is told by the names of its files.

    Repeated (member, item) rows are all kept. InputError for anything the layout does not allow: a
    missing file or column, a wrong number of fields, a rating that is no number or off its scale,
    an item without an entry in the item file, a file without rows.
    """
    folder = Path(path)
    layout = _layout_of(folder)
    item_index, item_texts = _read_items(folder / layout.items, layout)
    table = _Table(folder / layout.ratings, layout.rating_columns)
    member_name, item_name, rating_name, *time_name = layout.rating_columns
    member_index: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    parts: list[tuple[np.ndarray, ...]] = []
    highest = 10.0 if table.separated else 5.0
    for first, chunk in table.chunks():
        size = len(chunk)
        members = map(member_index.__getitem__, table.column(chunk, member_name))
        items = map(item_index.__getitem__, table.column(chunk, item_name))
        member = np.fromiter(members, np.int32, size)
        try:
            item = np.fromiter(items, np.int32, size)
        except KeyError as error:
            key = error.args[0]
            place = list(table.column(chunk, item_name)).index(key)
            raise table.wrong(first + place, item_name, f"an id of {layout.items}", key) from None
        rating = table.numbers(chunk, rating_name, first, float)
        # Written so that nan, which compares as false, is off the scale too.
        off = np.flatnonzero(~((rating >= layout.lowest) & (rating <= highest)))
        if len(off):
            place = int(off[0])
            found = list(table.column(chunk, rating_name))[place]
            wanted = f"a rating from {layout.lowest:g} to {highest:g}"
            raise table.wrong(first + place, rating_name, wanted, found)
        if time_name:
            time = table.numbers(chunk, time_name[0], first, int)
        else:
            time = np.arange(first, first + size, dtype=np.int64)
        parts.append((member, item, rating.astype(np.float32), time))
    member, item, rating, time = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Interactions.from_rows(
        (member, item, rating, time),
        scale=10 if rating.max() > 5 else 5,
        member_names=[clean(name) for name in member_index],
        item_texts=item_texts,
        source=folder.name,
    )
