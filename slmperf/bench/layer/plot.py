"""plot: the time of layers as stacked bars, a panel per context, a bar per shape and scheme."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slmperf.bench.layer.measure import ALLREDUCE, LayerTime
from slmperf.bench.layer.report import ORDER, by_work, change, labels, setting
from slmperf.check import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinct for the colour-blind (Paul Tol's muted scheme): the attention block cool, the MLP warm,
# what both have grey.
COLOURS = {
    "qkv": "#332288",
    "rope": "#88ccee",
    "attention": "#4477aa",
    "o": "#44aa99",
    "gate/up": "#cc6677",
    "act": "#ddcc77",
    "down": "#aa4499",
    "norms": "#999933",
    "quantise": "#777777",
    ALLREDUCE: "#dddddd",
}


def plot_layers(layers: Sequence[LayerTime], path: Path) -> None:
    """Draw the layers' parts into a PNG, SVG or PDF file.

    Every context and decode step has a panel with its own scale. Above each bar stand the layer's
    time (the block as one call, and the all-reduces) and its change to the first; a black line
    shows where it is.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    check_plot(path)
    groups = by_work(layers)
    widest = max(len(group) for group in groups.values())
    width = 1.6 + len(groups) * max(2.2, 0.5 + 0.95 * widest)
    figure = Figure(figsize=(max(width, 6.4), 5.0), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (work, group) in zip(panels, groups.items(), strict=True):
        _panel(axes, group)
        axes.set_title(work, fontsize=10)
    panels[0].set_ylabel("milliseconds in one layer")
    first = layers[0]
    figure.suptitle(
        f"One layer, {setting(layers)}, on {'a GPU' if first.device == 'cuda' else 'a CPU'}",
        fontsize=11,
    )
    handles, names = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linewidth=1.4))
    figure.legend(
        # The bar's top part at the legend's top.
        [handles[-1], *reversed(handles[:-1])],
        ["layer as one call", *reversed(names)],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, group: Sequence[LayerTime]) -> None:
    """Bars of one context, side by side."""
    places = range(len(group))
    bottom = [0.0] * len(group)
    tallest = max(max(one.layer_us, one.sum_us + one.allreduce.time_us) for one in group) / 1e3
    for part in ORDER:
        heights = [layer.part_us(part) / 1e3 for layer in group]
        if not any(heights):
            continue
        bars = axes.bar(
            places,
            heights,
            bottom=bottom,
            width=0.68,
            color=COLOURS[part],
            label=f"{part} (simulated)" if part == ALLREDUCE else part,
            hatch="///" if part == ALLREDUCE else None,
            edgecolor="white",
            linewidth=0.4,
        )
        dark = part not in ("rope", "act", ALLREDUCE)
        axes.bar_label(
            bars,
            [f"{height:.3g}" if height > 0.045 * tallest else "" for height in heights],
            label_type="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, layer, top in zip(places, group, bottom, strict=True):
        whole = layer.layer_us / 1e3
        # Above the bar a line; inside it marks at the sides, so that its numbers stay readable.
        for left, right in [(-0.46, 0.46)] if whole >= top else [(-0.46, -0.34), (0.34, 0.46)]:
            axes.plot([place + left, place + right], [whole] * 2, color="black", linewidth=1.6)
        text = f"{whole:.3g}"
        if layer is not group[0]:
            text += f"\n{change(layer.layer_us, group[0].layer_us)}"
        axes.annotate(
            text,
            (place, max(whole, top)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
        )
    axes.set_xticks(list(places), labels(group))
    axes.set_ylim(0, 1.14 * tallest)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
