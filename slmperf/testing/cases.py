"""What an op is run on. A case is one call, complete: tensors, settings, what it costs.

Adding an op: a subclass of `Case`, and one line in `FAMILIES`. The axes of a family are crossed
for the full battery and for the GPU, sampled pairwise for every day, and cut to small shapes for
the interpreter.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from slmperf.ops import JSD, ForwardKL, ReverseKL, divergence, divergence_reference
from slmperf.ops.divergence import Kind, operator_arguments
from slmperf.testing.pairwise import Axes, cross, pairwise

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case(ABC):
    """One call of one op. Subclasses add their parameters as fields; the name comes from them."""

    op: ClassVar[str]
    differentiable: ClassVar[tuple[str, ...]]  # the tensors that receive a gradient
    row_axis: ClassVar[dict[str, int]]  # tensor name -> the dimension that counts rows

    dtype: torch.dtype

    def __str__(self) -> str:
        parts = (getattr(self, field.name) for field in fields(self))
        return "-".join(str(part).removeprefix("torch.").replace(" ", "") for part in parts)

    def generator(self, device: str = "cpu") -> torch.Generator:
        """Random numbers of the device, which depend on the case alone."""
        return torch.Generator(device).manual_seed(zlib.crc32(str(self).encode()))

    @abstractmethod
    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The inputs, contiguous, the same on every call."""

    @abstractmethod
    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """The public function."""

    @abstractmethod
    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """The reference, in the dtype of the tensors."""

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
    @abstractmethod
    def bytes(self) -> int:
        """Least traffic of forward and backward: each reads its inputs once and writes once."""

    @property
    def flops(self) -> int:
        """Operations of the matrix products, forward and backward; 0 where there are none."""
        return 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """What a bench line prints."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """What else a bench line prints: the settings that change the work."""


def random_logits(
    maker: str, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in fp32 that a wrong softmax does not survive.

    apart     independent, standard deviation 3
    close     a student 0.01 away from its teacher: values near 0, differences of near-equal numbers
    offset    logits around 30, and a few outliers 12 above the rest, at other places per model
    rising    sorted, so that the largest logit so far changes in every block
    peaked    standard deviation 60, so that most probabilities underflow, and two that rival
    alike     rows that share one large component: a mistaken row index shows less than usual
    masked    minus infinity in both models over whole blocks and here and there
    """
    rows, vocabulary = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device)

    def somewhere(share: float) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device) < share

    student, teacher = 3 * normal(*shape), 3 * normal(*shape)
    if maker == "close":
        student = teacher + 0.01 * normal(*shape)
    elif maker == "offset":
        student, teacher = (x + 30 + 12 * somewhere(2 / vocabulary) for x in (student, teacher))
    elif maker == "rising":
        student, teacher = student.sort(dim=1).values, teacher.sort(dim=1).values
        student = student + 0.5 * normal(*shape)
    elif maker == "peaked":
        student, teacher = 20 * student, 20 * teacher
        for logits in (student, teacher):
            top = logits.max(dim=1, keepdim=True).values
            logits[:, :2] = top + normal(rows, 2)[:, : logits.shape[1]]
    elif maker == "alike":
        shared = 5 * normal(1, vocabulary)
        student, teacher = shared + 0.3 * student, shared + 0.3 * teacher
    elif maker == "masked":
        gone = somewhere(0.2)
        gone[:, : vocabulary // 2] |= torch.arange(rows, device=gone.device)[:, None] % 2 == 0
        gone[:, -1] = False  # a row that allows nothing is no distribution
        student, teacher = (x.masked_fill(gone, -torch.inf) for x in (student, teacher))
    return student, teacher


@dataclass(frozen=True)
class DivergenceCase(Case):
    """divergence on (T, V) logits."""

    op: ClassVar[str] = "divergence"
    differentiable: ClassVar[tuple[str, ...]] = ("student",)
    row_axis: ClassVar[dict[str, int]] = {"student": 0, "teacher": 0}

    rows: int
    vocabulary: int
    kind: Kind
    temperature: float
    maker: str

    @property
    def shape(self) -> tuple[int, int]:
        """(T, V)."""
        return self.rows, self.vocabulary

    @property
    def setting(self) -> str:
        """The kind."""
        return str(self.kind)

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """Student and teacher logits."""
        student, teacher = random_logits(self.maker, self.shape, self.generator(device))
        return {"student": student.to(self.dtype), "teacher": teacher.to(self.dtype)}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.divergence."""
        return divergence(**tensors, kind=self.kind, temperature=self.temperature, impl=impl)

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """slmperf.ops.divergence_reference."""
        return divergence_reference(**tensors, kind=self.kind, temperature=self.temperature)

    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.divergence.<impl>."""
        arguments = operator_arguments(self.kind, self.temperature)
        op = getattr(torch.ops.slmperf.divergence, impl)
        return op, (tensors["student"], tensors["teacher"], *arguments)

    def rivals(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """torch's own kl_div, which has fewer passes than the reference."""
        if isinstance(self.kind, JSD):
            return {}
        names = ("student", "teacher") if self.kind == ForwardKL() else ("teacher", "student")

        def kl_div(tensors: dict[str, Tensor]) -> Tensor:
            logits = (tensors[name].float() / self.temperature for name in names)
            log_b, log_a = (torch.log_softmax(x, dim=-1) for x in logits)
            terms = torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True)
            return terms.sum(dim=-1)

        return {"kl_div": kl_div}

    @property
    def reduction(self) -> int:
        """V."""
        return self.vocabulary

    @property
    def bytes(self) -> int:
        """Forward reads both logits, backward reads both and writes one."""
        return 5 * self.rows * self.vocabulary * self.dtype.itemsize


@dataclass(frozen=True)
class Family:
    """All cases of an op: how one is made, and the values that its parameters take where."""

    make: Callable[..., Case]
    axes: Axes  # native kernels and GPUs
    small: Axes  # in place of the same names, for the interpreter: under 100 tiles a case
    checked: tuple[Case, ...]  # what the battery's other checks run on, interpreted or not
    compiled: tuple[Case, ...]  # what offline compilation launches: every config and specialisation
    bench: Mapping[str, tuple[Case, ...]]  # device type -> what the bench times there

    def every(self, small: bool = False) -> list[Case]:
        """The full cross."""
        return [self.make(**row) for row in cross(self._axes(small))]

    def sample(self, seed: int, small: bool = False) -> list[Case]:
        """A few cases in which any two values of two parameters meet."""
        return [self.make(**row) for row in pairwise(self._axes(small), seed)]

    def _axes(self, small: bool) -> Axes:
        return {**self.axes, **self.small} if small else self.axes


def _divergence(
    shape: tuple[int, int], dtype: torch.dtype, kind: Kind, temperature: float, maker: str
) -> DivergenceCase:
    return DivergenceCase(dtype, *shape, kind, temperature, maker)


def _bench(rows: int, vocabulary: int, kind: Kind, dtype: torch.dtype) -> DivergenceCase:
    return _divergence((rows, vocabulary), dtype, kind, 1.0, "apart")


EVEN_ODD = (140000, 140001)

FAMILIES = {
    "divergence": Family(
        make=_divergence,
        axes={
            "dtype": (FP32, BF16, FP16),
            # one entry, less than a vector, one vector and one block exactly, odd, several blocks;
            # rows enough that the twin's largest error is no matter of luck
            "shape": ((1, 1), (29, 5), (16, 16), (24, 1024), (24, 1025), (19, 777), (33, 3001)),
            "kind": (ForwardKL(), ReverseKL(), JSD(0.5), JSD(0.05)),
            "temperature": (1.0, 0.35, 4.0),
            "maker": ("apart", "close", "offset", "rising", "peaked", "alike", "masked"),
        },
        small={
            "shape": ((1, 1), (9, 5), (8, 64), (6, 257)),
            "temperature": (1.0, 0.35),
        },
        checked=(
            _divergence((3, 131), BF16, ForwardKL(), 0.7, "masked"),
            _divergence((3, 131), FP16, ReverseKL(), 1.0, "apart"),
            _divergence((3, 131), FP32, JSD(0.3), 2.0, "rising"),
        ),
        compiled=tuple(
            _divergence((3, vocabulary), dtype, kind, 1.0, "apart")
            # rows that start on 16 bytes, and rows that do not
            for dtype, vocabularies in ((FP32, EVEN_ODD), (BF16, EVEN_ODD), (FP16, EVEN_ODD[1:]))
            for vocabulary in vocabularies
            for kind in (ForwardKL(), ReverseKL(), JSD(0.5))
        ),
        bench={
            "cuda": (
                _bench(4096, 128256, ForwardKL(), BF16),
                _bench(4096, 128256, ReverseKL(), BF16),
                _bench(4096, 128256, JSD(0.5), BF16),
                _bench(4096, 32000, ForwardKL(), FP32),
                _bench(64, 128256, ForwardKL(), BF16),
            ),
            "cpu": (
                _bench(512, 32000, ForwardKL(), FP32),
                # fewer rows: with compilation, all of them take less than two minutes on two cores
                _bench(128, 32000, ReverseKL(), FP32),
                _bench(128, 32000, JSD(0.5), FP32),
                _bench(128, 32000, ForwardKL(), BF16),
                _bench(1024, 2048, ForwardKL(), FP32),
            ),
        },
    ),
}
