"""studies: which problems are measured together, by the command and by the GPU check."""

from __future__ import annotations

from dataclasses import replace

import torch

from slmperf.bench.kd.problems import DTYPES, Problem
from slmperf.check import InputError, parse_tokens
from slmperf.ops.half_products import has_bf16_units

# Sizes if none are asked for: (tokens, vocabulary, student, teacher).
SIZES = {
    "cpu": ("1024", 32000, 512, 768),
    "cuda": ("1k,2k,4k,8k", 128256, 4096, 4096),
}
LOGITS = {"cpu": ("fp32",), "cuda": ("bf16", "fp32", "difference")}
DTYPES_OF = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
ANSWERS_EVERY = 128  # tokens

Study = dict[Problem, tuple[str, ...]]  # problem -> modes of ours


def studies(
    device: str,
    tokens: str | None,
    vocabulary: int | None,
    student: int | None,
    teacher: int | None,
    dtype: str | None,
    logits: str | None,
    divergence: str,
) -> dict[str, Study]:
    """Title -> what is timed in turns: a study per number of tokens, the device's own sizes where
    nothing is asked for. InputError for what cannot be.
    """
    sizes = SIZES[device]
    if logits is not None and logits not in LOGITS["cuda"]:
        raise InputError(f"logits is {logits!r}, expected one of {', '.join(LOGITS['cuda'])}")
    if logits == "difference" and device == "cpu":
        raise InputError("logits is 'difference', expected fp32 or bf16 on a CPU")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    if dtype == "fp32" and logits not in (None, "fp32"):
        raise InputError(f"logits is {logits!r}, expected fp32 with dtype fp32")
    found: dict[str, Study] = {}
    for count in map(parse_tokens, (sizes[0] if tokens is None else tokens).split(",")):
        problems: Study = {}
        for kind in DTYPES_OF[device] if dtype is None else (dtype,):
            problem = Problem(
                count,
                sizes[1] if vocabulary is None else vocabulary,
                sizes[2] if student is None else student,
                sizes[3] if teacher is None else teacher,
                kind, device, divergence,
            )  # fmt: skip
            modes = LOGITS[device] if logits is None else (logits,)
            modes = tuple(mode for mode in modes if kind == "bf16" or mode == "fp32")
            problems[problem] = modes
            if count >= 2 * ANSWERS_EVERY:
                problems[replace(problem, answers=count // ANSWERS_EVERY)] = modes[-1:]
        first = next(iter(problems))
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        found[f"{first.heads}, {count} tokens, {divergence}{threads}"] = problems
    return found


def bf16_units(device: str) -> bool:
    """Whether bf16 x bf16 -> fp32 runs at bf16's speed."""
    return bool(has_bf16_units(torch.device(device)))
