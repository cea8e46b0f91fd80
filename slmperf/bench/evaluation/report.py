"""report: what `slmperf eval` found: tables for a terminal, and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from slmperf.command.terminal import digits, new_table
from slmperf.models.files import finite

if TYPE_CHECKING:
    from rich.table import Table

    from slmperf.bench.evaluation.layers import LayerError


class Figure(NamedTuple):
    """A figure of a model."""

    value: float
    rises: bool  # whether more is better
    standard_error: float | None = None  # None: not known


@dataclass(frozen=True)
class Found:
    """What was measured; pairs are of the base and of the model."""

    model: str
    base: str
    sizes: tuple[dict[str, float], dict[str, float]]
    figures: tuple[dict[str, Figure], dict[str, Figure]]
    layers: list[LayerError]
    texts: list[str]  # that the layers' errors are on
    seconds: float


def figure_table(found: Found) -> Table:
    """A row for each figure: before, after, the change."""
    table = new_table(
        f"{found.model} beside {found.base}, {found.seconds:.1f} s",
        ("measured", "before", "after", "change %"),
    )
    before, after = found.sizes
    for name, value in before.items():
        cells = [f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in (value, after[name])]
        table.add_row(name, *cells, _change(value, after[name]))
    table.add_section()
    for name, figure in found.figures[0].items():
        other = found.figures[1][name]
        table.add_row(name, _told(figure), _told(other), _change(figure.value, other.value))
    return table


def layer_table(found: Found) -> Table:
    """A row for each quantised layer: its error on each text, in percent."""
    held_out = len(found.texts) > 1
    table = new_table(
        f"tr(E H E') / tr(W H W'), %, weights alone, on {'; '.join(found.texts)}",
        ("layer", "weights", "training", *["held out"] * held_out),
    )
    for layer in found.layers:
        errors = [100 * error for error in (layer.error, layer.held_out_error) if error is not None]
        table.add_row(
            layer.name.removeprefix("model."), layer.weights, *[f"{error:.3g}" for error in errors]
        )
    means = [100 * mean for mean in _means(found.layers) if mean is not None]
    table.add_section()
    table.add_row("mean", "", *[f"{mean:.3g}" for mean in means])
    return table


def to_json(found: Found) -> str:
    """One JSON object: figures by name, each before, after and the change; rows of the layers.

    What is not finite becomes null.
    """
    (small, large), (before, after) = found.sizes, found.figures
    figures = {
        name: {
            "before": figure.value,
            "after": after[name].value,
            "change_pct": _percent(figure.value, after[name].value),
            "rises": figure.rises,
            "standard_errors": [figure.standard_error, after[name].standard_error],
        }
        for name, figure in before.items()
    }
    mean, held_out = _means(found.layers)
    plain = {
        "model": found.model,
        "base": found.base,
        "sizes": {name: {"before": value, "after": large[name]} for name, value in small.items()},
        "figures": figures,
        "texts": found.texts,
        "layers": [asdict(layer) for layer in found.layers],
        "error_mean": mean,
        "held_out_error_mean": held_out,
        "seconds": found.seconds,
    }
    return json.dumps(finite(plain), indent=1, allow_nan=False) + "\n"


def _means(layers: list[LayerError]) -> tuple[float | None, float | None]:
    """Means over the layers of the errors on both texts; None without layers or the text."""
    errors = [layer.error for layer in layers]
    others = [layer.held_out_error for layer in layers if layer.held_out_error is not None]
    mean, held_out = (sum(one) / len(one) if one else None for one in (errors, others))
    return mean, held_out


def _told(figure: Figure) -> str:
    error = "" if figure.standard_error is None else f" ± {figure.standard_error:.4f}"
    return digits(figure.value) + error


def _percent(before: float, after: float) -> float | None:
    """The change; None from 0, and where one of both is not finite."""
    if not before or not all(map(math.isfinite, (before, after))):
        return None
    return 100 * (after / before - 1)


def _change(before: float, after: float) -> str:
    percent = _percent(before, after)
    return "" if percent is None else f"{percent:+.2f}"
