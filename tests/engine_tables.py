"""The tables of docs/engines.md: shapes that pruning and quantising leave, by engine.

Made from the rules of `slmperf.models.engines.support` on examples, so that they cannot say another
thing than an export does. `python tests/engine_tables.py` writes them between their marks in that
file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slmperf.check import InputError
from slmperf.models.engines.facts import ENGINES, Engine, Facts, facts_of
from slmperf.models.engines.rules import NAMES
from slmperf.models.engines.support import as_decilm, as_pruned, neuron_multiple, reasons
from slmperf.models.formats.compressed_tensors import quantization_config
from slmperf.models.quantized import LinearScheme
from slmperf.models.structure import UNITS, layer_name
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Fp8, Int4, Int8

PAGE = Path(__file__).resolve().parents[1] / "docs" / "engines.md"
_RANKS = 4
_LAYERS = 4
BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": _LAYERS,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
SCHEMES = {
    "bf16": None,
    "FP8": LinearScheme(Fp8(), ActivationSpec("float", "token")),
    "FP8 blocks": LinearScheme(Fp8(block=(128, 128)), ActivationSpec("float", "group")),
    "W8A8": LinearScheme(Int8(), ActivationSpec("int", "token")),
    "W4A16, groups of 128": LinearScheme(Int4()),
    "W4A16, groups of 32": LinearScheme(Int4(group_size=32)),
    "W4A16, a scale per channel": LinearScheme(Int4(group_size=-1)),
}


def layers(*own: dict[str, Any]) -> dict[str, Any]:
    """Layers with sizes of their own, as slmperf writes them."""
    return {
        "model_type": "slmperf_pruned",
        "base_model_type": "llama",
        "architectures": ["PrunedForCausalLM"],
        "per_layer_config": {str(index): sizes for index, sizes in enumerate(own)},
    }


def _family(name: str, kind: str, **changed: Any) -> dict[str, Any]:
    return {"model_type": name, "architectures": [f"{kind}ForCausalLM"], **changed}


_UNEVEN = {"head_map": [3, 1, 2, 1, 1, 2, 1, 1], "num_attention_heads": 12}
_NEURONS = [{"intermediate_size": size} for size in (14336, 11264, 8192, 11264)]
_QUERIES = [{"num_attention_heads": heads} for heads in (32, 16, 8, 16)]
_GROUPS = [{"num_attention_heads": 4 * kv, "num_key_value_heads": kv} for kv in (8, 4, 8, 4)]
SHAPES: dict[str, dict[str, Any]] = {
    "the same neurons fewer in all layers (11264)": {"intermediate_size": 11264},
    "whole KV groups fewer in all layers (16 over 4)": {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "as many query heads fewer in every group (16 over 8)": {"num_attention_heads": 16},
    "query heads unevenly over KV heads (12 over 8)": layers(*[_UNEVEN] * _LAYERS),
    "neurons by layer": layers(*_NEURONS),
    "query heads by layer, KV heads alike": layers(*_QUERIES),
    "KV heads by layer": layers(*_GROUPS),
    "KV heads that 4 ranks do not divide (24 over 6)": {
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
    },
    "Qwen2, fewer heads": _family(
        "qwen2",
        "Qwen2",
        hidden_size=3584,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    "Qwen3, neurons by layer": layers(*_NEURONS) | {"base_model_type": "qwen3"},
    "Mixtral, fewer heads": _family(
        "mixtral", "Mixtral", num_attention_heads=16, num_key_value_heads=4
    ),
    "Mistral with sliding windows": _family("mistral", "Mistral", sliding_window=4096),
    "Qwen2 or Qwen3 with windows in some layers": _family(
        "qwen3",
        "Qwen3",
        sliding_window=4096,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "biases in the MLP": {"mlp_bias": True},
    "a label-only head": {"label_token_ids": [5, 9]},
}


def tables() -> dict[str, str]:
    """Name of a mark -> the Markdown between its begin and its end."""
    return {"shapes": _shapes(), "multiples": _multiples(), "cache": _cache()}


def page(text: str) -> str:
    """The page with its tables made again."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text = re.sub(f"{begin}.*{end}", f"{begin}\n{table}{end}", text, flags=re.DOTALL)
    return text


def _shapes() -> str:
    """Which form serves a shape, and the reasons where there is none or another than the stock
    class."""
    notes: dict[str, str] = {}
    rows = []
    for name, changed in SHAPES.items():
        facts = facts_of(BASE | changed)
        cells = [_cell(facts, engine, plugin, notes) for engine in ENGINES for plugin in (0, 1)]
        rows.append([name, *cells])
    head = [f"{NAMES[engine]}{own}" for engine in ENGINES for own in ("", ", plug-in")]
    lines = [f"{mark}. {note}" for note, mark in notes.items()]
    return _table(["shape", *head], rows) + "\n" + "\n".join(lines) + "\n"


def _cell(facts: Facts, engine: Engine, plugin: int, notes: dict[str, str]) -> str:
    found = reasons(facts, engine=engine, ranks=_RANKS, plugin=bool(plugin))
    if not found:
        return "plug-in" if facts.written == "PrunedForCausalLM" else "stock"
    if plugin:
        found = reasons(as_pruned(facts), engine=engine, ranks=_RANKS, plugin=True)
        return "plug-in" if not found else f"no ({_note(found[0], engine, notes)})"
    why = _note(found[0], engine, notes)
    try:
        as_decilm(facts, engine=engine, ranks=_RANKS, device="cuda")
    except InputError:
        return f"no ({why})"
    return f"DeciLM ({why})"


def _note(reason: str, engine: Engine, notes: dict[str, str]) -> str:
    """The number of a reason, without the layers that it names."""
    text = re.sub(r"^layer \d+( \(and \d+ more\))?: ", "", reason)
    return notes.setdefault(text.replace(NAMES[engine], "the engine"), str(len(notes) + 1))


def _multiples() -> str:
    rows = []
    for name, scheme in SCHEMES.items():
        cells = []
        for engine in ENGINES:
            facts = facts_of(fields_of_scheme(scheme, 1))
            multiple = neuron_multiple(facts, engine=engine, ranks=1, plugin=False, device="cuda")
            cells.append("any" if multiple == 1 else str(multiple))
        rows.append([name, *cells])
    return _table(["neurons per rank in multiples of", *map(NAMES.get, ENGINES)], rows)


def fields_of_scheme(scheme: LinearScheme | None, neurons: int) -> dict[str, Any]:
    """A model whose layers are all quantised in one way."""
    names = [
        layer_name(index, part)
        for index in range(_LAYERS)
        for parts in UNITS.values()
        for part in parts
    ]
    fields = BASE | {"intermediate_size": neurons}
    if scheme is not None:
        fields["quantization_config"] = quantization_config(
            dict.fromkeys(names, scheme), linears=names, kv_cache=False
        )
    return fields


def _cache() -> str:
    rows = []
    for name in ("KV heads by layer", "query heads by layer, KV heads alike"):
        cache = facts_of(BASE | SHAPES[name]).cache()
        rows.append([name, f"{cache.native:,}", f"{cache.pool:,}", f"{cache.share:.0%}"])
    return _table(["4 layers, bytes of a token", "vLLM", "SGLang", "wasted"], rows)


def _table(head: list[Any], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
