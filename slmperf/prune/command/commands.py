"""The command `slmperf prune`: its options and what it prints. Only typer is imported here.

Everything that can be wrong with options, model and files is looked for before weights are read,
and nothing is written before the result is there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slmperf.prune.command.job import Job

Option = typer.Option
# What options say where they are not given; giving another word where they cannot matter is refused
# (job.py).
GRANULARITY, GPU, PROMPT, TENSOR_PARALLEL, EVAL_SPLIT = 512, "h100", "16k", 1, "eval"


def prune(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.", show_default=False)],
    params: Annotated[
        str,
        Option(
            help="Target: parameters, such as 2.4B; the nearest legal shape; several: --compare."
        ),
    ] = "",
    kv_bytes: Annotated[
        str, Option(help="Target: bytes of a token in the KV cache, at most; 57344 or 56KiB.")
    ] = "",
    milliseconds: Annotated[
        float | None, Option(help="Target: predicted milliseconds to the first token, at most.")
    ] = None,
    intermediate: Annotated[str, Option(help="Neurons; several with commas to compare.")] = "",
    heads: Annotated[int | None, Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, Option(help="Key/value heads.")] = None,
    head_mode: Annotated[
        str, Option(help="Which heads leave together: kv_group, uniform or free.")
    ] = "kv_group",
    dimensions: Annotated[
        str, Option("--prune", help="What a target may shrink: mlp, attention or mlp,attention.")
    ] = "",
    granularity: Annotated[
        int, Option(help="A target's neurons are multiples of this.")
    ] = GRANULARITY,
    per_layer: Annotated[
        bool, Option("--per-layer", help="A target's sizes may differ between layers.")
    ] = False,
    calibration: Annotated[
        Path | None, Option(help="In-domain text, JSONL or plain, or ranking prompts.")
    ] = None,
    generic: Annotated[Path | None, Option(help="Generic text to calibrate on instead.")] = None,
    split: Annotated[
        str, Option(help="Calibrate on lines of this split; all but eval if empty.")
    ] = "",
    samples: Annotated[int, Option(help="Calibration sequences, at most.")] = 512,
    generic_samples: Annotated[
        int | None, Option(help="The same of --generic; as --samples if not given.")
    ] = None,
    answers_only: Annotated[
        bool,
        Option("--answers-only", help="Only tokens before those of answers or completions count."),
    ] = False,
    context: Annotated[
        int | None, Option(help="Tokens of a sequence; as trained, at most 2048, if not given.")
    ] = None,
    evaluate: Annotated[
        Path | None,
        Option("--eval", help="Measure before and after: perplexity of text, AUC of prompts."),
    ] = None,
    eval_split: Annotated[str, Option(help="Measure on lines of this split.")] = EVAL_SPLIT,
    mode: Annotated[
        str, Option(help="Inputs of a layer: sequential, one_pass or dense_target.")
    ] = "sequential",
    method: Annotated[
        str, Option(help="How layers are pruned; with --compare several with commas, or all.")
    ] = "",
    damping: Annotated[float, Option(help="Pull to the old weights, over the Gram's mean.")] = 0.01,
    swaps: Annotated[int, Option(help="At most so many swaps in each layer.")] = 0,
    compare: Annotated[
        bool, Option("--compare", help="Compare methods, sizes and calibration sets; no model.")
    ] = False,
    spill: Annotated[Path | None, Option(help="Folder for what memory does not hold.")] = None,
    stream: Annotated[
        bool, Option("--stream", help="Hold one block of the model in memory at a time.")
    ] = False,
    gpu: Annotated[str, Option(help="For --milliseconds: a preset or file of `plan`.")] = GPU,
    prompt: Annotated[str, Option(help="For --milliseconds: tokens of a prompt.")] = PROMPT,
    tp: Annotated[
        int, Option(help="For --milliseconds: GPUs that share the model.")
    ] = TENSOR_PARALLEL,
) -> None:
    """Prune MLP neurons and attention heads of a model, to sizes or to a target.

    Writes the checkpoint with pruning.json (a row for each layer) and pruning.svg (error curves);
    with --compare only comparison.json and comparison.svg. Stock Transformers reads it, or
    slmperf.models where layers differ; slmperf.models.export_for_engine writes those for vLLM.
    """
    from slmperf.prune.command.asked import Asked, Texts
    from slmperf.prune.command.job import Job

    asked = Asked(
        params=params,
        kv_bytes=kv_bytes,
        milliseconds=milliseconds,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_mode=head_mode,
        dimensions=dimensions,
        granularity=granularity,
        per_layer=per_layer,
        gpu=gpu,
        prompt=prompt,
        tp=tp,
        mode=mode,
        method=method,
        damping=damping,
        swaps=swaps,
        compare=compare,
        spill=spill,
        stream=stream,
    )
    files = {"in-domain": calibration, "generic": generic}
    texts = Texts(
        files={source: path for source, path in files.items() if path is not None},
        split=split or None,
        samples=samples,
        generic_samples=generic_samples,
        answers_only=answers_only,
        context=context,
        evaluate=evaluate,
        eval_split=eval_split,
    )
    job = Job.read(model, out, asked, texts)
    (_compare if compare else _prune)(job)


def _prune(job: Job) -> None:
    from slmperf.prune.command.report import layer_table, summary

    for note in job.notes:
        typer.echo(note)
    with _bars() as stage:
        done = job.prune(stage)
    for note in done.notes:
        typer.echo(note)
    _print(layer_table(done.report))
    typer.echo(summary(done.report))
    if done.after is not None:
        typer.echo(f"{job.measure_name}: {done.before:.4f} before, {done.after:.4f} after")
    typer.echo(f"wrote {job.out}")


def _compare(job: Job) -> None:
    from slmperf.prune.command.report import comparison_table

    for note in job.notes:
        typer.echo(note)
    with _bars() as stage:
        found = job.compare(stage)
    _print(comparison_table(found))
    for name, seconds in found.pass_seconds.items():
        order = found.elimination_seconds.get(name)
        more = "" if order is None else f", one elimination for all sizes {order:.1f} s"
        typer.echo(f"{name}: {found.tokens[name]:,} tokens, one pass {seconds:.1f} s{more}")
    typer.echo(f"wrote {job.out}")


def _print(table: Any) -> None:
    from rich.console import Console

    # A pipe has no width; 120 columns keep a line of the table a line of the log.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars with the time left, one under the other, of each title one that starts at its first call
    of (done, total); off a terminal invisible.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    shown = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with shown:

        def stage(title: str) -> Callable[[int, int], None]:
            tasks: list[TaskID] = []

            def move(done: int, total: int) -> None:
                if not tasks:
                    tasks.append(shown.add_task(title, total=None))
                shown.update(tasks[0], completed=done, total=total)

            return move

        yield stage
