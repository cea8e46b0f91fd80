"""plots: three figures of a report as SVG: quality against parameters, latency by stage, one
layer's time.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from slmperf.recipe.results import Interval, Results, StageResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per kind of stage and one per part of a layer; distinct for the colour-blind (Paul
# Tol's bright and muted schemes).
KIND_COLOURS = {
    "teacher": "#332288",
    "sft": "#ddaa33",
    "kd": "#4477aa",
    "prune_mlp": "#228833",
    "prune_attention": "#aa3377",
    "prune_gradual": "#66ccee",
    "quantise": "#ee6677",
    "floor": "#777777",
}
KIND_NAMES = {
    "teacher": "teacher",
    "sft": "fine-tuned",
    "kd": "distilled",
    "prune_mlp": "MLP pruned, not retrained",
    "prune_attention": "attention pruned, not retrained",
    "prune_gradual": "pruned in steps, retrained after each",
    "quantise": "quantised",
}
PART_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#bbbbbb")


def quality_plot(results: Results) -> str | None:
    """Delta to the teacher (or AUC, where no stage has a delta) over parameters; SVG text.

    None if no stage with a size was evaluated.
    """
    sized = [one for one in results.stages if one.parameters and one.mean("auc_mean") is not None]
    if not sized:
        return None
    relative = all(stage.delta_pct is not None for stage in sized)
    figure, axes = _axes(9.0, max(4.2, 0.3 * len(results.stages) + 1.4))
    points = []
    for stage in sized:
        value, interval = _quality(stage, relative)
        colour, size = KIND_COLOURS.get(stage.kind, "#000000"), float(stage.parameters or 0)
        if interval is not None:
            spread = [[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]]
            axes.errorbar(size, value, yerr=spread, color=colour, capsize=3, linewidth=1, zorder=2)
        axes.scatter(size, value, color=colour, s=38, zorder=3)
        points.append((size, value, stage.title, colour))
    for stage in results.stages:
        value, _ = _quality(stage, relative)
        if stage.kind == "floor" and value is not None and _near(value, points):
            axes.axhline(value, color=KIND_COLOURS["floor"], linestyle=":", linewidth=1, zorder=1)
            points.append((0.0, value, f"floor: {stage.title}", KIND_COLOURS["floor"]))
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.08)
    _plain_log_ticks(axes, [stage.parameters for stage in sized if stage.parameters])
    axes.set_xlabel("parameters")
    axes.set_ylabel("AUC, % against the teacher" if relative else "mean AUC")
    _label_at_the_right(figure, axes, points)
    _legend(axes, {stage.kind for stage in sized})
    return _svg(figure)


def latency_plot(results: Results) -> str | None:
    """Prefill, and ranking with and without the cached prefix, by stage; None without latencies."""
    timed = [stage for stage in results.stages if stage.latency is not None]
    if not timed:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 0.42 * len(timed) + 1.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(timed)))
    for place, stage in zip(places, timed, strict=True):
        latency = stage.latency
        assert latency is not None  # filtered above
        colour = KIND_COLOURS.get(stage.kind, "#000000")
        left.barh(place, latency.prefill_ms, color=colour, height=0.6)
        left.plot(
            [latency.prefill_ms, latency.prefill_p90_ms], [place, place], color="#222", linewidth=1
        )
        left.annotate(
            f"{latency.prefill_ms:.3g}",
            (max(latency.prefill_ms, latency.prefill_p90_ms), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        for value, shade, offset in (
            (latency.rank_uncached_ms, "#bbbbbb", -0.18),
            (latency.rank_cached_ms, colour, 0.18),
        ):
            if value is not None:
                right.barh(place + offset, value, color=shade, height=0.34)
                right.annotate(
                    f"{value:.3g}",
                    (value, place + offset),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
    first = timed[0].latency
    assert first is not None
    left.set_yticks(places, [stage.title for stage in timed])
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlabel("ms")
    left.set_title(f"prefill, {first.context} tokens\n(line: to the 90th percentile)", fontsize=10)
    right.set_xscale("log")
    right.margins(x=0.15)
    right.set_xlabel("ms, logarithmic")
    right.set_title(
        f"rank {first.candidates}: whole prompts (grey),\nprefix cached (colour)", fontsize=10
    )
    for axes in (left, right):
        _clean(axes)
        axes.grid(axis="x", color="#e6e6e6", zorder=0)
        axes.set_axisbelow(True)
    return _svg(figure)


def layer_plot(results: Results) -> str | None:
    """Where one layer's time goes, by stage, in ms; None if no stage was split."""
    split = [stage for stage in results.stages if stage.latency and stage.latency.layer_ms]
    if not split:
        return None
    figure, axes = _axes(9.0, 0.42 * len(split) + 1.9)
    parts = list(dict.fromkeys(part for stage in split for part in _parts(stage)))
    start = [0.0] * len(split)
    for number, part in enumerate(parts):
        widths = [_parts(stage).get(part, 0.0) for stage in split]
        colour = PART_COLOURS[number % len(PART_COLOURS)]
        bars = axes.barh(
            range(len(split)), widths, left=start, height=0.6, color=colour, label=part
        )
        total = max(sum(_parts(stage).values()) for stage in split)
        axes.bar_label(
            bars,
            [f"{width:.2g}" if width > 0.06 * total else "" for width in widths],
            label_type="center",
            fontsize=8,
        )
        start = [before + width for before, width in zip(start, widths, strict=True)]
    axes.set_yticks(range(len(split)), [stage.title for stage in split])
    axes.invert_yaxis()
    axes.set_xlabel("ms in one layer, batch 1")
    axes.legend(
        ncols=len(parts), loc="lower center", bbox_to_anchor=(0.42, 1.0), frameon=False, fontsize=9
    )
    return _svg(figure)


def _parts(stage: StageResult) -> dict[str, float]:
    return stage.latency.layer_ms if stage.latency is not None else {}


def _quality(stage: StageResult, relative: bool) -> tuple[float, Interval | None]:
    if relative:
        return stage.delta_pct, stage.delta_interval  # type: ignore[return-value]
    return stage.mean("auc_mean"), stage.auc_interval  # type: ignore[return-value]


def _near(value: float, points: list) -> bool:
    """Does a floor belong on the scale of the stages? One far below would squeeze them into a
    line.
    """
    values = [point[1] for point in points]
    room = max(max(values) - min(values), 1e-3)
    return min(values) - 1.5 * room <= value <= max(values) + 1.5 * room


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    axes.grid(axis="both", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def _clean(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plain_log_ticks(axes: Axes, values: list[int]) -> None:
    """Ticks at 1, 2, 5 of each decade, written 200k or 1.5M rather than as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = max(values) > 30 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short_count(value: float) -> str:
    """1234567 -> "1.23M"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _label_at_the_right(figure: Figure, axes: Axes, points: list) -> None:
    """Names in a column right of the plot, in the order of their points, never on each other."""
    figure.draw_without_rendering()  # limits and size are final only now
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / figure.dpi
    gap = 12.0 / height  # lines of 12 points
    ordered = sorted(points, key=lambda point: point[1])
    places: list[float] = []
    for point in ordered:
        place = (point[1] - low) / (high - low)
        places.append(max(place, places[-1] + gap) if places else place)
    above = max(0.0, places[-1] - 1.0)
    for index in reversed(range(len(places))):  # push the column down where it ran out at the top
        ceiling = places[index + 1] - gap if index + 1 < len(places) else 1.0
        places[index] = min(places[index], ceiling) if above else places[index]
    for (x, y, text, colour), place in zip(ordered, places, strict=True):
        from_x: dict[str, Any] = {"xy": (x, y), "xycoords": "data"}
        if x == 0:  # a line across the whole plot: start at its right end
            from_x = {"xy": (1.0, y), "xycoords": ("axes fraction", "data")}
        axes.annotate(
            text,
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
            **from_x,
        )


def _legend(axes: Axes, kinds: set[str]) -> None:
    for kind, name in KIND_NAMES.items():
        if kind in kinds:
            axes.scatter([], [], color=KIND_COLOURS[kind], label=name)
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
    )


def _svg(figure: Figure) -> str:
    """The same figure always gives the same bytes: no date, fixed ids."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "slmperf"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
