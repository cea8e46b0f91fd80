"""report: Results -> the table in the paper's layout, on the console, report.md and report.html."""

from __future__ import annotations

from pathlib import Path

from slmperf.recipe.distillation import paper
from slmperf.recipe.distillation.results import Results, StageResult, TextFacts
from slmperf.recipe.paper import SOURCE
from slmperf.recipe.report import print_one, write_pages
from slmperf.recipe.report_cells import DASH, Table
from slmperf.recipe.results import Interval

MAIN = "Validation losses (the paper's Table 5)"
_ORDER = ("method", "validation loss", "the paper's", "less", "interval")


def write_report(results: Results, folder: Path) -> None:
    """Write report.md and report.html into the folder."""
    summary = [f"{results.date}, {results.machine.get('processor', 'machine unknown')}"]
    if results.seconds is not None:
        summary[0] += f", {results.seconds / 60:.1f} minutes"
    content = {
        "first_line": first_line(results.data),
        "synthetic": results.data.synthetic,
        "title": f"slmperf: {results.recipe}",
        "summary": [*summary, f"`{results.command}`"] if results.command else summary,
        "tables": [main_table(results), _stages_table(results), _facts_table(results)],
        "plots": [],
    }
    write_pages(content, folder)


def print_table(results: Results) -> None:
    """Print where the text is from, the main table and its notes."""
    print_one(main_table(results), first_line(results.data), _ORDER)


def first_line(data: TextFacts) -> str:
    """Is the text real, and where is it from? The first line of everything that is printed."""
    kind = "synthetic" if data.synthetic else "real"
    return (
        f"The text is {kind}: {data.source}; {data.training:,} examples to learn from, "
        f"{data.training_tokens:,} tokens; {data.validation:,} to measure on, "
        f"{data.validation_tokens:,} tokens of completions."
    )


def main_table(results: Results) -> Table:
    """The rows by group, the paper's figures beside ours."""
    group, role = paper.REFERENCE
    reference = next((row for row in results.groups.get(group, []) if row.role == role), None)
    less = f"less {reference.title}" if reference else ""
    columns = ["method", "validation loss", "95% interval", "seeds"]
    columns += [less, f"{less}: 95% interval"] if reference else []
    theirs = any(row.role for rows in results.groups.values() for row in rows)
    columns += ["the paper's row", "the paper's loss"] if theirs else []
    rows: list[list[str]] = []
    apart: set[int] = set()
    for name, members in results.groups.items():
        if len(results.groups) > 1:
            apart.add(len(rows))
            rows.append([paper.TITLES.get(name, "Other stages"), *[""] * (len(columns) - 1)])
        for row in members:
            cells = [row.title, f"{row.loss:.4f}", _interval(row.interval), str(len(row.seeds))]
            if reference:
                found = DASH if row.difference is None else f"{row.difference:+.4f}"
                cells += [found, _interval(row.difference_interval, "+")]
            if theirs:
                cells += _theirs(name, row)
            rows.append(cells)
    return Table(
        title=MAIN if theirs else "Validation losses",
        columns=columns,
        rows=rows,
        notes=_notes(results, theirs, reference is not None),
        apart=apart,
        paper={len(columns) - 2, len(columns) - 1} if theirs else set(),
    )


def _theirs(group: str, row: StageResult) -> list[str]:
    if row.role is None:
        return [DASH, DASH]
    figure = paper.VALIDATION_LOSSES[group][row.role]
    return [figure.method, DASH if figure.loss is None else f"{figure.loss:.4f}"]


def _notes(results: Results, theirs: bool, differences: bool) -> list[str]:
    notes = [
        "Validation loss: mean cross entropy, in nats, over the completions' tokens of the same "
        "validation examples, of the checkpoint that was best on them. Intervals: Student's t over "
        "seeds, which draw new weights, the order of the data and the student's own text. A "
        "teacher of one seed and the examples are the same in all: no part of the interval."
    ]
    if differences:
        notes.append("Differences are taken seed by seed: below 0 is better.")
    if theirs:
        notes.append(
            f"The paper's figures: {SOURCE}; other data, models and lengths of training than ours."
        )
    return notes + results.notes


def _stages_table(results: Results) -> Table:
    rows = []
    for row in results.stages.values():
        steps = {seed.steps for seed in row.seeds if seed.steps is not None}
        best = [str(seed.best_step) for seed in row.seeds if seed.best_step is not None]
        seconds = [seed.train_seconds for seed in row.seeds if seed.train_seconds is not None]
        rows.append(
            [
                row.name,
                row.kind,
                row.source or DASH,
                row.teacher or DASH,
                f"{row.parameters:,}",
                ", ".join(map(str, sorted(steps))) or DASH,
                ", ".join(best) or DASH,
                ", ".join(f"{seed.loss:.4f}" for seed in row.seeds),
                f"{sum(seconds) / len(seconds):.1f}" if seconds else DASH,
            ]
        )
    columns = ["stage", "kind", "from", "teacher", "parameters", "steps", "best step"]
    return Table("Every stage", [*columns, "loss by seed", "training, mean s"], rows)


def _facts_table(results: Results) -> Table:
    data = results.data
    rows = [
        ["text", data.source],
        ["vocabulary", f"{data.vocabulary:,}"],
        ["context", f"{data.context:,} tokens, {data.cut:,} examples cut to it"],
        ["longest prompt", f"{data.longest_prompt:,} tokens"],
        *[[name, value] for name, value in results.machine.items()],
        *[[name, value] for name, value in results.versions.items()],
    ]
    return Table("Data, machine, versions", ["", ""], rows)


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return DASH
    return f"[{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"
