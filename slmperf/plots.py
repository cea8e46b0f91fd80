"""plots: what figures share: colours, panels without a frame, writing in one step.

Matplotlib is imported where it is used.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from slmperf.models.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's bright scheme: distinct for the colour-blind.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def panels(figure: Figure, count: int) -> list[Axes]:
    """At least one panel, side by side, with a light grid and without a frame."""
    found = figure.subplots(1, max(1, count), squeeze=False)[0]
    for axes in found:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    return list(found)


def write_figure(figure: Figure, path: str | Path, kind: str) -> None:
    """Write a figure as `kind` (svg, png, pdf), whole or not at all; the same figure is the same
    SVG.
    """
    content = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(content, format=kind, dpi=130, metadata=metadata)
    write_atomically(path, content.getvalue())
