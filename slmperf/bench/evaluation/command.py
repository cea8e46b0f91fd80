"""The command `slmperf eval`: its options and what it prints. Only typer is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmperf.command import EVAL_SPLIT
from slmperf.command.terminal import bars, print_table

Option = typer.Option


def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    base: Annotated[
        Path | None,
        Option(
            help="The model it was made from; what its quantization.json or pruning.json says, "
            "if not given."
        ),
    ] = None,
    text: Annotated[
        Path | None, Option(help="Perplexity on this text, JSONL or plain.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, Option(help="AUC on these ranking prompts, mean and by task.")
    ] = None,
    tasks: Annotated[
        str, Option(help="Tasks of lm-eval (extra [eval]), with commas: arc_easy,piqa.")
    ] = "",
    task_folder: Annotated[
        Path | None, Option(help="For --tasks: a folder with tasks of your own, as lm-eval's YAML.")
    ] = None,
    layers: Annotated[
        bool, Option("--layers", help="The error of each quantised weight, on --calibration.")
    ] = False,
    calibration: Annotated[
        Path | None, Option(help="For --layers: the text that calibrated.")
    ] = None,
    held_out: Annotated[
        Path | None, Option(help="For --layers: text that did not; another column.")
    ] = None,
    samples: Annotated[
        int, Option(help="For --layers: pieces of --context tokens of each text, at most.")
    ] = 512,
    context: Annotated[
        int | None, Option(help="Tokens of a sequence; as trained, at most 2048, if not given.")
    ] = None,
    eval_split: Annotated[
        str, Option(help="Measure on lines of this split, --text and --held-out.")
    ] = EVAL_SPLIT,
    out: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure a pruned or quantised model beside the one it was made from.

    Perplexity, AUC, tasks of lm-eval; and the error of each layer, tr(E H E') / tr(W H W'), E the
    difference of the weights and H of what flows into the layer in the model before.
    """
    from slmperf.bench.evaluation.job import Asked, Job
    from slmperf.bench.evaluation.report import figure_table, layer_table

    asked = Asked(
        text=text,
        prompts=prompts,
        tasks=tuple(dict.fromkeys(word.strip() for word in tasks.split(",") if word.strip())),
        task_folder=task_folder,
        layers=layers,
        calibration=calibration,
        held_out=held_out,
        samples=samples,
        context=context,
        eval_split=eval_split,
        out=out,
    )
    job = Job.read(model, base, asked)
    for note in job.notes:
        typer.echo(note)
    with bars() as stage:
        found = job.measure(stage)
    print_table(figure_table(found))
    if found.layers:
        print_table(layer_table(found))
    if out is not None:
        job.write(found)
        typer.echo(f"wrote {out}")
