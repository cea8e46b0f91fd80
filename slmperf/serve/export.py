"""The command `slmperf export`: a checkpoint as a serving engine takes it. Only typer is imported
here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slmperf.models.engines.export import Exported
    from slmperf.models.engines.facts import Engine
    from slmperf.models.engines.rules import Device

Option = typer.Option


def export(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.", show_default=False)],
    engine: Annotated[str, Option(help="vllm or sglang.", show_default=False)],
    tp: Annotated[int, Option(help="Tensor-parallel ranks that will share the model.")] = 1,
    stock: Annotated[
        bool, Option("--stock", help="For an engine without slmperf beside it (its plug-in).")
    ] = False,
    pad: Annotated[
        bool, Option("--pad", help="Add neurons of zeros where the engine asks for multiples.")
    ] = False,
    quantization: Annotated[
        str,
        Option(help="slmperf: quantised layers by the plug-in; empty: the engine's."),
    ] = "",
    labels: Annotated[
        str,
        Option(help="Answers that alone are scored: words of one token each, or #ID, with commas."),
    ] = "",
    device: Annotated[str, Option(help="Where the engine will run: cuda or cpu.")] = "cuda",
) -> None:
    """Write a checkpoint as vLLM or SGLang serves it, or say what it asks for.

    Pruned to the same sizes in all layers, a model runs in the stock engine as it is. Layers that
    differ run in slmperf's plug-in, or with --stock as DeciLM, filled up with zeros.
    """
    from slmperf.command.places import check_places, written
    from slmperf.data.text import tokenizer_beside
    from slmperf.models.engines.export import export_for_engine

    if device not in ("cuda", "cpu"):
        raise InputError(f"--device: wanted cuda or cpu, found {device!r}")
    check_places(out, None)
    tokenizer = tokenizer_beside(model)
    ids = [_token(label, tokenizer) for label in labels.split(",")] if labels else []
    with written(out):
        told = export_for_engine(
            model,
            tokenizer,
            out,
            engine=cast("Engine", engine),
            ranks=tp,
            plugin=not stock,
            device=cast("Device", device),
            pad=pad,
            quantization=quantization or None,
            labels=ids,
        )
    for line in summary(told):
        typer.echo(line)
    typer.echo(f"wrote {out}")


def summary(told: Exported) -> list[str]:
    """What was written and what it costs, in a few lines."""
    from slmperf.models.engines.facts import DECILM

    needs = "slmperf installed beside the engine" if told.plugin else "no plug-in"
    if told.quantization:
        needs += f", started with --quantization {told.quantization}"
    if told.written == DECILM:
        needs += ", but --trust-remote-code for its configuration"
    lines = [f"{told.written} for {_counted(told.ranks, 'rank')}: {needs}"]
    zeros = {"neuron": told.neurons, "query head": told.query_heads, "KV head": told.kv_heads}
    added = [_counted(count, what) for what, count in zeros.items() if count]
    if added:
        lines.append(f"zeros added, all layers together: {', '.join(added)}")
    if told.moved:
        lines.append(f"heads in the order of the ranks in {_counted(told.moved, 'layer')}")
    cache = f"KV cache: {told.cache.bytes_per_token:,} bytes per token"
    if told.cache.wasted:
        cache += (
            f", {told.cache.wasted:.0%} of them unused: SGLang's cache is as wide in every layer "
            "as in the widest; query heads by layer over alike KV heads waste none"
        )
    return [*lines, cache]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _token(label: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id of an answer, whose spaces count; InputError where it is not one token."""
    if label.strip().startswith("#") and label.strip()[1:].isdecimal():
        return int(label.strip()[1:])
    if tokenizer is None:
        raise InputError(f"--labels: wanted #ID where there is no tokenizer, found {label!r}")
    ids = tokenizer.encode(label, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"--labels: wanted words of one token, found {label!r} of {len(ids)}")
    return ids[0]
