"""The command `slmperf bench kd`. Only typer is imported here, as in slmperf.bench.commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def kd(
    tokens: Annotated[
        str | None, typer.Option(help="T, k = 1024; 1024, on a GPU 1k,2k,4k,8k.")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="V; 32000, on a GPU 128256.")] = None,
    student: Annotated[int | None, typer.Option(help="Its hidden size; 512, or 4096.")] = None,
    teacher: Annotated[int | None, typer.Option(help="Its hidden size; 768, or 4096.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the inputs: fp32, bf16; on a CPU both, on a GPU bf16.")
    ] = None,
    logits: Annotated[
        str | None, typer.Option(help="fp32, bf16, difference; fp32 on a CPU, on a GPU all.")
    ] = None,
    divergence: Annotated[
        str, typer.Option(help="forward_kl, reverse_kl, jsd:0.5, skew_forward_kl:0.1, ...")
    ] = "forward_kl",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of timing per way; at least five rounds.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
) -> None:
    """Time kd_loss, forward and backward, beside its four matrix products alone, plain torch,
    torch.compile and Liger; memory beyond the inputs, and errors of the gradients.

    Then the same with one answer token in 128, and the quickstart's training step before and now.
    Exit code 1 where ours cannot run.
    """
    import json

    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.kd import measure, report, studies
    from slmperf.bench.kd.problems import Step
    from slmperf.check import InputError

    where = results.check_device(device)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    found = studies.studies(where, tokens, vocabulary, student, teacher, dtype, logits, divergence)
    results.check_files(out, None)
    facts = results.machine(where) | {"bf16_units": studies.bf16_units(where)}
    console = Console(width=None if sys.stdout.isatty() else 140)
    step = Step(device=where)
    rows: list[report.Row] = []
    refused: dict[str, str] = {}
    with Console(stderr=True).status("") as status:
        for title, problems in found.items():
            status.update(title)
            one = measure.measure(problems, seconds)
            rows += one.rows
            refused |= one.refused
            if not as_json:
                console.print(report.table(one.rows, one.refused, title))
        status.update(str(step))
        steps = measure.measure_step(step, seconds)
    rows += steps
    if as_json:
        typer.echo(
            json.dumps(results.content("kd", rows, machine=facts, refused=refused), indent=1)
        )
    else:
        console.print(report.step_table(steps, step))
        for line in (*report.lines(rows), f"bf16 units: {'yes' if facts['bf16_units'] else 'no'}"):
            typer.echo(line)
    if out is not None:
        results.write_results(out, "kd", rows, machine=facts, refused=refused)
        typer.echo(f"results: {out}", err=as_json)
    if any(": kd_loss, " in name for name in refused):
        raise typer.Exit(1)
