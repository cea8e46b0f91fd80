"""What an op is run on: one family of cases per op, in `FAMILIES`.

Adding an op: a subclass of `Case`, and one line in `FAMILIES`. The axes of a family are crossed
for the full battery and for the GPU, sampled pairwise for every day, and cut to small shapes for
the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence,
    divergence_reference,
)
from slmperf.ops.divergence import Kind, code_of
from slmperf.testing.case import BF16, FP16, FP32, Case, Family, named
from slmperf.testing.glue_cases import GLUE
from slmperf.testing.kd_family import FAMILY as KD_LOSS
from slmperf.testing.linear_cases import LINEAR


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


def _without_ties(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A student whose probabilities are nowhere its teacher's but for rounding.

    There the sign of q - p, on which the gradient of the total variation depends, says nothing.
    """
    student = student.clone()
    for _ in range(4):  # what one row loses shifts its other probabilities a little
        both = (x.double() / temperature for x in (student, teacher))
        log_q, log_p = (torch.log_softmax(x, dim=1) for x in both)
        near = ((log_q - log_p).abs() < 1e-5) & (log_q.exp() < 1.0)
        student = torch.where(near, student - student.abs() / 16 - 1, student)
    return student


@dataclass(frozen=True)
class DivergenceCase(Case):
    """divergence on (T, V) logits."""

    op: ClassVar[str] = "divergence"
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
        return named(self.kind)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The student's logits."""
        return ("student",)

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """Student and teacher logits."""
        logits = random_logits(self.maker, self.shape, self.generator(device))
        student, teacher = (x.to(self.dtype) for x in logits)
        if self.kind == TotalVariation():
            student = _without_ties(student, teacher, self.temperature)
        return {"student": student, "teacher": teacher}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.divergence."""
        return divergence(**tensors, kind=self.kind, temperature=self.temperature, impl=impl)

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """slmperf.ops.divergence_reference."""
        return divergence_reference(**tensors, kind=self.kind, temperature=self.temperature)

    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.divergence.<impl>."""
        op = getattr(torch.ops.slmperf.divergence, impl)
        return op, (tensors["student"], tensors["teacher"], *code_of(self.kind), self.temperature)

    def rivals(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """torch's own kl_div, which has fewer passes than the reference."""
        if self.kind not in (ForwardKL(), ReverseKL()):
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


def _divergence(
    shape: tuple[int, int], dtype: torch.dtype, kind: Kind, temperature: float, maker: str
) -> DivergenceCase:
    return DivergenceCase(dtype, *shape, kind, temperature, maker)


def _bench(rows: int, vocabulary: int, kind: Kind, dtype: torch.dtype) -> DivergenceCase:
    return _divergence((rows, vocabulary), dtype, kind, 1.0, "apart")


EVEN_ODD = (140000, 140001)
_EVERY_KIND = (
    ForwardKL(), ReverseKL(), JSD(0.5), SkewForwardKL(), SkewReverseKL(), TotalVariation(),
)  # fmt: skip

FAMILIES = {
    "divergence": Family(
        make=_divergence,
        axes={
            "dtype": (FP32, BF16, FP16),
            # one entry, less than a vector, one vector and one block exactly, odd, several blocks;
            # rows enough that the twin's largest error is no matter of luck
            "shape": ((1, 1), (29, 5), (16, 16), (24, 1024), (24, 1025), (19, 777), (33, 3001)),
            "kind": (
                ForwardKL(),
                ReverseKL(),
                JSD(0.5),
                JSD(0.05),
                SkewForwardKL(0.1),
                SkewReverseKL(0.3),
                TotalVariation(),
            ),
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
            _divergence((3, 131), FP32, SkewReverseKL(0.2), 0.7, "masked"),
        ),
        compiled=tuple(
            _divergence((3, vocabulary), dtype, kind, 1.0, "apart")
            # rows that start on 16 bytes, and rows that do not
            for dtype, vocabularies in ((FP32, EVEN_ODD), (BF16, EVEN_ODD), (FP16, EVEN_ODD[1:]))
            for vocabulary in vocabularies
            for kind in (
                (ForwardKL(), ReverseKL(), JSD(0.5))
                if (dtype, vocabulary) != (BF16, EVEN_ODD[0])
                else _EVERY_KIND
            )
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
    "kd_loss": KD_LOSS,
    **LINEAR,
    **GLUE,
}
