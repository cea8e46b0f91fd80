"""The command `slmperf deploy`. Only typer is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Option = typer.Option
# Containers of the versions that the rules were found with.
_IMAGES = {"sglang": "lmsysorg/sglang:v0.5.23", "vllm": "vllm/vllm-openai:v0.33.0"}


def deploy(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    engine: Annotated[Literal["sglang", "vllm"], Option(show_default=False)],
    gpu: Annotated[str, Option(help="h100, a100, h200, or a file that `plan fit` wrote.")] = "h100",
    tp: Annotated[
        int | None,
        Option(help="GPUs that share a model; those that take the fewest in all if not given."),
    ] = None,
    context: Annotated[str, Option(help="Tokens of a prompt: 16384 or 16k.")] = "16k",
    items: Annotated[int, Option(help="Prompts of a request, released together.")] = 1,
    item_tokens: Annotated[str, Option(help="Tokens of each behind the prefix.")] = "128",
    hot_share: Annotated[
        float, Option(help="Of the requests that find their prefix in the cache, 0 to 1.")
    ] = 0.0,
    requests_per_s: Annotated[
        float | None, Option(help="Requests a second, one for a member with all items.")
    ] = None,
    target_ttft_ms: Annotated[
        float | None,
        Option(help="Milliseconds until all items are answered, waiting included."),
    ] = None,
    replicas: Annotated[int, Option(help="At least so many.")] = 1,
    quantization: Annotated[
        Literal["slmperf"] | None,
        Option(help="Quantised layers by the plug-in, slower; else by the engine."),
    ] = None,
    name: Annotated[
        str, Option(help="In the cluster and at the port; the folder's if empty.")
    ] = "",
    image: Annotated[str, Option(help="The engine's container; its project's own if empty.")] = "",
    claim: Annotated[
        str, Option(help="PersistentVolumeClaim that holds the checkpoint's folder.")
    ] = "models",
    write: Annotated[
        Path | None, Option(help="Folder for serve.sh and kubernetes.yaml, new or empty.")
    ] = None,
) -> None:
    """Size a deployment of SGLang or vLLM, and print what starts it.

    Command lines for one machine and manifests for Kubernetes, with SGLang's router before several
    replicas; the engines do the rest. Nothing is started.
    """
    from slmperf import __version__
    from slmperf.check import parse_tokens
    from slmperf.command.places import check_new, check_writable, written
    from slmperf.command.terminal import print_table
    from slmperf.models.files import write_folder
    from slmperf.plan.latency import LatencyModel
    from slmperf.serve.deploy.checkpoint import read_checkpoint
    from slmperf.serve.deploy.kubernetes import check_name, kubernetes_name, manifests, text
    from slmperf.serve.deploy.lines import Deployment, dockerfile, script
    from slmperf.serve.deploy.report import notes, summary, table
    from slmperf.serve.deploy.sizing import Wanted, size

    wanted = Wanted(
        engine=engine,
        context=parse_tokens(context, "--context"),
        items=items,
        item_tokens=parse_tokens(item_tokens, "--item-tokens"),
        hot_share=hot_share,
        requests_per_s=requests_per_s,
        target_ttft_ms=target_ttft_ms,
        replicas=replicas,
        quantization=quantization,
    )
    if name:
        check_name("--name", name)
    if write is not None:
        check_new(write)
        check_writable(write)
    model = LatencyModel.named(gpu)
    read = read_checkpoint(checkpoint)
    sized, tried = size(read, model, wanted, tp)
    called = name or kubernetes_name(checkpoint.resolve().name)
    own = f"slmperf-{engine}:{_IMAGES[engine].partition(':')[2]}"
    deployment = Deployment(
        name=called,
        checkpoint=read,
        wanted=wanted,
        sized=sized,
        image=image or (own if sized.plugin else _IMAGES[engine]),
        claim=claim,
    )
    print_table(table(deployment, tried))
    told = notes(deployment, tried, model)
    for line in told:
        typer.echo(line)
    lines = script(deployment)
    cluster = text(manifests(deployment), [*summary(deployment), "", *told])
    if write is None:
        typer.echo(f"\n{lines}\n{cluster}")
        return
    with written(write), write_folder(write) as aside:
        (aside / "serve.sh").write_text(lines)
        (aside / "serve.sh").chmod(0o755)
        (aside / "kubernetes.yaml").write_text(cluster)
        if sized.plugin and not image:
            (aside / "Dockerfile").write_text(dockerfile(_IMAGES[engine], __version__))
    typer.echo(f"wrote {write}")
