"""measure: times in turns, memory above the inputs, errors of the gradients.

A row's ratios are medians over rounds of neighbouring times: what slows the machine down for a
while slows both. Keys of a row beside those of every result file:

    times_products              its time by that of the products alone, in its dtype
    speedup_over_eager, ..._compiled, ..._liger, ..._liger_chunked, ..._fp32
                                the other's time by its own; fp32: ours on inputs in fp32
    tflops                      of the products' operations
    peak_mib                    the most held beyond the inputs, gradients included
    above_gradients_gib         that, less the gradients themselves
    memory_of_eager, memory_of_reference
                                its peak_mib by theirs
    gradient_error, gradient_error_close
                                the larger of those of hidden states and head: norm of the
                                difference from float64 by the norm, at fewer tokens; of a student
                                apart from its teacher, and of one close to it (problems.py)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.bench.kd.peaks import peak_of
from slmperf.bench.kd.problems import Problem, Step
from slmperf.bench.kd.ways import OURS, PRODUCTS, Way, call_of, eager, steps_of, ways_of
from slmperf.testing.timing import Call, rounds_s, sampler, summary

# Few enough that float64 is affordable, and enough that an error is no matter of luck.
ERROR_TOKENS = {"cpu": 64, "cuda": 256}
# A key of a row -> the way whose time stands above the row's own.
OTHERS = {
    "speedup_over_eager": "eager",
    "speedup_over_compiled": "torch.compile",
    "speedup_over_liger": "liger-kernel",
    "speedup_over_liger_chunked": "liger-kernel chunked",
}


class Measured(NamedTuple):
    """Rows, and the name of each row that is missing -> why its way cannot run."""

    rows: list[dict[str, Any]]
    refused: dict[str, str]


class _Entry(NamedTuple):
    """One row to be."""

    problem: Problem
    name: str  # of the way
    way: Way
    logits: tuple[str, ...]

    @property
    def row(self) -> str:
        return f"{self.problem}: {self.name}"


def measure(problems: Mapping[Problem, tuple[str, ...]], seconds: float) -> Measured:
    """A row for every way of every problem, timed in turns with all others.

    problems  problem -> the modes of ours; those with `answers` come after their own whole
    seconds   of timing per row, at least five rounds
    """
    torch.compiler.reset()  # a limit on recompilations would silently run a later case uncompiled
    refused: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    entries = [
        _Entry(problem, name, way, logits)
        for problem, logits in problems.items()
        for name, way in ways_of(problem, logits).items()
    ]
    for entry in entries:
        try:
            facts[entry.row] = _facts(entry)
        except Exception as error:
            _refuse(refused, entry.row, error)
    for problem, logits in problems.items():
        if problem.answers is None:
            errors = gradient_errors(problem, ways_of(problem, logits))
            for name, found in errors.items():
                facts.get(f"{problem}: {name}", {}).update(found)
    times = _times(
        [entry for entry in entries if entry.row not in refused], refused, facts, seconds
    )
    if any(problem.device == "cuda" for problem in problems):
        torch.cuda.empty_cache()
    rows = [_row(entry, times, facts) for entry in entries if entry.row in times]
    return Measured(rows, refused)


def _times(
    entries: Sequence[_Entry],
    refused: dict[str, str],
    facts: Mapping[str, dict[str, Any]],
    seconds: float,
) -> dict[str, list[float]]:
    """Row -> seconds of each round; a problem's ways share its inputs."""
    samplers: dict[str, Callable[[], float]] = {}
    given: dict[Problem, dict[str, Tensor]] = {}
    for entry in entries:
        if entry.problem not in given:
            given[entry.problem] = entry.problem.inputs()
        try:
            call = call_of(entry.way, given[entry.problem])
            samplers[entry.row], graph = _sampler(call, entry.problem.device, entry.way.graph)
            facts[entry.row]["graph"] = graph
        except Exception as error:
            _refuse(refused, entry.row, error)
    return rounds_s(samplers, seconds)


def _refuse(refused: dict[str, str], row: str, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    refused[row] = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _facts(entry: _Entry) -> dict[str, Any]:
    """What a row says besides times and errors."""
    problem, way = entry.problem, entry.way
    found: dict[str, Any] = {
        "tokens": problem.tokens,
        "vocabulary": problem.vocabulary,
        "student": problem.student,
        "teacher": problem.teacher,
        "dtype": problem.dtype,
        "divergence": problem.divergence,
        "answers": problem.answers,
        "way": entry.name,
        "role": way.role,
    }
    if way.role != "products" and (peak := peak_of(problem, entry.name, entry.logits)) is not None:
        found["peak_mib"] = peak
        found["above_gradients_gib"] = (peak - problem.gradient_bytes / 2**20) / 2**10
    return found


def _sampler(call: Call, device: str, graph: bool) -> tuple[Callable[[], float], bool]:
    """And whether it replays a graph: what cannot be captured is timed as it is."""
    if graph and device == "cuda":
        try:
            return sampler([call], device), True
        except Exception:
            torch.cuda.synchronize()
    return sampler([call], device, graph=False), False


def _row(
    entry: _Entry, times: Mapping[str, list[float]], facts: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    problem, own = entry.problem, times[entry.row]

    def times_of(name: str, of: Problem) -> float | None:
        """Another's time by this one's; None where it has none."""
        if (other := times.get(f"{of}: {name}")) is None:
            return None
        return statistics.median(a / b for a, b in zip(other, own, strict=True))

    found = {"name": entry.row, **summary(own)._asdict(), **facts[entry.row]}
    found["tflops"] = problem.flops / found["time_us"] * 1e-6
    found["yardstick"] = f"{problem}: {PRODUCTS}"
    if entry.way.role == "products":
        return found
    if (share := times_of(PRODUCTS, problem)) is not None:
        found["times_products"] = 1 / share
    whole = replace(problem, answers=None)  # what others compute in any case
    others = {key: times_of(name, whole) for key, name in OTHERS.items() if name != entry.name}
    if entry.way.role == "ours" and problem.dtype != "fp32":
        wide = replace(problem, dtype="fp32")
        others["speedup_over_fp32"] = times_of(OURS.format("fp32"), wide)
    found |= {key: value for key, value in others.items() if value is not None}
    for name in ("eager", "reference"):
        theirs = facts.get(f"{whole}: {name}", {}).get("peak_mib")
        if theirs and found.get("peak_mib") is not None:
            found[f"memory_of_{name}"] = found["peak_mib"] / theirs
    return found


def gradient_errors(problem: Problem, ways: Mapping[str, Way]) -> dict[str, dict[str, float]]:
    """Way -> gradient_error and gradient_error_close, at ERROR_TOKENS tokens at most.

    Against eager in float64 on the very inputs, so that what rounding them cost is no error.
    """
    small = problem.of_tokens(ERROR_TOKENS[problem.device])
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for key, close in (("gradient_error", False), ("gradient_error_close", True)):
        given = small.inputs(close)
        wide = {name: one.detach().double() for name, one in given.items()}
        wide["hidden"].requires_grad_()
        wide["weight"].requires_grad_()
        truth = _gradients(eager(small, torch.float64), wide)
        del wide
        for name, way in ways.items():
            if way.role != "products":
                with suppress(Exception):  # its time says why it cannot run
                    errors = map(relative_error, _gradients(way.run, given), truth)
                    found[name][key] = max(errors)
        del truth, given
    return found


def _gradients(run: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(given), (given["hidden"], given["weight"]))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference by the norm of the truth."""
    return float(torch.linalg.vector_norm(found.double() - truth) / truth.norm())


def measure_step(step: Step, seconds: float) -> list[dict[str, Any]]:
    """The step before and now: times in turns, memory, and what became of both."""
    given = step.inputs()
    ways = steps_of(step)
    calls = {name: call_of(way, given) for name, way in ways.items()}
    samplers = {name: _sampler(call, step.device, True)[0] for name, call in calls.items()}
    times = rounds_s(samplers, seconds)
    peaks = {name: peak_of(step, name) for name in ways}
    rows = [
        {
            "name": f"{step}: {name}",
            **summary(times[name])._asdict(),
            "way": name,
            "peak_mib": peaks[name],
            "yardstick": f"{step}: before",
        }
        for name in ways
    ]
    pairs = zip(times["before"], times["now"], strict=True)
    rows[1]["speedup_over_before"] = statistics.median(a / b for a, b in pairs)
    if peaks["before"] and peaks["now"]:
        rows[1]["memory_of_before"] = peaks["now"] / peaks["before"]
    return rows
