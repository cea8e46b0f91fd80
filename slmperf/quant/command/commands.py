"""The command `slmperf quantize`: its options and what it prints. Only typer is imported here.

Everything that can be wrong with options, model and files is looked for before weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmperf.command import EVAL_SPLIT
from slmperf.command.terminal import bars, print_table

Option = typer.Option


def quantize(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.", show_default=False)],
    scheme: Annotated[
        str, Option(help="fp8, fp8-static, fp8-block, w8a8 or w4a16.", show_default=False)
    ],
    override: Annotated[
        list[str] | None,
        Option(
            help="Another scheme, or none, for layers: '*.down_proj=fp8'; may be given again, the "
            "last that matches decides."
        ),
    ] = None,
    method: Annotated[
        str, Option(help="rtn, gptq, quantease or gptq+quantease; as the scheme says if empty.")
    ] = "",
    group_size: Annotated[
        int | None, Option(help="For w4a16: inputs that share a scale, -1 for all; else 128.")
    ] = None,
    damping: Annotated[
        float | None, Option(help="Over the mean of the Gram's diagonal; as the method says.")
    ] = None,
    calibration: Annotated[
        Path | None,
        Option(
            help="In-domain text, JSONL or plain, or ranking prompts; fp8, fp8-block and --method "
            "rtn can do without."
        ),
    ] = None,
    generic: Annotated[Path | None, Option(help="Generic text to calibrate on instead.")] = None,
    split: Annotated[
        str, Option(help="Calibrate on lines of this split; all but eval if empty.")
    ] = "",
    samples: Annotated[
        int, Option(help="Pieces of --context tokens, packed without padding, at most.")
    ] = 512,
    context: Annotated[
        int | None, Option(help="Tokens of a piece; as trained, at most 2048, if not given.")
    ] = None,
    held_out: Annotated[
        Path | None, Option(help="Also take every layer's error on this text (its split eval).")
    ] = None,
    evaluate: Annotated[
        Path | None,
        Option("--eval", help="Measure before and after: perplexity of text, AUC of prompts."),
    ] = None,
    eval_split: Annotated[str, Option(help="Measure on lines of this split.")] = EVAL_SPLIT,
    kv_cache: Annotated[
        bool, Option("--kv-cache", help="FP8 keys and values, with calibrated scales.")
    ] = False,
    no_smooth: Annotated[
        bool, Option("--no-smooth", help="No SmoothQuant where the scheme has it (w8a8).")
    ] = False,
    spill: Annotated[Path | None, Option(help="Folder for what memory does not hold.")] = None,
    stream: Annotated[
        bool, Option("--stream", help="Hold one block of the model in memory at a time.")
    ] = False,
) -> None:
    """Quantise a model into a checkpoint that Transformers, vLLM and SGLang read as it is.

    Writes the checkpoint with quantization.json (a row for each layer) and quantization.svg (error
    and bits by layer). Finished blocks are kept in OUT.parts until all are: the same command, run
    again after it was stopped, goes on behind them.
    """
    from slmperf.command.texts import Texts
    from slmperf.quant.command.job import Asked, Job
    from slmperf.quant.command.report import layer_table, summary

    asked = Asked(
        scheme=scheme,
        override=tuple(override or ()),
        method=method or None,
        group_size=group_size,
        damping=damping,
        kv_cache=kv_cache,
        no_smooth=no_smooth,
        held_out=held_out,
        spill=spill,
        stream=stream,
    )
    files = {"in-domain": calibration, "generic": generic}
    texts = Texts(
        files={source: path for source, path in files.items() if path is not None},
        split=split or None,
        samples=samples,
        context=context,
        evaluate=evaluate,
        eval_split=eval_split,
        packed=True,
    )
    job = Job.read(model, out, asked, texts)
    for note in job.notes:
        typer.echo(note)
    with bars() as stage:
        done = job.quantize(stage)
    print_table(layer_table(done.report))
    typer.echo(summary(done.report))
    for name, before in done.before.items():
        typer.echo(f"{name}: {before:.4f} before, {done.after[name]:.4f} after")
    typer.echo(f"wrote {out}")
