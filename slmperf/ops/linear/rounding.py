"""Numbers rounded to int8 or fp8 codes for the products behind them: what quantize_input, rms_norm
and silu_mul share.

    codes, scale = ActivationSpec.encode(numbers)        in the numbers' dtype, scales kept in fp32

rms_norm and silu_mul round their own result, which then is not written to memory in between; the
codes are exactly those that quantize_input gives for it. Inside an operator this is

    codes         int: NONE, the result stays floating; INT8; FP8 (e4m3)
    group         int: numbers of a token that share a scale; 0: all of them
    static_scale  (1,) fp32: the one scale for all; None: found for each token or group
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.activation_spec import GROUP, ActivationSpec
from slmperf.ops.linear.weights import QuantizedInput

NONE, INT8, FP8 = 0, 1, 2
CODES = {INT8: torch.int8, FP8: torch.float8_e4m3fn}


class Rounding(NamedTuple):
    """The operators' arguments."""

    codes: int
    group: int
    static_scale: Tensor | None


def rounding_of(
    op: str, activations: ActivationSpec | None, input_scale: Tensor | None, x: Tensor, width: int
) -> Rounding:
    """The arguments for results of so many columns on x's device; InputError for what does not go
    together."""
    static = activations is not None and activations.static
    if static != (input_scale is not None):
        found = "none" if input_scale is None else "one"
        raise InputError(f"{op}: input_scale: found {found} with {activations}")
    if activations is None:
        return Rounding(NONE, 0, None)
    group = GROUP if activations.strategy == "group" else 0
    if group and width % group:
        raise InputError(f"{op}: groups of {group} do not divide {width} columns")
    if input_scale is not None:
        if input_scale.numel() != 1 or input_scale.device != x.device:
            raise InputError(
                f"{op}: input_scale is {tuple(input_scale.shape)} on {input_scale.device}, wanted "
                f"one number on {x.device}"
            )
        # As x is divided by it; of fp32 nothing changes.
        input_scale = input_scale.detach().reshape(1).to(x.dtype).float()
    return Rounding(FP8 if activations.kind == "float" else INT8, group, input_scale)


def check_no_gradient(op: str, rounding: Rounding, **tensors: Tensor | None) -> None:
    """NotImplementedError where codes are asked for of what wants a gradient."""
    if rounding.codes == NONE or not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(f"{op}: {name} wants a gradient, and there is none of codes")


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D) as operators take it: any stride from row to row, none within."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rounded_reference(numbers: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(T, D) -> codes and scales in plain torch; no scales, (0,), where none are found."""
    codes, group, static_scale = rounding
    if codes == NONE:
        return numbers, numbers.new_empty(0, dtype=torch.float32)
    strategy = "tensor" if static_scale is not None else "group" if group else "token"
    spec = ActivationSpec("float" if codes == FP8 else "int", strategy)  # type: ignore[arg-type]
    found, scale = spec.encode(numbers, static_scale)
    wide = torch.promote_types(numbers.dtype, torch.float32)
    return found, scale.to(wide) if static_scale is None else scale.new_empty(0, dtype=wide)


def empty_results(
    x: Tensor, shape: tuple[int, int], codes: int, group: int, static_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Memory of a result of this shape, on x's device: numbers or codes; scales, (0,) where there
    are none to be found."""
    result = x.new_empty(shape, dtype=CODES.get(codes, x.dtype))
    scales: tuple[int, ...] = (shape[0], shape[1] // group if group else 1)
    if codes == NONE or static_scale is not None:
        scales = (0,)
    return result, x.new_empty(scales, dtype=torch.float32)


def as_output(
    result: Tensor, scale: Tensor, rounding: Rounding, shape: tuple[int, ...]
) -> Tensor | QuantizedInput:
    """What the public functions return, in the shape of their arguments."""
    result = result.view(shape)
    if rounding.codes == NONE:
        return result
    if rounding.static_scale is not None:
        return QuantizedInput(result, rounding.static_scale)
    return QuantizedInput(result, scale.view(*shape[:-1], scale.shape[1]))
