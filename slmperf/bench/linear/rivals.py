"""Other ways to a quantised linear layer: torch's own ops, and packages where they are installed.

Each takes the same weight (a copy in its own layout, made before the timing) and bf16 inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from slmperf.ops import Fp8Weight, Int4Weight, Int8Weight, quantize_input
from slmperf.ops.linear.weights import Weight

Call = Callable[[], Tensor]
# Name -> weight, x -> a call of it.
Ways = dict[str, Callable[[Weight, Tensor], Call]]

_aten = torch.ops.aten


def others(weight: Weight, device: str) -> Ways:
    """What there is for this weight's scheme on this device; none is imported before it is made."""
    if isinstance(weight, Int4Weight):
        if device == "cpu":
            return {"torch int4pack": _int4pack_cpu}
        found: Ways = {"torch int4pack": _int4pack_cuda}
        for package, make in (("gemlite", _gemlite), ("vllm", _marlin)):
            if find_spec(package):
                found[package] = make
        return found
    if isinstance(weight, Int8Weight):
        found = {"torch._int_mm": _int_mm}
        if device == "cpu":
            found["torch int8pack"] = _int8pack_cpu
        return found
    if device == "cuda" and not weight.blocks:
        return {"torch._scaled_mm": _scaled_mm}
    return {}


def _unsigned(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """Codes plus 8 (N, K) int32, and (K / group, N, 2) bf16: scales, and what a code of 8 means."""
    scale, zero_point = weight.scales
    zero = torch.zeros_like(scale) if zero_point is None else -zero_point * scale
    both = torch.stack([scale.T, zero.T], dim=-1).bfloat16().contiguous()
    return weight.codes.int() + 8, both


def _group(weight: Int4Weight) -> int:
    if weight.group_size == -1:
        raise NotImplementedError("groups of 32, 64, 128 or 256 alone")
    return weight.group_size


def _int4pack_cpu(weight: Weight, x: Tensor) -> Call:
    assert isinstance(weight, Int4Weight)
    codes, both = _unsigned(weight)
    packed = _aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return partial(_aten._weight_int4pack_mm_for_cpu, x, packed, _group(weight), both)


def _int4pack_cuda(weight: Weight, x: Tensor) -> Call:
    """tinygemm, which torchao's int4 weight-only layers call."""
    assert isinstance(weight, Int4Weight)
    codes, both = _unsigned(weight)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = _aten._convert_weight_to_int4pack(pairs, 8)
    return partial(_aten._weight_int4pack_mm, x, packed, _group(weight), both)


def _int8pack_cpu(weight: Weight, x: Tensor) -> Call:
    """Weight-only: inputs are not rounded."""
    scale = weight.scales.scale[:, 0].bfloat16().contiguous()
    return partial(_aten._weight_int8pack_mm, x, weight.codes, scale)


def _int_mm(weight: Weight, x: Tensor) -> Call:
    """The product of codes alone: no rounding of inputs, no scales."""
    codes = quantize_input(x, weight.activations, impl="reference").codes  # type: ignore[arg-type]
    if x.device.type == "cuda" and len(codes) <= 16:
        raise NotImplementedError("more than 16 rows alone")
    return partial(torch._int_mm, codes, weight.codes.T)


def _scaled_mm(weight: Weight, x: Tensor) -> Call:
    """cuBLASLt with the inputs rounded before: a scale for each row and each output."""
    assert isinstance(weight, Fp8Weight)
    rounded = quantize_input(x, weight.activations, weight.input_scale, impl="reference")  # type: ignore[arg-type]
    scale = rounded.scale.view(-1, 1).expand(len(x), 1).contiguous()
    of_weight = weight.scale.view(1, -1).expand(1, weight.outputs).contiguous()
    return partial(
        torch._scaled_mm, rounded.codes, weight.codes.T, scale, of_weight, out_dtype=x.dtype
    )


def _gemlite(weight: Weight, x: Tensor) -> Call:
    from gemlite.helper import A16Wn

    assert isinstance(weight, Int4Weight)
    scale, zero_point = weight.scales
    zeros = torch.full_like(scale, 8) if zero_point is None else 8 + zero_point.to(scale.dtype)
    codes = (weight.codes + 8).to(torch.uint8)
    maker = A16Wn(device=str(x.device), dtype=x.dtype)
    return partial(maker.from_weights(codes, scale, zeros, 4, _group(weight)), x)


def _marlin(weight: Weight, x: Tensor) -> Call:
    """vLLM's Marlin, from a GPTQ layout."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    assert isinstance(weight, Int4Weight)
    if weight.zero_point is not None:
        raise NotImplementedError("asked for symmetric weights alone")
    outputs, inputs = weight.outputs, weight.inputs
    unsigned = (weight.codes.T.int() + 8).reshape(inputs // 8, 8, outputs)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)[:, None]
    words = (unsigned << shifts).sum(dim=1, dtype=torch.int32).contiguous()
    packed = _custom_ops.gptq_marlin_repack(words, inputs, outputs, 4)
    scale = marlin_utils.marlin_permute_scales(
        weight.scales.scale.T.contiguous(), inputs, outputs, weight.group_size
    )
    workspace = marlin_utils.marlin_make_workspace_new(x.device)
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    return partial(
        marlin_utils.apply_gptq_marlin_linear, x, packed, scale, none, workspace,
        scalar_types.uint4b8, outputs, inputs,
    )  # fmt: skip
