"""report: the times of layers as tables and lines, side by side: shapes, schemes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from slmperf.bench.layer.block import PARTS
from slmperf.bench.layer.measure import ALLREDUCE, ATTENTION_BLOCK, LayerTime, PartTime

if TYPE_CHECKING:
    from rich.table import Table

# Down a table and up a bar: the attention block first, then the MLP, then what both have.
ORDER = (
    *ATTENTION_BLOCK,
    "gate/up",
    "act",
    "down",
    *(part for part in PARTS if part in ("norms", "quantise")),
    ALLREDUCE,
)
NOISY = 0.2
TOTALS: dict[str, Callable[[LayerTime], float]] = {
    "attention block": lambda layer: layer.attention_block_us,
    "sum of parts": lambda layer: layer.sum_us,
    "block, one call": lambda layer: layer.block.time_us,
    "residue": lambda layer: layer.residue_us,
    "layer": lambda layer: layer.layer_us,
}


def by_work(layers: Sequence[LayerTime]) -> dict[str, list[LayerTime]]:
    """Layers that do the same together, in their order."""
    works = dict.fromkeys(layer.work for layer in layers)
    return {work: [layer for layer in layers if layer.work == work] for work in works}


def labels(layers: Sequence[LayerTime]) -> list[str]:
    """What tells layers of the same work apart: their shapes, their schemes, or both."""
    shapes, schemes = ({str(getattr(one, name)) for one in layers} for name in ("shape", "scheme"))
    if len(schemes) == 1:
        return [str(one.shape) for one in layers]
    return [one.scheme if len(shapes) == 1 else f"{one.shape} {one.scheme}" for one in layers]


def setting(layers: Sequence[LayerTime]) -> str:
    """What layers have in common: ranks, and the shape or the scheme that all have."""
    first, told = layers[0], [f"tp {layers[0].tensor_parallel}"]
    if len({one.scheme for one in layers}) == 1:
        told.append(first.scheme)
    elif len({one.shape for one in layers}) == 1:
        told.append(str(first.shape))
    return ", ".join(told)


def change(value: float, base: float) -> str:
    """ "-28.5%"; "-" where there is nothing to compare with."""
    return f"{100 * (value / base - 1):+.1f}%" if base > 0 else "-"


def time_rows(layers: Sequence[LayerTime]) -> list[tuple[str, ...]]:
    """Rows of cells for layers of one context: what, then for each layer milliseconds and, but for
    the first, the change to the first.
    """
    rows = []
    present = {ALLREDUCE, *(part.part for layer in layers for part in layer.parts)}
    for part in ORDER:
        if part in present:
            label = f"{part} (simulated)" if part == ALLREDUCE else part
            rows.append((label, *_times([layer.part_us(part) for layer in layers])))
    for name, total in TOTALS.items():
        values = [total(layer) for layer in layers]
        cells = _times(values) if name != "residue" else _plain(values)
        rows.append((name, *cells))
        if name == "block, one call":
            spread = [f"{_ms(one.block.low_us)} to {_ms(one.block.high_us)}" for one in layers]
            rows.append(("  its quartiles", spread[0], *_between(spread[1:])))
    return rows


def _ms(us: float) -> str:
    """Milliseconds with three digits at least."""
    value = us / 1e3
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _times(values: Sequence[float]) -> list[str]:
    cells = [_ms(values[0])]
    for value in values[1:]:
        cells += [_ms(value), change(value, values[0])]
    return cells


def _plain(values: Sequence[float]) -> list[str]:
    return [_ms(values[0]), *_between([_ms(value) for value in values[1:]])]


def _between(cells: Sequence[str]) -> list[str]:
    return [cell for one in cells for cell in (one, "")]


def work_rows(layers: Sequence[LayerTime]) -> list[tuple[str, ...]]:
    """Rows of cells for layers of one context: the part, then for each layer MB, GFLOP and the
    share of the roof.
    """
    rows = []
    for name in (*ORDER, "block"):
        found = [_part(layer, name) for layer in layers]
        if name != ALLREDUCE and any(found):
            cells = [cell for one in found for cell in _work(one)]
            rows.append((name, *cells))
    return rows


def _part(layer: LayerTime, name: str) -> PartTime | None:
    return next((one for one in (*layer.parts, layer.block) if one.part == name), None)


def _work(part: PartTime | None) -> tuple[str, str, str]:
    if part is None:
        return "-", "-", "-"
    share = "-" if part.roof_share is None else f"{100 * part.roof_share:.0f}%"
    flops = f"{part.flops / 1e9:.4g}" if part.flops else "-"
    return f"{part.bytes / 1e6:.4g}", flops, share


def tables(layers: Sequence[LayerTime]) -> list[Table]:
    """For each context and decode step a table of times and one of work and share of the roof."""
    from rich.table import Table

    found = []
    for doing, group in by_work(layers).items():
        names, title = labels(group), f"{doing}, {setting(group)}"
        times = Table(title=f"{title}: milliseconds in one layer", title_justify="left")
        times.add_column("part")
        for name in names:
            times.add_column(f"{name} ms", justify="right", no_wrap=True)
            if name != names[0]:
                times.add_column(f"to {names[0]}", justify="right", no_wrap=True)
        for row in time_rows(group):
            ends = row[0].startswith(ALLREDUCE) or row[0] in ("attention block", "residue")
            times.add_row(*row, end_section=ends)
        work = Table(title=f"{title}: work and share of the roof", title_justify="left")
        work.add_column("part")
        for name in names:
            for column in (f"{name} MB", "GFLOP", "roof"):
                work.add_column(column, justify="right", no_wrap=True)
        for row in work_rows(group):
            work.add_row(*row)
        found += [times, work]
    return found


def lines(layers: Sequence[LayerTime]) -> list[str]:
    """What each shape saves against the one before it in the same scheme, a line per pair and
    context; how many times as fast a scheme is as the first; how the all-reduces were simulated; a
    warning where other work disturbed the measurement.
    """
    found = []
    for work, group in by_work(layers).items():
        schemes = dict.fromkeys(one.scheme for one in group)
        for scheme in schemes:
            told = f" in {scheme}" if len(schemes) > 1 else ""
            found += [
                f"{a.shape} -> {b.shape}{told}, {work}: "
                f"attention block {change(b.attention_block_us, a.attention_block_us)}, "
                f"layer {change(b.layer_us, a.layer_us)}"
                for a, b in pairwise(one for one in group if one.scheme == scheme)
            ]
        found += [
            f"{one.shape}, {work}: {one.scheme} is {one.speed:.2f} times as fast as "
            f"{one.beside.scheme}"
            for one in group
            if one.beside is not None
        ]
    if layers[0].tensor_parallel > 1:
        exchange = layers[0].allreduce
        found.append(
            f"all-reduce: simulated, two a layer, a ring of {layers[0].tensor_parallel} ranks at "
            f"{exchange.bytes / exchange.time_us * 1e-3:.4g} GB/s"
        )
    loud = {layer.name: _spread(layer.block) for layer in layers if _spread(layer.block) > NOISY}
    if loud:
        worst = max(loud, key=loud.__getitem__)
        found.append(
            f"noisy: the block's quartiles lie up to {100 * loud[worst]:.0f}% of its median apart "
            f"({worst}); something else ran on this machine"
        )
    return found


def _spread(part: PartTime) -> float:
    return (part.high_us - part.low_us) / part.time_us
