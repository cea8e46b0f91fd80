"""What several kernels share: the machine as a launcher sees it, fp8 on GPUs that do not have it,
steps of an online softmax, and loads of rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from slmperf import arch

Config = TypeVar("Config")

# Where a maximum starts: a finite number, so that no difference of maxima is inf - inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = 1.4426950408889634


class Machine(NamedTuple):
    """What a launcher chooses by: 80 for an A100, 90 for an H100 or H200; multiprocessors."""

    capability: int
    processors: int


def machine(tensor: torch.Tensor) -> Machine:
    """The tensor's device. A CPU tensor, which the interpreter runs, is capability 0."""
    if tensor.device.type != "cuda":
        return Machine(0, 2)  # two processors, so that the interpreter sees split rows
    major, minor = arch.cuda_capability(tensor.device.index) or (0, 0)
    properties = torch.cuda.get_device_properties(tensor.device)
    return Machine(10 * major + minor, properties.multi_processor_count)


def configured(table: Mapping[tuple[int, int], Config], tensor: torch.Tensor) -> Config:
    """Entry of a (capability, bytes per element) table: the newest that is not above the device."""
    here = machine(tensor).capability
    known = max(capability for capability, _ in table if capability <= here)
    return table[known, tensor.element_size()]


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    return machine(tensor).processors


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@triton.jit
def e4m3(code):
    """fp8 e4m3 of bytes, in fp16, by arithmetic: an A100 has no such type. The same bits, seven
    places on, are an fp16 number 2^8 times too small, for its exponents begin 8 lower."""
    code = code.to(tl.int16)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def keep_where(weight, value):
    """Value, but 0 where the weight is: 0 log 0 = 0, and 0 times an infinity as well."""
    return tl.where(weight == 0.0, 0.0, value)


@triton.jit
def wide_sum(x):
    """Sum over all lanes in fp64: once per program it costs nothing, and nothing is lost in it."""
    return tl.sum(x.to(tl.float64))


@triton.jit
def moved_cross(cross, total, factor, shift):
    """Sum of w x after every x moved by `shift` and every w shrank by `factor`; total is sum w.

    A factor of 0 leaves nothing, of an infinite sum either: a weight that underflows counts as 0.
    """
    return tl.where(factor == 0.0, 0.0, factor * (cross + shift * total))


@triton.jit
def moved_gap(gap, total, left_factor, right_factor):
    """Sum of left less right weights after each shrank by its factor; total is the right sum."""
    return left_factor * gap + (left_factor - right_factor) * total


@triton.jit
def log1p(x):
    """log(1 + x), accurate near 0: what rounding 1 + x loses adds itself to the logarithm."""
    total = 1.0 + x
    return tl.log(total) + (x - (total - 1.0))


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, accurate where it is near 0: the Taylor series to x^7 above -1/2."""
    y = 1.0 / 5040.0
    y = y * x + 1.0 / 720.0
    y = y * x + 1.0 / 120.0
    y = y * x + 1.0 / 24.0
    y = y * x + 1.0 / 6.0
    y = y * x + 0.5
    y = y * x + 1.0
    return tl.where(x > -0.5, y * x, tl.exp(x) - 1.0)


@triton.jit
def softcapped(x, cap):
    """cap tanh(x / cap), accurate near 0: tanh |y| = -e / (2 + e) with e = expm1(-2 |y|)."""
    less = expm1_negative(-2.0 * tl.abs(x / cap))
    size = cap * (-less / (2.0 + less))
    return tl.where(x < 0.0, -size, size)


@triton.jit
def load_rows(ptr, row, stride, column, inside):
    """(rows, columns) numbers in fp32, 0 where they are not inside; rows are `stride` apart."""
    at = row[:, None] * stride + column[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
