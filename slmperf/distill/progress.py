"""How a training shows itself: a bar with tokens/s and time left, and a plain log file."""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class LogFile:
    """Lines with a time stamp, each written at once, so that a kill loses none. None: no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def line(self, text: str) -> None:
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


class Bar:
    """A progress bar over the steps of a training. Off a terminal only the log file tells."""

    def __init__(self, name: str, steps: int, done: int, show: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (show and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(name, total=steps, completed=done, speed="", loss="")
        self._bar.start()

    def update(self, step: int, tokens_per_second: float, loss: float | None) -> None:
        speed = f"{tokens_per_second:,.0f} tokens/s"
        told = "" if loss is None else f"loss {loss:.4f}"
        self._bar.update(self._task, completed=step, speed=speed, loss=told)

    def close(self) -> None:
        self._bar.stop()


class Clock:
    """Seconds and tokens of a training, over all its runs."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before = seconds
        self._start = time.perf_counter()
        self._tokens_before = tokens
        self.tokens = tokens

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    @property
    def tokens_per_second(self) -> float:
        """Speed of this run alone."""
        return (self.tokens - self._tokens_before) / max(time.perf_counter() - self._start, 1e-9)

    def left(self, steps_done: int, steps_to_do: int) -> str:
        """Time left as h:mm:ss, at the pace of this run; "?" before its first step."""
        if steps_done == 0:
            return "?"
        pace = (time.perf_counter() - self._start) / steps_done
        return str(timedelta(seconds=round(pace * steps_to_do)))
