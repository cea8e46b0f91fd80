"""Grids that weights are rounded to: which values there are, what shares a scale, and rounding to
the nearest.

    integers     W ~ (code - zero_point) * scale, code in [-2^(b-1), 2^(b-1) - 1]
    fp8 (e4m3)   W ~ code * scale, |code| <= 448

Scales are as compressed-tensors computes them: max |W| / ((2^b - 1) / 2) where 0 is code 0, and
(max - min) / (2^b - 1) with 0 between min and max where it has a code of its own, the zero point.
A scale is rounded to the dtype it is stored in before codes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError

BITS = (2, 3, 4, 8)


class Scales(NamedTuple):
    """What a weight's codes are multiplied by, and the code that stands for 0."""

    scale: Tensor  # see WeightSpec.scale_shape, floating
    zero_point: Tensor | None  # the same shape, int8; None: 0 everywhere


@dataclass(frozen=True)
class WeightSpec:
    """A grid for a weight (out, in).

    kind        "int", or "float": fp8 e4m3
    bits        2, 3, 4 or 8; 8 where kind is "float"
    symmetric   no zero points; always so where kind is "float"
    group_size  neighbouring inputs of one output that share a scale; -1: all of them, one scale per
                output channel; None: one scale for the whole weight
    block       (outputs, inputs) that share a scale, instead of a group_size
    """

    kind: Literal["int", "float"] = "int"
    bits: int = 8
    symmetric: bool = True
    group_size: int | None = -1
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a grid that does not exist."""
        if self.kind not in ("int", "float"):
            raise InputError(f"kind: wanted 'int' or 'float', found {self.kind!r}")
        if self.bits not in BITS or (self.kind == "float" and self.bits != 8):
            wanted = "2, 3, 4 or 8" if self.kind == "int" else "8"
            raise InputError(f"bits: wanted {wanted}, found {self.bits!r}")
        if self.kind == "float" and not self.symmetric:
            raise InputError("symmetric: wanted True of a float grid, found False")
        size = self.group_size
        if size is not None and not (size == -1 or size >= 1):
            raise InputError(f"group_size: wanted a number >= 1, -1 or None, found {size!r}")
        if self.block is not None and (
            len(self.block) != 2 or min(self.block) < 1 or size != -1 or not self.symmetric
        ):
            raise InputError(
                "block: wanted (outputs, inputs) >= 1, symmetric and without a group_size, "
                f"found {self}"
            )

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of codes: int8, also for fewer bits, or float8_e4m3fn."""
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    @property
    def lowest(self) -> float:
        """The smallest code."""
        return -float(2 ** (self.bits - 1)) if self.kind == "int" else -448.0

    @property
    def highest(self) -> float:
        """The largest code."""
        return float(2 ** (self.bits - 1) - 1) if self.kind == "int" else 448.0

    @property
    def by_row(self) -> bool:
        """Whether no two outputs share a scale."""
        return self.block is None and self.group_size is not None

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale, of a weight with so many; the last group may have fewer."""
        if self.block is not None:
            return min(self.block[1], inputs)
        return inputs if self.group_size in (-1, None) else int(self.group_size or 0)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight (out, in): (out, groups), (1, 1), or a block's rows and
        columns. InputError where group_size does not divide the inputs."""
        outputs, inputs = shape
        if self.block is not None:
            return -(-outputs // self.block[0]), -(-inputs // self.block[1])
        if self.group_size is None:
            return 1, 1
        group = self.group_of(inputs)
        if inputs % group:
            raise InputError(f"group_size {group} does not divide {inputs} inputs")
        return outputs, inputs // group

    def spread(self, values: Tensor, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
        """Scales or zero points, one per entry of a weight `shape` (out, in), or of these rows of
        it; a view where all of a row share one."""
        outputs, inputs = shape
        if rows is None:
            rows = torch.arange(outputs, device=values.device)
        if self.block is not None:
            rows = rows // self.block[0]
        values = values[rows] if len(values) > 1 else values.expand(len(rows), -1)
        if values.shape[1] > 1:
            values = values.repeat_interleave(self.group_of(inputs), dim=1)[:, :inputs]
        return values.expand(-1, inputs)

    def scales(
        self, weight: Tensor, dtype: torch.dtype | None = None, *, shrink: float = 1.0
    ) -> Scales:
        """Scales that reach the largest values of `weight` (out, in), floating and finite.

        dtype: of the scales; None: the weight's. A group of zeros gets the dtype's epsilon.
        shrink: the share of the range that is reached; what lies beyond is clamped.
        Raises InputError for a group_size that does not divide, and where dtype overflows.
        """
        dtype = dtype or weight.dtype
        high, low = (shrink * one for one in self._extremes(weight.detach().float()))
        if self.symmetric:
            top = (self.highest - self.lowest) / 2 if self.kind == "int" else self.highest
            scale = torch.maximum(high, -low) / top
        else:
            high, low = high.clamp(min=0.0), low.clamp(max=0.0)
            scale = (high - low) / (self.highest - self.lowest)
        scale = stored(scale, dtype)
        zero_point = None
        if not self.symmetric:
            zero = self.lowest - low / scale.float()
            zero_point = zero.clamp(self.lowest, self.highest).round().to(torch.int8)
        return Scales(scale, zero_point)

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """The nearest codes (out, in): int8 or float8_e4m3fn; casts saturate."""
        scale, zero_point = self._beside(weight, scales, torch.float32)
        ratio = weight.detach().float().reshape(self._parted(weight)) / scale
        if self.kind == "int":
            ratio.round_()
        if zero_point is not None:
            ratio += zero_point
        return ratio.clamp_(self.lowest, self.highest).to(self.code_dtype).view(weight.shape)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """(codes - zero_point) * scale, (out, in) in the scale's dtype, as readers compute it."""
        scale, zero_point = self._beside(codes, scales, scales.scale.dtype)
        values = codes.reshape(self._parted(codes)).to(scale.dtype)
        if zero_point is not None:
            values -= zero_point
        return values.mul_(scale).view(codes.shape)

    def _parted(self, weight: Tensor) -> tuple[int, ...]:
        """A weight's shape, (out, groups, inputs of a group) where rows have their own scales."""
        rows, groups = self.scale_shape((weight.shape[0], weight.shape[1]))
        return (rows, groups, weight.shape[1] // groups) if self.by_row else tuple(weight.shape)

    def _beside(
        self, weight: Tensor, scales: Scales, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points in dtype, in shapes that go with `_parted`."""

        def beside(values: Tensor) -> Tensor:
            if self.by_row:
                return values.to(dtype)[..., None]
            return self.spread(values.to(dtype), (weight.shape[0], weight.shape[1]))

        zero_point = scales.zero_point
        return beside(scales.scale), None if zero_point is None else beside(zero_point)

    def _extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Largest and smallest values of what shares a scale."""
        rows, groups = self.scale_shape((weight.shape[0], weight.shape[1]))
        if self.by_row:
            parts = weight.reshape(rows, groups, -1)
            return parts.amax(2), parts.amin(2)
        if self.block is None:
            return weight.amax().view(1, 1), weight.amin().view(1, 1)
        down, across = self.block
        padded = torch.nn.functional.pad(
            weight, (0, groups * across - weight.shape[1], 0, rows * down - weight.shape[0])
        )  # zeros: max |W| is all that is asked of a block
        parts = padded.view(rows, down, groups, across)
        return parts.amax((1, 3)), parts.amin((1, 3))


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` >= 0 in the dtype that it is stored in; 0, also by underflow, becomes its epsilon.

    Raises InputError where it overflows.
    """
    rounded = scale.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        found = float(scale.max())
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"scale: wanted at most {torch.finfo(dtype).max:.6g} in {name}, found {found:.6g}"
        )
    return torch.where(rounded == 0, torch.finfo(dtype).eps, rounded)


@dataclass(frozen=True)
class Int4(WeightSpec):
    """Four bits, groups of 128 inputs."""

    bits: int = 4
    group_size: int | None = 128


@dataclass(frozen=True)
class Int8(WeightSpec):
    """Eight bits, one scale per output channel."""


@dataclass(frozen=True)
class Fp8(WeightSpec):
    """fp8 e4m3, one scale per output channel."""

    kind: Literal["int", "float"] = "float"
