"""report: rows of measure as tables, and what they come to in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slmperf.bench.kd.problems import CLOSE_GAP, CLOSE_OFFSET, Step

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]

# Key of a row -> heading and how it is written.
COLUMNS: dict[str, tuple[str, str]] = {
    "time_us": ("ms", "{:.4g}"),
    "times_products": ("x products", "{:.3f}"),
    "speedup_over_eager": ("over eager", "{:.2f} x"),
    "speedup_over_compiled": ("over compiled", "{:.2f} x"),
    "speedup_over_liger": ("over liger", "{:.2f} x"),
    "speedup_over_liger_chunked": ("over chunked", "{:.2f} x"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "gradient_error": ("error", "{:.2g}"),
    "gradient_error_close": ("close", "{:.2g}"),
}


def cell(row: Row, key: str) -> str:
    """A row's value as the table shows it, "-" where it has none."""
    value = row.get(key)
    if value is None:
        return "-"
    return COLUMNS[key][1].format(value / 1e3 if key == "time_us" else value)


def table(rows: Sequence[Row], refused: Mapping[str, str], title: str) -> Table:
    """The rows of a measurement, a section per problem."""
    from rich.table import Table

    notes = [f"{name}: {reason}" for name, reason in refused.items()]
    notes.append(
        "peak: the most held beyond the inputs, gradients included; error: of the gradients, "
        f"relative, against float64; close: of a student {CLOSE_GAP:g} from its teacher, logits "
        f"around {CLOSE_OFFSET:g}"
    )
    shown = Table(
        title=title, title_justify="left", caption="\n".join(notes), caption_justify="left"
    )
    shown.add_column("way", overflow="fold")
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    for key in keys:
        shown.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
    problem = None
    for row in rows:
        answers = "" if row["answers"] is None else f", {row['answers']} answers alone"
        found = f"{row['dtype']}{answers}"
        if found != problem:
            shown.add_section()
            shown.add_row(found, *[""] * len(keys))
            problem = found
        shown.add_row(f"  {row['way']}", *(cell(row, key) for key in keys))
    return shown


def lines(rows: Sequence[Row]) -> list[str]:
    """What each row of ours comes to, a line each."""
    found = []
    for row in rows:
        if row.get("role") != "ours":
            continue
        parts = [
            said.format(1 / row[key] if key.startswith("memory_of_") else row[key])
            for key, said in (
                ("times_products", "{:.3f} x the products"),
                ("speedup_over_eager", "{:.2f} x as fast as eager"),
                ("memory_of_eager", "1/{:.1f} of its memory"),
                ("memory_of_reference", "1/{:.1f} of the reference's"),
                ("speedup_over_fp32", "{:.2f} x as fast as on inputs in fp32"),
            )
            if row.get(key)
        ]
        found.append(f"{row['name']}: {', '.join(parts) or '-'}")
    return found


def step_table(rows: Sequence[Row], step: Step) -> Table:
    """The step before and now."""
    from rich.table import Table

    shown = Table(
        title=f"{step}: head and loss, forward and backward, {step.tokens} tokens, vocabulary "
        f"{step.vocabulary}, hidden {step.student} from {step.teacher}",
        title_justify="left",
        caption="before: all logits of these tokens, through divergence and cross_entropy",
        caption_justify="left",
    )
    shown.add_column("way")
    for heading in ("ms", "quartiles", "peak MiB", "time", "memory"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speedup, memory = row.get("speedup_over_before"), row.get("memory_of_before")
        shown.add_row(
            row["way"],
            f"{row['time_us'] / 1e3:.2f}",
            f"{row['low_us'] / 1e3:.2f} to {row['high_us'] / 1e3:.2f}",
            cell(row, "peak_mib"),
            "1" if speedup is None else f"{1 / speedup:.2f}",
            "1" if memory is None else f"{memory:.2f}",
        )
    return shown
