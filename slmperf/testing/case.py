"""What every op's cases have in common: a case is one call, complete; a family all of an op's."""

from __future__ import annotations

import random
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from slmperf.testing.budget import EPS_FP32
from slmperf.testing.pairwise import Axes, cross, pairwise

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def named(part: object) -> str:
    """A parameter in words; switches that are off are not named."""
    return re.sub(r", \w+=False\b", "", str(part))


class _Caught(TorchFunctionMode):
    """Remembers the operator of an op that is called, and its arguments."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = f"slmperf::{op}"

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if isinstance(function, OpOverload) and function.name().startswith(self.op):
            self.call = function, args
        return function(*args, **(kwargs or {}))


def called(run: Callable[[], object], op: str) -> tuple[Callable, tuple]:
    """The registered operator of an op that a call of its public function ends in, and what it is
    called with."""
    with _Caught(op) as caught:
        run()
    return caught.call


@dataclass(frozen=True)
class Case(ABC):
    """One call of one op. Subclasses add their parameters as fields; the name comes from them."""

    op: ClassVar[str]
    row_axis: ClassVar[dict[str, int]]  # tensor name -> the dimension that counts rows
    # Names of tensors that stay as they are in gold and twin, and in memory: quantised weights.
    fixed: ClassVar[tuple[str, ...]] = ()

    dtype: torch.dtype

    def __str__(self) -> str:
        parts = (getattr(self, field.name) for field in fields(self))
        return "-".join(named(part).removeprefix("torch.").replace(" ", "") for part in parts)

    def generator(self, device: str = "cpu") -> torch.Generator:
        """Random numbers of the device, which depend on the case alone."""
        return torch.Generator(device).manual_seed(zlib.crc32(str(self).encode()))

    @property
    @abstractmethod
    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors that receive a gradient; none: forward alone is run."""

    @abstractmethod
    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The inputs, contiguous, the same on every call."""

    @abstractmethod
    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """The public function: one value per row, or one of all rows."""

    @abstractmethod
    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """The reference, in the dtype of the tensors."""

    def terms(self, tensors: dict[str, Tensor]) -> Tensor | None:
        """Where the value is one number: what it adds up, (T,), by the reference."""
        return None

    @abstractmethod
    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """The registered operator behind `impl` and its arguments, for opcheck."""

    def rivals(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """Other plain-torch ways to the same result, for the bench: name -> function of tensors."""
        return {}

    @property
    @abstractmethod
    def reduction(self) -> int:
        """Number of terms in the longest sum, for the error budget."""

    @property
    def cancellation(self) -> float:
        """Below this no relative error is asked: what fp32 leaves where terms of order 1 cancel."""
        return EPS_FP32**2

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Least traffic of forward and backward: each reads its inputs once and writes once."""

    @property
    def flops(self) -> int:
        """Operations of the matrix products, forward and backward; 0 where there are none."""
        return 0

    @property
    def product_dtype(self) -> torch.dtype:
        """What the matrix products multiply, for the machine's roof."""
        return self.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """What a bench line prints."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """What else a bench line prints: the settings that change the work."""


@dataclass(frozen=True)
class Family:
    """All cases of an op: how one is made, and the values that its parameters take where."""

    make: Callable[..., Case]
    axes: Axes  # native kernels and GPUs
    small: Axes  # in place of the same names, for the interpreter: under 100 tiles a case
    checked: tuple[Case, ...]  # what the battery's other checks run on, interpreted or not
    compiled: tuple[Case, ...]  # what offline compilation launches: every config and specialisation
    bench: Mapping[str, tuple[Case, ...]]  # device type -> what the bench times there
    large: tuple[Case, ...] = ()  # too large to be crossed
    # Where the cross of all axes would be without end: those that are crossed, each combination
    # twice, with values of the others that a fixed sample of these puts together.
    crossed: tuple[str, ...] = ()

    def every(self, small: bool = False) -> list[Case]:
        """The full cross."""
        axes = self._axes(small)
        if not self.crossed:
            return [self.make(**row) for row in cross(axes)]
        others = pairwise({k: v for k, v in axes.items() if k not in self.crossed}, seed=0)
        chance = random.Random(0)
        rows = 2 * cross({name: axes[name] for name in self.crossed})
        return [self.make(**row, **chance.choice(others)) for row in rows]

    def sample(self, seed: int, small: bool = False) -> list[Case]:
        """A few cases in which any two values of two parameters meet."""
        return [self.make(**row) for row in pairwise(self._axes(small), seed)]

    def _axes(self, small: bool) -> Axes:
        return {**self.axes, **self.small} if small else self.axes
