"""plot: predicted latency against parameters, as an SVG or PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmperf.check import check_plot
from slmperf.models.shapes import Shape
from slmperf.plan.latency import LatencyModel
from slmperf.plan.search import Choice, candidates
from slmperf.plots import COLOURS, panels, write_figure

STYLES = ("-", "--", ":", "-.")


def plot_plan(
    path: str | Path,
    model: LatencyModel,
    bases: Sequence[Shape],
    choices: Sequence[Choice],
    *,
    target_ttft_ms: float,
    scheme: str,
    **asked: Any,
) -> None:
    """One line per base and number of heads over the widths that pruning can leave, in one scheme.

    asked    context, tensor_parallel, items, item_tokens, hot: as in `LatencyModel.prefill_ms`

    Those that meet the target and are listed are dots. Raises InputError as `check_plot` does.
    """
    kind = check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    [axes] = panels(figure, 1)
    ranks = asked["tensor_parallel"]
    for colour, base in zip(COLOURS * 3, bases, strict=False):
        for style, shapes in zip(STYLES * 4, candidates(base, ranks), strict=False):
            size = [shape.parameters / 1e9 for shape in shapes]
            time = [model.prefill_ms(shape, scheme=scheme, **asked) for shape in shapes]
            label = f"{base}, {shapes[0].heads}/{shapes[0].kv_heads} heads"
            axes.plot(size, time, style, color=colour, label=label, linewidth=1.6)
    met = [one for one in choices if one.scheme == scheme]
    hot = asked.get("hot", False)
    axes.scatter(
        [one.parameters / 1e9 for one in met],
        [one.ttft_hot_ms if hot else one.ttft_cold_ms for one in met],
        color="#222222", s=26, zorder=3, label="largest that meets it",
    )  # fmt: skip
    axes.axhline(target_ttft_ms, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"target {target_ttft_ms:g} ms",
        (1.0, target_ttft_ms),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#555555",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters, billions")
    axes.set_ylabel(f"predicted TTFT, ms ({'hot' if hot else 'cold'} prefix)")
    axes.set_title(
        f"{model.name}, {scheme}, {asked['context']:,} tokens, "
        f"tensor parallel {ranks}, items: {asked['items']}",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    write_figure(figure, path, kind)
