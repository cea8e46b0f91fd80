"""schemes: the ways to quantise a linear layer that serving engines have kernels for, by name.

| name       | weights                         | inputs                          | calibration |
|------------|---------------------------------|---------------------------------|-------------|
| fp8        | fp8 e4m3, per output channel    | fp8, per token                  | better      |
| fp8-static | fp8 e4m3, one scale             | fp8, one scale, calibrated      | needed      |
| fp8-block  | fp8 e4m3, blocks of 128 x 128   | fp8, groups of 128 of a token   | better      |
| w8a8       | int8, per output channel        | int8, per token; smoothed       | needed      |
| w4a16      | int4, groups of 128 inputs      | as they are                     | needed      |

The codes of w8a8 are chosen by gptq, which leaves eight bits little to gain, those of the others by
gptq+quantease. Method rtn needs no calibration but for the scale of fp8-static's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from slmperf.check import InputError
from slmperf.models.quantized import LinearScheme
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Fp8, Int4, Int8


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is quantised, and what chooses its codes."""

    name: str  # for reports
    linear: LinearScheme
    method: str = "gptq+quantease"  # one of `METHODS`, where the caller asks for none
    smooth: bool = False  # whether SmoothQuant goes before, where the caller does not say
    rounds_without_calibration: bool = False  # then by rtn, where no method is asked for

    @property
    def static(self) -> bool:
        """Whether the scale of its inputs is fixed beforehand, by calibration."""
        activations = self.linear.activations
        return activations is not None and activations.static

    @property
    def grouped(self) -> bool:
        """Whether neighbouring inputs share a scale, any number of them."""
        return self.linear.weights.group_size not in (-1, None)


_FP8_TOKEN, _FP8_FIXED, _FP8_GROUP, _INT8_TOKEN = (
    ActivationSpec("float", "token"),
    ActivationSpec("float", "tensor"),
    ActivationSpec("float", "group"),
    ActivationSpec("int", "token"),
)
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("fp8", LinearScheme(Fp8(), _FP8_TOKEN), rounds_without_calibration=True),
            Scheme("fp8-static", LinearScheme(Fp8(group_size=None), _FP8_FIXED)),
            Scheme(
                "fp8-block",
                LinearScheme(Fp8(block=(128, 128)), _FP8_GROUP),
                rounds_without_calibration=True,
            ),
            Scheme("w8a8", LinearScheme(Int8(), _INT8_TOKEN), "gptq", smooth=True),
            Scheme("w4a16", LinearScheme(Int4())),
        )
    }
)


def scheme_named(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of that name; `group_size` replaces that of a scheme with groups (-1: one scale
    per output channel).

    Raises InputError for a name that is none, and for a group_size where there are no groups.
    """
    if name not in SCHEMES:
        raise InputError(f"scheme: wanted one of {', '.join(SCHEMES)}, found {name!r}")
    scheme = SCHEMES[name]
    if group_size is None:
        return scheme
    if not scheme.grouped:
        raise InputError(f"group_size: wanted none with scheme {name}, found {group_size}")
    weights = replace(scheme.linear.weights, group_size=group_size)
    name = scheme.name if weights == scheme.linear.weights else f"{name}-g{group_size}"
    return replace(scheme, name=name, linear=replace(scheme.linear, weights=weights))
