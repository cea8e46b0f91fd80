"""report: what a quantisation looks like: a table for a terminal, a figure as SVG or PNG.

The figures themselves are `QuantReport.to_json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.check import check_plot
from slmperf.command.terminal import new_table
from slmperf.plots import COLOURS, panels, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from slmperf.quant.results import LayerQuantized, QuantReport

_PLACE = re.compile(r"layers\.(\d+)\.(.+)")


def layer_table(report: QuantReport) -> Table:
    """A row for each layer quantised; columns that are empty for all are left out, and a scheme or
    a method that all have is said above them."""
    source = (report.calibration or {}).get("source")
    schemes, methods = (
        {getattr(one, name) for one in report.layers} for name in ("scheme", "method")
    )
    alike = [min(found) for found in (schemes, methods) if len(found) == 1]
    text = f"{report.tokens:,} tokens of {source or 'text'}" if report.tokens else "no text"
    table = new_table(", ".join([*alike, text]), ("layer",))
    rows: list[list[str]] = [[layer.name.removeprefix("model.")] for layer in report.layers]
    told: list[tuple[str, Callable[[LayerQuantized], str]]] = [
        ("scheme", lambda layer: layer.scheme),
        ("method", lambda layer: layer.method),
        ("bits", lambda layer: f"{layer.bits:.2f}"),
        ("error %", lambda layer: _percent(layer.relative_error)),
        ("rtn %", lambda layer: _percent(layer.relative_error_rtn)),
        ("held out %", lambda layer: _percent(layer.held_out_error)),
        ("rtn held out %", lambda layer: _percent(layer.held_out_error_rtn)),
        ("alpha", lambda layer: "" if layer.alpha is None else f"{layer.alpha:.2f}"),
        ("seconds", lambda layer: f"{layer.seconds:.2f}"),
        ("note", lambda layer: layer.note),
    ]
    for name, cell_of in told:
        cells = [cell_of(layer) for layer in report.layers]
        if any(cells) and not (name in ("scheme", "method") and len(set(cells)) == 1):
            words = name in ("scheme", "method", "note")
            table.add_column(name, justify="left" if words else "right")
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    for row in rows:
        table.add_row(*row)
    return table


def summary(report: QuantReport) -> str:
    """Bytes, mean error beside that of rounding to nearest, time and memory, in one line."""
    before, after = report.bytes_before / 2**20, report.bytes_after / 2**20
    pairs = [
        (layer.relative_error, layer.relative_error_rtn)
        for layer in report.layers
        if layer.relative_error is not None and layer.relative_error_rtn is not None
    ]
    errors = ""
    if pairs:
        own, rtn = (100 * sum(one) / len(pairs) for one in zip(*pairs, strict=True))
        errors = f", mean error {own:.3g}% (rounded to nearest {rtn:.3g}%)"
    resumed = f", {report.resumed_blocks} blocks of an earlier run" * bool(report.resumed_blocks)
    device = "" if report.device_peak_mib is None else f", {report.device_peak_mib:,.0f} MiB on GPU"
    return (
        f"{before:,.1f} -> {after:,.1f} MiB of weights ({100 * (after / before - 1):+.1f}%)"
        f"{errors} in {report.seconds:.1f} s{resumed}; peak {report.peak_mib:,.0f} MiB of memory"
        f"{device}"
    )


def plot_layers(layers: Sequence[LayerQuantized], path: str | Path) -> None:
    """Error and bits of each layer over the blocks, a colour for each kind of layer; the errors of
    rounding to nearest dashed. Without errors the bits alone.

    Raises InputError for a file that is no .svg, .png or .pdf.
    """
    kind = check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[int, LayerQuantized]]] = {}
    for layer in layers:
        match = _PLACE.search(layer.name)
        assert match is not None  # every quantised layer is one of a block
        kinds.setdefault(match[2].rpartition(".")[2], []).append((int(match[1]), layer))
    erred = any(layer.relative_error for layer in layers)
    figure = Figure(figsize=(2.0 + 4.5 * (1 + erred), 4.0), layout="constrained")
    drawings = panels(figure, 1 + erred)
    for colour, (name, found) in zip((*COLOURS, "#bbbbbb"), kinds.items(), strict=False):
        blocks = [index for index, _ in found]
        drawings[-1].plot(blocks, [layer.bits for _, layer in found], "o-", **_line(colour, name))
        if erred:
            _errors(drawings[0], found, colour, name)
    if erred:
        drawings[0].set_yscale("log")
        drawings[0].set_ylabel("error of the output, % (dashed: rtn)")
    drawings[-1].set_ylabel("bits per weight, scales included")
    drawings[-1].set_ylim(bottom=0)
    for axes in drawings:
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawings[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    write_figure(figure, path, kind)


def _errors(
    axes: Axes, found: Sequence[tuple[int, LayerQuantized]], colour: str, name: str
) -> None:
    """Lines of the errors above 0: their axis is logarithmic."""
    for style, of in (
        ("o-", lambda layer: layer.relative_error),
        ("--", lambda layer: layer.relative_error_rtn),
    ):
        points = [(index, 100 * of(layer)) for index, layer in found if of(layer)]
        axes.plot(*zip(*points, strict=True) if points else ([], []), style, **_line(colour, name))


def _line(colour: str, name: str) -> dict[str, Any]:
    return {"color": colour, "label": name, "ms": 4, "lw": 1.2}


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.3g}"
