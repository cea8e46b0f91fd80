"""The loss of distillation on logits.

An example is one history row i with its answer tokens A_i and all its tokens S_i (A_i included). A
token t weighs

    w_t = answer_weight / |A_i| * [t in A_i]  +  sequence_weight / |S_i|

and the loss of a step is

    1/N * sum_t w_t * (kd_weight * D(teacher_t, student_t) + ce_weight * CE(student_t, target_t))

with N the number of examples of the step: over all accumulated batches and all ranks, so that
neither how a step is cut into batches nor how examples spread over ranks changes it. Without a
teacher: CE alone, weight 1. The teacher's logits carry no gradient. Weights 0.95 / 0.05 and 0.9 /
0.1, D the forward KL: arXiv 2502.14305, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.distill.config import DistillationConfig
from slmperf.ops import JSD, ForwardKL, ReverseKL, divergence


class LossParts(NamedTuple):
    """Sums over tokens, not yet divided by the number of examples; fp32 scalars."""

    total: Tensor  # what is minimised
    divergence: Tensor  # sum of w * D; 0 without a teacher or with kd_weight 0
    cross_entropy: Tensor  # sum of w * CE; 0 where CE has no weight


@dataclass(frozen=True)
class DistillationLoss:
    """kd_weight * D(teacher, student) + ce_weight * CE(student, target), weighted and summed."""

    kind: ForwardKL | ReverseKL | JSD = ForwardKL()
    kd_weight: float = 0.9
    ce_weight: float = 0.1
    temperature: float = 1.0

    @classmethod
    def of(cls, config: DistillationConfig) -> DistillationLoss:
        return cls(config.divergence, config.kd_weight, config.ce_weight, config.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, weights: Tensor
    ) -> LossParts:
        """Student and teacher logits (T, V), targets (T,) int64, weights (T,) fp32 -> sums over the
        T tokens.
        """
        zero = student.new_zeros((), dtype=torch.float32)
        kd_weight, ce_weight = (0.0, 1.0) if teacher is None else (self.kd_weight, self.ce_weight)
        kd = ce = zero
        if kd_weight:
            kd = (
                divergence(student, teacher, kind=self.kind, temperature=self.temperature) @ weights
            )
        if ce_weight:
            losses = torch.nn.functional.cross_entropy(student.float(), targets, reduction="none")
            ce = losses @ weights
        return LossParts(kd_weight * kd + ce_weight * ce, kd.detach(), ce.detach())
