"""The loss of distillation, from the hidden states of both models (slmperf.ops.kd_loss).

As DistillationTrainer takes it. A token t as a target costs

    l_t = kd_weight * D(teacher_t, student_t) + ce_weight * CE(student_t, target_t)

and without a teacher CE alone. On the student's own text there is no CE: its targets would be what
the student has just drawn. A are the answer tokens of a step, S all tokens of what has answers
(A among them): over all accumulated batches and all ranks, so that neither how a step is cut into
batches nor how examples spread over ranks changes its loss, which is

    tokens     answer_weight / |A| * sum_A l_t  +  sequence_weight / |S| * sum_S l_t
    examples   1/N * sum_i ( answer_weight / |A_i| * sum_{A_i} l_t
                             + sequence_weight / |S_i| * sum_{S_i} l_t )

by `normalization`: over the step's tokens, or the mean of its N examples (rows of a history), each
over its own. The teacher's logits carry no gradient. There are no further terms. Weights 0.95 /
0.05 and 0.9 / 0.1, D the forward KL: arXiv 2502.14305, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops import ForwardKL, KDLoss, StudentHead, kd_loss
from slmperf.ops.divergence import Kind
from slmperf.ops.kd_loss.heads import Teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DistillationLoss(torch.nn.Module):
    """(1 - cross_entropy) * D(teacher, student) + cross_entropy * CE(student, label), per token.

    What stays the same from batch to batch of slmperf.ops.kd_loss, whose arguments these are; the
    heads come from `student_head` and `teacher_head`, which run a language model up to its logits.
    It has no parameters and no state.

        loss = DistillationLoss(ReverseKL(), cross_entropy=0.1, temperature=2.0)
        student = student_head(model, inputs)
        teacher = teacher_head(large_model, inputs)
        loss(student, teacher, labels=next_tokens).loss.backward()
    """

    def __init__(
        self,
        divergence: Kind = ForwardKL(),  # noqa: B008  (frozen)
        *,
        cross_entropy: float = 0.0,
        temperature: float = 1.0,
        tau_squared: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        logits: str = "auto",
        chunk_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(divergence, Kind):
            raise InputError(
                f"DistillationLoss: divergence is {divergence!r}, expected ForwardKL() or another "
                "divergence of slmperf.ops"
            )
        self.settings: dict[str, Any] = {
            "divergence": divergence,
            "cross_entropy": cross_entropy,
            "temperature": temperature,
            "tau_squared": tau_squared,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "logits": logits,
            "chunk_bytes": chunk_bytes,
            "impl": impl,
        }

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher enters: not at cross_entropy 1, where it need not be run."""
        return self.settings["cross_entropy"] < 1.0

    def forward(
        self,
        student: StudentHead,
        teacher: Teacher | None = None,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        rows: Tensor | None = None,
        capacity: int | None = None,
        vocabulary: Sequence[int] | Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> KDLoss:
        """Loss, divergence and cross entropy of one batch; arguments as of slmperf.ops.kd_loss.

        Heads in float64, which no kernel takes, go to its reference.
        """
        settings = self.settings
        if student.hidden.dtype == torch.float64 and settings["impl"] == "auto":
            settings = {**settings, "impl": "reference"}
        return kd_loss(
            student,
            teacher,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
            rows=rows,
            capacity=capacity,
            vocabulary=vocabulary,
            group=group,
            **settings,
        )

    def extra_repr(self) -> str:
        """The divergence, and the settings that are not as they are by themselves."""
        plain = DistillationLoss().settings
        changed = [
            f"{name}={value!r}"
            for name, value in self.settings.items()
            if name != "divergence" and value != plain[name]
        ]
        return ", ".join([repr(self.settings["divergence"]), *changed])
