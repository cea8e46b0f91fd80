"""Rules: which checkpoints SGLang 0.5.23 and vLLM 0.33.0 serve, told from config.json alone.

Found in the sources of the two engines and, but for what only a GPU runs, by starting them with
such checkpoints (tests/engines). Rules of GPU kernels count where `device` is "cuda"; they were
read, not run. docs/engines.md is their table.

    stock classes    H and F divide by the ranks, G divides by them or they by G
    our plug-in      whole key/value heads on every rank, any number of query heads each
    DeciLM           one number of query heads in all layers, Llama's parts only
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from slmperf.check import InputError
from slmperf.models.engines.decilm import decilm_layouts, decilm_neurons
from slmperf.models.engines.facts import DECILM, ENGINES, PRUNED, Engine, Facts, facts_of
from slmperf.models.engines.layout import HeadLayout, either
from slmperf.models.engines.linear import NAME
from slmperf.models.engines.rules import (
    NAMES,
    Device,
    of_activation,
    of_class,
    of_decilm,
    of_heads,
    of_moves,
    of_schemes,
    together,
)
from slmperf.models.layer_sizes import LayerSizes
from slmperf.ops.head_map import HeadMap

Model = str | os.PathLike[str] | Mapping[str, Any] | Facts


def reasons(
    model: Model,
    *,
    engine: Engine,
    ranks: int = 1,
    plugin: bool = False,
    device: Device = "cuda",
    dtype: str | None = None,
    quantization: str | None = None,
) -> list[str]:
    """Why the engine does not serve a checkpoint as it is, one line each; none: it does.

    model   a folder, or the fields of its config.json
    ranks   the tensor-parallel size
    plugin  whether slmperf is installed beside the engine
    dtype   what the engine is started with ("float32"); None: its own choice
    quantization  "slmperf": quantised layers are the plug-in's, slower, but of sizes that no kernel
                  takes (`rules.of_product`); None: the engine's
    Raises InputError for a configuration that is wrong in itself.
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}, wanted {' or '.join(map(repr, ENGINES))}")
    if ranks < 1:
        raise InputError(f"ranks is {ranks}, wanted at least 1")
    facts = model if isinstance(model, Facts) else facts_of(model)
    found = list(of_class(facts, engine, plugin))
    if found:  # no class: what its layers want says nothing
        return found
    found += of_heads(facts, engine, ranks)
    found += together(
        (i, f"{layer.intermediate_size} neurons do not divide by {ranks} ranks")
        for i, layer in enumerate(facts.layers)
        if layer.intermediate_size % ranks
    )
    if found:
        return found
    if device == "cuda" and engine == "sglang":
        found += of_activation(facts, ranks)
    own = plugin and quantization == NAME
    if facts.quantized and not own and dtype == "float32":
        if engine == "sglang":
            found.append("SGLang runs quantised layers in bfloat16 or float16, not in float32")
        elif device == "cuda":
            found.append("vLLM's kernels of quantised layers give bfloat16 or float16, not float32")
    return found + of_schemes(facts, engine, ranks, "own" if own else device)


def check_served(
    what: str,
    model: Model,
    *,
    engine: Engine,
    ranks: int = 1,
    plugin: bool = False,
    device: Device = "cuda",
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """InputError, in the name of `what`, with the reason why the engine does not serve a
    checkpoint and the nearest that it does; the arguments are those of `reasons`."""
    facts = model if isinstance(model, Facts) else facts_of(model)
    here = partial(reasons, facts, engine=engine, ranks=ranks, device=device)
    found = here(plugin=plugin, dtype=dtype, quantization=quantization)
    if not found:
        return
    if not here(plugin=plugin, quantization=quantization):  # but for the dtype
        near = ["--dtype bfloat16", f"--quantization {NAME} with the plug-in (slower)"]
    else:
        near = nearest(
            facts,
            engine=engine,
            ranks=ranks,
            plugin=plugin,
            device=device,
            quantization=quantization,
        )
    raise refusal(what, engine, found, near)


def refusal(what: str, engine: Engine, found: Sequence[str], near: Sequence[str]) -> InputError:
    """The one line of a refused checkpoint: the first reason, and what would be served."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    wanted = " or ".join(near) if near else "another engine, or Transformers"
    return InputError(f"{what}: {NAMES[engine]}: {found[0]}{more}; wanted {wanted}")


def served_ranks(
    model: Model,
    *,
    engine: Engine,
    plugin: bool = False,
    device: Device = "cuda",
    quantization: str | None = None,
) -> list[int]:
    """The tensor-parallel sizes at which the engine serves a checkpoint, as it is."""
    facts = model if isinstance(model, Facts) else facts_of(model)
    most = max(layer.heads.query_heads for layer in facts.layers)
    here = partial(reasons, facts, engine=engine, plugin=plugin, device=device)
    return [n for n in range(1, most + 1) if not here(ranks=n, quantization=quantization)]


def nearest(
    facts: Facts,
    *,
    engine: Engine,
    ranks: int,
    plugin: bool,
    device: Device,
    quantization: str | None = None,
) -> list[str]:
    """Changes to a refused checkpoint, or to how it is served, of which each is enough."""
    how: dict[str, Any] = {"engine": engine, "device": device, "quantization": quantization}

    def served(changed: Facts, with_plugin: bool) -> bool:
        return not reasons(changed, ranks=ranks, plugin=with_plugin, **how)

    found = []
    sizes = served_ranks(facts, plugin=plugin, **how)
    if sizes:
        found.append("1 rank" if sizes == [1] else f"{either(sizes)} tensor-parallel ranks")
    multiple = neuron_multiple(facts, ranks=ranks, plugin=plugin, **how)
    if multiple and not served(facts, plugin):
        found.append(
            f"neurons in multiples of {multiple}, to which `slmperf export --pad` fills them up"
        )
    if facts.alike and not multiple:
        heads = facts.layers[0].heads
        for kv_heads in range(heads.kv_heads - 1, 0, -1):
            fewer = [HeadMap(heads.counts[:kv_heads])] * len(facts.layers)
            if served(facts.with_heads(fewer, facts.written), plugin):
                found.append(f"{fewer[0].query_heads} query over {kv_heads} key/value heads")
                break
    if not plugin and served(facts, True):
        found.append("slmperf installed beside the engine (its plug-in)")
    elif facts.written not in (PRUNED, DECILM) and served(as_pruned(facts), True):
        found.append("what `slmperf export` writes for the plug-in")
    own = how | {"quantization": NAME}
    if own != how and facts.quantized and not reasons(facts, ranks=ranks, plugin=True, **own):
        found.append(f"--quantization {NAME} with the plug-in (slower)")
    if facts.written != DECILM:
        with contextlib.suppress(InputError):
            as_decilm(facts, engine=engine, ranks=ranks, device=device)
            found.append("the DeciLM that `slmperf export --stock` writes")
    return found


def neuron_multiple(
    facts: Facts,
    *,
    engine: Engine,
    ranks: int,
    plugin: bool,
    device: Device,
    quantization: str | None = None,
) -> int | None:
    """The smallest multiple of the ranks of which any number of neurons is served; None: no such
    one, or experts, which stay as they are."""
    if facts.family == "mixtral":
        return None
    here = partial(reasons, engine=engine, ranks=ranks, plugin=plugin, device=device)
    for multiple in (ranks * 2**power for power in range(11)):
        layers = tuple(LayerSizes(multiple, layer.heads) for layer in facts.layers)
        once = replace(facts, layers=layers)
        if not here(once, quantization=quantization):
            return multiple
    return None


def as_pruned(facts: Facts) -> Facts:
    """The same, run by the plug-in's class."""
    return facts.with_heads([layer.heads for layer in facts.layers], PRUNED)


def as_decilm(
    facts: Facts, *, engine: Engine, ranks: int, device: Device
) -> tuple[Facts, list[HeadLayout]]:
    """What a checkpoint is when it is written as DeciLM, and where its heads are then.

    Raises InputError with the reason why it cannot be.
    """
    found = list(of_decilm(facts, engine))
    if not found:
        layouts = decilm_layouts([layer.heads for layer in facts.layers], ranks, engine)
        found = of_moves(facts, layouts)
    if not found:
        groups = [(len(one.query_heads) // len(one.kv_heads), one.kv_heads) for one in layouts]
        heads = [HeadMap((group,) * len(kv_heads)) for group, kv_heads in groups]
        written = facts.with_heads(heads, DECILM)
        for multiple in (decilm_neurons(ranks, engine) * 2**power for power in range(8)):
            filled = written.with_neurons(multiple)
            found = reasons(filled, engine=engine, ranks=ranks, device=device)
            if not found:
                return filled, layouts
    raise InputError(found[0])
