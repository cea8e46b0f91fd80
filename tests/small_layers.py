"""Small layers to quantise: grids, a weight with the Gram matrix of its inputs, errors in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.ops.weight_spec import Fp8, Int4, Int8, Scales, WeightSpec
from slmperf.quant.layer import QuantizedWeight

SPECS = {
    "int4 groups": Int4(group_size=32),
    "int4 channel": Int4(group_size=-1),
    "int4 tensor": Int4(group_size=None),
    "int4 zero points": Int4(group_size=32, symmetric=False),
    "int3": WeightSpec(bits=3),
    "int2 zero points": WeightSpec(bits=2, symmetric=False),
    "int8": Int8(),
    "fp8": Fp8(),
    "fp8 tensor": Fp8(group_size=None),
    "fp8 blocks": Fp8(block=(16, 24)),
}


def problem(seed: int, outputs: int, inputs: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs of unequal size, fp32 and fp64."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=make, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=make, dtype=torch.float64)
    x *= 4 * torch.rand(inputs, generator=make, dtype=torch.float64) ** 2 + 0.05
    return torch.randn(outputs, inputs, generator=make), x.T @ x


def values(made: QuantizedWeight, spec: WeightSpec) -> Tensor:
    """(codes - zero_point) * scale, fp64."""
    return spec.decode(made.codes, Scales(made.scale.double(), made.zero_point))


def errors(weight: Tensor, made: QuantizedWeight, gram: Tensor, spec: WeightSpec) -> Tensor:
    """tr(E H E') row by row, fp64."""
    error = weight.double() - values(made, spec)
    return ((error @ gram.double()) * error).sum(1)
