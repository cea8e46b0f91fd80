"""peaks: the most memory that a way holds beyond its inputs.

On a GPU what torch's allocator gives out. On a CPU the largest resident set of a process of its
own, less the one before the call: it counts what torch, its libraries and C++ kernels allocate
alike, and of every buffer the pages that were written. Inputs are there before; so is what the
first call of any size leaves behind (threads, the libraries' code). Every block of 64 KiB or more
is mapped alone there, so that what is freed is gone at once.

    python -m slmperf.bench.kd.peaks '{"problem": {...}, "logits": [...], "way": "eager"}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from slmperf.bench.kd.problems import Problem, Step
from slmperf.bench.kd.ways import Way, call_of, steps_of, ways_of
from slmperf.testing.timing import peak_mib

_MMAP_THRESHOLD = -3  # of malloc.h


def peak_of(problem: Problem | Step, name: str, logits: tuple[str, ...] = ()) -> float | None:
    """MiB that forward and backward hold at most beyond the inputs, the gradients included.

    None on a CPU whose system does not let a process forget its largest resident set.
    """
    if problem.device == "cuda":
        call = call_of(_ways(problem, logits)[name], problem.inputs())
        found = peak_mib(call, "cuda")
        del call
        torch.cuda.empty_cache()
        return found
    task = {
        type(problem).__name__.lower(): asdict(problem),
        "logits": logits,
        "way": name,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "slmperf.bench.kd.peaks", json.dumps(task)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"memory of {name}: {lines[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def _ways(problem: Problem | Step, logits: tuple[str, ...]) -> Mapping[str, Way]:
    return steps_of(problem) if isinstance(problem, Step) else ways_of(problem, logits)


def _resident_mib(what: str) -> float:
    """VmRSS or VmHWM, the largest of it so far."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _measured(problem: Problem | Step, way: Way) -> float | None:
    """In a process that has measured nothing yet."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    small = replace(problem, tokens=8, vocabulary=64)
    call = call_of(way, problem.inputs())
    if way.role == "compiled":
        call()  # what the compiler holds is not the step's
    else:
        call_of(way, small.inputs())()
    gc.collect()
    libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest resident set
    except OSError:
        return None
    before = _resident_mib("VmRSS")
    call()
    return _resident_mib("VmHWM") - before


def _main(text: str) -> None:
    task: dict[str, Any] = json.loads(text)
    torch.set_num_threads(task["threads"])
    problem = Step(**task["step"]) if "step" in task else Problem(**task["problem"])
    print(json.dumps(_measured(problem, _ways(problem, tuple(task["logits"]))[task["way"]])))


if __name__ == "__main__":
    _main(sys.argv[1])
