"""peaks: the most memory that a step holds above weights and optimizer state.

Counted is all that the step itself makes, from the batch to the weights' update: activations,
logits, what the loss holds, gradients. Weights of both models and AdamW's moments are there before,
and no gradient is. On a GPU it is what torch's allocator gives out. On a CPU it is the largest
resident set of a process of its own less the one before the step, as in slmperf.bench.kd.peaks.

    python -m slmperf.bench.train.peaks '{"problem": {...}, "way": "eager", "threads": 2}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from slmperf.bench.train.loop import take_step, trainer_of
from slmperf.bench.train.problems import Models, Problem, models_of
from slmperf.bench.train.ways import Way, ways_of

_MMAP_THRESHOLD = -3  # of malloc.h
_WARM_CONTEXT, _WARM_VOCABULARY = 8, 64


class Peak(NamedTuple):
    """Of the first step from the problem's own weights.

    peak_mib  None on a CPU whose system does not let a process forget its largest resident set
    loss      before the step
    """

    peak_mib: float | None
    loss: float


def peak_of(problem: Problem, name: str) -> Peak:
    """What one way's step holds and finds."""
    if problem.device == "cuda":
        gc.collect()
        found = _measured(problem, name, _OnDevice())
        gc.collect()
        torch.cuda.empty_cache()
        return found
    task = {"problem": problem.as_json(), "way": name, "threads": torch.get_num_threads()}
    done = subprocess.run(
        [sys.executable, "-m", "slmperf.bench.train.peaks", json.dumps(task)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"memory of {name}: {lines[-1][:200]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


class _OnDevice:
    """Of torch's allocator."""

    def begin(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def end(self) -> float | None:
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self.before) / 2**20


class _OfProcess:
    """Of a process that has measured nothing yet and maps every block of 64 KiB or more alone, so
    that what is freed is gone at once.
    """

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)
        self.libc.mallopt(_MMAP_THRESHOLD, 2**16)

    def begin(self) -> None:
        gc.collect()
        self.libc.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the largest resident set
            self.before: float | None = _resident_mib("VmRSS")
        except OSError:
            self.before = None

    def end(self) -> float | None:
        return None if self.before is None else _resident_mib("VmHWM") - self.before


def _resident_mib(what: str) -> float:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _measured(problem: Problem, name: str, gauge: _OnDevice | _OfProcess) -> Peak:
    """One small step leaves behind what the first of any size does (threads, libraries' code)."""
    small = problem.of_context(_WARM_CONTEXT, _WARM_VOCABULARY)
    _step(small, ways_of(small)[name], models_of(small), _nothing, _nothing)
    way, models = ways_of(problem)[name], models_of(problem)
    for group in models.optimizer.param_groups:
        group["lr"] = 0.0  # all steps find the same weights
    if way.role in ("compiled", "rival"):
        _step(problem, way, models, _nothing, _nothing)  # what a compiler holds is not the step's
    else:
        _make_moments(models)
    peak: list[float | None] = []
    loss = _step(problem, way, models, gauge.begin, lambda: peak.append(gauge.end()))
    return Peak(peak[0], loss)


def _nothing() -> None:
    pass


def _make_moments(models: Models) -> None:
    """AdamW's, by a step on gradients of 0."""
    for weight in models.student.parameters():
        weight.grad = torch.zeros_like(weight)
    models.optimizer.step()
    models.optimizer.zero_grad()


def _step(
    problem: Problem,
    way: Way,
    models: Models,
    begin: Callable[[], None],
    end: Callable[[], None],
) -> float:
    """One step of a way, in a bare loop or the trainer's; its loss."""
    if way.loss is not None:
        batch = problem.batch()
        begin()
        loss = take_step(way.loss, models, batch)
        end()
        return float(loss)

    def told(event: str) -> bool:
        (begin if event == "begin" else end)()
        return False

    with trainer_of(problem, models, 1, told) as trainer:
        trainer.train()
        return trainer.losses[0]


def _main(text: str) -> None:
    task = json.loads(text)
    torch.set_num_threads(task["threads"])
    print(json.dumps(_measured(Problem.of_json(task["problem"]), task["way"], _OfProcess())))


if __name__ == "__main__":
    _main(sys.argv[1])
