"""The quantisation method "slmperf" of the plug-in for vLLM (--quantization slmperf).

Compressed-tensors checkpoints by `QuantizedLinear`: for sizes and machines that vLLM has no kernel
for. Without it vLLM's own kernels are taken.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from slmperf.models.engines.linear import NAME, QuantizationFields, QuantizedMethod, stored_linear


class QuantizationConfig(QuantizationFields, CompressedTensorsConfig):
    """vLLM's reading of a checkpoint, but for its linear layers."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        stored = stored_linear(self.fields, prefix)
        if stored is None:
            return UnquantizedLinearMethod()
        return SlmperfLinearMethod(stored, prefix)


class SlmperfLinearMethod(QuantizedMethod, LinearMethodBase):
    """By this name vLLM knows that its newer loaders of weights are wanted."""

    classes = parameter


def register() -> None:
    """Add the method to vLLM's."""
    register_weight_loader_v2_supported_method(SlmperfLinearMethod)
    register_quantization_config(NAME)(QuantizationConfig)
