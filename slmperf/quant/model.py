"""quantize_model: replace the linear layers of a decoder by quantised ones, in place.

The configuration gets the `quantization_config` of the compressed-tensors layout "int-quantized",
so that a checkpoint saved by `slmperf.models.save` is read by `slmperf.models.load`, and by stock
Transformers and the serving engines where compressed-tensors is installed. Keys and layout:
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from slmperf.check import InputError
from slmperf.models.checkpoint import weight_bytes
from slmperf.models.quantized import QuantizedLinear, replace_linear
from slmperf.models.structure import linear_blocks
from slmperf.quant.rounding import Int8, rtn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LAYOUT_VERSION = "0.20.0"  # of compressed-tensors, whose reader was tried on these files


@dataclass(frozen=True)
class QuantReport:
    """Number of layers quantised, and the bytes of the checkpoint's tensors before and after."""

    layers: int
    bytes_before: int
    bytes_after: int


def quantize_model(model: PreTrainedModel, spec: Int8) -> QuantReport:
    """Quantise every linear layer of the decoder blocks, round to nearest; embeddings and output
    head stay as they are.

    The model is changed in place and ends in evaluation mode; its weights take no gradient any
    more.
    Raises InputError for a model whose blocks are not Llama-like (a mixture of experts keeps its
    experts in one tensor), and for one that is quantised already.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            "quantize_model: wanted a model with floating weights, found a quantised one"
        )
    linear_blocks(model)
    before = weight_bytes(model)

    def make(name: str, linear: nn.Linear) -> QuantizedLinear:
        try:
            codes, scale = rtn(linear.weight, spec)
        except InputError as error:
            raise InputError(f"quantize_model: {name}: {error}") from error
        return QuantizedLinear(codes, scale, None if linear.bias is None else linear.bias.detach())

    layers = replace_linear(model, make)
    model.config.quantization_config = _quantization_config()
    model.eval()
    return QuantReport(layers, before, weight_bytes(model))


def _quantization_config() -> dict[str, Any]:
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "int-quantized",
    }
    return {
        "config_groups": {"group_0": group},
        "format": "int-quantized",
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "moe_sparsity_config": None,
        "version": _LAYOUT_VERSION,
    }
