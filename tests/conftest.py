"""Shared by all tests: offline hubs, two threads, real data if it is there, Triton interpreted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

# Before anything imports transformers or triton.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The machine that the budget of make test was set on has two cores; make gives each its process.
torch.set_num_threads(min(2, torch.get_num_threads()))


_COMPILING: list[subprocess.Popen] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where a collected test uses the battery and Triton is interpreted, mend the interpreter.

    And let kernels compile on the second core while other tests run: see `kernels_compiled`.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and "slmperf.testing" in sys.modules:
        from slmperf.testing import interpreter

        interpreter.cure()
    files = {item.path.name for item in session.items}
    # Alone, and where the other core has its own tests, they are compiled where they are asked for.
    among_others = "test_kernels_compile.py" in files and len(files) > 10
    among_others = among_others and "PYTEST_XDIST_WORKER" not in os.environ
    if among_others and find_spec("triton") and not session.config.option.collectonly:
        script = str(ROOT / "bench/kernels_check.py")
        command = ["nice", "-n", "15", sys.executable, script, "--sample"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        _COMPILING.append(subprocess.Popen(command, cwd=ROOT, **quiet))


@pytest.fixture(scope="session")
def kernels_compiled() -> None:
    """Waits for what was begun when the tests were collected; its results are in a cache."""
    for process in _COMPILING:
        process.wait()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real interactions, $SLMPERF_DATA or beside the repository; skips without."""
    folder = Path(os.environ.get("SLMPERF_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no ../shared/data: real interactions are not on this machine")
    return folder


@pytest.fixture(scope="session")
def paper_file() -> Path:
    """The paper's figures beside the repository; the test skips where they are not."""
    path = ROOT.parent / "shared" / "paper" / "results.json"
    if not path.is_file():
        pytest.skip("no ../shared/paper/results.json: the paper's tables are not on this machine")
    return path


@pytest.fixture(scope="session")
def paper(paper_file) -> dict:
    """The paper's figures."""
    return json.loads(paper_file.read_text())


@pytest.fixture
def slmperf(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: arguments -> exit code, stdout, stderr."""
    from slmperf import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["slmperf", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip, with the reason, where torch sees no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
