"""Distillation from a teacher that can only write: train on its text (sequence-level distillation).

write_teacher_text asks a generator or a server for one text after each prompt; read_teacher_text
gives them back as examples, prompts shown and texts to be learned. A DistillationTrainer without a
teacher then minimises the cross entropy of the teacher's own text: at temperature 1, in
expectation, the forward KL between distributions of whole texts, up to a constant; at temperature 0
the loss of arXiv 1606.07947, with the greedy text for the best one.

A file, JSON lines:

    {"teacher_text": 1, "teacher": "name", "examples": 2, "new_tokens": 300, "seed": 0, ...}
    {"key": 0, "prompt_tokens": 3, "input_ids": [1, 15, 7, 42, 9, 2]}
    {"key": 1, ...}

It appears when it is whole. Until then its lines stand in <name>.part, which a run that was killed
goes on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmperf.check import InputError
from slmperf.distill.cache.files import acquire
from slmperf.distill.examples import example_of
from slmperf.distill.on_policy.generators import Generator, text_seed
from slmperf.distill.server import CompletionServer
from slmperf.models.files import fsync

FORMAT = 1


def write_teacher_text(
    source: Generator | CompletionServer,
    examples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    teacher: str | None = None,
    new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
    context: int | None = None,
    at_once: int = 64,
) -> Path:
    """Write what the teacher says after each example's prompt; the file's path.

    Called again after a kill, with the same arguments, it goes on behind the last whole line; of a
    finished file nothing is asked again. Every text has a seed of its own, made of `seed` and its
    place: where a source's text is a function of prompt and seed, it does not depend on when a run
    was killed.

    source      a generator of slmperf.distill.on_policy, or a server
    teacher     the teacher's name, of its weights: the file has it, and only a teacher of that name
                goes on with it. A generator needs one; None for a server: its model and address
    examples    as slmperf.distill.examples has them: the prompt is what stands before the first
                answer, all of one without answers or marks; or lists of ids, prompts themselves
    new_tokens  tokens of a text at most
    stop        a text ends behind the first of these tokens
    context     tokens of prompt and text together at most
    at_once     texts that are asked for together, and written together

    InputError for a file that was begun with other arguments, a generator without a name, a prompt
    that is empty or leaves no room in `context`, and whatever the source raises.
    """
    path = Path(path)
    if seed < 0:
        raise InputError(f"teacher's text: seed is {seed}, expected at least 0")
    keys, prompts = _prompts(examples)
    room = [_room(key, ids, new_tokens, context) for key, ids in zip(keys, prompts, strict=True)]
    digest = hashlib.blake2b(digest_size=16)
    for key, prompt in zip(keys, prompts, strict=True):
        digest.update(json.dumps([key, prompt]).encode())
    ask: Callable[..., list[list[int]]]
    if isinstance(source, CompletionServer):
        ask, model = source.complete, source.check()
        teacher = teacher or f"{model} at {source.url}"
    else:
        ask = source.generate
        if not teacher:
            raise InputError(
                f"teacher's text: teacher is {teacher!r} and the source a {type(source).__name__}, "
                "expected the name of its weights"
            )
    header = {
        "teacher_text": FORMAT,
        "teacher": teacher,
        "examples": len(prompts),
        "new_tokens": new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": sorted(stop),
        "context": context,
        "prompts": digest.hexdigest(),
    }
    if path.exists():
        _check_header(path, header)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    lock = acquire(path.with_name(f".{path.name}.lock"))
    if lock is None:
        raise InputError(f"{path}: another process is writing it, expected none")
    try:
        done, size = _written(part, header)
        with open(part, "r+b" if part.exists() else "wb") as stream:
            stream.truncate(size)
            stream.seek(size)
            if not size:
                stream.write(_line(header))
            for first in range(done, len(prompts), at_once):
                chosen = range(first, min(first + at_once, len(prompts)))
                texts = ask(
                    [prompts[place] for place in chosen],
                    new_tokens=[room[place] for place in chosen],
                    temperature=temperature,
                    top_p=top_p,
                    seeds=[text_seed(seed, place) for place in chosen],
                    stop=stop,
                )
                for place, text in zip(chosen, texts, strict=True):
                    ids = [*prompts[place], *map(int, text)]
                    told = {"key": keys[place], "prompt_tokens": len(prompts[place])}
                    stream.write(_line({**told, "input_ids": ids}))
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(part, path)
        fsync(path.parent)
    finally:
        os.close(lock)
    return path


def read_teacher_text(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Examples for a training: input_ids (T,) int64; answer (T,) bool, True at what the teacher
    wrote; key. InputError for a file that is not finished, or is none.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if not path.is_file():
        found = "none"
        if part.is_file():
            found = f"an unfinished one, {part.name}: write_teacher_text goes on with it"
        raise InputError(f"{path}: wanted a file of teacher's text, found {found}")
    lines = path.read_bytes().split(b"\n")
    header = _header(path, lines[0])
    examples = []
    for number, line in enumerate(lines[1:-1], 2):
        try:
            told = json.loads(line)
            ids, shown = np.array(told["input_ids"], np.int64), int(told["prompt_tokens"])
            key = told["key"]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path} line {number}: {line[:60]!r}, expected key, prompt_tokens and input_ids"
            ) from None
        examples.append({"input_ids": ids, "answer": np.arange(len(ids)) >= shown, "key": key})
    if len(examples) != header["examples"] or lines[-1]:
        raise InputError(
            f"{path}: truncated: expected {header['examples']} texts, found {len(examples)}"
        )
    return examples


def _prompts(examples: Sequence[Any]) -> tuple[list[int | str], list[list[int]]]:
    """Keys and prompts of all examples."""
    keys: list[int | str] = []
    prompts = []
    for place in range(len(examples)):
        given, key = examples[place], None
        if isinstance(given, Mapping) or hasattr(given, "input_ids"):
            example, key = example_of(given, place), _read(given, "key")
            marked = _read(given, "labels") is not None or _read(given, "answer") is not None
            (answers,) = example.answer.nonzero()
            first = answers[0] if marked and len(answers) else len(example.ids)
            given = example.ids[:first]
        ids = [int(token) for token in given]
        key = place if key is None else key
        if not ids:
            raise InputError(f"teacher's text: the prompt of {key!r} is empty, expected a token")
        keys.append(key if isinstance(key, str) else int(key))
        prompts.append(ids)
    if not prompts:
        raise InputError("teacher's text: there are no examples, wanted at least one")
    return keys, prompts


def _read(given: Any, name: str) -> Any:
    return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)


def _room(key: int | str, prompt: list[int], new_tokens: int, context: int | None) -> int:
    """Tokens that the text after a prompt may have."""
    room = new_tokens if context is None else min(new_tokens, context - len(prompt))
    if room < 1:
        raise InputError(
            f"teacher's text: new_tokens is {new_tokens} and the prompt of {key!r} has "
            f"{len(prompt)} tokens, expected room for one more in context = {context}"
        )
    return room


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if header["teacher_text"] == FORMAT:
            return header
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(
        f"{path}: begins with {line[:60]!r}, expected the settings of a file of teacher's text"
    )


def _check_header(path: Path, wanted: dict[str, Any], line: bytes | None = None) -> None:
    """InputError where a file was written, or begun, with other arguments."""
    if line is None:
        with open(path, "rb") as stream:
            line = stream.readline()
    found = _header(path, line)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{path}: holds another text, its {name} is {found.get(name)!r}, expected {value!r}"
            )


def _written(part: Path, header: dict[str, Any]) -> tuple[int, int]:
    """Texts of an earlier run, and the bytes of their whole lines with the header's."""
    whole = part.read_bytes() if part.exists() else b""
    size = whole.rfind(b"\n") + 1  # what follows was being written when it was killed
    if not size:
        return 0, 0
    lines = whole[:size].split(b"\n")[:-1]
    _check_header(part, header, lines[0])
    return len(lines) - 1, size
