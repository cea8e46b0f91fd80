"""The rules of `slmperf.models.engines.support`, one function for each thing that they are about.

Each gives a line for whatever is refused. What is read in an engine's source stands there under:

    SGLang 0.5.23   srt/models/{llama,mistral,qwen2,qwen3,mixtral,nemotron_nas}.py,
                    srt/layers/quantization/compressed_tensors, srt/layers/activation.py,
                    kernels/jit/csrc/gemm/marlin; its int8 kernel in sgl-kernel/csrc/gemm
    vLLM 0.33.0     model_executor/models (the same names), model_executor/layers/quantization,
                    model_executor/kernels/linear
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from slmperf.check import InputError
from slmperf.models.engines.facts import DECILM, PRUNED, Engine, Facts
from slmperf.models.engines.layout import HeadLayout, over_ranks, possible_ranks
from slmperf.models.engines.placing import Move
from slmperf.models.layer_sizes import LayerSizes
from slmperf.models.quantized import LinearScheme
from slmperf.models.structure import FAMILIES, UNITS
from slmperf.ops.activation_spec import GROUP
from slmperf.ops.head_map import HeadMap
from slmperf.ops.weight_spec import WeightSpec

Device = Literal["cuda", "cpu"]
Kernels = Literal["cuda", "cpu", "own"]  # of quantised layers: the engine's there, or the plug-in's
NAMES = {"sglang": "SGLang", "vllm": "vLLM"}
_VECTOR = 16  # bytes that SGLang's activation kernel reads at once
_MARLIN_GROUPS = (-1, 32, 64, 128)


# ---- the class that runs it


def of_class(facts: Facts, engine: Engine, plugin: bool) -> Iterator[str]:
    """What the class that is to run the checkpoint does not compute."""
    name = NAMES[engine]
    if facts.hidden_act != "silu":
        yield f"hidden_act is {facts.hidden_act!r}, {name} knows 'silu'"
    elif facts.written == PRUNED and not plugin:
        yield f"{PRUNED} is the class of slmperf's plug-in, which is not there"
    elif facts.written == PRUNED:
        yield from _of_plugin(facts, engine)
    elif facts.written == DECILM:
        yield from of_decilm(facts, engine)
    elif facts.labels:
        yield "label_token_ids are read by slmperf's plug-in alone"
    else:
        yield from _of_stock(facts, engine)


def _of_stock(facts: Facts, engine: Engine) -> Iterator[str]:
    heads = facts.layers[0].heads
    implied = heads.query_heads * facts.head_size == facts.hidden_size
    if not facts.alike:
        yield "its own classes have the same sizes in all layers"
    if not implied and (engine, facts.family) in (("vllm", "qwen2"), ("sglang", "mixtral")):
        yield (
            f"its {FAMILIES[facts.family]} takes heads of {facts.hidden_size} / "
            f"{heads.query_heads} channels, they have {facts.head_size}"
        )
    if engine == "sglang" and facts.mlp_bias:
        yield "biases in the MLP, which its Llama leaves out"
    if engine == "sglang" and any(facts.windows):
        yield "sliding windows, which its classes leave out"
    if engine == "vllm" and any(facts.windows) and not all(facts.windows):
        yield "sliding windows in some layers, its classes have them in all or none"
    if engine == "vllm" and facts.family == "qwen3" and facts.attention_bias:
        yield "a bias in o_proj, which its Qwen3 leaves out"


def _of_plugin(facts: Facts, engine: Engine) -> Iterator[str]:
    if facts.family == "mixtral":
        yield "slmperf's plug-in has no mixtures of experts"
    if engine == "sglang" and any(facts.windows):
        yield "sliding windows, which slmperf's plug-in has for vLLM alone"
    if engine == "sglang" and facts.mlp_bias:
        yield "biases in the MLP, which slmperf's plug-in has for vLLM alone"


def of_decilm(facts: Facts, engine: Engine) -> Iterator[str]:
    """What DeciLMForCausalLM does not compute, of a checkpoint that is one or is to become one."""
    if facts.family in ("mixtral", "qwen3"):
        yield f"{facts.family} has parts that {DECILM} lacks"
    if any(facts.windows):
        yield f"the model has sliding windows, {DECILM} has none"
    if engine == "sglang" and facts.mlp_bias:
        yield f"the model has biases in its MLP, SGLang's {DECILM} has none"
    if facts.hidden_act != "silu":
        yield f"hidden_act is {facts.hidden_act!r}, the engines know 'silu'"
    if facts.labels:
        yield "label_token_ids are read by slmperf's plug-in alone"
    kv_heads = {layer.heads.kv_heads for layer in facts.layers}
    if facts.written == DECILM and engine == "sglang" and len(kv_heads) > 1:
        yield f"{DECILM} has one number of key/value heads in SGLang, found {sorted(kv_heads)}"


# ---- sizes over ranks


def widest_heads(layers: Sequence[LayerSizes]) -> tuple[int, int]:
    """Query and key/value heads into which those of every layer fit: what engines read as the
    model's of a checkpoint whose layers differ (FlatConfig)."""
    kv_heads = max(layer.heads.kv_heads for layer in layers)
    return kv_heads * max(max(layer.heads.counts) for layer in layers), kv_heads


def of_heads(facts: Facts, engine: Engine, ranks: int) -> list[str]:
    """Heads that the ranks cannot share."""

    def problem(heads: HeadMap) -> str | None:
        if facts.written == PRUNED:
            fits = ranks in possible_ranks(heads)
        else:
            divides = heads.kv_heads % ranks == 0 or ranks % heads.kv_heads == 0
            fits = heads.query_heads % ranks == 0 and divides
        what = f"{heads.query_heads} query heads over {heads.kv_heads} key/value heads"
        return None if fits else f"{what} do not divide by {ranks} ranks"

    found = ((i, problem(layer.heads)) for i, layer in enumerate(facts.layers))
    wrong = together((i, text) for i, text in found if text is not None)
    if wrong or facts.written != PRUNED:
        return wrong
    queries, _ = widest_heads(facts.layers)
    if engine == "vllm" and queries % ranks:  # its own check of a configuration
        return [f"{queries} query heads, into which all layers fit, do not divide by {ranks} ranks"]
    return list(of_moves(facts, [over_ranks(layer.heads, ranks).layout for layer in facts.layers]))


def of_activation(facts: Facts, ranks: int) -> list[str]:
    """Neurons that SGLang's activation kernel does not take: by its source, not run."""
    multiple = _VECTOR // 2  # of bf16; fp32, which has fewer, is cast to it
    return together(
        (
            i,
            f"{layer.intermediate_size // ranks} neurons per rank, wanted a multiple of {multiple} "
            "(SGLang's activation kernel)",
        )
        for i, layer in enumerate(facts.layers)
        if layer.intermediate_size // ranks % multiple
    )


# ---- quantised layers


def of_moves(facts: Facts, layouts: Sequence[HeadLayout]) -> list[str]:
    """Scales of several heads, where layouts part these heads or add others.

    A DeciLM is written with heads that stay together where they were; the plug-in moves each alone.
    """
    found: list[tuple[int, str]] = []
    for (index, part), scheme in facts.schemes.items():
        heads, layout = facts.layers[index].heads, layouts[index]
        if not part.startswith("self_attn") or layout.keeps(heads):
            continue
        spec = scheme.weights
        queries = part.endswith(("q_proj", "o_proj"))
        move = Move(layout.query_heads if queries else layout.kv_heads, facts.head_size)
        inputs = scheme.activations
        if part.endswith("o_proj"):
            if inputs is not None and inputs.strategy == "group" and facts.head_size % GROUP:
                found.append((index, f"{part}: {GROUP} inputs share a scale, heads have fewer"))
                continue
            shared = spec.group_of(heads.query_heads * facts.head_size)
            if spec.group_size is None or (spec.group_size == -1 and spec.block is None):
                continue
        elif spec.block is not None:
            shared = spec.block[0]
        else:
            continue
        try:
            move.scales(shared)
            parted = facts.written == PRUNED and facts.head_size % shared != 0
        except InputError:
            parted = True
        if parted:
            found.append(
                (
                    index,
                    f"{part}: {shared} channels share a scale, heads of {facts.head_size} have to "
                    "be moved or added for the ranks (slmperf export, then quantise)",
                )
            )
    return together(found)


def of_schemes(facts: Facts, engine: Engine, ranks: int, kernels: Kernels) -> list[str]:
    """Quantised layers that cannot be cut for the ranks, or that no kernel takes."""
    found: list[tuple[int, str]] = []
    for index in range(len(facts.layers)):
        for unit, parts in UNITS.items():
            schemes = [facts.schemes.get((index, part)) for part in parts]
            if any(scheme != schemes[0] for scheme in schemes):
                found.append((index, f"{unit}: its parts are quantised in different ways"))
            elif schemes[0] is not None:
                inputs, outputs = _of_rank(facts, index, unit, ranks)
                if kernels == "own":
                    checks = [of_product(schemes[0], inputs, outputs)]
                else:
                    checks = [_at_load(schemes[0], inputs, outputs, ranks, unit)]
                    checks.append(_by_name(schemes[0], engine))
                if kernels == "cuda":
                    checks.append(_in_kernels(schemes[0], engine, inputs, sum(outputs)))
                found += [(index, f"{unit}: {text}") for check in checks for text in check]
    return together(found)


def of_product(scheme: LinearScheme, inputs: int, outputs: Sequence[int]) -> Iterator[str]:
    """What slmperf's own product in an engine does not take: of a layer's inputs and of the outputs
    of each part of it that one rank has."""
    spec, activations = scheme.weights, scheme.activations
    rows, columns = spec.block or (1, spec.group_of(inputs))
    if inputs % columns:
        yield f"{inputs} inputs per rank, wanted whole groups of {columns}"
    if activations is not None and activations.strategy == "group" and inputs % GROUP:
        yield f"{inputs} inputs per rank, of which {GROUP} share a scale"
    for size in dict.fromkeys(outputs):
        if size % rows:
            yield f"{size} outputs per rank, wanted whole blocks of {rows}"
    if scheme.packed and 32 % spec.bits:
        yield f"codes of {spec.bits} bits, wanted 2, 4 or 8"
    elif scheme.packed:
        yield from _words(spec, inputs, outputs)


def _of_rank(facts: Facts, index: int, unit: str, ranks: int) -> tuple[int, list[int]]:
    """Inputs and outputs, of each part, that one rank has of a layer."""
    sizes = facts.layers[index]
    queries = sizes.heads.query_heads
    if facts.written == PRUNED:
        queries = len(over_ranks(sizes.heads, ranks).layout.query_heads)
    query = queries * facts.head_size // ranks
    key = max(1, sizes.heads.kv_heads // ranks) * facts.head_size
    neurons = sizes.intermediate_size // ranks
    return {
        "qkv_proj": (facts.hidden_size, [query, key, key]),
        "o_proj": (query, [facts.hidden_size]),
        "gate_up_proj": (facts.hidden_size, [neurons, neurons]),
        "down_proj": (neurons, [facts.hidden_size]),
    }[unit]


def _at_load(
    scheme: LinearScheme,
    inputs: int,
    outputs: list[int],
    ranks: int,
    unit: str,
) -> Iterator[str]:
    """What loaders refuse or cannot cut for the ranks."""
    spec = scheme.weights
    if spec.block is not None:
        rows, columns = spec.block
        if ranks > 1 and unit in ("o_proj", "down_proj") and inputs % columns:
            yield f"{inputs} inputs per rank, wanted whole blocks of {columns}"
        split = ranks > 1 and unit not in ("o_proj", "down_proj")
        for size in dict.fromkeys(outputs if split else outputs[:-1]):
            if size % rows:
                yield f"{size} outputs per rank, wanted whole blocks of {rows}"
        return
    group = spec.group_of(inputs)
    if group and inputs % group:
        yield f"{inputs} inputs per rank, wanted whole groups of {group}"
    if scheme.packed:
        yield from _words(spec, inputs, outputs)


def _words(spec: WeightSpec, inputs: int, outputs: Sequence[int]) -> Iterator[str]:
    """Packed codes that would be parted between ranks within a word."""
    words = 32 // spec.bits if 32 % spec.bits == 0 else 32
    if inputs % words:
        yield f"{inputs} inputs per rank, wanted whole words of {words} codes"
    of_rows = not spec.symmetric and spec.group_size is not None
    if of_rows and any(size % words for size in outputs):
        yield f"{outputs} outputs per rank, wanted whole words of {words} zero points"


def _by_name(scheme: LinearScheme, engine: Engine) -> Iterator[str]:
    """Schemes that an engine has no layer for."""
    if scheme.packed and scheme.weights.group_size is None:
        yield "packed weights with one scale, wanted one per channel or group"
    if scheme.packed and engine == "sglang" and scheme.weights.bits not in (4, 8):
        yield f"{scheme.weights.bits} bits, SGLang knows 4 and 8"


def _in_kernels(scheme: LinearScheme, engine: Engine, inputs: int, outputs: int) -> Iterator[str]:
    """What the kernels on a GPU refuse: by the engines' sources, not run."""
    spec = scheme.weights
    if scheme.packed and spec.group_size not in (*_MARLIN_GROUPS, None):
        yield f"groups of {spec.group_size}, Marlin knows 32, 64, 128 and -1"
    if scheme.packed and engine == "vllm" and spec.bits not in (4, 8):
        yield f"{spec.bits} bits, Marlin knows 4 and 8"
    if scheme.packed and spec.bits == 8 and not spec.symmetric:
        yield "8 bits with zero points, which Marlin does not know"
    if engine == "vllm":
        return  # fills up or takes Triton where sizes are odd
    narrow, wide = (
        (inputs % 128 == 0 and outputs % 64 == 0),
        (inputs % 64 == 0 and outputs % 128 == 0),
    )
    if scheme.packed and not narrow and not wide:
        yield (
            f"{inputs} inputs and {outputs} outputs per rank, Marlin wants multiples of 128 and 64 "
            "or of 64 and 128"
        )
    activations = scheme.activations
    if spec.kind == "int" and activations is not None and (inputs % 16 or outputs % 8):
        yield (
            f"{inputs} inputs and {outputs} outputs per rank, the int8 kernel wants multiples of "
            "16 and 8"
        )


# ---- words


def together(found: Iterable[tuple[int, str]]) -> list[str]:
    """One line for layers of which the same is to be said."""
    layers: dict[str, list[int]] = {}
    for index, text in found:
        layers.setdefault(text, []).append(index)
    lines = []
    for text, indices in layers.items():
        rest = f" (and {len(indices) - 1} more)" if len(indices) > 1 else ""
        lines.append(f"layer {indices[0]}{rest}: {text}")
    return lines
