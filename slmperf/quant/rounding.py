"""rtn: symmetric integer quantisation of a weight, each value rounded to its nearest code.

    scale_n = max_d |W_nd| / 127.5        code_nd = clamp(round(W_nd / scale_n), -128, 127)

One scale per output channel, as compressed-tensors computes it. The scale is rounded to the dtype
it is stored in before the codes are chosen, and the codes are kept to the file: a weight is never
quantised twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError


@dataclass(frozen=True)
class Int8:
    """Weights in int8, symmetric, one scale per output channel; activations keep their dtype."""


class Codes(NamedTuple):
    """A quantised weight: it stands for codes * scale."""

    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out, 1) in the weight's dtype


def rtn(weight: Tensor, spec: Int8) -> Codes:
    """Round `weight` (out, in), any floating dtype, to the nearest codes of `spec`.

    The scale is stored in the weight's dtype. A channel of zeros gets the dtype's epsilon as its
    scale.
    Raises InputError for values that are not finite.
    """
    if not isinstance(spec, Int8):
        raise NotImplementedError(f"rtn: {type(spec).__name__} is not supported, supported: Int8")
    if weight.dim() != 2:
        raise InputError(f"rtn: weight is {tuple(weight.shape)}, wanted (out, in)")
    if not bool(torch.isfinite(weight).all()):
        raise InputError("rtn: weight holds values that are not finite")
    values = weight.detach().float()
    scale = (values.abs().amax(1, keepdim=True) / 127.5).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    codes = torch.round(values / scale.float()).clamp(-128, 127).to(torch.int8)
    return Codes(codes, scale)
