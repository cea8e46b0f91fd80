"""Checks of a quantised weight's tensors, and their messages."""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.routing import HALF_AND_FLOAT


def check_codes(
    name: str, codes: Tensor, dtype: torch.dtype, bits: int, what: str = "codes"
) -> None:
    """InputError for codes of another dtype, for none, and of int4 for others than -8 to 7."""
    shape, found = tuple(codes.shape), str(codes.dtype)
    asked = bits == 4 or codes.dtype != dtype  # int8 holds no others: no pass over them
    whole = asked and not codes.dtype.is_floating_point and codes.numel() > 0 and not codes.is_meta
    if whole:
        low, high = (int(value) for value in codes.aminmax())
        found += f" from {low} to {high}"
    if codes.dtype != dtype or codes.dim() != 2 or 0 in shape:
        raise InputError(f"{name}: {what} are {found} {shape}, wanted {dtype} (N, K)")
    if bits == 4 and whole and (low < -8 or high > 7):
        raise InputError(f"{name}: {what} are {found} {shape}, wanted -8 to 7")


def check_scale(name: str, scale: Tensor, wanted: tuple[int, ...]) -> None:
    """InputError for another shape or a dtype that kernels do not read."""
    if tuple(scale.shape) != wanted or scale.dtype not in HALF_AND_FLOAT:
        raise InputError(
            f"{name}: scale is {scale.dtype} {tuple(scale.shape)}, wanted bfloat16, float16 or "
            f"float32 {wanted}"
        )


def check_devices(name: str, first: Tensor, **others: Tensor | None) -> None:
    """InputError where a weight's tensors lie on several devices."""
    for what, one in others.items():
        if one is not None and one.device != first.device:
            raise InputError(f"{name}: {what} is on {one.device}, wanted the codes' {first.device}")


def check_slice(name: str, what: str, begin: int, end: int, size: int, unit: int) -> None:
    """InputError for a slice that is none, or that cuts through what belongs together."""
    if not 0 <= begin < end <= size or begin % unit or (end % unit and end != size):
        raise InputError(
            f"{name}: {what} {begin} to {end} of {size}, wanted multiples of {unit} in order"
        )
