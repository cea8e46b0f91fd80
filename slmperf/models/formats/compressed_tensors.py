"""quantization_config of the compressed-tensors layout: from schemes to its words, and back.

Keys, their values and how layers are matched: https://github.com/vllm-project/compressed-tensors.
The readers' validation refuses unknown keys of a group, so only those that all of them know are
written. The package itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from slmperf.check import InputError, one_line
from slmperf.models.kv_scales import CACHE, attention_modules, has_kv_scales
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.models.structure import FUSED
from slmperf.ops.activation_spec import GROUP, ActivationSpec
from slmperf.ops.weight_spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "compressed-tensors"
_VERSION = "0.20.0"  # of compressed-tensors, whose reader was tried on these files
_PACKED, _INT, _FLOAT, _NAIVE = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
)
_MIXED, _DENSE = "mixed-precision", "dense"


class StoredLinear(NamedTuple):
    """How a checkpoint holds a linear layer."""

    scheme: LinearScheme
    packed: bool  # codes in weight_packed, not in weight


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantised layers, or scales of keys and values."""
    return any(
        isinstance(module, QuantizedLinear) or has_kv_scales(module) for module in model.modules()
    )


def write_config(model: PreTrainedModel) -> None:
    """Set `model.config.quantization_config` to what the model's layers are; on the meta device,
    too.

    Raises InputError for a model with nothing quantised.
    """
    schemes, linears = {}, []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            schemes[name] = module.scheme
        if isinstance(module, QuantizedLinear | nn.Linear):
            linears.append(name)
    kv = {name: has_kv_scales(module) for name, module in attention_modules(model)}
    if len(set(kv.values())) > 1:
        name = next(name for name, scaled in kv.items() if not scaled)
        raise InputError(
            f"write_config: wanted cache scales in all layers or none, {name} lacks them"
        )
    if not is_quantized(model):
        raise InputError("write_config: wanted a model with quantised layers, found none")
    model.config.quantization_config = quantization_config(
        schemes, linears=linears, kv_cache=any(kv.values())
    )


def quantization_config(
    schemes: Mapping[str, LinearScheme], *, linears: Iterable[str], kv_cache: bool
) -> dict[str, Any]:
    """The configuration of a checkpoint with these layers quantised.

    schemes   full layer name -> how it is quantised
    linears   names of all linear layers; those without a scheme are listed as ignored
    kv_cache  whether keys and values have scales
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        group = _group(scheme)
        groups.setdefault(json.dumps(group), {"targets": []} | group)["targets"].append(name)
    ordered = list(groups.values())
    for group in ordered:
        group["targets"] = _with_fused(group["targets"]) if len(ordered) > 1 else ["Linear"]
    formats = {group["format"] for group in ordered}
    return {
        "config_groups": {f"group_{index}": group for index, group in enumerate(ordered)},
        "format": formats.pop() if len(formats) == 1 else _MIXED if formats else _DENSE,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "ignore": _with_fused([name for name in linears if name not in schemes]),
        "kv_cache_scheme": _activation_arguments(CACHE) if kv_cache else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "moe_sparsity_config": None,
        "version": _VERSION,
    }


def _with_fused(names: Iterable[str]) -> list[str]:
    """The names, but where all projections are there that engines run as one layer, in their place
    a pattern of them and of that layer: vLLM looks for the projections, SGLang for the layer.
    """
    present = dict.fromkeys(names)
    targets = []
    for name in present:
        last = name.rpartition(".")[2]
        parent = name.removesuffix(last)
        fused = next((whole for whole, parts in FUSED.items() if last in parts), None)
        parts = FUSED.get(fused or "", ())
        if fused is None or not all(parent + part in present for part in parts):
            targets.append(name)
        elif last == parts[0]:
            targets.append(f"re:{re.escape(parent)}({'|'.join([*parts, fused])})$")
    return targets


def format_of(scheme: LinearScheme) -> str:
    """The name of the layout that a layer's tensors have."""
    if scheme.packed:
        return _PACKED
    if scheme.activations is None:
        return _NAIVE
    return _INT if scheme.weights.kind == "int" else _FLOAT


def _group(scheme: LinearScheme) -> dict[str, Any]:
    spec, inputs = scheme.weights, scheme.activations
    strategy = (
        "block" if spec.block else {None: "tensor", -1: "channel"}.get(spec.group_size, "group")
    )
    weights = _arguments(spec.kind, strategy, spec.bits, spec.symmetric, dynamic=False)
    if strategy == "group":
        weights["group_size"] = spec.group_size
    if spec.block:
        weights["block_structure"] = list(spec.block)
    return {
        "weights": weights,
        "input_activations": None if inputs is None else _activation_arguments(inputs),
        "output_activations": None,
        "format": format_of(scheme),
    }


def _activation_arguments(spec: ActivationSpec) -> dict[str, Any]:
    arguments = _arguments(spec.kind, spec.strategy, dynamic=not spec.static)
    return arguments | ({"group_size": GROUP} if spec.strategy == "group" else {})


def _arguments(
    kind: str, strategy: str, bits: int = 8, symmetric: bool = True, *, dynamic: bool
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
    }


def read_schemes(
    quantization: Mapping[str, Any], linears: Iterable[str]
) -> tuple[dict[str, StoredLinear], bool]:
    """The reverse: of the linear layers with these names those that are quantised, and whether keys
    and values have scales.

    As readers of the layout do it, a layer belongs to the group that names it, else to one with a
    matching pattern ("re:..."), else to one of the class "Linear".
    Raises InputError for what is not quantised as `LinearScheme` says.
    """
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise InputError(f"quantization_status is {status!r}, wanted 'compressed'")
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        found = quantization.get(key) or {}
        if (
            not isinstance(found, dict)
            or found.get("format", _DENSE) != _DENSE
            or (key != "sparsity_config" and found)
        ):
            raise InputError(f"{key} is {found}, wanted none: such weights are not read")
    groups = _object("config_groups", quantization.get("config_groups"))
    read = {name: _read_group(name, group, quantization) for name, group in groups.items()}
    targets = {
        target: read[name]
        for name, group in groups.items()
        for target in _list(f"config_groups.{name}.targets", group.get("targets"))
    }
    ignore = _list("ignore", quantization.get("ignore") or [])
    schemes = {}
    for linear in linears:
        matching = sorted(
            (target for target in targets if _matches(linear, target)), key=_least_specific
        )
        if matching and not any(_matches(linear, target) for target in ignore):
            schemes[linear] = targets[matching[0]]
    return schemes, _has_kv_cache(quantization.get("kv_cache_scheme"))


def _has_kv_cache(scheme: Any) -> bool:
    if scheme is None:
        return False
    found = _read_activations("kv_cache_scheme", scheme)
    if found != CACHE:
        raise InputError(f"kv_cache_scheme is {found}, wanted {CACHE}")
    return True


def _read_group(name: str, group: Any, quantization: Mapping[str, Any]) -> StoredLinear:
    where = f"config_groups.{name}"
    group = _object(where, group)
    if group.get("output_activations") is not None:
        raise InputError(f"{where} quantises outputs, wanted output_activations null")
    spec = _read_weights(f"{where}.weights", _object(f"{where}.weights", group.get("weights")))
    inputs = group.get("input_activations")
    if inputs is not None:
        inputs = _read_activations(f"{where}.input_activations", inputs)
    scheme = LinearScheme(spec, inputs)
    known = {format_of(scheme), _NAIVE}
    if scheme.packed:  # eight bits may also be stored as they are, of which packing makes the same
        known = {_PACKED, _INT, _NAIVE} if spec.bits == 8 and spec.symmetric else {_PACKED}
    elif spec.kind == "float":
        known |= {_FLOAT}
    found = group.get("format") or quantization.get("format")
    if found not in list(known):  # which need not be a name
        wanted = " or ".join(map(repr, sorted(known)))
        raise InputError(f"{where} has format {found!r}, wanted {wanted} for such weights")
    return StoredLinear(scheme, found == _PACKED)


def _read_weights(where: str, arguments: dict[str, Any]) -> WeightSpec:
    strategy, group_size = _known(where, arguments)
    if arguments.get("dynamic"):
        raise InputError(f"{where}: dynamic is {arguments['dynamic']!r}, wanted false")
    if arguments.get("actorder") in ("group", "dynamic", True):
        raise InputError(
            f"{where}: actorder {arguments['actorder']!r}: reordered groups (weight_g_idx) "
            "are not read, wanted 'static', 'weight' or null"
        )
    sizes = {"tensor": None, "channel": -1, "block": -1, "group": group_size}
    if strategy not in sizes:
        raise InputError(f"{where}: strategy is {strategy!r}, wanted {', '.join(sizes)}")
    if (strategy == "group") != (group_size not in (None, -1)):
        raise InputError(f"{where}: strategy {strategy!r} with group_size {group_size!r}")
    try:
        return WeightSpec(
            kind=arguments.get("type", "int"),
            bits=arguments.get("num_bits", 8),
            symmetric=arguments.get("symmetric", True),
            group_size=sizes[strategy],
            block=_block(where, strategy, arguments.get("block_structure")),
        )
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def _block(where: str, strategy: str, found: Any) -> tuple[int, int] | None:
    if strategy != "block" and found is None:
        return None
    if strategy != "block" or not isinstance(found, list) or [*map(type, found)] != [int, int]:
        raise InputError(f"{where}: strategy {strategy!r} with block_structure {found!r}")
    return found[0], found[1]


def _read_activations(where: str, arguments: Any) -> ActivationSpec:
    arguments = _object(where, arguments)
    strategy, group_size = _known(where, arguments)
    try:
        spec = ActivationSpec(arguments.get("type", "int"), strategy)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for name, found, wanted in (
        ("num_bits", arguments.get("num_bits", 8), 8),
        ("symmetric", arguments.get("symmetric", True), True),
        ("group_size", group_size if strategy == "group" else GROUP, GROUP),
        ("dynamic", arguments.get("dynamic", False), not spec.static),
    ):
        if found != wanted:
            raise InputError(f"{where}: {name} is {found!r}, wanted {wanted!r} for {strategy!r}")
    return spec


def _known(where: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Strategy and group_size of an arguments object without unknown keys and without scales of a
    dtype of their own."""
    unknown = set(arguments) - _KEYS
    if unknown:
        raise InputError(f"{where}: unknown key {min(unknown)!r}")
    if arguments.get("scale_dtype") is not None:
        raise InputError(f"{where}: scale_dtype is {arguments['scale_dtype']!r}, wanted null")
    strategy, group_size = arguments.get("strategy"), arguments.get("group_size")
    if group_size is not None and type(group_size) is not int:
        raise InputError(f"{where}: group_size is {group_size!r}, wanted a number or null")
    if strategy is not None and not isinstance(strategy, str):
        raise InputError(f"{where}: strategy is {strategy!r}, wanted a name or null")
    if type(arguments.get("symmetric", True)) is not bool:
        raise InputError(f"{where}: symmetric is {arguments['symmetric']!r}, wanted true or false")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(group_size, "group")
    return strategy, group_size


# Of an arguments object, all that compressed-tensors takes.
_KEYS = {
    "actorder",
    "block_structure",
    "dynamic",
    "group_size",
    "num_bits",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "strategy",
    "symmetric",
    "type",
    "zp_dtype",
}


def _object(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{where}: wanted an object, found {found!r}")
    return found


def _list(where: str, found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{where}: wanted a list of names, found {found!r}")
    return found


def _matches(linear: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target in (linear, "Linear")
    try:
        return re.match(target.removeprefix("re:"), linear) is not None
    except re.error as error:
        raise InputError(f"target {target!r}: no regular expression: {error}") from error


def _least_specific(target: str) -> tuple[int, str]:
    """What to sort targets by: names, patterns, the class."""
    return (2 if target == "Linear" else 1 if target.startswith("re:") else 0, target)
