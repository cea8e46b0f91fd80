"""An audit on the terminal and in a result file."""

from __future__ import annotations

import sys
from pathlib import Path

from slmperf.bench.auditing.report import AuditReport
from slmperf.bench.results import machine, write_results
from slmperf.bench.roof import roof


def print_report(report: AuditReport) -> None:
    """The table, then one line for every finding."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="slmperf audit", title_justify="left", caption_justify="left")
    table.caption = f"exact gradient: {report.reference}"
    for column in ("", "what", "found", "meant, or remark"):
        table.add_column(column, overflow="fold")
    rows = report.rows()
    for number, (section, *cells) in enumerate(rows):
        first = number == 0 or rows[number - 1][0] != section
        last = number + 1 == len(rows) or rows[number + 1][0] != section
        table.add_row(section if first else "", *cells, end_section=last)
    # A pipe has no width; 120 columns keep a line of the table a line of the log.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for line in report.verdict():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_report(path: Path, report: AuditReport) -> None:
    """A result file of kind "audit": a row for each part of the step, the rest under "audit"."""
    write_results(
        path,
        "audit",
        [part._asdict() for part in report.parts],
        machine=machine(report.device),
        roof=roof(report.device).as_json(),
        audit=report.as_json(),
    )
