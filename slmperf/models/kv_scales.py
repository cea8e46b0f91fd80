"""Scales of a quantised key/value cache: keys and values are rounded to fp8 on their way into it.

The attention modules of such a model have buffers `k_scale` and `v_scale` (1,), which a checkpoint
stores beside their projections. Keys (after the rotary embedding) and values are rounded and put
back into their dtype before the cache gets them, as compressed-tensors does it in Transformers; an
engine keeps the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.ops.activation_spec import ActivationSpec

CACHE = ActivationSpec("float", "tensor")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(full name, module) of every attention layer: what has projections of keys and values."""
    for name, module in model.named_modules():
        if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
            yield name, module


def has_kv_scales(attention: nn.Module) -> bool:
    """Whether keys and values of this layer are rounded."""
    return hasattr(attention, "k_scale")


def set_kv_scales(attention: nn.Module, k_scale: Tensor, v_scale: Tensor) -> None:
    """Have an attention layer round its keys and values with these scales: one number each,
    floating, finite and above 0; also on the meta device, where values are not looked at.

    They may be set again. Raises InputError for other scales.
    """
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise InputError(
                f"set_kv_scales: {name} is {scale.dtype} {tuple(scale.shape)}, "
                "expected one floating number"
            )
        if not scale.is_meta and not 0 < float(scale) < torch.inf:
            raise InputError(f"set_kv_scales: wanted a {name} above 0, found {float(scale)}")
    if not has_kv_scales(attention):
        attention.register_forward_pre_hook(_round_into_cache, with_kwargs=True)
    attention.register_buffer("k_scale", k_scale.detach().reshape(1).clone())
    attention.register_buffer("v_scale", v_scale.detach().reshape(1).clone())


class _Rounded:
    """A cache, or none, that gets its keys and values rounded."""

    def __init__(self, cache: Any, attention: nn.Module) -> None:
        self.cache, self.attention = cache, attention

    def update(self, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """(B, G, T, C) each -> (B, G, T', C) each."""
        key = CACHE.fake_quantized(key, self.attention.k_scale)
        value = CACHE.fake_quantized(value, self.attention.v_scale)
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, *rest, **named)


def _round_into_cache(
    attention: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = _Rounded(named.get("past_key_values"), attention)
    return positional, named | {"past_key_values": cache}
