"""The commands `slmperf plan` and `slmperf plan fit`. Only typer is imported here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmperf.plan.latency import LatencyModel

app = typer.Typer()


@app.callback(invoke_without_command=True)
def plan(
    ctx: typer.Context,
    target_ttft_ms: Annotated[
        float | None, typer.Option(help="Milliseconds until the answers are there.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of a prompt: 16384 or 16k.")] = "16k",
    gpu: Annotated[
        str, typer.Option(help="h100, a100, h200, or a file that `plan fit` wrote.")
    ] = "h100",
    tp: Annotated[int, typer.Option(help="GPUs that share a model (tensor parallel).")] = 1,
    items: Annotated[int, typer.Option(help="Prompts released together on one prefix.")] = 1,
    item_tokens: Annotated[str, typer.Option(help="Tokens of each behind the prefix.")] = "128",
    hot: Annotated[
        bool, typer.Option("--hot", help="Hold the target against the cached prefix.")
    ] = False,
    base: Annotated[
        str, typer.Option(help="Models to prune: names or checkpoint folders, with commas.")
    ] = "8b,3b,1b",
    scheme: Annotated[str, typer.Option(help="fp8, w8a8, bf16, w4a16; all if empty.")] = "",
    usd_per_gpu_hour: Annotated[
        float, typer.Option(help="Price for the cost column; the default is an assumption.")
    ] = 3.0,
    write: Annotated[
        Path | None,
        typer.Option(help="Write a choice as a recipe, YAML; it trains the base anew."),
    ] = None,
    choice: Annotated[int, typer.Option(help="Which row --write takes.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Latency over parameters, .svg or .png.")
    ] = None,
) -> None:
    """List the shapes that meet a latency, before anybody trains them."""
    if ctx.invoked_subcommand is not None:
        return
    from slmperf.check import InputError, check_plot, parse_tokens
    from slmperf.models.files import write_atomically
    from slmperf.models.shapes import shape_of
    from slmperf.plan.latency import LatencyModel
    from slmperf.plan.plot import plot_plan
    from slmperf.plan.recipe import recipe_text
    from slmperf.plan.search import floor_ms
    from slmperf.plan.search import plan as search

    if target_ttft_ms is None:
        raise InputError("plan: --target-ttft-ms is missing, expected milliseconds such as 150")
    model = LatencyModel.named(gpu)
    bases = [shape_of(one.strip()) for one in base.split(",") if one.strip()]
    tokens, own_tokens = parse_tokens(context), parse_tokens(item_tokens, "item tokens")
    schemes = [one.strip() for one in scheme.split(",") if one.strip()] or list(model.gemm_tflops)
    if not bases:
        raise InputError(f"plan: base is {base!r}, expected at least one shape")
    if not usd_per_gpu_hour > 0:
        raise InputError(f"plan: usd_per_gpu_hour is {usd_per_gpu_hour}, expected a number > 0")
    if plot is not None:
        check_plot(plot)
    found = search(
        target_ttft_ms=target_ttft_ms,
        context=tokens,
        gpu=model,
        tensor_parallel=tp,
        items=items,
        item_tokens=own_tokens,
        hot=hot,
        bases=bases,
        schemes=schemes,
    )
    if write is not None and found and not 1 <= choice <= len(found):
        raise InputError(
            f"plan: choice is {choice}, expected 1 to {len(found)} of the shapes found"
        )
    if found:
        _print_choices(found, usd_per_gpu_hour)
    else:
        least = floor_ms(model, context=tokens, items=items, item_tokens=own_tokens, hot=hot)
        line = (
            f"no shape of {base} that fits {model.device_memory_gb:g} GB meets "
            f"{target_ttft_ms:g} ms; "
            f"the cost per token and per pass alone is {least:.0f} ms"
        )
        if write is not None:
            raise InputError(f"plan: nothing to write: {line}")
        typer.echo(line)
    _print_trust(model, found)
    if write is not None:
        write_atomically(write, recipe_text(found[choice - 1]))
        typer.echo(f"wrote {write}: slmperf run {write}")
    if plot is not None:
        plot_plan(
            plot,
            model,
            bases,
            found,
            target_ttft_ms=target_ttft_ms,
            scheme=schemes[0],
            context=tokens,
            tensor_parallel=tp,
            items=items,
            item_tokens=own_tokens,
            hot=hot,
        )
        typer.echo(f"wrote {plot}")


@app.command()
def fit(
    measurements: Annotated[
        list[Path], typer.Argument(help="Results of bench serve --shape, or the paper's figures.")
    ],
    like: Annotated[
        str, typer.Option(help="What is not fitted is taken from this model.")
    ] = "h100-paper",
    name: Annotated[str, typer.Option(help="Name of the new model.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the model, for `plan --gpu`.")] = None,
) -> None:
    """Fit the planner's constants to measurements, and print how well they do."""
    from rich.console import Console
    from rich.table import Table

    from slmperf.plan.fit import fit as fit_cells
    from slmperf.plan.fit import read_cells
    from slmperf.plan.latency import LatencyModel

    base = LatencyModel.named(like)
    found = fit_cells(
        [cell for path in measurements for cell in read_cells(path)],
        base,
        name or measurements[0].stem,
        f"Fitted on {', '.join(path.name for path in measurements)}; "
        f"what is not fitted as in {base.name}.",
    )
    model = found.model
    table = Table(title=f"{model.name}: predicted against measured", title_justify="left")
    for column in (
        "shape",
        "context",
        "tp",
        "items",
        "prefix",
        "ms",
        "error %",
        "left out, error %",
    ):
        table.add_column(column, justify="left" if column in ("shape", "prefix") else "right")
    for cell, error, left_out in zip(found.cells, found.error_pct, found.left_out_pct, strict=True):
        prefix = "hot" if cell.hot else "cold"
        sizes = (str(cell.shape), f"{cell.context:,}", str(cell.tensor_parallel), str(cell.items))
        table.add_row(*sizes, prefix, f"{cell.ttft_ms:.4g}", f"{error:+.2f}", f"{left_out:+.2f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for scheme in model.fitted.schemes:
        console.print(f"matrix products  {model.gemm_tflops[scheme]:.5g} TFLOP/s ({scheme})")
    console.print(f"attention        {model.attention_tflops:.5g} TFLOP/s")
    console.print(f"per token        {model.token_us:.5g} us")
    console.print(f"per pass         {model.fixed_ms:.5g} ms")
    if out is not None:
        model.save(out)
        console.print(f"wrote {out}")


def _print_choices(found: list, usd_per_gpu_hour: float) -> None:
    from rich.console import Console
    from rich.table import Table

    first = found[0]
    table = Table(
        title=f"items: {first.items}, on a prefix of {first.context - first.item_tokens:,} tokens; "
        f"tensor parallel {first.tensor_parallel}; $ per million scores at {usd_per_gpu_hour:g} "
        "an hour and GPU; * extrapolates",
        title_justify="left",
    )
    columns = (
        "", "base", "neurons", "heads", "scheme", "parameters", "weights GB", "KV kB per token",
        "members per GPU", "TTFT cold ms", "TTFT hot ms", "$ cold", "$ hot",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("base", "scheme") else "right")
    for number, one in enumerate(found, 1):
        shape = one.shape
        table.add_row(
            str(number),
            str(one.base),
            f"{shape.intermediate:,}",
            f"{shape.heads}/{shape.kv_heads}",
            one.scheme,
            f"{one.parameters / 1e9:.3f}B",
            f"{one.weight_bytes / 1e9:.2f}",
            f"{one.kv_bytes_per_token / 1e3:.1f}",
            f"{one.members_per_gpu:,.0f}"
            if one.members_per_gpu >= 10
            else f"{one.members_per_gpu:.1f}",
            f"{one.ttft_cold_ms:.0f}" + "*" * bool(one.ttft_cold_ms.extrapolates),
            f"{one.ttft_hot_ms:.1f}" + "*" * bool(one.ttft_hot_ms.extrapolates),
            f"{one.gpu_hours_cold * usd_per_gpu_hour:.2f}",
            f"{one.gpu_hours_hot * usd_per_gpu_hour:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_trust(model: LatencyModel, found: list) -> None:
    """How far the figures hold: the fit's error, and in which ways rows lie outside of it."""
    seen = model.fitted
    if seen.cells:
        typer.echo(
            f"{model.name}: fitted within {seen.residual_pct:g}% on {seen.cells} measurements "
            f"({seen.left_out_pct or 0:g}% on one that is left out)"
        )
    else:
        typer.echo(f"{model.name}: {model.source}")
    rows: dict[str, list[int]] = {}
    for number, one in enumerate(found, 1):
        for reason in one.ttft_cold_ms.extrapolates + one.ttft_hot_ms.extrapolates:
            numbers = rows.setdefault(reason, [])
            if number not in numbers:
                numbers.append(number)
    for reason, numbers in rows.items():
        every = len(numbers) == len(found)
        where = "all rows" if every else f"rows {', '.join(map(str, numbers))}"
        typer.echo(f"extrapolates in {where}: {reason}")
