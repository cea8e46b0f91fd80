"""QuantizedLinear as an engine's linear layer: what both plug-ins' quantisation methods share.

The engines have kernels for some schemes on some devices and refuse the sizes that those do not
take. Here a layer's tensors are loaded by the engine's own parameters, which cut them for its rank
and put q, k and v (gate and up) into one, and then computed by `QuantizedLinear`: any scheme, any
size, any device, but no faster than its product.

SGLang's parameters (sglang.srt.layers.parameter) are those of vLLM (vllm.model_executor.parameter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.formats.compressed_tensors import read_schemes
from slmperf.models.formats.packing import unpack
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.ops.weight_spec import WeightSpec

# The quantisation method's name, for --quantization.
NAME = "slmperf"
_FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}


def scheme_of(quantization: Mapping[str, Any], layer: str) -> LinearScheme | None:
    """How a checkpoint with this quantization_config holds an engine's layer; None: as it is.

    A layer that the engine made of several is what its first is. Raises InputError as
    `read_schemes` does, and for codes that do not fill words.
    """
    parent, _, last = layer.rpartition(".")
    stored = read_schemes(quantization, [f"{parent}.{_FUSED.get(last, last)}"])[0]
    if not stored:
        return None
    (found,) = stored.values()
    if found.packed != found.scheme.packed:
        raise InputError(f"{layer}: eight bits are stored in bytes, wanted them packed")
    if found.scheme.packed and 32 % found.scheme.weights.bits:
        raise InputError(f"{layer}: codes of {found.scheme.weights.bits} bits, wanted 2, 4 or 8")
    return found.scheme


class QuantizedMethod:
    """The three calls that an engine makes of a linear layer's quantisation method."""

    classes: ClassVar[Any]  # the engine's module of parameters

    def __init__(self, scheme: LinearScheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Any = None,
        **unused: Any,
    ) -> None:
        """Give the layer the parameters that a rank's share of the checkpoint is loaded into.

        Raises InputError where groups or blocks would be parted between ranks.
        """
        classes, spec = self.classes, self.scheme.weights
        inputs, parts = input_size_per_partition, output_partition_sizes
        _check_parts(spec, inputs, parts)
        both, outputs = {"output_dim": 0, "input_dim": 1}, sum(parts)
        words = {"packed_factor": 32 // spec.bits} | both

        def add(name: str, kind: Any, shape: tuple[int, ...], dtype: Any, **places: Any) -> None:
            data = torch.zeros(shape, dtype=dtype)
            layer.register_parameter(name, kind(data=data, weight_loader=weight_loader, **places))

        if self.scheme.packed:
            shape = (outputs, inputs * spec.bits // 32)
            kind = classes.PackedvLLMParameter
            add("weight_packed", kind, shape, torch.int32, packed_dim=1, **words)
            add("weight_shape", classes.BasevLLMParameter, (2,), torch.int64)
        else:
            kind = classes.ModelWeightParameter
            add("weight", kind, (outputs, inputs), spec.code_dtype, **both)
        shape = spec.scale_shape((outputs, inputs))
        if spec.group_size is None:
            add("weight_scale", classes.PerTensorScaleParameter, (len(parts),), params_dtype)
        elif spec.block:
            add("weight_scale", classes.BlockQuantScaleParameter, shape, params_dtype, **both)
        elif spec.group_size == -1:
            kind = classes.ChannelQuantScaleParameter
            add("weight_scale", kind, shape, params_dtype, output_dim=0)
        else:
            add("weight_scale", classes.GroupQuantScaleParameter, shape, params_dtype, **both)
        if not spec.symmetric:
            packed = (outputs * spec.bits // 32, shape[1])
            kind, places = classes.PackedvLLMParameter, words
            if spec.group_size == -1:
                kind, places = classes.PackedColumnParameter, dict(words)
                places.pop("input_dim")
            add("weight_zero_point", kind, packed, torch.int32, packed_dim=0, **places)
        activations = self.scheme.activations
        if activations is not None and activations.static:
            add("input_scale", classes.PerTensorScaleParameter, (len(parts),), torch.float32)
        layer.parts, layer.inputs = parts, inputs

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put a QuantizedLinear in the place of the loaded parameters."""
        held = {name: value.data for name, value in layer.named_parameters(recurse=False)}
        spec, outputs = self.scheme.weights, sum(layer.parts)
        scale, zero_point = held["weight_scale"], held.get("weight_zero_point")
        if spec.group_size is None:  # of each of the layers that are one here
            spec = replace(spec, group_size=-1)
            parts = torch.tensor(layer.parts, device=scale.device)
            scale = scale.repeat_interleave(parts)[:, None]
        codes = held.get("weight")
        if codes is None:
            codes = unpack(held["weight_packed"], spec.bits, layer.inputs)
        if zero_point is not None:
            zero_point = unpack(zero_point.T.contiguous(), spec.bits, outputs).T.contiguous()
        input_scale = held.get("input_scale")
        for name in held:
            if name != "bias":
                delattr(layer, name)
        layer.quantized = QuantizedLinear(
            codes,
            scale,
            zero_point,
            scheme=replace(self.scheme, weights=spec),
            input_scale=None if input_scale is None else input_scale.max(),
        )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, in) -> (T, out) of this rank."""
        output = layer.quantized(x)
        return output if bias is None else output + bias


def _check_parts(spec: WeightSpec, inputs: int, parts: list[int]) -> None:
    rows, columns = spec.block or (1, max(1, spec.group_size or 1))
    for what, size, multiple in (
        ("inputs", inputs, columns),
        *(("outputs", part, rows) for part in parts),
    ):
        if size % multiple:
            raise InputError(
                f"{size} {what} on a rank, wanted a multiple of {multiple}, the scale's group"
            )
