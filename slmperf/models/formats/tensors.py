"""A quantised layer's tensors as the compressed-tensors layout names and shapes them.

weight            (out, in) int8 or float8_e4m3fn
weight_packed     (out, ceil(in * bits / 32)) int32 instead, with weight_shape (2,) int64
weight_scale      (out, groups), rows and columns of blocks, or (1,) for the whole weight
weight_zero_point of asymmetric weights, int8 as weight_scale; packed: along the outputs, int32
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slmperf.models.formats.packing import pack, unpack
from slmperf.ops.weight_spec import Scales, WeightSpec


def tensors_of(
    codes: Tensor, scales: Scales, spec: WeightSpec, *, packed: bool
) -> dict[str, Tensor]:
    """The tensors of a weight (out, in), by name; what is stored as it is may be a view.

    codes   (out, in) int8 or float8_e4m3fn
    scales  in the shape that `WeightSpec.scale_shape` says
    packed  whether codes are stored packed
    """
    tensors = {"weight": codes}
    if packed:
        sizes = torch.tensor(codes.shape, device=codes.device)
        tensors = {"weight_packed": pack(codes, spec.bits), "weight_shape": sizes}
    beside = {"weight_scale": scales.scale}
    if scales.zero_point is not None:
        zero_point = scales.zero_point
        if packed and spec.group_size is not None:
            zero_point = pack(zero_point.T, spec.bits).T
        beside["weight_zero_point"] = zero_point
    for name, values in beside.items():
        # Flat in between: a column has any stride, of which readers cannot view other bytes.
        shape = (1,) if spec.group_size is None else values.shape
        tensors[name] = values.reshape(-1).view(shape)
    return tensors


def codes_of(tensors: Mapping[str, Tensor], spec: WeightSpec, inputs: int) -> Tensor:
    """The reverse: codes (out, in); a view where they are not packed."""
    if "weight" in tensors:
        return tensors["weight"]
    return unpack(tensors["weight_packed"], spec.bits, inputs)


def scales_of(
    tensors: Mapping[str, Tensor], spec: WeightSpec, shape: tuple[int, int], *, packed: bool
) -> Scales:
    """The reverse: scales and zero points of a weight `shape` (out, in), in the shape that
    `WeightSpec.scale_shape` says."""
    scale = tensors["weight_scale"].view(spec.scale_shape(shape))
    zero_point = tensors.get("weight_zero_point")
    if zero_point is None:
        return Scales(scale, None)
    if packed and spec.group_size is not None:
        zero_point = unpack(zero_point.T.contiguous(), spec.bits, shape[0]).T
    return Scales(scale, zero_point.reshape(scale.shape))
