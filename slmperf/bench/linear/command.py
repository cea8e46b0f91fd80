"""The command `slmperf bench linear`. Only typer is imported here, as in slmperf.bench.commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def linear(
    scheme: Annotated[str | None, typer.Option(help="int4-128, int8-token, fp8-token, ...")] = None,
    shape: Annotated[str | None, typer.Option(help="Outputs by inputs, 5120x3072.")] = None,
    rows: Annotated[str | None, typer.Option(help="Numbers of rows M, 1,16,2048.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five rounds.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time a quantised linear layer, beside bf16, fp32 and what torch and others have."""
    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.linear import measure as linears
    from slmperf.bench.roof import roof as measured
    from slmperf.check import InputError

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    found = linears.problems(where, scheme, shape, rows)
    results.check_files(out, None)
    roof = measured(where)
    refused: dict[str, str] = {}
    content = [row for one in found for row in linears.measure(*one, where, roof, seconds, refused)]
    Console(width=None if sys.stdout.isatty() else 140).print(linears.shown(content, refused))
    if out is not None:
        results.write_results(
            out, "linear", content, machine=results.machine(where), roof=roof.as_json()
        )
        typer.echo(f"results: {out}")
    if any(name.endswith(linears.OURS) for name in refused):
        raise typer.Exit(1)
