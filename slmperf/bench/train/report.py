"""report: rows of measure as tables, what was expected of them, and what they come to in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slmperf.bench.roof import Roof
from slmperf.bench.train.counts import counts_of
from slmperf.bench.train.problems import Problem

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]

# Key of a row -> heading and how it is written.
COLUMNS: dict[str, tuple[str, str]] = {
    "time_us": ("ms", "{:.5g}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "speedup_over_eager": ("over eager", "{:.2f} x"),
    "speedup_over_lean": ("over lean", "{:.2f} x"),
    "speedup_over_answers_alone": ("over alone", "{:.2f} x"),
    "speedup_over_compiled": ("over compiled", "{:.2f} x"),
    "speedup_over_liger": ("over liger", "{:.2f} x"),
    "speedup_over_liger_chunked": ("over chunked", "{:.2f} x"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "memory_of_eager": ("of eager's", "{:.0%}"),
    "overhead_pct": ("overhead", "{:+.1f}%"),
    "loss": ("loss", "{:.5f}"),
}


def cell(row: Row, key: str) -> str:
    """A row's value as the table shows it, "-" where it has none."""
    value = row.get(key)
    if value is None:
        return "-"
    return COLUMNS[key][1].format(value / 1e3 if key == "time_us" else value)


def expected(problem: Problem, roof: Roof) -> str:
    """What was counted before anything was measured, a line."""
    found = counts_of(problem)
    eager, ours = found.expected_us(roof, problem.dtype)
    return (
        f"counted: layers {found.layer_flops / 1e12:.3g} TFLOP, heads of all rows "
        f"{found.head_flops / 1e12:.3g} ({found.head_share:.0%} of the step), of the answers "
        f"{found.answer_flops / 1e12:.3g}; eager moves {found.logit_bytes / 1e9:.3g} GB of logits "
        f"and holds {found.logit_mib:,.0f} MiB of them; at this machine's best rates eager "
        f"{eager / 1e3:.4g} ms, kd_loss {ours / 1e3:.4g} ms: {eager / ours:.2f} x"
    )


def table(problem: Problem, rows: Sequence[Row], refused: Mapping[str, str], roof: Roof) -> Table:
    """The rows of one problem, under what was expected of them."""
    from rich.table import Table

    notes = [expected(problem, roof), *(f"{name}: {why}" for name, why in refused.items())]
    notes.append(
        "a step: its batch, forward, backward, clipping, AdamW; peak: the most held above weights "
        "and optimizer state, gradients included; overhead: of the trainer over kd_loss's bare loop"
    )
    shown = Table(
        title=str(problem), title_justify="left", caption="\n".join(notes), caption_justify="left"
    )
    shown.add_column("way", overflow="fold")
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    for key in keys:
        shown.add_column(COLUMNS[key][0], justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row["way"], *(cell(row, key) for key in keys))
    return shown


def lines(rows: Sequence[Row]) -> list[str]:
    """What each row of ours comes to, a line each."""
    found = []
    for row in rows:
        if row["role"] != "ours":
            continue
        parts = [f"{row['tokens_per_s']:,.0f} tokens/s"]
        if "speedup_over_eager" in row:
            faster = row["speedup_over_eager"]
            parts.append(f"{faster:.2f} x as fast as eager ({1 - 1 / faster:.0%} less time)")
        if "memory_of_eager" in row:
            parts.append(f"{1 - row['memory_of_eager']:.0%} less memory")
        if "overhead_pct" in row:
            parts.append(f"{row['overhead_pct']:+.2f}% over the bare loop")
        found.append(f"{row['name']}: {', '.join(parts)}")
    return found
