"""Small models with layers rounded to the nearest, for what is done with such layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from slmperf.models.formats.compressed_tensors import write_config
from slmperf.models.kv_scales import attention_modules, set_kv_scales
from slmperf.models.quantized import LinearScheme, QuantizedLinear, replace_linear
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Fp8, Int4, Int8, WeightSpec

SCHEMES = {
    "fp8": LinearScheme(Fp8(), ActivationSpec("float", "token")),
    "fp8-static": LinearScheme(Fp8(group_size=None), ActivationSpec("float", "tensor")),
    "fp8-block": LinearScheme(Fp8(block=(128, 128)), ActivationSpec("float", "group")),
    "fp8-weights": LinearScheme(Fp8()),
    "w8a8": LinearScheme(Int8(), ActivationSpec("int", "token")),
    "w4a8": LinearScheme(Int4(group_size=8), ActivationSpec("int", "token")),
    "w8a16": LinearScheme(Int8()),
    "w4a16": LinearScheme(Int4(group_size=8)),
    "w4a16-channel": LinearScheme(Int4(group_size=-1)),
    "w4a16-tensor": LinearScheme(Int4(group_size=None)),
    "w4a16-asymmetric": LinearScheme(Int4(group_size=8, symmetric=False)),
    "w3a16": LinearScheme(WeightSpec(bits=3, group_size=8)),
    "w2a16": LinearScheme(WeightSpec(bits=2, group_size=8)),
}


def rounded(linear: nn.Linear, scheme: LinearScheme) -> QuantizedLinear:
    """The layer rounded to the nearest; a static scale of the inputs is invented."""
    weight, spec = linear.weight.detach(), scheme.weights
    scales = spec.scales(weight)
    static = scheme.activations is not None and scheme.activations.static
    return QuantizedLinear(
        spec.encode(weight, scales),
        scales.scale,
        scales.zero_point,
        linear.bias,
        scheme=scheme,
        input_scale=torch.tensor(0.02, dtype=weight.dtype) if static else None,
    )


def replace(module: nn.Module, scheme: LinearScheme | Mapping[str, LinearScheme]) -> None:
    """Round the linear layers of a model or a block; of a mapping by the last part of the name."""

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        part = name.rpartition(".")[2]
        own = scheme if isinstance(scheme, LinearScheme) else scheme.get(part)
        return None if own is None else rounded(linear, own)

    replace_linear(module, make)


def set_cache_scales(attention: nn.Module, index: int) -> None:
    """Invented scales of layer `index`'s keys and values, in the dtype of its model."""
    scales = torch.tensor([0.01 * (index + 1), 0.02], dtype=next(attention.parameters()).dtype)
    set_kv_scales(attention, *scales)


def quantized(
    model: nn.Module, scheme: LinearScheme | Mapping[str, LinearScheme], *, kv_cache: bool = False
) -> nn.Module:
    """The model with its layers rounded, and scales of keys and values."""
    if kv_cache:
        for index, (_, attention) in enumerate(attention_modules(model)):
            set_cache_scales(attention, index)
    replace(model, scheme)
    write_config(model)
    return model.eval()
