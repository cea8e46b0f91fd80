"""Starts engines as subprocesses, in their own environments and from a temporary folder.

What they say goes into files, the ends of which are shown when something fails. Whatever a process
started is killed with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from checkpoints import DTYPE, PROMPTS, TOKENS, TOP
from environments import DEVICE, folder

HERE = Path(__file__).parent
SHOWN = 6000  # characters of a log
# Of all jobs together; a GPU's kernels are compiled in them.
JOBS_TIMEOUT_S = 360 if DEVICE == "cpu" else 1200


class Job(NamedTuple):
    """One start of an engine."""

    name: str
    model: Path
    options: dict = {}  # of the engine, see run_jobs.py
    new_tokens: int = TOKENS


class Outcome(NamedTuple):
    """What came of it: for each prompt tokens, top and prompt_logprobs; None where it failed."""

    found: list[dict] | None
    log: str


def environment(engine: str, run: Path, site: Path | None) -> dict[str, str]:
    """Variables of an engine's processes; `site`: where slmperf is installed, None: nowhere."""
    stubs = [HERE / "stubs" / engine] if DEVICE == "cpu" else []
    paths = [*stubs, *([site] if site else [])]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "XDG_"))}
    return keep | {
        "HOME": str(run),  # and with it all caches
        "PATH": f"{folder(engine) / 'bin'}:{os.environ['PATH']}",  # ninja, for kernels of a GPU
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": str(int(DEVICE == "cpu")),  # takes longer than what it speeds up
        "SGLANG_USE_CPU_ENGINE": str(int(DEVICE == "cpu")),
        "VLLM_CACHE_ROOT": str(folder(engine) / "cache"),  # what it found out of its own classes
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork" if DEVICE == "cpu" else "spawn",
    }


@contextmanager
def started(
    engine: str, arguments: list, run: Path, site: Path | None, **more: str
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """python with these arguments, and its log; dead with all it started when the block ends."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [folder(engine) / "bin/python", *map(str, arguments)],
            cwd=run,
            env=environment(engine, run, site) | more,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run_jobs(engine: str, jobs: list[Job], run: Path, site: Path | None) -> dict[str, Outcome]:
    """Each job's outcome by its name, one after the other."""
    rest = {"prompts": PROMPTS, "top": TOP, "device": DEVICE, "dtype": DTYPE}
    described = [{**job._asdict(), "model": str(job.model), **rest} for job in jobs]
    (run / "jobs.json").write_text(json.dumps(described))
    with started(engine, [HERE / "run_jobs.py", engine, run], run, site) as (process, log):
        try:
            process.wait(JOBS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass  # what is done counts
    outcomes = {}
    for job in jobs:
        found, said = run / f"{job.name}.json", run / f"{job.name}.log"
        outcomes[job.name] = Outcome(
            json.loads(found.read_text()) if found.exists() else None,
            (said if said.exists() else log).read_text(),
        )
    return outcomes


@contextmanager
def serving(
    engine: str,
    arguments: list,
    run: Path,
    site: Path | None,
    timeout_s: float,
    ready: str = "/health",
) -> Iterator[str]:
    """The address of a server that answers at `ready`; it gets --host and --port."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    asked = [*arguments, "--host", "127.0.0.1", "--port", port]
    with started(engine, asked, run, site) as (process, log):
        limit = time.monotonic() + timeout_s
        while True:
            try:
                urllib.request.urlopen(address + ready, timeout=20).close()
                break
            except OSError:
                dead = process.poll() is not None
                assert not dead and time.monotonic() < limit, log.read_text()[-SHOWN:]
                time.sleep(0.5)
        yield address


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def post(address: str, body: dict) -> dict:
    """The answer to a JSON request."""
    content = {"content-type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
