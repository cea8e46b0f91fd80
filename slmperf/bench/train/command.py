"""The command `slmperf bench train`. Only typer is imported here, as in slmperf.bench.commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    student: Annotated[
        str | None,
        typer.Option(help="Shape or checkpoint folder; 8 layers of 512, on a GPU 1b."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Likewise; 12 layers of 1024, on a GPU 8b.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Of a batch, k = 1024; 2048, on a GPU 4096.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of one of its rows; 512, on a GPU 1024.")
    ] = None,
    answers: Annotated[
        str, typer.Option(help="One token in so many is an answer; several, as 1,2,8,128.")
    ] = "1,8",
    checkpointing: Annotated[
        str, typer.Option(help="Of the student's layers, where all are answers: off, on or both.")
    ] = "both",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or both joined; fp32, on a GPU bf16.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five steps.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time one optimizer step of distillation: plain torch, Liger's losses, kd_loss in a bare loop
    and in slmperf's trainer; random weights, one batch for all.

    Step time, tokens/s, and peak memory above weights and optimizer state, gradients included;
    with and without row compaction and checkpointing; the trainer's overhead over the bare loop,
    here and at the quickstart's size. Beside each table stands what was counted before. With its
    defaults about twenty minutes on two CPU cores. Exit code 1 where ours cannot run.
    """
    import json

    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.roof import roof as measured_roof
    from slmperf.bench.train import report, studies
    from slmperf.check import InputError

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    problems = studies.problems(
        where, student, teacher, tokens, context, answers, checkpointing, dtype
    )
    results.check_files(out, None)
    # Transformers and its trainer: seconds, which an option that is wrong need not cost.
    from slmperf.bench.train import measure

    top, facts = measured_roof(where), results.machine(where)
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[report.Row] = []
    refused: dict[str, str] = {}
    with Console(stderr=True).status("") as status:
        for problem, chosen in problems.items():
            status.update(str(problem))
            one = measure.measure(problem, seconds, chosen)
            rows += one.rows
            refused |= one.refused
            if not as_json:
                console.print(report.table(problem, one.rows, one.refused, top))
    more = {"machine": facts, "roof": top.as_json(), "refused": refused}
    if as_json:
        typer.echo(json.dumps(results.content("train", rows, **more), indent=1))
    else:
        for line in report.lines(rows):
            typer.echo(line)
    if out is not None:
        results.write_results(out, "train", rows, **more)
        typer.echo(f"results: {out}", err=as_json)
    if any(name.rpartition(": ")[2] in measure.OF_OURS for name in refused):
        raise typer.Exit(1)
