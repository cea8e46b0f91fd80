"""linear: y = x W' + bias, W plain or quantised, on any device.

A thin front: it checks, brings x to (M, K) and calls the op of the weight's scheme (int4.py,
int8.py, fp8.py), whose `auto` looks the kernel up in a table by device and number of rows.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from slmperf import arch
from slmperf.check import InputError
from slmperf.ops.linear import fp8, int4, int8
from slmperf.ops.linear.product import product_reference
from slmperf.ops.linear.rounding import as_rows
from slmperf.ops.linear.weights import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedInput,
    Weight,
)
from slmperf.ops.routing import HALF_AND_FLOAT

_OPS: dict[type, ModuleType] = {Int4Weight: int4, Int8Weight: int8, Fp8Weight: fp8}
_STRATEGIES = {None: 0, "token": 1, "tensor": 2, "group": 3}


def linear(
    x: Tensor | QuantizedInput,
    weight: Weight | Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    starts: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x (..., K) times a weight (N, K) -> (..., N).

    x          fp32, bf16 or fp16, receives a gradient; or inputs that were rounded before
    weight     Int4Weight, Int8Weight, Fp8Weight, or a plain (N, K) tensor of x's dtype, with which
               torch's product is called: `impl` is "auto", "torch" or "reference"
    bias       (N,) floating, experts' (E, N); receives a gradient
    residual   (..., N) floating, added before the result is rounded; receives a gradient
    starts     (E + 1,) int32 on x's device, not descending, from 0 to M: of x (M, K) the rows
               starts[e] to starts[e + 1] go with expert e of a stacked weight. Without gradients
    out_dtype  fp32, bf16 or fp16; None: x's, which rounded inputs do not have
    impl       "auto" (by the table of this device), "cpu", "cuda", "triton", "torch" or "reference"

    Sums are of fp32 or int32 and rounded once ("torch" and "reference" round the product to the
    wider dtype of x and the output before they add the residual). The same bits from run to run; on
    a CPU for any number of threads where `impl` is "cpu". InputError for shapes, dtypes and devices
    that do not fit, NotImplementedError for what `impl` does not take.
    """
    codes, x_scale = x if isinstance(x, QuantizedInput) else (x, None)
    if isinstance(weight, Tensor):
        if x_scale is not None:
            raise InputError("linear: x is rounded, wanted floating inputs of a plain weight")
        return _plain(codes, weight, bias, residual, starts, out_dtype, impl)
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise InputError(f"linear: x is {x.dtype}, wanted floating, or a QuantizedInput")
    dtype = out_dtype or (None if x_scale is not None else codes.dtype)
    if dtype is None:
        raise InputError("linear: out_dtype: wanted one for inputs that were rounded, found none")
    if dtype not in (*HALF_AND_FLOAT, codes.dtype):
        raise InputError(f"linear: out_dtype is {dtype}, wanted bfloat16, float16 or float32")
    _check(codes, x_scale, weight, bias, residual, starts)
    rows = as_rows(codes)
    if residual is not None:
        residual = as_rows(residual)
    arguments: tuple
    if isinstance(weight, Int4Weight):
        arguments = (
            rows, weight.packed, weight.scale, weight.zero_point, bias, residual, starts,
            weight.outputs, weight.group_size, dtype,
        )  # fmt: skip
    else:
        activations = weight.activations
        strategy = _STRATEGIES[None if activations is None else activations.strategy]
        if x_scale is not None:
            x_scale = x_scale.view(1, 1) if x_scale.dim() == 1 else x_scale.flatten(0, -2)
        elif weight.input_scale is not None:
            # As x is divided by it; of fp32 nothing changes.
            x_scale = weight.input_scale.to(codes.dtype).float()
            x_scale = x_scale.view(1, 1)
        arguments = (
            rows, x_scale, weight.data, weight.scale, bias, residual, starts, strategy, dtype,
        )  # fmt: skip
    module = _OPS[type(weight)]
    if impl != "auto":
        impl = module.ROUTES.choose(impl, rows)
    elif type(rows.shape[0]) is int and not torch.compiler.is_compiling():
        # A graph that is being traced keeps `auto`, for other numbers of rows.
        impl = module.chosen(*arguments)
    y = getattr(getattr(torch.ops.slmperf, weight.op), impl)(*arguments)
    return y.view(*codes.shape[:-1], weight.outputs)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    starts: Tensor | None,
    out_dtype: torch.dtype | None,
    impl: str,
) -> Tensor:
    """torch's product with a weight that is not quantised."""
    if impl not in ("auto", "torch", "reference"):
        raise NotImplementedError(
            f"linear: impl={impl!r} with a plain weight is not supported; there is: torch"
        )
    if weight.dim() != 2 or weight.dtype != x.dtype or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"linear: weight is {weight.dtype} {tuple(weight.shape)}, wanted {x.dtype} "
            f"(N, {x.shape[-1]}) for x {tuple(x.shape)}"
        )
    if starts is not None:
        raise InputError("linear: starts: wanted a stacked quantised weight, found a plain one")
    for name, one, wanted in (
        ("bias", bias, (weight.shape[0],)),
        ("residual", residual, (*x.shape[:-1], weight.shape[0])),
    ):
        if one is not None and tuple(one.shape) != wanted:
            raise InputError(f"linear: {name} is {tuple(one.shape)}, wanted {wanted}")
    rows = product_reference(
        as_rows(x), weight, bias, None if residual is None else as_rows(residual), None,
        out_dtype or x.dtype,
    )  # fmt: skip
    return rows.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    starts: Tensor | None,
) -> None:
    """InputError for whatever does not go together; nothing is asked of the device."""
    shape = (weight.outputs, weight.inputs)
    if x.dim() == 0 or x.shape[-1] != weight.inputs:
        raise InputError(
            f"linear: x is {tuple(x.shape)}, wanted (..., {weight.inputs}) for a weight {shape}"
        )
    held = weight.packed if isinstance(weight, Int4Weight) else weight.data
    named = {"bias": bias, "residual": residual, "starts": starts, "x_scale": x_scale}
    for name, one in (*named.items(), ("weight", held)):
        if one is not None and one.device != x.device:
            raise InputError(f"linear: {name} is on {one.device}, wanted x's {x.device}")
    experts = tuple(held.shape[: -4 if isinstance(weight, Int4Weight) else -2])
    if len(experts) != (0 if starts is None else 1):
        raise InputError(
            f"linear: starts: found {'none' if starts is None else 'some'}, wanted them where "
            f"weights are stacked, found {experts or 'one'}"
        )
    if starts is not None:
        if starts.dtype != torch.int32 or tuple(starts.shape) != (experts[0] + 1,) or x.dim() != 2:
            raise InputError(
                f"linear: starts is {starts.dtype} {tuple(starts.shape)} with x {tuple(x.shape)}, "
                f"wanted torch.int32 ({experts[0] + 1},) and (M, {weight.inputs})"
            )
    for name, one, wanted in (
        ("bias", bias, (*experts, weight.outputs)),
        ("residual", residual, (*x.shape[:-1], weight.outputs)),
    ):
        known = one is None or one.dtype in (*HALF_AND_FLOAT, x.dtype)
        if one is not None and (tuple(one.shape) != wanted or not known):
            raise InputError(
                f"linear: {name} is {one.dtype} {tuple(one.shape)}, wanted bfloat16, float16 or "
                f"float32 {wanted}"
            )
    if x_scale is None:
        return
    if isinstance(weight, Int4Weight) or weight.activations is None:
        raise InputError("linear: x is rounded, wanted floating inputs of a weight-only scheme")
    wanted_codes = weight.data.dtype
    if x.dtype != wanted_codes:
        raise InputError(f"linear: x is {x.dtype}, wanted {wanted_codes} for a weight {shape}")
    tokens, strategy = tuple(x.shape[:-1]), weight.activations.strategy
    shapes = {"token": (*tokens, 1), "tensor": (1,), "group": (*tokens, weight.inputs // 128)}
    if tuple(x_scale.shape) != shapes[strategy] or x_scale.dtype != torch.float32:
        raise InputError(
            f"linear: x's scale is {x_scale.dtype} {tuple(x_scale.shape)}, wanted torch.float32 "
            f"{shapes[strategy]} of strategy {strategy!r}"
        )
    if x.device.type == "cuda" and x.dtype == torch.float8_e4m3fn:
        capability = arch.cuda_capability(x.device.index or 0)
        if capability is not None and capability < (8, 9):
            raise NotImplementedError(
                f"linear: fp8 codes on sm_{capability[0]}{capability[1]}, which has no fp8 units; "
                "wanted floating x, which it takes weight-only"
            )
