"""What a training example is, in the forms that data sets have it in.

An example is a mapping, or an object with attributes, that holds

    input_ids       its tokens
    labels          as Transformers wants them: -100 where a token is no answer, else the token
    or answer       bool for each token
    row             with `answer`: which history row a token belongs to (0, 1, ...; below 0: none)
    attention_mask  0 for padding, which is dropped
    key             what a teacher's cache calls it: an integer >= 0 or a string

Without labels and answer every token is an answer; without rows all are of one row. A token of a
row without an answer is only shown. The first token is predicted by nothing and belongs to no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slmperf.check import InputError

_IGNORED = -100


class Example(NamedTuple):
    """One example's arrays (L,), and its name."""

    ids: np.ndarray  # int64
    answer: np.ndarray  # bool
    row: np.ndarray  # int64
    key: int | str | None


def example_of(given: Any, number: int) -> Example:
    """Arrays of the example with this number in its data set; InputError for lengths that differ
    and labels that are not its tokens.
    """
    read = given.get if isinstance(given, Mapping) else lambda name: getattr(given, name, None)

    def array(name: str) -> np.ndarray | None:
        value = read(name)
        if value is None:
            return None
        value = np.asarray(value)
        if value.ndim != 1 or (len(value) and value.dtype.kind not in "iub"):
            raise InputError(
                f"train: {name} of example {number} is {value.shape} {value.dtype}, wanted (L,) "
                "integers"
            )
        return value

    found = array("input_ids")
    if found is None:
        has = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise InputError(f"train: example {number} holds {has}, wanted input_ids among them")
    ids = found.astype(np.int64)
    labels, answer, row = array("labels"), array("answer"), array("row")
    if labels is not None and answer is None:
        answer = labels != _IGNORED
        if len(labels) == len(ids) and (labels[answer] != ids[answer]).any():
            at = int(np.flatnonzero(answer & (labels != ids))[0])
            raise InputError(
                f"train: example {number} has the label {labels[at]} at token {at}, wanted its "
                f"token {ids[at]}, or -100"
            )
    answer = np.ones(len(ids), bool) if answer is None else answer.astype(bool)
    row = np.zeros(len(ids), np.int64) if row is None else row.astype(np.int64)
    mask = array("attention_mask")
    sizes = {"answer marks": answer, "rows": row, "attention marks": mask}
    if any(one is not None and len(one) != len(ids) for one in sizes.values()):
        told = ", ".join(f"{len(one)} {name}" for name, one in sizes.items() if one is not None)
        raise InputError(
            f"train: example {number} has {len(ids)} ids, {told}, wanted equal numbers"
        )
    if mask is not None and not mask.all():
        ids, answer, row = ids[mask != 0], answer[mask != 0], row[mask != 0]
    if not len(ids):
        raise InputError(f"train: example {number} has no tokens, wanted at least one")
    row = row.copy()
    row[0] = -1
    return Example(ids, answer & (row >= 0), row, read("key"))


def examples_of(given: Sequence[Any]) -> list[Example]:
    """All of a data set; InputError for an empty one, or one that learns nothing."""
    if not hasattr(given, "__len__"):
        raise InputError(
            f"train: the data set is a {type(given).__name__}, wanted one with a length: its order "
            "is drawn from the seed"
        )
    found = [example_of(given[number], number) for number in range(len(given))]
    if not found:
        raise InputError("train: there are no examples, wanted at least one")
    if not any(one.answer.any() for one in found):
        raise InputError(
            f"train: none of {len(found)} examples has an answer (labels, answer), "
            "wanted at least one"
        )
    return found
