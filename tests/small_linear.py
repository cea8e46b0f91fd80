"""Small quantised weights, with the codes and scales that they were made from."""

import torch

from slmperf.ops import Fp8Weight, Int4Weight, Int8Weight
from slmperf.testing.linear_cases import SCHEMES


def quantised(spec, outputs, inputs, dtype=torch.bfloat16):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    scales = spec.scales(weight)
    return spec.encode(weight, scales), scales


def made(name, outputs, inputs, dtype=torch.bfloat16):
    """A weight of a scheme, and the codes and scales that it was made from."""
    scheme = SCHEMES[name]
    codes, scales = quantised(scheme.spec, outputs, inputs, dtype)
    if scheme.spec.bits == 4:
        return Int4Weight.from_codes(codes, scales, scheme.spec.group_size), codes, scales
    kind = Int8Weight if scheme.spec.kind == "int" else Fp8Weight
    static = scheme.activations is not None and scheme.activations.static
    input_scale = torch.tensor(0.0301) if static else None
    return kind.from_codes(codes, scales.scale, scheme.activations, input_scale), codes, scales
