"""The commands `slmperf bench ...`. Only typer is imported here; each imports what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from slmperf.bench.gram.command import gram
from slmperf.bench.kd.command import kd
from slmperf.bench.linear.command import linear
from slmperf.bench.osscar.command import osscar
from slmperf.bench.quantize.command import quantize
from slmperf.bench.train.command import train

app = typer.Typer(
    help="Measure: the machine's roof, operators, one layer, a training step, a serving load.",
    no_args_is_help=True,
)
app.command()(gram)
app.command()(kd)
app.command()(linear)
app.command()(osscar)
app.command()(quantize)
app.command()(train)


@app.command()
def serve(
    workload: Annotated[
        str, typer.Option(help="small, or a load of the paper: table7, table9, table10, table11.")
    ] = "small",
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="http://HOST:PORT (OpenAI's /v1/completions), http://HOST:PORT/v1/score, or "
            "MODULE:FUNCTION; this process's engine if not given."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint for this process's engine (random weights if not given), or the name "
            "by which the server knows its model (asked for if not given)."
        ),
    ] = None,
    prompts: Annotated[str, typer.Option(help="ids, text, or both, one after the other.")] = "both",
    rate: Annotated[float | None, typer.Option(help="Members a second (m).")] = None,
    k: Annotated[int | None, typer.Option(help="Prompts per member, released together.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens of a prompt: 512, 16k.")] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Of these, tokens that a member's prompts do not share.")
    ] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens out, at most.")] = None,
    members: Annotated[int | None, typer.Option(help="Measured members.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Members before them, left out.")] = None,
    spacing: Annotated[str | None, typer.Option(help="constant or poisson.")] = None,
    hot_after: Annotated[
        float | None,
        typer.Option(help="Seconds from a member's first prompt to the others; 0 is together."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of prompts and gaps; a new one each time if not given.")
    ] = None,
    vocabulary: Annotated[int, typer.Option(help="Ids that the server's model knows.")] = 32000,
    device: Annotated[str, typer.Option(help="For this process's engine.")] = "auto",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    timeout_s: Annotated[float, typer.Option(help="A request is lost after this time.")] = 600.0,
    shape: Annotated[
        str | None,
        typer.Option(
            help="What the server runs, for slmperf plan fit: 3b, 2.1b, ...; this process's "
            "engine knows its own, and the three below."
        ),
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Likewise: GPUs per model.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Likewise: bf16, fp8, ...")] = None,
    hardware: Annotated[str | None, typer.Option(help="Likewise: the server's GPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the times of cold and hot prompts (.png, .svg).")
    ] = None,
) -> None:
    """Load a server as ranking does: members arrive, each with k prompts on one long prefix.

    Arrivals never wait for answers. Prints TTFT, TPOT and input tokens a second, for the first
    prompt of each member (cold), its siblings (hot) and all; on this process's engine the share of
    this machine's roof too. Of a server the roof is not known.
    """
    import secrets

    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.serving import report as serving
    from slmperf.bench.serving import workloads
    from slmperf.bench.serving.endpoints import open_endpoint
    from slmperf.check import InputError, parse_tokens
    from slmperf.models.shapes import shape_of

    work = workloads.workload(
        workload,
        rate=rate,
        k=k,
        context=None if context is None else parse_tokens(context),
        suffix=None if suffix is None else parse_tokens(suffix, "suffix"),
        output_tokens=output_tokens,
        members=members,
        warmup=warmup,
        spacing=spacing,
        hot_after_s=hot_after,
        # A server that keeps prefixes would take a second run of one seed for hot.
        seed=secrets.randbits(31) if seed is None else seed,
    )
    kinds = [kind for kind in workloads.KINDS if prompts in (kind, "both")]
    if not kinds:
        raise InputError(f"prompts are {prompts!r}, expected ids, text or both")
    server = {"shape": shape, "tp": tp, "scheme": scheme, "hardware": hardware}
    said = [name for name, value in server.items() if value is not None]
    if endpoint is None and said:
        raise InputError(
            f"--{said[0]} says what a server runs, expected --endpoint beside it: this process's "
            "engine has its own"
        )
    if tp is not None and tp < 1:
        raise InputError(f"tp is {tp}, expected at least 1")
    if shape is not None:
        shape_of(shape)
    results.check_files(out, plot)
    where = results.check_device(device)
    announced = f"{work}; about {len(kinds) * work.seconds:.0f} s"
    if endpoint is None:
        from slmperf.bench.roof import roof as measured_roof
        from slmperf.bench.serving.engine import open_engine

        engine = open_engine(model, work, where)
        for kind in kinds:
            engine.check_kind(kind)
        workloads.check_vocabulary(engine.vocabulary)
        top = measured_roof(where)
        typer.echo(announced)
        reports = [engine.measure(work, kind, top) for kind in kinds]
        facts, roof_facts = engine.facts(), top.as_json()
    else:
        workloads.check_vocabulary(vocabulary)
        target = open_endpoint(endpoint, model=model, api_key=api_key, timeout_s=timeout_s)
        typer.echo(announced)
        reports = [serving.measure(work, kind, target, vocabulary=vocabulary) for kind in kinds]
        facts = {"shape": shape, "tensor_parallel": tp, "scheme": scheme, "hardware": hardware}
        roof_facts = None
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(serving.table(reports))
    for line in (line for report in reports for line in report.lines):
        typer.echo(line)
    if out is not None:
        rows = serving.rows(reports, endpoint=endpoint or "engine", **facts)
        machine = results.machine(where)
        results.write_results(out, "serve", rows, machine=machine, roof=roof_facts)
        typer.echo(f"results: {out}")
    if plot is not None:
        serving.plot(reports, plot)
        typer.echo(f"plot: {plot}")


@app.command()
def layer(
    shape: Annotated[
        str, typer.Option(help="Shapes or checkpoint folders, the first being what others save on.")
    ] = "3b,2.4b,2.1b",
    context: Annotated[
        str | None,
        typer.Option(help="Tokens of the prefill, k = 1024; 4k,16k,32k on a GPU, less on a CPU."),
    ] = None,
    tp: Annotated[int, typer.Option(help="Ranks; the share of one of them is timed.")] = 1,
    decode: Annotated[
        str | None,
        typer.Option(help="Also decode steps of so many sequences of the context, such as 1,16."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp32, fp8, w8a8, w4a16, or several, such as bf16,w4a16, which are compared "
            "with the first; the dtype's if not given."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the activations: bf16 or fp32; the device's faster if not given."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    allreduce_gbs: Annotated[
        float | None,
        typer.Option(help="For the simulated all-reduce; that of four H100 if not given."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw stacked bars (.png, .svg, .pdf).")] = None,
) -> None:
    """Time one Transformer block part by part, and whole: random weights, a prefill of batch 1, and
    decode steps.

    Prints for each context shapes and schemes side by side, the change to the first, and for each
    part the work and its share of this machine's roof. The all-reduces of --tp ranks are simulated.
    """
    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench.layer import measure, options, report
    from slmperf.bench.layer import plot as plots
    from slmperf.bench.roof import roof as measured_roof

    where = results.check_device(device)
    results.check_files(out, plot)
    shapes = options.parse_shapes(shape)
    schemes = options.choose_schemes(scheme, dtype, where)
    if context is None:
        contexts = options.default_contexts(where, schemes)
    else:
        contexts = options.parse_contexts(context)
    steps = (0, *(() if decode is None else options.parse_decode(decode)))  # 0: the prefill
    works = [(tokens, sequences) for sequences in steps for tokens in contexts]
    for tokens, sequences in works:  # all of it first: nothing is measured in vain
        options.check_layers(shapes, tokens, tp, schemes, where, sequences)
        measure.allreduce(shapes[0], tokens, tp, allreduce_gbs)
    if where == "cpu" and context is None:
        typer.echo(
            f"contexts are {' and '.join(map(str, contexts))} tokens: smaller on a CPU than on a "
            "GPU, so that this ends within two minutes; --context sets others"
        )
    top = measured_roof(where)
    found = []
    for tokens, sequences in works:
        new = measure.measure_layers(
            shapes,
            tokens,
            tensor_parallel=tp,
            decode=sequences,
            scheme=scheme,
            dtype=dtype,
            device=where,
            roof=top,
            allreduce_gbs=allreduce_gbs,
        )
        for one, name in zip(new, report.labels(new), strict=True):
            typer.echo(f"{one.work}, {name}: {one.layer_us / 1e3:.4g} ms a layer")
        found += new
    # A pipe has no width: as much as the columns need.
    columns = len(shapes) * len(schemes)
    console = Console(width=None if sys.stdout.isatty() else 40 + 40 * columns)
    for table in report.tables(found):
        console.print(table)
    for line in report.lines(found):
        typer.echo(line)
    if out is not None:
        rows = [row for one in found for row in one.rows()]
        results.write_results(
            out, "layer", rows, machine=results.machine(where), roof=top.as_json()
        )
        typer.echo(f"results: {out}")
    if plot is not None:
        plots.plot_layers(found, plot)
        typer.echo(f"plot: {plot}")


@app.command()
def roof(
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: the CPU, and the GPU where there is one.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write a row per rate there, for slmperf bench compare.")
    ] = None,
) -> None:
    """Measure what this machine does at best: copy bandwidth, matrix rates, launch latency.

    Always measured anew and kept; the table shows what was kept before beside it.
    """
    import json

    from rich.console import Console

    from slmperf.bench import results
    from slmperf.bench import roof as roofs

    best = results.check_device(device)
    results.check_files(out, None)
    kinds = ["cpu", "cuda"] if (device, best) == ("auto", "cuda") else [best]
    before = {kind: roofs.kept_roof(kind) for kind in kinds}
    found = {kind: roofs.measure_roof(kind) for kind in kinds}
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found.values()], indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        for kind, one in found.items():
            console.print(roofs.roof_table(one, before[kind]))
    if out is not None:
        rows = [row for one in found.values() for row in one.rows()]
        facts = results.machine(best)
        results.write_results(out, "roof", rows, machine=facts, roof=found[best].as_json())
        typer.echo(f"results: {out}", err=as_json)
    try:
        for one in found.values():
            roofs.keep(one)
    except OSError as error:
        typer.echo(f"not kept: {roofs.cache_file()}: {error.strerror}", err=True)


@app.command()
def ops(
    op: Annotated[str | None, typer.Option(help="One op; all of them if not given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[
        float, typer.Option(help="Of timing per variant; at least five rounds.")
    ] = 0.3,
    out: Annotated[Path | None, typer.Option(help="Write the rows there, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline (.png, .svg, .pdf).")] = None,
) -> None:
    """Time every op, forward and backward, beside plain torch, torch.compile and rivals.

    Exit code 1 where an implementation of ours cannot run or finds another result.
    """
    from rich.console import Console

    from slmperf.bench import ops as benches
    from slmperf.bench import plots, results
    from slmperf.bench.roof import roof as measured_roof
    from slmperf.check import InputError

    where = results.check_device(device)
    cases = benches.cases_of(op, where)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds}, expected more than 0")
    results.check_files(out, plot)
    top = measured_roof(where)
    rows: list[benches.Row] = []
    refused: dict[str, str] = {}
    ours: list[str] = []
    with Console(stderr=True).status("") as status:
        for number, case in enumerate(cases, 1):
            status.update(f"{number} of {len(cases)}: {case.op} {case}")
            ways = benches.variants(case, where)
            found = benches.measure_case(case, where, top, seconds, ways)
            rows += found.rows
            refused |= found.refused
            ours += [f"{case.op} {case} {name}" for name, way in ways.items() if way.role == "ours"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(benches.rows_table(rows, refused, top))
    if out is not None:
        content = benches.as_json(rows)
        facts = results.machine(where)
        results.write_results(
            out, "ops", content, machine=facts, roof=top.as_json(), refused=refused
        )
        typer.echo(f"results: {out}")
    if plot is not None:
        plots.roofline(rows, top, plot)
        typer.echo(f"plot: {plot}")
    if set(ours) & set(refused):
        raise typer.Exit(1)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Results of the one run.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Results of the other.")],
    fail_over: Annotated[
        float | None,
        typer.Option(help="Exit code 1 where a row takes more times as long as this, or is gone."),
    ] = None,
) -> None:
    """Compare two result files row by row; what lies within their noise counts as the same.

    Where both files hold a row's yardstick (plain torch beside it), times are taken in yardsticks;
    yardsticks themselves do not count for --fail-over.
    """
    from rich.console import Console

    from slmperf.bench import compare as comparing
    from slmperf.check import InputError

    if fail_over is not None and not fail_over >= 1:
        raise InputError(f"fail-over is {fail_over}, expected a factor of at least 1")
    found = comparing.compare(before, after)
    for line in found.warnings:
        typer.echo(line)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(comparing.changes_table(found))
    if fail_over is None:
        return
    worse = found.worse_than(fail_over)
    for one in worse:
        typer.echo(f"slower than {fail_over} x: {one.name}, {one.decisive:.2f} x")
    if found.missing:
        names = ", ".join(one.name for one in found.missing[:3])
        more = ", ..." if len(found.missing) > 3 else ""
        typer.echo(f"{len(found.missing)} rows of A have no time in B: {names}{more}")
    if worse or found.missing:
        raise typer.Exit(1)
