"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them, read into compressed-tensors' terms.

Of a linear layer (out, in) with groups of g inputs:

    qweight  (in * bits / 32, out) int32: unsigned codes, packed along the inputs
    qzeros   (in / g, out * bits / 32) int32: zero points, packed along the outputs; each less 1
             where checkpoint_format is "gptq", as they are where it is "gptq_v2"
    scales   (in / g, out)
    g_idx    (in,) int32: the group of each input

    W = (code - zero) * scale = ((code - 2^(b-1)) - (zero - 2^(b-1))) * scale

The last form is that of `WeightSpec`; the zero points are left out where all of them are 0 in it.
Layers whose groups are not neighbours (desc_act without static groups) have no such form.
Source: https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes, one_line
from slmperf.models.formats.packing import unpack, words
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.ops.weight_spec import WeightSpec

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")  # the last may be missing


@dataclass(frozen=True)
class Settings:
    """What a GPTQ configuration says of all layers."""

    bits: int
    group_size: int  # -1: all inputs
    zeros_less_one: bool


def read_settings(quantization: Mapping[str, Any]) -> Settings:
    """The settings in a quantization_config; InputError for what is not read."""
    keys = ("checkpoint_format", "format")
    layout, *others = [quantization[key] for key in keys if quantization.get(key)] or ["gptq"]
    if others and others != [layout]:
        raise InputError(f"checkpoint_format is {layout!r}, but format {others[0]!r}")
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format is {layout!r}, wanted 'gptq' or 'gptq_v2'")
    pack_dtype = str(quantization.get("pack_dtype", "int32")).removeprefix("torch.")
    if pack_dtype != "int32":
        raise InputError(f"pack_dtype is {pack_dtype!r}, wanted 'int32'")
    if quantization.get("dynamic"):
        raise InputError("dynamic: settings of single layers are not read")
    bits, group_size = quantization.get("bits"), quantization.get("group_size", -1)
    if not isinstance(bits, int) or not isinstance(group_size, int):
        raise InputError(f"wanted numbers bits and group_size, found {bits!r} and {group_size!r}")
    WeightSpec(bits=bits, group_size=group_size)
    return Settings(bits, group_size, layout == "gptq")


def read_linear(
    name: str,
    shape: tuple[int, int],
    parts: Mapping[str, Tensor],
    bias: Tensor | None,
    settings: Settings,
    dtype: torch.dtype,
) -> QuantizedLinear:
    """The layer `name`, (out, in) = shape, from its tensors `parts`, scales and bias in `dtype`.

    Raises InputError for tensors that do not go together and for groups that are not neighbours.
    """
    outputs, inputs = shape
    bits = settings.bits
    group = inputs if settings.group_size == -1 else settings.group_size
    groups = -(-inputs // group)
    check_shapes(
        name,
        qweight=(parts["qweight"], f"{words(inputs, bits)} {outputs}"),
        qzeros=(parts["qzeros"], f"{groups} {words(outputs, bits)}"),
        scales=(parts["scales"], f"{groups} {outputs}"),
        **({"g_idx": (parts["g_idx"], f"{inputs}")} if "g_idx" in parts else {}),
    )
    for part in ("qweight", "qzeros"):
        if parts[part].dtype != torch.int32:
            raise InputError(f"{name}: {part} is {parts[part].dtype}, wanted torch.int32")
    neighbours = torch.arange(inputs) // group
    if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), neighbours):
        raise InputError(
            f"{name}: g_idx: groups of inputs that are not neighbours (desc_act without static "
            "groups) are not read"
        )
    codes = unpack(parts["qweight"].T.contiguous(), bits, inputs)
    zeros = _zeros(parts["qzeros"], bits, outputs, settings.zeros_less_one).T
    symmetric = not bool(zeros.any())
    spec = WeightSpec(bits=bits, symmetric=symmetric, group_size=settings.group_size)
    try:
        return QuantizedLinear(
            codes,
            parts["scales"].T.to(dtype).contiguous(),
            None if symmetric else zeros.contiguous(),
            bias,
            scheme=LinearScheme(spec),
        )
    except InputError as error:
        raise InputError(f"{name}: {one_line(error)}") from error


def _zeros(qzeros: Tensor, bits: int, outputs: int, less_one: bool) -> Tensor:
    """Zero points in the terms of `WeightSpec`: (groups, out) int8."""
    if not less_one:
        return unpack(qzeros, bits, outputs)
    if 32 % bits == 0:
        # Writers take 1 from all fields of a word at once, and so a 0 borrows from the field above.
        ones = sum(1 << place for place in range(0, 32, bits))
        words = (qzeros.to(torch.int64) + ones) % 2**32
        return unpack(
            torch.where(words < 2**31, words, words - 2**32).to(torch.int32), bits, outputs
        )
    half = 2 ** (bits - 1)
    unsigned = unpack(qzeros, bits, outputs).to(torch.int32) + half
    return ((unsigned + 1) % 2**bits - half).to(torch.int8)
