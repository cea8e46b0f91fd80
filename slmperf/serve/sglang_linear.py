"""The quantisation method "slmperf" of the plug-in for SGLang (--quantization slmperf).

Compressed-tensors checkpoints by `QuantizedLinear`: for sizes and machines that SGLang has no
kernel for, a CPU among them. Without it SGLang's own kernels are taken.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import parameter
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from slmperf.models.engines.linear import NAME, QuantizedMethod, scheme_of


class QuantizationConfig(CompressedTensorsConfig):
    """SGLang's reading of a checkpoint, but for its linear layers."""

    fields: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        made = super().from_config(config)
        made.fields = config
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None
    ) -> str | None:
        return NAME if user_quant == NAME else None

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_name(self) -> str:
        return NAME

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        scheme = scheme_of(self.fields, prefix)
        return UnquantizedLinearMethod() if scheme is None else _LinearMethod(scheme)


class _LinearMethod(QuantizedMethod, LinearMethodBase):
    classes = parameter


def register() -> None:
    """Add the method to SGLang's."""
    QUANTIZATION_METHODS[NAME] = CPU_QUANTIZATION_METHODS[NAME] = QuantizationConfig
