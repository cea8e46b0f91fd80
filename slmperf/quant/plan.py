"""plan: which layer of a model is quantised by which scheme, checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from slmperf.check import InputError
from slmperf.models import structure
from slmperf.models.structure import experts_of, layer_name, linear_blocks
from slmperf.ops.activation_spec import GROUP
from slmperf.quant.layer import METHODS
from slmperf.quant.schemes import Scheme, scheme_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The linear layers of a block by what flows into them; engines run those of a unit as one.
UNITS = tuple(structure.UNITS.values())
LINEARS = tuple(name for unit in UNITS for name in unit)

Overrides = Mapping[str, str | Scheme | None]


@dataclass(frozen=True)
class Plan:
    """What is done to each layer.

    layers     per block, by name within it, the scheme; layers that stay as they are are absent
    method     that every scheme is to use; None: each its own
    """

    layers: tuple[dict[str, Scheme], ...]
    method: str | None

    def method_of(self, scheme: Scheme, *, calibrated: bool) -> str:
        """What chooses the codes of a scheme's layers, with a calibration set or without."""
        rounds = scheme.rounds_without_calibration and not calibrated
        return self.method or ("rtn" if rounds else scheme.method)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The schemes in use, by name."""
        return {scheme.name: scheme for block in self.layers for scheme in block.values()}

    def needs_calibration(self) -> str:
        """In words what cannot be done without a calibration set, "" for nothing."""
        for scheme in self.schemes.values():
            if scheme.static:
                return f"scheme {scheme.name}"
            method = self.method_of(scheme, calibrated=False)
            if method != "rtn":
                return f"scheme {scheme.name} by method {method}"
        return ""


def plan_layers(
    model: PreTrainedModel,
    scheme: str | Scheme,
    *,
    overrides: Overrides | None = None,
    method: str | None = None,
    group_size: int | None = None,
) -> Plan:
    """The plan for `quantize_model`'s arguments.

    Raises InputError, naming argument and layer, for a model that cannot be quantised, a pattern
    that matches no layer, different schemes of one name, layers that engines run as one with
    different schemes, and groups that do not divide a layer's inputs.
    """
    blocks = _blocks(model)
    if method is not None and method not in METHODS:
        raise InputError(f"method: wanted one of {', '.join(METHODS)}, found {method!r}")
    overrides = overrides or {}
    asked = [one for one in (scheme, *overrides.values()) if one is not None]
    resolved = _resolved(asked, group_size)
    layers = []
    unmatched = set(overrides)
    for index in range(len(blocks)):
        found: dict[str, Scheme] = {}
        for name in LINEARS:
            wanted: str | Scheme | None = scheme
            for pattern, other in overrides.items():  # in order; the last that matches decides
                if fnmatchcase(layer_name(index, name), pattern):
                    unmatched.discard(pattern)
                    wanted = other
            if wanted is not None:
                found[name] = resolved[wanted]
        layers.append(found)
    for pattern in overrides:
        if pattern in unmatched:
            raise InputError(
                f"overrides: wanted patterns of layers such as {layer_name(0, UNITS[0][0])}, "
                f"found {pattern!r}, which matches none"
            )
    if not any(layers):
        raise InputError("overrides: wanted at least one layer to quantise, found none")
    for index, block in enumerate(blocks):
        _check_units(index, block, layers[index])
        for name, one in layers[index].items():
            _check_groups(layer_name(index, name), block.get_submodule(name), one)
    return Plan(tuple(layers), method)


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks; InputError for a model that is quantised or has no plain layers."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("model: wanted floating weights, found a quantised model")
    blocks = getattr(getattr(model, "model", None), "layers", None) or ()
    for index, block in enumerate(blocks):
        if getattr(block, "mlp", None) is not None and experts_of(block) is not None:
            raise InputError(
                f"{type(model).__name__}: wanted linear layers in {layer_name(index, 'mlp')}, "
                "found a mixture of experts, which is not quantised"
            )
    return linear_blocks(model)


def _resolved(asked: Sequence[str | Scheme], group_size: int | None) -> dict[str | Scheme, Scheme]:
    """What names and schemes stand for; group_size goes to the named ones that have groups."""
    plain = {one: scheme_named(one) if isinstance(one, str) else one for one in asked}
    grouped = [one for one, scheme in plain.items() if isinstance(one, str) and scheme.grouped]
    if group_size is not None and not grouped:
        names = ", ".join(scheme.name for scheme in plain.values())
        raise InputError(f"group_size: wanted none with scheme {names}, found {group_size}")
    found = plain | {one: scheme_named(one, group_size) for one in grouped}
    by_name: dict[str, Scheme] = {}
    for scheme in found.values():
        if by_name.setdefault(scheme.name, scheme) != scheme:
            raise InputError(
                f"overrides: wanted a name of its own for every scheme, found {scheme.name!r} "
                "for two that differ"
            )
    return found


def _check_units(index: int, block: nn.Module, layers: Mapping[str, Scheme]) -> None:
    """InputError where layers that engines run as one are quantised differently, or where a block
    of weights would reach from one into the next."""
    for unit in UNITS:
        for name in unit[:-1]:
            blocked = name in layers and layers[name].linear.weights.block
            outputs = block.get_submodule(name).out_features
            if blocked and outputs % blocked[0]:
                raise InputError(
                    f"{layer_name(index, name)}: blocks of {blocked[0]} outputs do not divide its "
                    f"{outputs} outputs, to which engines join {unit[-1].rpartition('.')[2]}"
                )
        first = layers.get(unit[0])
        for name in unit[1:]:
            other = layers.get(name)
            if other != first:
                told = [one.name if one is not None else "none" for one in (first, other)]
                raise InputError(
                    f"overrides: wanted one scheme for {layer_name(index, unit[0])} and "
                    f"{name.rpartition('.')[2]}, which engines run as one, "
                    f"found {told[0]} and {told[1]}"
                )


def _check_groups(name: str, layer: nn.Linear, scheme: Scheme) -> None:
    """InputError where groups of weights or inputs do not divide the layer."""
    shape = (layer.out_features, layer.in_features)
    try:
        scheme.linear.weights.scale_shape(shape)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    activations = scheme.linear.activations
    if activations is not None and activations.strategy == "group" and shape[1] % GROUP:
        raise InputError(f"{name}: activations: groups of {GROUP} do not divide {shape[1]} inputs")
