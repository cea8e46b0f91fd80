"""The quantisation method "slmperf" of the plug-in for SGLang (--quantization slmperf).

Compressed-tensors checkpoints by `QuantizedLinear`: for sizes and machines that SGLang has no
kernel for, a CPU among them. Without it SGLang's own kernels are taken.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.layers import parameter
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearBase
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from slmperf.models.engines.linear import NAME, QuantizationFields, QuantizedMethod, stored_linear


class QuantizationConfig(QuantizationFields, CompressedTensorsConfig):
    """SGLang's reading of a checkpoint, but for its linear layers."""

    weight_block_size: tuple[int, int] | None = None  # of a layer, in the copy that its method has

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        stored = stored_linear(self.fields, prefix)
        if stored is None:
            return UnquantizedLinearMethod()
        method = SlmperfLinearMethod(stored, prefix)
        method.quant_config = copy.copy(self)  # the loader of blocks' scales asks it:
        method.quant_config.weight_block_size = stored.scheme.weights.block
        return method


class SlmperfLinearMethod(QuantizedMethod, LinearMethodBase):
    """By this name SGLang knows that its newer loaders of weights are wanted."""

    classes = parameter
    quant_config: QuantizationConfig


def register() -> None:
    """Add the method to SGLang's."""
    if SlmperfLinearMethod.__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
        WEIGHT_LOADER_V2_SUPPORTED.append(SlmperfLinearMethod.__name__)
    QUANTIZATION_METHODS[NAME] = CPU_QUANTIZATION_METHODS[NAME] = QuantizationConfig
