"""Real serving engines: their environments, slmperf's wheel, checkpoints and what is right.

`make test-engines` runs this folder; `make test` does not collect it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import processes
import pytest
from checkpoints import Checkpoint
from environments import missing
from processes import Job, Outcome

pytest.register_assert_rewrite("served")  # whose tests the test files import


def pytest_sessionstart() -> None:
    """Nothing runs without the environments."""
    if missing():
        pytest.exit(f"no environment of {missing()}: make test-engines builds them", returncode=2)


@pytest.fixture(scope="session")
def site(tmp_path_factory, root) -> Path:
    """slmperf's wheel, built from the checkout and installed alone: what a user's pip would find.

    One for all processes that run tests.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        site = shared / "site"
        if not site.exists():
            built = shared / "wheel"
            built.mkdir()
            build = ["setup.py", "-q", "egg_info", "--egg-base", built]
            build += ["build", "--build-base", built, "bdist_wheel", "--dist-dir", built]
            _run([sys.executable, *build], root)
            (wheel,) = built.glob("*.whl")
            install = ["-m", "pip", "install", "-q", "--no-deps", "--target", shared / "aside"]
            _run([sys.executable, *install, wheel], root)
            (shared / "aside").rename(site)
    return site


def _run(command: list, root: Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Checkpoint]:
    """name, engine -> the checkpoint of `checkpoints.MODELS`, made once."""
    made = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name, engine: Checkpoint(name, made / f"{name}-{engine}", engine))


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory) -> Callable[..., dict[str, Outcome]]:
    """processes.run_jobs in a folder of its own."""

    def run(engine: str, jobs: list[Job], site: Path | None = None) -> dict[str, Outcome]:
        return processes.run_jobs(engine, jobs, tmp_path_factory.mktemp(f"{engine}-jobs"), site)

    return run


@pytest.fixture(scope="session")
def in_environment(tmp_path_factory) -> Callable[..., str]:
    """Runs Python source in an engine's environment, slmperf beside it: what it printed."""

    def run(engine: str, source: str, site: Path, **more: str) -> str:
        place = tmp_path_factory.mktemp(f"{engine}-source")
        with processes.started(engine, ["-c", source], place, site, **more) as (process, log):
            code = process.wait(120)
        said = log.read_text()
        assert code == 0, said[-processes.SHOWN :]
        return said

    return run
