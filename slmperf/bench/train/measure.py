"""measure: times in turns, memory above weights and optimizer state: rows.

A row's ratios are medians over rounds of neighbouring times: what slows the machine down for a
while slows both. Keys of a row beside those of every result file:

    tokens_per_s                of the batch, answers or not
    speedup_over_eager, ..._lean, ..._answers_alone, ..._compiled, ..._liger, ..._liger_chunked
                                the other's time by its own
    overhead_pct                of the trainer: how much longer its step is than that of the bare
                                loop with kd_loss; both make their batches
    peak_mib                    the most that the step holds above weights and optimizer state:
                                activations, logits, gradients (peaks.py)
    memory_of_eager             its peak_mib by eager's
    loss                        of the first step
    head_share                  of all operations, those of the two heads over every row
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from slmperf.bench.train.counts import counts_of
from slmperf.bench.train.loop import batches_of, rounds_s, sampler
from slmperf.bench.train.peaks import peak_of
from slmperf.bench.train.problems import EAGER, OURS, TRAINER, Problem, models_of
from slmperf.bench.train.ways import Way, ways_of
from slmperf.testing.timing import summary

# A key of a row -> the way whose time stands above the row's own.
OTHERS = {
    "speedup_over_eager": EAGER,
    "speedup_over_lean": "eager, lean",
    "speedup_over_answers_alone": "eager, answers alone",
    "speedup_over_compiled": "torch.compile",
    "speedup_over_liger": "liger-kernel",
    "speedup_over_liger_chunked": "liger-kernel chunked",
}
OF_OURS = (OURS, f"{OURS}, every row", TRAINER)
# Losses of one problem that differ by more than this share are not of one formula. bf16 logits,
# which some ways have, are off by about 2^-9 / sqrt(tokens).
SAME_LOSS = 0.01


class Measured(NamedTuple):
    """Rows, and the name of each row that is missing -> why its way cannot run."""

    rows: list[dict[str, Any]]
    refused: dict[str, str]


def measure(problem: Problem, seconds: float, chosen: tuple[str, ...] | None = None) -> Measured:
    """A row for every way of a problem, timed in turns.

    seconds  of timing per way, at least five steps
    chosen   names of the ways; None: all
    """
    torch.compiler.reset()  # a limit on recompilations would silently run a later case uncompiled
    ways = {name: way for name, way in ways_of(problem).items() if chosen is None or name in chosen}
    refused: dict[str, str] = {}
    peaks = {}
    for name in ways:
        try:
            peaks[name] = peak_of(problem, name)
        except Exception as error:
            _refuse(refused, f"{problem}: {name}", error)
    if EAGER in peaks:
        for name, peak in peaks.items():
            right = peaks[EAGER].loss
            if not abs(peak.loss - right) <= SAME_LOSS * abs(right):
                refused[f"{problem}: {name}"] = f"loss {peak.loss:.6g}, eager has {right:.6g}"
    running = {name: way for name, way in ways.items() if f"{problem}: {name}" not in refused}
    times = _times(problem, running, refused, seconds)
    return Measured([_row(problem, name, ways[name], times, peaks) for name in times], refused)


def _times(
    problem: Problem, ways: Mapping[str, Way], refused: dict[str, str], seconds: float
) -> dict[str, list[float]]:
    """Way -> seconds of each round. All have one student and one optimizer: what weights are does
    not matter to a time, and each of their own would not fit.
    """
    models, batches = models_of(problem), batches_of(problem)
    samplers: dict[str, Callable[[], float]] = {}
    for name, way in ways.items():
        if way.loss is None:
            continue
        try:
            samplers[name] = sampler(problem, way.loss, models, batches)
            samplers[name]()  # compiles, and shows what cannot run
        except Exception as error:
            models.optimizer.zero_grad()
            samplers.pop(name)
            _refuse(refused, f"{problem}: {name}", error)
    trainer = TRAINER if TRAINER in ways else None
    return rounds_s(problem, samplers, models, trainer, seconds)


def _refuse(refused: dict[str, str], row: str, error: Exception) -> None:
    lines = str(error).strip().splitlines()
    refused[row] = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _row(
    problem: Problem,
    name: str,
    way: Way,
    times: Mapping[str, list[float]],
    peaks: Mapping[str, Any],
) -> dict[str, Any]:
    own = times[name]

    def times_of(other: str) -> float | None:
        """Another's time by this one's; None where it has none."""
        if other not in times or other == name:
            return None
        return statistics.median(a / b for a, b in zip(times[other], own, strict=True))

    found: dict[str, Any] = {
        "name": f"{problem}: {name}",
        **summary(own)._asdict(),
        "way": name,
        "role": way.role,
        "student": str(problem.student),
        "teacher": str(problem.teacher),
        "tokens": problem.tokens,
        "answers": problem.answers,
        "dtype": problem.dtype,
        "checkpointing": problem.checkpointing,
        "head_share": counts_of(problem).head_share,
        "yardstick": f"{problem}: {EAGER}",
    }
    found["tokens_per_s"] = problem.tokens / found["time_us"] * 1e6
    others = {key: times_of(other) for key, other in OTHERS.items()}
    found |= {key: value for key, value in others.items() if value is not None}
    if name == TRAINER and (bare := times_of(OURS)) is not None:
        found["overhead_pct"] = 100 * (1 / bare - 1)
    if name in peaks:
        found |= {key: value for key, value in peaks[name]._asdict().items() if value is not None}
        theirs = peaks[EAGER].peak_mib if EAGER in peaks else None
        if theirs and found.get("peak_mib") is not None:
            found["memory_of_eager"] = found["peak_mib"] / theirs
    return found
