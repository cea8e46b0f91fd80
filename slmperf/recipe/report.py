"""report: Results -> report.md, a self-contained report.html, and the table on the console."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.models.files import write_atomically
from slmperf.recipe import plots
from slmperf.recipe.report_cells import Table, metric
from slmperf.recipe.report_tables import LATENCY, LAYER, MAIN, main_table, tables
from slmperf.recipe.results import Results

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Plot:
    """One SVG picture, base64, printed after the table of that title."""

    title: str
    caption: str
    svg: str
    after: str


def write_report(results: Results, folder: Path) -> None:
    """Write report.md and report.html into the folder. The html needs nothing beside itself."""
    content = {
        "first_line": first_line(results),
        "synthetic": results.data.synthetic,
        "title": f"slmperf: {results.recipe}",
        "summary": _summary(results),
        "tables": tables(results),
        "plots": _plots(results),
    }
    write_pages(content, Path(folder))


def write_pages(content: Mapping[str, Any], folder: Path) -> None:
    """Fill the templates: first_line, synthetic, title, summary (lines), tables, plots."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.j2").render(content, paper_class=_paper_class)
        write_atomically(folder / name, text)


def print_table(results: Results, console: Console | None = None) -> None:
    """Print where the data is from, the main table and its notes, in colour where there is a
    terminal.
    """
    order = ("stage", "delta %", "AUC mean", "parameters", "AUC", "prefill ms", "MiB")
    print_one(main_table(results), first_line(results), order, console)


def print_one(
    table: Table, first: str, order: Sequence[str], console: Console | None = None
) -> None:
    """Print a line, a table and its notes.

    A narrow terminal gets the columns that fit, those first that begin like the words of `order`; a
    file or a pipe gets all of them.
    """
    import rich.box
    import rich.console
    import rich.table
    from rich.markup import escape

    console = console or rich.console.Console()
    widths = [
        3 + max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(table.columns, *table.rows, strict=True)
    ]
    keep = set(range(len(widths)))
    if not console.is_terminal:
        console = rich.console.Console(file=console.file, width=max(console.width, sum(widths)))
    else:
        room, keep = console.width, set()
        for place in sorted(
            range(len(widths)), key=lambda place: _rank(table.columns[place], order)
        ):
            if widths[place] <= room:
                room -= widths[place]
                keep.add(place)
    console.print(first, markup=False, highlight=False, soft_wrap=True)
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for place in sorted(keep):
        drawn.add_column(
            escape(table.columns[place]), justify="right" if place else "left", no_wrap=True
        )
    for number, row in enumerate(table.rows):
        style = "dim" if number in table.apart else None
        drawn.add_row(*(escape(row[place]) for place in sorted(keep)), style=style)
    console.print(drawn)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)


def _rank(column: str, order: Sequence[str]) -> int:
    """Place of a column when there is not room for all."""
    name = column.replace("\n", " ")
    return next((place for place, start in enumerate(order) if name.startswith(start)), len(order))


def first_line(results: Results) -> str:
    """Is the data real, and where is it from? The first line of everything that is printed."""
    data = results.data
    size = (
        f"{data.interactions:,} interactions of {data.members:,} members "
        f"with {data.items:,} items; "
        f"{data.candidates:,} candidates of {data.scored_members:,} members are scored"
    )
    if data.synthetic:
        return f"The data is synthetic: {data.source}; {size}."
    return f"The data is real: {data.source}; {size}."


def _summary(results: Results) -> list[str]:
    """The run in a few lines above the tables."""
    lines = [f"{results.date}, {results.machine.get('processor', 'machine unknown')}"]
    if results.seconds is not None:
        lines[0] += f", {results.seconds / 60:.1f} minutes"
    by_quality = [
        stage
        for stage in results.stages
        if stage.kind != "floor" and stage.mean("auc_mean") is not None
    ]
    floors = [stage for stage in results.stages if stage.kind == "floor"]
    if by_quality:
        best = max(by_quality, key=lambda stage: stage.mean("auc_mean") or 0.0)
        lines.append(f"highest mean AUC of a model: {best.title}, {metric(best, 'auc_mean', 4)}")
    if floors:
        best = max(floors, key=lambda stage: stage.mean("auc_mean") or 0.0)
        lines.append(f"highest floor: {best.title}, {metric(best, 'auc_mean', 4)}")
    timed = [stage for stage in results.stages if stage.latency]
    if len(timed) > 1:
        fast = min(timed, key=lambda stage: stage.latency.prefill_ms if stage.latency else math.inf)
        first, last = timed[0].latency, fast.latency
        assert first is not None and last is not None  # filtered above
        lines.append(
            f"fastest prefill: {fast.title}, {last.prefill_ms:.3g} ms, "
            f"{first.prefill_ms / last.prefill_ms:.1f} times as fast as {timed[0].title}"
        )
    return lines


def _plots(results: Results) -> list[Plot]:
    drawn = [
        (
            "Quality against parameters",
            "Bars are bootstrap intervals over members, paired with the teacher; dotted lines are "
            "floors; a floor far below the models is left out.",
            plots.quality_plot(results),
            MAIN,
        ),
        ("Latency by stage", "Medians, batch 1.", plots.latency_plot(results), LATENCY),
        (
            LAYER,
            "One decoder layer in a prefill, mean over layers.",
            plots.layer_plot(results),
            LAYER,
        ),
    ]
    return [
        Plot(title, caption, base64.b64encode(svg.encode()).decode(), after)
        for title, caption, svg, after in drawn
        if svg is not None
    ]


def _paper_class(table: Table, place: int) -> str:
    import markupsafe

    return markupsafe.Markup(' class="paper"') if place in table.paper else ""
