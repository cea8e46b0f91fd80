"""Prompts as JSONL: one prompt a line, for data that is not a table of ratings.

    {"task": "Will the member like this job?", "member": "m17",
     "history": [{"text": "Baker in Lyon", "action": "yes"}, {"text": "Cook", "action": "saved"}],
     "candidate": "Pastry chef in Paris", "label": 1, "time": 1365029107}

(one line in the file). Every key is needed; other keys are ignored.

    task       text: the instruction, which is also the task's name in the tables
    member     text or whole number
    history    what the member did before, oldest first, at least one entry; the action is a short
               text: "yes" and "no" (or 1 and 0) are shown as the answers are, others as they stand
    candidate  text
    label      0 or 1
    time       a number, in any unit: it orders the prompts of a member
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slmperf.check import InputError

Row = TypeVar("Row")

KEYS = ("task", "member", "history", "candidate", "label", "time")


@dataclass(frozen=True)
class Prompt:
    """One line of a JSONL file. history: (text, action), oldest first; label: 0 or 1."""

    task: str
    member: str
    history: tuple[tuple[str, str], ...]
    candidate: str
    label: int
    time: float


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {_show(value)}, expected a text")
    return value


def _action(where: str, value: Any) -> str:
    if type(value) is int and value in (0, 1):
        return "yes" if value else "no"
    return _text(where, "history action", value)


def _history(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: history is {_show(value)}, expected a list of text and action")
    if not value:
        raise InputError(f"{where}: history is empty, expected at least one text with its action")
    entries = []
    for entry in value:
        if not isinstance(entry, dict) or not {"text", "action"} <= entry.keys():
            raise InputError(
                f"{where}: history entry is {_show(entry)}, expected an object with text and action"
            )
        entries.append(
            (_text(where, "history text", entry["text"]), _action(where, entry["action"]))
        )
    return tuple(entries)


def _prompt(where: str, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected one JSON object, found {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected one JSON object, found {_show(value)}")
    missing = [key for key in KEYS if key not in value]
    if missing:
        raise InputError(
            f"{where}: no key {missing[0]}, expected {', '.join(KEYS)}, "
            f"found {', '.join(map(str, value)) or 'nothing'}"
        )
    label, time, member = value["label"], value["time"], value["member"]
    if type(label) is not int or label not in (0, 1):
        raise InputError(f"{where}: label is {_show(label)}, expected 0 or 1")
    if type(time) not in (int, float) or not math.isfinite(time):
        raise InputError(f"{where}: time is {_show(time)}, expected a number")
    return Prompt(
        task=_text(where, "task", value["task"]),
        member=str(member) if type(member) is int else _text(where, "member", member),
        history=_history(where, value["history"]),
        candidate=_text(where, "candidate", value["candidate"]),
        label=label,
        time=float(time),
    )


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSONL file, in the order of its lines; blank lines are skipped.

    InputError with the line for anything the format above does not allow, and for an empty file.
    """
    return read_each(path, _prompt, "prompts")


def read_each(path: str | Path, parse: Callable[[str, str], Row], what: str) -> list[Row]:
    """What `parse(where, line)` makes of each line of a UTF-8 file that is not blank.

    InputError, with the file, where it cannot be read or holds nothing; `what` is what was wanted.
    """
    path = Path(path)
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(parse(f"{path} line {number}", line))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a JSONL file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from None
    if not rows:
        raise InputError(f"{path}: no {what}, expected one JSON object a line")
    return rows
