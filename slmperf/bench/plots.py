"""plots: the roofline of an ops run.

Ops with matrix products are drawn as usual, TFLOP/s over operations per byte. Ops without have no
such axis: a line per case shows their GB/s, and the roof is the copy rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmperf.bench.ops import Row
from slmperf.bench.roof import Roof
from slmperf.check import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By the order in which variants appear; distinct for the colour-blind (Paul Tol's bright scheme).
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FORMAT_OF = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}


def roofline(rows: Sequence[Row], roof: Roof, path: str | Path) -> None:
    """Draw the rows under the roof into a PNG, SVG or PDF file."""
    from matplotlib.figure import Figure

    check_plot(path)
    panels = [
        (draw, wanted)
        for draw, wanted in (
            (_by_case, [row for row in rows if row.tflops is None]),
            (_by_intensity, [row for row in rows if row.tflops is not None]),
        )
        if wanted
    ]
    impls = list(dict.fromkeys(row.impl for row in rows))
    height = max(4.5, 1.6 + 0.55 * len({row.case for row in rows}))
    figure = Figure(figsize=(8.5 * max(1, len(panels)), height), layout="constrained")
    for number, (draw, wanted) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        draw(axes, wanted, roof, impls)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(which="major", color="#e6e6e6")
        axes.set_axisbelow(True)
    figure.suptitle(f"{roof.device}, {roof.threads} threads, torch {roof.torch}", fontsize=11)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _by_case(axes: Axes, rows: Sequence[Row], roof: Roof, impls: Sequence[str]) -> None:
    """A line per case: GB/s of its least traffic, logarithmic, under the copy rate."""
    cases = list(dict.fromkeys(row.case for row in rows))
    names = {
        row.case: f"{row.op} {'x'.join(map(str, row.shape))}\n{row.dtype} {row.setting}"
        for row in rows
    }
    axes.axvline(roof.copy_gbs, color="#222222", linewidth=1.5)
    axes.annotate(
        f"copy, {roof.copy_gbs:.3g} GB/s ",
        (roof.copy_gbs, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    _points(axes, rows, impls, [(row.gbs, cases.index(row.case)) for row in rows])
    axes.set_xscale("log")
    rates = [row.gbs for row in rows]
    axes.set_xlim(min(rates) / 1.5, 1.6 * max(roof.copy_gbs, *rates))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_yticks(range(len(cases)), [names[case] for case in cases], fontsize=8.5)
    axes.set_xlabel("GB/s of the least traffic, forward and backward")
    _plain_ticks(axes.xaxis)
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.05), ncols=4)


def _by_intensity(axes: Axes, rows: Sequence[Row], roof: Roof, impls: Sequence[str]) -> None:
    """TFLOP/s over operations per byte, both logarithmic."""
    points = [((row.tflops or 0) * 1e3 / row.gbs, row.tflops or 0) for row in rows]
    rates = {name: rate for name, rate in roof.matrix_tflops.items() if rate}
    used = {FORMAT_OF.get(row.dtype, row.dtype) for row in rows} & set(rates) or {"fp32"}
    low, high = min(x for x, _ in points) / 2, max(x for x, _ in points) * 2
    high = max(high, *(2e3 * rates[name] / roof.copy_gbs for name in used))
    low = min(low, *(0.25e3 * rates[name] / roof.copy_gbs for name in used))
    for name in sorted(used, key=rates.__getitem__):
        knee = rates[name] * 1e3 / roof.copy_gbs
        slope = low * roof.copy_gbs / 1e3
        axes.plot([low, knee, high], [slope, rates[name], rates[name]], color="#222222")
        text = f"{name}, {rates[name]:.3g} TFLOP/s"
        axes.annotate(text, (high, rates[name]), xytext=(-4, 4), textcoords="offset points",
                      ha="right", fontsize=9)  # fmt: skip
    _points(axes, rows, impls, points)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("operations per byte of least traffic")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _points(
    axes: Axes, rows: Sequence[Row], impls: Sequence[str], places: Sequence[tuple[float, float]]
) -> None:
    for number, impl in enumerate(impls):
        mine = [place for row, place in zip(rows, places, strict=True) if row.impl == impl]
        ours = any(row.impl == impl and row.role == "ours" for row in rows)
        if mine:
            axes.scatter(
                [x for x, _ in mine],
                [y for _, y in mine],
                label=impl,
                s=64 if ours else 40,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
            )


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5 of each decade, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
