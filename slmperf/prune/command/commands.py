"""The command `slmperf prune`: its options and what it prints. Only typer is imported here.

Everything that can be wrong with options, model and files is looked for before weights are read,
and nothing is written before the result is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmperf.command import EVAL_SPLIT
from slmperf.command.terminal import bars, print_table

if TYPE_CHECKING:
    from slmperf.prune.command.job import Job

Option = typer.Option
# What options say where they are not given; giving another word where they cannot matter is refused
# (job.py).
GRANULARITY, GPU, PROMPT, TENSOR_PARALLEL = 512, "h100", "16k", 1


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
    from slmperf.command.texts import Texts
    from slmperf.prune.command.asked import Asked
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
    with bars() as stage:
        done = job.prune(stage)
    for note in done.notes:
        typer.echo(note)
    print_table(layer_table(done.report))
    typer.echo(summary(done.report))
    if done.after is not None:
        typer.echo(f"{job.measure_name}: {done.before:.4f} before, {done.after:.4f} after")
    typer.echo(f"wrote {job.out}")


def _compare(job: Job) -> None:
    from slmperf.prune.command.report import comparison_table

    for note in job.notes:
        typer.echo(note)
    with bars() as stage:
        found = job.compare(stage)
    print_table(comparison_table(found))
    for name, seconds in found.pass_seconds.items():
        order = found.elimination_seconds.get(name)
        more = "" if order is None else f", one elimination for all sizes {order:.1f} s"
        typer.echo(f"{name}: {found.tokens[name]:,} tokens, one pass {seconds:.1f} s{more}")
    typer.echo(f"wrote {job.out}")
