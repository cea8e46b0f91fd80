"""The command `slmperf bench gram`. Only typer is imported here, as in slmperf.bench.commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def gram(
    rows: Annotated[int | None, typer.Option(help="Tokens of an update.")] = None,
    size: Annotated[int | None, typer.Option(help="Inputs of the layer, d.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five rounds.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time the update of a Gram matrix, fp32 and bf16 inputs, beside plain matrix products.

    Its operations are n d^2, the symmetric half counted once; a product's are twice as many.
    """
    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.gram import measure as grams
    from slmperf.check import InputError

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    found = grams.problems(where, rows, size)
    results.check_files(out, None)
    content = [row for one in found for row in grams.measure(*one, where, seconds)]
    Console(width=None if sys.stdout.isatty() else 120).print(grams.table(content))
    if out is not None:
        results.write_results(out, "gram", content, machine=results.machine(where), roof=None)
        typer.echo(f"results: {out}")
