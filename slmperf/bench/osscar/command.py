"""The command `slmperf bench osscar`. Only typer is imported here, as in slmperf.bench.commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def osscar(
    size: Annotated[int | None, typer.Option(help="Inputs of the layer, d.")] = None,
    outputs: Annotated[int | None, typer.Option(help="Outputs of the layer, N; d / 2.")] = None,
    remove: Annotated[int | None, typer.Option(help="Inputs removed; d / 4.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five rounds.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time osscar beside one fp64 Cholesky factorisation and the recurrence of its paper.

    Up to 2048 inputs: beyond, the recurrence takes half an hour. Peaks are tensors above inputs.
    """
    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.osscar import measure as solvers
    from slmperf.check import InputError

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    found = solvers.problems(size, outputs, remove)
    results.check_files(out, None)
    content = [row for one in found for row in solvers.measure(one, where, seconds)]
    Console(width=None if sys.stdout.isatty() else 120).print(solvers.table(content))
    if out is not None:
        results.write_results(out, "osscar", content, machine=results.machine(where), roof=None)
        typer.echo(f"results: {out}")
