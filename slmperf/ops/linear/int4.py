"""linear_int4: x times a weight of 4 bits in groups (W4A16).

    y = x W' ...    W = (code - zero point) * scale, rounded to the scale's dtype, then to x's

The rounded W is what the quantiser measured and what readers of the checkpoint multiply with; every
kernel multiplies with exactly these numbers. The layout is int4_layout.py's.

    x           (M, K) fp32, bf16 or fp16
    packed      (ceil(N / 16), ceil(K / 64), 32, 4) int32; its first dimension has any stride
    scale       (groups, 16 ceil(N / 16)) fp32, bf16 or fp16; zero_point the same, int8; any stride
                between groups
    outputs     N
    group_size  32, 64, 128, or -1: all
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.ops.linear import int4_cuda, table
from slmperf.ops.linear.int4_layout import unpack_int4
from slmperf.ops.linear.product import product_reference, register
from slmperf.ops.routing import HALF_AND_FLOAT, MISSING, Implementation, require_interpreter, routes
from slmperf.ops.weight_spec import Scales, WeightSpec

SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? residual,"
    " Tensor? starts, SymInt outputs, int group_size, ScalarType out_dtype) -> Tensor"
)
SCHEMA_DEQUANTIZE = (
    "(Tensor packed, Tensor scale, Tensor? zero_point, SymInt outputs, SymInt inputs,"
    " int group_size) -> Tensor"
)


def dequantize_int4_reference(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, outputs: int, inputs: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """(..., N, K) in the scale's dtype, in plain torch."""
    spec = WeightSpec("int", 4, zero_point is None, group_size)
    codes = unpack_int4(packed, outputs, inputs)
    flat, groups = codes.reshape(-1, inputs), scale.shape[-2]

    def beside(values: Tensor) -> Tensor:
        return values.mT[..., :outputs, :].reshape(-1, groups)

    zeros = None if zero_point is None else beside(zero_point)
    return spec.decode(flat, Scales(beside(scale), zeros)).view(codes.shape)


def linear_int4_reference(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, outputs: int, group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in plain torch."""
    weight = dequantize_int4_reference(packed, scale, zero_point, outputs, x.shape[1], group_size)
    return product_reference(x, weight, bias, residual, starts, out_dtype)


ROUTES = routes(
    "linear_int4",
    {"cpu": "by table", "cuda": "by table"},
    cpu=Implementation(("cpu",), needs="native"),
    triton=Implementation(("cuda", "cpu"), needs="triton"),
    cuda=Implementation(("cuda",), (torch.bfloat16, torch.float16), "cuda"),
    torch=Implementation(("cpu", "cuda")),
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)

for _name in ("cpu", "triton", "reference"):
    torch.library.define(
        f"slmperf::dequantize_int4.{_name}", SCHEMA_DEQUANTIZE, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.register_fake(
        f"slmperf::dequantize_int4.{_name}",
        lambda packed, scale, zero_point, outputs, inputs, group_size: scale.new_empty(
            (*packed.shape[:-4], outputs, inputs)
        ),
    )
torch.library.impl("slmperf::dequantize_int4.reference", ("cpu", "cuda"))(dequantize_int4_reference)


@torch.library.impl("slmperf::dequantize_int4.triton", ("cpu", "cuda"))
def _dequantize_triton(packed: Tensor, *arguments: Any) -> Tensor:
    require_interpreter("dequantize_int4", packed)
    from slmperf.triton_kernels.linear_int4 import dequantize_int4 as launch

    return launch(packed, *arguments)


def dequantize_int4(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, outputs: int, inputs: int,
    group_size: int,
) -> Tensor:  # fmt: skip
    """(..., N, K) in the scale's dtype, by the fastest means there is on this device."""
    overload, needs = ("triton",) * 2 if packed.device.type == "cuda" else ("cpu", "native")
    overload = "reference" if MISSING[needs] else overload
    op = getattr(torch.ops.slmperf.dequantize_int4, overload)
    return op(packed, scale, zero_point, outputs, inputs, group_size)


def _torch(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, outputs: int, group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's product with the weight put together first: for many rows."""
    weight = dequantize_int4(packed, scale, zero_point, outputs, x.shape[1], group_size)
    return product_reference(x, weight, bias, residual, starts, out_dtype)


def _triton(x: Tensor, *arguments: Any) -> Tensor:
    require_interpreter("linear_int4", x)
    from slmperf.triton_kernels.common import machine
    from slmperf.triton_kernels.linear_int4 import linear_int4 as launch

    *_, starts, outputs, _, _ = arguments
    experts = 0 if starts is None else len(starts) - 1
    call = table.Call("linear_int4", x.shape[0], outputs, x.shape[1], x.dtype, experts=experts)
    return launch(x, *arguments, table.tile(call, machine(x).capability))


def _fits(impl: str, given: dict[str, Any]) -> bool:
    """Whether an implementation that the table names takes these arguments."""
    return impl != "cuda" or int4_cuda.fits(given["x"], given["scale"])


def _weight(given: dict[str, Any], inputs: int, dtype: torch.dtype) -> Tensor:
    packed, scale, zero_point = given["packed"], given["scale"], given["zero_point"]
    weight = dequantize_int4(
        packed, scale, zero_point, given["outputs"], inputs, given["group_size"]
    )
    return weight.to(dtype)


chosen = register(
    "linear_int4",
    SCHEMA,
    ROUTES,
    implementations={
        "triton": _triton,
        "cuda": int4_cuda.linear_int4,
        "torch": _torch,
        "reference": linear_int4_reference,
    },
    weight_of=_weight,
    fits=_fits,
)
