"""report: what a pruning and a comparison look like: tables for a terminal, figures as SVG or PNG.

The figures themselves are `PruneReport.to_json` and `Comparison.to_json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.check import check_plot
from slmperf.command.terminal import digits, new_table
from slmperf.plots import COLOURS, panels, write_figure

if TYPE_CHECKING:
    from rich.table import Table

    from slmperf.prune.compare import Comparison
    from slmperf.prune.results import LayerPruned, PruneReport

_SIZES = {"intermediate_size": "neurons", "attention_heads": "heads", "key_value_heads": "KV heads"}
_KINDS = {"down_proj": "neurons removed, %", "o_proj": "heads removed, %"}


def layer_table(report: PruneReport) -> Table:
    """A row for each layer pruned: what stayed, the error, the time."""
    table = new_table(
        f"{report.settings['method']}, {report.settings['mode']}, {report.tokens:,} tokens of "
        f"{report.calibration.get('source') or 'the calibration set'}",
        ("layer", "kept", "of", "error %", "tokens", "Gram s", "solve s"),
    )
    for layer in report.layers:
        mark = "" if layer.method == report.settings["method"] else f" ({layer.method})"
        table.add_row(
            layer.name.removeprefix("model.") + mark,
            f"{len(layer.kept):,}",
            f"{layer.groups:,}",
            f"{100 * layer.relative_error:.3g}",
            f"{layer.tokens:,}",
            f"{layer.gram_seconds:.2f}",
            f"{layer.solve_seconds:.2f}",
        )
    return table


def summary(report: PruneReport) -> str:
    """Parameters, time (beside that of running every block twice) and memory, in one line."""
    device = "" if report.device_peak_mib is None else f", {report.device_peak_mib:,.0f} MiB on GPU"
    forwards, beside = report.forwards_seconds, ""
    if forwards:
        beside = f", {report.seconds / forwards:.2f} x two passes through the pruned blocks"
    return (
        f"{report.parameters_before:,} -> {report.parameters_after:,} parameters "
        f"({100 * (report.parameters_after / report.parameters_before - 1):+.1f}%) in "
        f"{report.seconds:.1f} s{beside}; peak {report.peak_mib:,.0f} MiB of memory{device}"
    )


def comparison_table(found: Comparison) -> Table:
    """A row for each method, size and calibration set; the best of each point is marked by *."""
    sets, scored = len(found.tokens) > 1, found.before is not None
    columns = ["size", "parameters", *["calibration"] * sets, "method", "layer error %"]
    columns += [*[found.measure] * scored, "seconds"]
    table = new_table(f"{found.mode}; errors are means over the layers pruned", columns)
    first = ["before", f"{found.parameters:,}", *[""] * (2 + sets)]
    table.add_row(*first, *[digits(found.before)] * scored, "", end_section=True)
    for number, row in enumerate(found.rows):
        error, score = found.best(row)
        cells = [
            size_text(row.sizes),
            f"{row.parameters:,}",
            *[row.calibration] * sets,
            row.method,
            f"{100 * row.error:.4g}" + "*" * (row.error == error),
            *[digits(row.score) + "*" * (row.score == score)] * scored,
            f"{row.seconds:.2f}",
        ]
        last = number + 1 == len(found.rows) or found.rows[number + 1].sizes != row.sizes
        table.add_row(*cells, end_section=last)
    return table


def size_text(sizes: Mapping[str, Any]) -> str:
    """Sizes as a table says them: "410 neurons, 2 KV heads"."""
    return ", ".join(
        f"{value:,} {_SIZES[name]}" if isinstance(value, int) else f"{_SIZES[name]} by layer"
        for name, value in sizes.items()
        if name in _SIZES and value is not None
    )


def plot_curves(layers: Sequence[LayerPruned], path: str | Path) -> None:
    """Relative error over the share removed, a line for each layer, light to dark with depth.

    Raises InputError for a file that is no .svg, .png or .pdf.
    """
    kind = check_plot(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = [layer for layer in layers if layer.curve]
    kinds = {
        label: [layer for layer in drawn if layer.name.endswith(ending)]
        for ending, label in _KINDS.items()
    }
    kinds = {label: found for label, found in kinds.items() if found}
    figure = Figure(figsize=(1.5 + 4.5 * max(1, len(kinds)), 4.0), layout="constrained")
    for axes, (label, found) in zip(panels(figure, len(kinds)), kinds.items(), strict=False):
        for place, layer in enumerate(found):
            share = [100 * (n + 1) / layer.groups for n in range(len(layer.curve))]
            colour = colormaps["viridis_r"](0.1 + 0.8 * place / max(1, len(found) - 1))
            axes.plot([0, *share], [0, *(100 * e for e in layer.curve)], color=colour, lw=1.2)
        ends = (found[0], found[-1])
        for shade, layer in zip((0.1, 0.9), ends, strict=True):
            axes.plot([], [], color=colormaps["viridis_r"](shade), label=_short(layer.name))
        axes.set_xlabel(label)
        axes.set_ylabel("error of the layer's output, %")
        axes.legend(fontsize=8, frameon=False)
    write_figure(figure, path, kind)


def plot_comparison(found: Comparison, path: str | Path) -> None:
    """Layer error and score over parameters: a colour for each method, a style for each set.

    Raises InputError for a file that is no .svg, .png or .pdf.
    """
    kind = check_plot(path)
    from matplotlib.figure import Figure

    scored = found.before is not None
    figure = Figure(figsize=(6.5 + 4.5 * scored, 4.2), layout="constrained")
    drawings = panels(figure, 1 + scored)
    methods = list(dict.fromkeys(row.method for row in found.rows))
    for colour, method in zip(COLOURS, methods, strict=False):
        for style, name in zip(("-", "--", ":", "-."), found.tokens, strict=False):
            rows = [row for row in found.rows if (row.method, row.calibration) == (method, name)]
            rows = sorted(rows, key=lambda row: row.parameters)
            label = method if len(found.tokens) == 1 else f"{method}, {name}"
            size = [row.parameters / 1e6 for row in rows]
            drawn: dict[str, Any] = {"color": colour, "ls": style, "marker": "o", "ms": 4}
            drawings[0].plot(size, [100 * row.error for row in rows], label=label, **drawn)
            if scored:
                drawings[1].plot(size, [row.score or math.nan for row in rows], **drawn)
    drawings[0].set_ylabel("mean error of the layers pruned, %")
    if scored:
        drawings[1].axhline(found.before or 0.0, color="#777777", linestyle=(0, (4, 3)), lw=1)
        drawings[1].set_ylabel(f"{found.measure} (dashed: before)")
        if found.measure == "perplexity":
            drawings[1].set_yscale("log")
    for axes in drawings:
        axes.set_xlabel("parameters, millions")
    drawings[0].legend(fontsize=8, frameon=False)
    write_figure(figure, path, kind)


def _short(name: str) -> str:
    return f"layer {name.split('.')[2]}"
