"""studies: which problems the command and the GPU check measure."""

from __future__ import annotations

from dataclasses import replace

from slmperf.bench.train.problems import OURS, SIZES, TOY, TRAINER, Problem
from slmperf.check import InputError, parse_tokens
from slmperf.models.shapes import shape_of

# A problem -> names of its ways; None: all of them.
Studies = dict[Problem, tuple[str, ...] | None]


def problems(
    device: str,
    student: str | None,
    teacher: str | None,
    tokens: str | None,
    context: str | None,
    answers: str,
    checkpointing: str,
    dtype: str | None,
) -> Studies:
    """What is measured one after the other, the device's own sizes where nothing is asked for; then
    the trainer at a toy's size. InputError for what cannot be.
    """
    if checkpointing not in ("off", "on", "both"):
        raise InputError(f"checkpointing is {checkpointing!r}, expected off, on or both")
    small, large, count, length = SIZES[device]
    small = small if student is None else shape_of(student)
    large = large if teacher is None else shape_of(teacher)
    count = count if tokens is None else parse_tokens(tokens, "tokens")
    length = min(length, count) if context is None else parse_tokens(context)
    if count % length:
        raise InputError(f"tokens is {count}, expected a multiple of context = {length}")
    found: Studies = {}
    for kind in (dtype or ("bf16" if device == "cuda" else "fp32")).split(","):
        for every in map(_every, answers.split(",")):
            problem = Problem(small, large, count // length, length, kind, device, every)
            if every > 1 or checkpointing != "on":
                found[problem] = None
            if every == 1 and checkpointing != "off":
                found[replace(problem, checkpointing=True)] = None
    found[replace(TOY, device=device)] = (OURS, TRAINER)
    return found


def _every(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"answers is {text!r}, expected whole numbers: one token in so many"
        ) from None
