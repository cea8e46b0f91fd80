"""QuantizedLinear as an engine's linear layer: what both plug-ins' quantisation methods share.

The engines have kernels for some schemes on some devices and refuse the sizes that those do not
take. Here a layer's tensors are loaded by the engine's own parameters, which cut them for its rank
and put q, k and v (gate and up) into one, and then arranged once as the kernels of
`slmperf.ops.linear` read them, in a `QuantizedLinear`: whatever `rules.of_product` does not refuse,
on any device.

SGLang's parameters (sglang.srt.layers.parameter) are those of vLLM (vllm.model_executor.parameter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.engines.rules import of_product
from slmperf.models.formats.compressed_tensors import StoredLinear, read_schemes
from slmperf.models.formats.packing import unpack
from slmperf.models.formats.tensors import codes_of
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.structure import FUSED

# The quantisation method's name, for --quantization.
NAME = "slmperf"


def stored_linear(quantization: Mapping[str, Any], layer: str) -> StoredLinear | None:
    """How a checkpoint with this quantization_config holds an engine's layer; None: as it is.

    Raises InputError as `read_schemes` does, and for a layer that the engine made of several which
    are quantised in different ways.
    """
    parent, _, last = layer.rpartition(".")
    names = [f"{parent}.{part}" for part in FUSED.get(last, (last,))]
    found = read_schemes(quantization, names)[0]
    first, *others = [found.get(name) for name in names]
    if any(other != first for other in others):
        raise InputError(f"{layer}: its parts are quantised in different ways")
    return first


class QuantizationFields:
    """What the engines' quantisation configs of the method share: stands before the engine's reader
    of compressed-tensors among the bases, and keeps the fields that it reads."""

    fields: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        made = super().from_config(config)  # type: ignore[misc]
        made.fields = config
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return NAME if user_quant == NAME else None

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_name(self) -> str:
        return NAME


class QuantizedMethod:
    """The three calls that an engine makes of the quantisation method of the layer `name`."""

    classes: ClassVar[Any]  # the engine's module of parameters

    def __init__(self, stored: StoredLinear, name: str) -> None:
        self.scheme, self.packed = stored
        self.name = name

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

        Raises InputError for what `of_product` names.
        """
        classes, spec = self.classes, self.scheme.weights
        inputs, parts = input_size_per_partition, output_partition_sizes
        for reason in of_product(self.scheme, inputs, parts):
            raise InputError(f"{self.name}: {reason}")
        layer.parts, layer.inputs = parts, inputs
        layer.weight_block_size = spec.block  # vLLM's loader of blocks' scales asks for it
        both, outputs = {"output_dim": 0, "input_dim": 1}, sum(parts)

        def add(name: str, kind: Any, shape: tuple[int, ...], dtype: Any, **places: Any) -> None:
            data = torch.zeros(shape, dtype=dtype)
            layer.register_parameter(name, kind(data=data, weight_loader=weight_loader, **places))

        def add_of_groups(name: str, dtype: torch.dtype) -> None:
            """What there is one of for all inputs and outputs that share a scale."""
            shape = spec.scale_shape((outputs, inputs))
            if spec.group_size is None:
                add(name, classes.PerTensorScaleParameter, (len(parts),), dtype)
            elif spec.block:
                add(name, classes.BlockQuantScaleParameter, shape, dtype, **both)
            elif spec.group_size == -1:
                add(name, classes.ChannelQuantScaleParameter, shape, dtype, output_dim=0)
            else:
                add(name, classes.GroupQuantScaleParameter, shape, dtype, **both)

        words = {"packed_factor": 32 // spec.bits}
        if self.packed:
            shape = (outputs, inputs * spec.bits // 32)
            kind = classes.PackedvLLMParameter
            add("weight_packed", kind, shape, torch.int32, packed_dim=1, **words, **both)
            add("weight_shape", classes.BasevLLMParameter, (2,), torch.int64)
        else:
            kind = classes.ModelWeightParameter
            add("weight", kind, (outputs, inputs), spec.code_dtype, **both)
        add_of_groups("weight_scale", params_dtype)
        if not spec.symmetric and not self._zeros_packed:
            add_of_groups("weight_zero_point", torch.int8)
        elif not spec.symmetric:
            groups = spec.scale_shape((outputs, inputs))[1]
            kind, places = classes.PackedvLLMParameter, both
            if spec.group_size == -1:
                kind, places = classes.PackedColumnParameter, {"output_dim": 0}
            shape = (outputs * spec.bits // 32, groups)
            add("weight_zero_point", kind, shape, torch.int32, packed_dim=0, **words, **places)
        activations = self.scheme.activations
        if activations is not None and activations.static:
            add("input_scale", classes.PerTensorScaleParameter, (len(parts),), torch.float32)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put a QuantizedLinear in the place of the loaded parameters."""
        held = {name: value.data for name, value in layer.named_parameters(recurse=False)}
        spec, outputs = self.scheme.weights, sum(layer.parts)
        scale, zero_point = held["weight_scale"], held.get("weight_zero_point")
        if zero_point is not None and self._zeros_packed:
            zero_point = unpack(zero_point.T.contiguous(), spec.bits, outputs).T.contiguous()
        if spec.group_size is None:  # of each of the layers that are one here
            spec = replace(spec, group_size=-1)
            parts = torch.tensor(layer.parts, device=scale.device)
            scale = scale.repeat_interleave(parts)[:, None]
            if zero_point is not None:
                zero_point = zero_point.repeat_interleave(parts)[:, None]
        codes = codes_of(held, spec, layer.inputs)
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

    @property
    def _zeros_packed(self) -> bool:
        return self.scheme.packed and self.scheme.weights.group_size is not None

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, in) -> (T, out) of this rank."""
        return layer.quantized.multiply(x, bias)
