"""terminal: what a command shows: bars on stderr while it works, tables on stdout.

Rich is imported where it is used, because `slmperf --help` reads this file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Move = Callable[[int, int], None]  # of (done, total)
# Of a title a function that says how much of it is done.
Stages = Callable[[str], Move]

# Columns of words; those of figures stand to the right.
_WORDS = ("layer", "method", "calibration", "size", "scheme", "note", "measured", "weights")


@contextlib.contextmanager
def bars(show: bool = True) -> Iterator[Stages]:
    """Bars with the time left, one under the other, of each title one that starts at its first call
    of (done, total); off a terminal, or where they are not to `show`, invisible.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    shown = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not (show and sys.stderr.isatty()),
    )
    with shown:

        def stage(title: str) -> Move:
            tasks: list[TaskID] = []

            def move(done: int, total: int) -> None:
                if not tasks:
                    tasks.append(shown.add_task(title, total=None))
                shown.update(tasks[0], completed=done, total=total)

            return move

        yield stage


def new_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table: words to the left, figures to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right")
    return table


def print_table(table: Table) -> None:
    """Print a table; into a pipe, which has no width, 120 columns wide."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)


def digits(value: float | None) -> str:
    """A figure of a table: four digits; "" for none."""
    return "" if value is None else f"{value:.4f}" if value < 10 else f"{value:.4g}"
