"""Exports: a checkpoint as an engine takes it at a tensor-parallel size, or the reason why not.

What can be tells `slmperf.models.engines.support`, before weights are read. The forms, the first
that the engine serves is taken:

    stock    as it is, or with neurons of zeros up to the multiple that its kernels want
    pruned   for slmperf's plug-in in the engine: PrunedForCausalLM, heads in the order of the ranks
    DeciLM   without the plug-in: heads and neurons of zeros (`slmperf.models.engines.decilm`)
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slmperf.check import InputError
from slmperf.data.text import tokenizer_beside
from slmperf.models.checkpoint import add_older_fields, load, write_pretrained
from slmperf.models.engines.decilm import CONFIGURATION, decilm_fields
from slmperf.models.engines.facts import (
    DECILM,
    PRUNED,
    Cache,
    Engine,
    Facts,
    facts_of,
    fields_of,
)
from slmperf.models.engines.layout import HeadLayout, queries_of
from slmperf.models.engines.linear import NAME
from slmperf.models.engines.placing import block_tensors
from slmperf.models.engines.rules import Device
from slmperf.models.engines.support import (
    as_decilm,
    nearest,
    neuron_multiple,
    reasons,
    refusal,
)
from slmperf.models.files import write_folder
from slmperf.models.formats.compressed_tensors import is_quantized, write_config
from slmperf.models.pruned import PrunedConfig, pruned_config
from slmperf.models.resize import apply_sizes
from slmperf.models.shards import ShardWriter
from slmperf.models.stored import TensorFiles, stored_tensors
from slmperf.models.structure import (
    block_of,
    decoder_blocks,
    heads_of,
    keep_heads,
    layer_name,
)
from slmperf.ops.head_map import HeadMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Exported(NamedTuple):
    """What was written, and what it costs.

    written       the class that runs it in the engine
    plugin        whether slmperf has to be installed beside the engine
    quantization  what the engine has to be started with: "slmperf", or None for nothing
    neurons       zeros added, in all layers together
    query_heads   the same, and of key/value heads
    kv_heads
    moved         layers whose heads stand in another order
    cache         the engine's keys and values of one token
    """

    written: str
    plugin: bool
    quantization: str | None
    engine: Engine
    ranks: int
    neurons: int
    query_heads: int
    kv_heads: int
    moved: int
    cache: Cache


class _Plan(NamedTuple):
    """A form: what is written, and where each layer's heads are in it."""

    facts: Facts
    layouts: list[HeadLayout]


def export_for_engine(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    engine: Engine,
    ranks: int = 1,
    plugin: bool = True,
    device: Device = "cuda",
    pad: bool = False,
    quantization: str | None = None,
    labels: Sequence[int] = (),
) -> Exported:
    """Write a checkpoint that the engine serves at `ranks` tensor-parallel ranks, in one step.

    model      a model in memory, which stays as it is, or the folder of a checkpoint; quantised
               or not
    tokenizer  None: that of the folder, if it has one
    plugin     whether slmperf's plug-in will be installed beside the engine. Where the stock class
               serves the checkpoint it is written for that all the same.
    device     where the engine runs; kernels of a GPU ask for multiples of sizes
    pad        add neurons of zeros where it takes them to be served
    quantization  "slmperf" where the engine is to run quantised layers by the plug-in, started
                  with --quantization slmperf
    labels     token ids: the plug-in computes no other logits (`label_token_ids`)

    Raises InputError with the reason and the nearest that is served.
    """
    if quantization is not None and (quantization != NAME or not plugin):
        raise InputError(
            f"export_for_engine: quantization: wanted {NAME} with the plug-in, found "
            f"{quantization}{'' if plugin else ' without it'}"
        )
    fields = fields_of(model) if isinstance(model, str | os.PathLike) else _fields_of_model(model)
    if labels:
        fields["label_token_ids"] = list(labels)
    facts = facts_of(fields)
    if not facts.quantized:
        quantization = None
    if isinstance(model, str | os.PathLike):
        dtype = _checked_dtype(Path(model), facts)
    else:
        dtype = model.dtype
    facts = replace(facts, itemsize=dtype.itemsize)
    plan = _planned(facts, engine, ranks, plugin, device, pad, quantization)
    if isinstance(model, str | os.PathLike):
        tokenizer = tokenizer or tokenizer_beside(Path(model))
        model = load(model, dtype=dtype)
    with write_folder(folder) as aside:
        _write(model, plan, facts, engine, aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    return _told(plan, facts, engine, ranks, quantization)


def permute_kv_heads(model: PreTrainedModel, ranks: int) -> PreTrainedModel:
    """Order the key/value heads of each layer so that `ranks` equal slices of them, in order, have
    query heads as even in number as whole groups allow; the logits stay.

    Tensor-parallel engines give each rank a slice of neighbouring key/value heads with the query
    heads that read them. Only layers with a head map change. Use the model that is returned.
    To be done before quantising, where scales of several heads are one.

    Raises InputError where a layer has fewer key/value heads than there are ranks.
    """
    blocks = decoder_blocks(model)
    maps = [heads_of(block) for block in blocks]
    for index, heads in enumerate(maps):
        if not 1 <= ranks <= heads.kv_heads:
            raise InputError(
                f"permute_kv_heads: layer {index} has {heads.kv_heads} key/value heads, "
                f"wanted at least one for each of {ranks} ranks"
            )
    for block, heads in zip(blocks, maps, strict=True):
        layout = _ordered(heads, ranks)
        if not layout.keeps(heads):
            keep_heads(block, layout.query_heads, layout.kv_heads)
    return apply_sizes(model)


def _ordered(heads: HeadMap, ranks: int) -> HeadLayout:
    """A layer's heads in the order of the ranks, none added."""
    order = [head for owned in heads.over_ranks(ranks) for head in owned]
    return HeadLayout(tuple(order), tuple(q for kv in order for q in queries_of(heads, kv)))


# ---- which form


def _fields_of_model(model: PreTrainedModel) -> dict[str, Any]:
    if is_quantized(model):
        write_config(model)
    own = {"architectures": [type(model).__name__], "dtype": str(model.dtype)}
    return model.config.to_dict() | own


def _checked_dtype(folder: Path, facts: Facts) -> torch.dtype:
    """The dtype of a checkpoint's unquantised tensors, that of the last norm: config.json need not
    say it.

    Raises InputError, naming the layer, where the files hold other sizes than config.json says:
    without its per-layer values, for one.
    """
    with TensorFiles(folder, stored_tensors(folder)) as files:
        blocks = 1 + max((block_of(name) or 0 for name in files.stored), default=0)
        if blocks != len(facts.layers):
            raise InputError(
                f"{folder}: the files have {blocks} layers, config.json says {len(facts.layers)}"
            )
        norm = files.get("model.norm.weight")
        if len(norm) != facts.hidden_size:
            raise InputError(
                f"{folder}: model.norm has {len(norm)} channels, config.json says hidden_size "
                f"{facts.hidden_size}"
            )
        for index, layer in enumerate(facts.layers):
            for part, rows in (
                ("self_attn.q_proj", layer.heads.query_heads * facts.head_size),
                ("self_attn.k_proj", layer.heads.kv_heads * facts.head_size),
                ("mlp.gate_proj", layer.intermediate_size),
            ):
                for kind in ("weight", "weight_packed"):
                    name = layer_name(index, f"{part}.{kind}")
                    if name in files.stored and (found := files.shape(name)[0]) != rows:
                        raise InputError(
                            f"{folder}: layer {index}: {part} has {found} outputs, config.json "
                            f"says {rows} (per_layer_config has what differs between layers)"
                        )
        return norm.dtype


def _planned(
    facts: Facts,
    engine: Engine,
    ranks: int,
    plugin: bool,
    device: Device,
    pad: bool,
    quantization: str | None,
) -> _Plan:
    """The first form that the engine serves; InputError with the reason for what it is."""
    if facts.written == DECILM:
        raise InputError("export_for_engine: wanted a stock or a pruned model, found a DeciLM")
    where: dict[str, Any] = {"engine": engine, "ranks": ranks, "device": device}
    how: dict[str, Any] = where | {"plugin": plugin, "quantization": quantization}
    found: list[str] = []
    for form in _forms(facts, ranks, plugin):
        found = reasons(form.facts, **how)
        if not found:
            return form
        multiple = neuron_multiple(form.facts, **how) if pad else None
        if multiple:
            return form._replace(facts=form.facts.with_neurons(multiple))
        facts = form.facts
    if not plugin:
        try:
            return _Plan(*as_decilm(facts, **where))
        except InputError as error:
            found = [f"{found[0]}; as DeciLM: {error}"]
    raise refusal("export_for_engine", engine, found, nearest(facts, **how))


def _forms(facts: Facts, ranks: int, plugin: bool) -> Iterator[_Plan]:
    """The forms without heads of zeros."""
    maps = [layer.heads for layer in facts.layers]
    stay = [HeadLayout.in_order(heads) for heads in maps]
    if not plugin or (facts.written != PRUNED and not facts.labels):
        yield _Plan(facts, stay)
    if plugin:
        if not facts.quantized and all(1 <= ranks <= heads.kv_heads for heads in maps):
            stay = [_ordered(heads, ranks) for heads in maps]
        heads = [
            HeadMap(tuple(old.counts[kv] for kv in layout.kv_heads if kv is not None))
            for old, layout in zip(maps, stay, strict=True)
        ]
        yield _Plan(facts.with_heads(heads, PRUNED), stay)


# ---- writing


def _write(model: PreTrainedModel, plan: _Plan, facts: Facts, engine: Engine, aside: Path) -> None:
    """Config, weights and the settings of generation, into the folder `aside`."""
    maps, sizes = [layer.heads for layer in facts.layers], list(plan.facts.layers)
    if all(layout.keeps(heads) for layout, heads in zip(plan.layouts, maps, strict=True)) and (
        list(facts.layers) == sizes and plan.facts.written != DECILM
    ):
        write_pretrained(model, None, aside)
        _mark(aside, plan.facts)
        return
    config, shards = model.config, ShardWriter(aside)
    biased = model.model.layers[0].self_attn.q_proj.bias is not None
    for index, (block, layout) in enumerate(zip(model.model.layers, plan.layouts, strict=True)):
        try:
            tensors = block_tensors(block, layout, sizes[index].intermediate_size)
        except InputError as error:
            raise InputError(f"export_for_engine: layer {index}: {error}") from None
        if plan.facts.written == DECILM and biased:  # in all four projections or in none
            norm = tensors["input_layernorm.weight"]
            tensors.setdefault("self_attn.o_proj.bias", torch.zeros_like(norm))
        shards.write({layer_name(index, name): value for name, value in tensors.items()})
    rest = {name: v for name, v in model.state_dict().items() if block_of(name) is None}
    if config.tie_word_embeddings:
        rest.pop("lm_head.weight")
    shards.write(rest)
    shards.finish()
    if model.generation_config is not None:
        model.generation_config.save_pretrained(aside)
    neurons = [layer.intermediate_size for layer in sizes]
    if plan.facts.written == DECILM:
        fields = decilm_fields(
            config,
            plan.layouts,
            neurons,
            engine=engine,
            head_size=facts.head_size,
            dtype=model.dtype,
            biased=biased,
        )
        (aside / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(CONFIGURATION, aside / CONFIGURATION.name)
        return
    if plan.facts.alike and config.model_type != PrunedConfig.model_type:
        config = copy.deepcopy(config)
        config.intermediate_size = neurons[0]
    else:
        config = pruned_config(config, neurons, [layer.heads for layer in sizes])
    config.head_dim, config.dtype = facts.head_size, model.dtype
    config.save_pretrained(aside)
    add_older_fields(aside)
    _mark(aside, plan.facts)


def _mark(aside: Path, facts: Facts) -> None:
    """Say in config.json which class runs the checkpoint, and the labels."""
    path = aside / "config.json"
    fields = json.loads(path.read_text()) | {"architectures": [facts.written]}
    if facts.labels:
        fields["label_token_ids"] = list(facts.labels)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _told(
    plan: _Plan, facts: Facts, engine: Engine, ranks: int, quantization: str | None
) -> Exported:
    written = plan.facts
    pairs = list(zip(facts.layers, written.layers, plan.layouts, strict=True))
    return Exported(
        written=written.written,
        plugin=written.written == PRUNED or quantization is not None,
        quantization=quantization,
        engine=engine,
        ranks=ranks,
        neurons=sum(new.intermediate_size - old.intermediate_size for old, new, _ in pairs),
        query_heads=sum(layout.query_heads.count(None) for _, _, layout in pairs),
        kv_heads=sum(layout.kv_heads.count(None) for _, _, layout in pairs),
        moved=sum(
            [head for head in layout.kv_heads if head is not None]
            != list(range(old.heads.kv_heads))
            for old, _, layout in pairs
        ),
        cache=written.cache(ranks).of(engine),
    )
