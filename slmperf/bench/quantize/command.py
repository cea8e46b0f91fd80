"""The command `slmperf bench quantize`. Only typer is imported here, as in its neighbours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def quantize(
    outputs: Annotated[int | None, typer.Option(help="Outputs of the layer.")] = None,
    inputs: Annotated[int | None, typer.Option(help="Inputs of the layer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five rounds.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time the 4-bit quantisation of a layer beside a matrix product and a factorisation, and
    compare the methods' errors on two synthetic layers.

    Without sizes: costs at 2048 x 2048 and 4096 x 4096, errors at 256 x 1024.
    """
    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.quantize import layer
    from slmperf.check import InputError
    from slmperf.testing.spectra import SPECTRA

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    for name, value in (("outputs", outputs), ("inputs", inputs)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    timed, judged = [layer.Size(2048, 2048), layer.Size(4096, 4096)], layer.Size(256, 1024)
    if outputs or inputs:
        judged = layer.Size(outputs or inputs or 1, inputs or outputs or 1)
        timed = [judged]
    results.check_files(out, None)
    costs = [row for size in timed for row in layer.measure(size, where, seconds)]
    errors = [row for kind in SPECTRA for row in layer.errors(kind, judged, where)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_costs(costs))
    console.print(_errors(errors))
    if out is not None:
        rows = [*costs, *errors]
        results.write_results(out, "quantize", rows, machine=results.machine(where), roof=None)
        typer.echo(f"results: {out}")


def _costs(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    found = Table("", "ms", "quartiles", "x matmul", "of the time allowed", "of the memory")
    for row in rows:
        found.add_row(
            row["name"],
            f"{row['time_us'] / 1e3:.4g}",
            f"{row['low_us'] / 1e3:.4g} to {row['high_us'] / 1e3:.4g}",
            f"{row['of_matmul']:.2f}",
            f"{row['of_allowed']:.2f}" if "of_allowed" in row else "",
            f"{row['peak_of_allowed']:.2f}" if "peak_of_allowed" in row else "",
        )
    return found


def _errors(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    found = Table("", "ms", "error, x gptq's", "held out")
    for row in rows:
        figures = (row["of_gptq"], row["held_out_of_gptq"])
        found.add_row(row["name"], f"{row['time_us'] / 1e3:.4g}", *(f"{x:.3f}" for x in figures))
    return found
