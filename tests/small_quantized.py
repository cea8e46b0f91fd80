"""Small models with layers rounded to the nearest, for what is done with such layers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from slmperf.models.formats.compressed_tensors import write_config
from slmperf.models.kv_scales import attention_modules, set_kv_scales
from slmperf.models.quantized import LinearScheme, QuantizedLinear, replace_linear
from slmperf.ops import linear
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
    "w4a16-32": LinearScheme(Int4(group_size=32)),
    "w4a16-32-asymmetric": LinearScheme(Int4(group_size=32, symmetric=False)),
    "w4a16-channel": LinearScheme(Int4(group_size=-1)),
    "w4a16-tensor": LinearScheme(Int4(group_size=None)),
    "w4a16-asymmetric": LinearScheme(Int4(group_size=8, symmetric=False)),
    "w3a16": LinearScheme(WeightSpec(bits=3, group_size=8)),
    "w2a16": LinearScheme(WeightSpec(bits=2, group_size=8)),
}


def by_reference() -> contextlib.AbstractContextManager[Any]:
    """Inside the `with` block quantised layers multiply by `linear`'s reference: plain torch, as
    the readers of their checkpoints do it."""
    return mock.patch("slmperf.models.quantized.linear", partial(linear, impl="reference"))


def assert_near(found: torch.Tensor, wanted: torch.Tensor, limit: float) -> None:
    """Logits (B, T, V) within `limit` of the wanted ones, in norm, for half of the tokens, and none
    far away: where an input falls between two codes, the last bit of a sum before it chooses, and
    what follows is another token's rounding (the largest input of int8 does, where it is negative:
    x / scale is -127.5)."""
    errors = (found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
    assert float(errors.median()) <= limit and float(errors.max()) <= max(0.05, 2 * limit)


def rounded(dense: nn.Linear, scheme: LinearScheme) -> QuantizedLinear:
    """The layer rounded to the nearest; a static scale of the inputs is invented."""
    weight, spec = dense.weight.detach(), scheme.weights
    scales = spec.scales(weight)
    static = scheme.activations is not None and scheme.activations.static
    return QuantizedLinear(
        spec.encode(weight, scales),
        scales.scale,
        scales.zero_point,
        dense.bias,
        scheme=scheme,
        input_scale=torch.tensor(0.02, dtype=weight.dtype) if static else None,
    )


def replace(module: nn.Module, scheme: LinearScheme | Mapping[str, LinearScheme]) -> None:
    """Round the linear layers of a model or a block; of a mapping by the last part of the name."""

    def make(name: str, dense: nn.Linear) -> nn.Module | None:
        part = name.rpartition(".")[2]
        own = scheme if isinstance(scheme, LinearScheme) else scheme.get(part)
        return None if own is None else rounded(dense, own)

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
