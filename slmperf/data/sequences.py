"""What a trainer and a scorer are given: token ids of training sequences and ranking prompts.

T: tokens of a sequence. A *row* is one interaction in the prompt: item text, facts, arrow, answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """A member's rows in order, with a label at (almost) every row.

    input_ids: int32 (T,). row: int32 (T,), -1 in the preamble, else the place in the sequence
    (0..n-1) of the row the token belongs to. answer: bool (T,), True at the answer tokens that
    this sequence trains on. rows: int32 (n,), the rows' numbers in the data (-1: history entry of
    a JSONL prompt). A window after a member's first opens with rows that an earlier window labels:
    they have a row, but no answer, and are no training examples here.
    """

    input_ids: np.ndarray
    row: np.ndarray
    answer: np.ndarray
    task: str
    member: int
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class RankingPrompt:
    """k candidates of one member behind one shared prefix.

    prefix: int32 (P,), preamble and history. candidates: k arrays int32, each ending right before
    the answer token. labels: int8 (k,). rows: int32 (k,), the candidates' numbers in the data.
    """

    task: str
    member: int
    prefix: np.ndarray
    candidates: tuple[np.ndarray, ...]
    labels: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Rows:
    """n rows of a prompt, one after the other, each with its answer (or action) at the end.

    tokens: int32 (T,). starts: int64 (n + 1,), where in tokens each row begins. numbers: int32
    (n,), the rows' numbers in the data.
    """

    tokens: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray

    def part(self, begin: int, end: int) -> Rows:
        """Rows begin..end (without end), by themselves."""
        starts = self.starts[begin : end + 1]
        tokens = self.tokens[starts[0] : starts[-1]]
        return Rows(tokens, starts - starts[0], self.numbers[begin:end])

    def latest(self, room: int) -> np.ndarray:
        """Tokens of as many of the last rows as fit into room tokens."""
        begin = int(np.searchsorted(self.starts, self.starts[-1] - room, side="left"))
        return self.tokens[self.starts[begin] :] if begin < len(self.starts) else self.tokens[:0]

    def questions(self) -> tuple[np.ndarray, ...]:
        """Each row by itself, without the answer."""
        cuts = zip(self.starts[:-1], self.starts[1:] - 1, strict=True)
        return tuple(self.tokens[begin:end] for begin, end in cuts)


def windows(
    lengths: np.ndarray, first_labelled: int, capacity: int, overlap: int
) -> Iterator[tuple[int, int, int]]:
    """Cut rows of these lengths into windows (start, labelled, end) of at most capacity tokens.

    Rows labelled..end are labelled there, start..labelled only shown: the latest rows before that
    fit in overlap tokens. Rows first_labelled.. are each labelled in exactly one window.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])  # ends[i]: tokens before row i
    labelled = first_labelled
    while labelled < len(lengths):
        shown = min(overlap, capacity - int(lengths[labelled]))
        start = int(np.searchsorted(ends, ends[labelled] - shown, side="left"))
        end = int(np.searchsorted(ends, ends[start] + capacity, side="right")) - 1
        yield start, labelled, end
        labelled = end
