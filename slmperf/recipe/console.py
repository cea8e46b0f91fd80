"""console: what a run says. Lines on the terminal and, timed, in run.log; bars on long steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from slmperf.command.terminal import Move, bars
from slmperf.distill.progress import LogFile


class Voice:
    """Says a line on standard output, and in the log file once there is one."""

    def __init__(self) -> None:
        self.log: LogFile | None = None
        self._early: list[str] = []  # said before the output folder exists

    def say(self, text: str) -> None:
        """One line on the terminal and in the log."""
        print(text, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """One line in the log alone."""
        if self.log is None:
            self._early.append(text)
        else:
            self.log.line(text)

    def log_to(self, path: Path) -> None:
        """Open the log file; what was said before goes into it first."""
        self.log = LogFile(path)
        while self._early:
            self.log.line(self._early.pop(0))

    @contextlib.contextmanager
    def bar(self, title: str, *, show: bool = True) -> Iterator[Move]:
        """A bar with the time left, moved by calls of (done, total); off a terminal invisible."""
        with bars(show) as stage:
            yield stage(title)
