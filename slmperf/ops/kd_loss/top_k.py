"""A chunk under a top-k teacher: k + 1 outcomes, the k tokens and all the others together.

The k logits are taken out of the student's rows (minus infinity stands in for them), so that what
the rows' statistics say is said of the others: log sum exp over them is the logit of the outcome
"another", exactly, where 1 less the sum of k probabilities would cancel. The divergence and its
gradient are then those of (C, k + 1) logits, by the same kernels as every other; the gradient of
"another" falls on the others in proportion to their probability.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.kd_loss.loss import Call
from slmperf.ops.kd_loss.rows import Rows, Shards, statistics_of


class TopK:
    """One chunk: `values`, then `gradient`. Changes the student's logits."""

    def __init__(
        self,
        phases: Any,
        call: Call,
        rows: Rows,
        shards: Shards,
        student: Tensor,
        begin: int,
        end: int,
    ) -> None:
        self.phases, self.call, self.shards, self.student = phases, call, shards, student
        assert call.indices is not None and call.log_probs is not None
        indices = rows.of(call.indices, begin, end)
        if indices.device.type == "cpu":
            self._check(indices)
        self.log_probs = rows.cleared(call.log_probs, begin, end).double()
        place, vocabulary = shards.local(indices), student.shape[1]
        self.own = (place >= 0) & (place < vocabulary)  # the others are other ranks'
        self.place = place.clamp(0, vocabulary - 1)
        self.logits = self._taken(self.place, self.own)

    def _check(self, indices: Tensor) -> None:
        """InputError for ids that are no tokens, or come twice in a row."""
        lost = self.shards.lost(indices)
        if lost.any():
            raise InputError(
                f"kd_loss: TeacherTopK.indices holds {int(indices[lost][0])}, expected 0 to "
                f"{int(self.shards.total) - 1}"
            )
        ordered = indices.sort(dim=1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        if twice.any():
            raise InputError(
                f"kd_loss: TeacherTopK.indices holds {int(ordered[:, 1:][twice][0])} twice in a "
                "row, expected different tokens"
            )

    def _taken(self, place: Tensor, own: Tensor) -> Tensor:
        """Logits (C, k) fp32 at places of this rank, from whichever rank has them."""
        found = self.student.gather(1, place).float().masked_fill(~own, -torch.inf)
        return self.shards.largest(found)

    def values(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Divergence and cross entropy (C,); labels as of the phases, None without the latter."""
        call, phases, student, temperature = (
            self.call,
            self.phases,
            self.student,
            self.call.temperature,
        )
        if labels is not None:
            here = (labels >= 0) & (labels < student.shape[1])
            place = labels.clamp(0, student.shape[1] - 1)
            label_logit = self._taken(place[:, None], here[:, None])[:, 0]
        # amin, not a plain scatter: places of other ranks fall on columns that others may own.
        gone = torch.full_like(self.logits, torch.inf, dtype=student.dtype)
        gone = gone.masked_fill(self.own, -torch.inf)
        student.scatter_reduce_(1, self.place, gone, "amin")
        _, _, self.others = statistics_of(
            phases, call, self.shards, student, None, None, labels, "none", temperature
        )
        most = self.others[:, 0].double()
        top = torch.maximum(most, self.logits.amax(dim=1).double())[:, None]
        inside = self.logits.double() - top
        outside = (most[:, None] - top) / temperature + self.others[:, 1:2]
        self.outcomes = torch.cat([inside / temperature, outside], dim=1).float()
        # Where there are no others, their log-sum of minus infinity would make 0 / 0 of each.
        self.others[:, 1].masked_fill_(self.others[:, 1].isneginf(), 0.0)
        self.given, self.mass = self._teacher()
        divergence, _, self.statistics = statistics_of(
            phases, call, None, self.outcomes, self.given, None, None, call.kind, 1.0
        )
        if self.mass is not None:  # sum s p (log s p - log q) = s (KL + log s)
            divergence = self.mass * (divergence + self.mass.log())
        if labels is None:
            return divergence, torch.zeros_like(divergence)
        outside_1 = most + self.others[:, 6].double()
        self.log_sum_1 = torch.logaddexp(outside_1, self.logits.double().logsumexp(dim=1))
        return divergence, (self.log_sum_1 - label_logit).float()

    def _teacher(self) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the outcomes (C, k + 1) fp32, and with "zero" what they sum to."""
        log_p, tail = self.log_probs, self.call.tail
        log_mass = log_p.logsumexp(dim=1, keepdim=True)
        another = torch.full_like(log_mass, -torch.inf)
        if tail == "bucket":
            another = torch.log(-torch.expm1(log_mass.clamp(max=0.0)))
            # Of a whole vocabulary nothing is left; 1 less its sum is rounding.
            whole = self.shards.total == log_p.shape[1]
            if isinstance(whole, Tensor):
                another = another.masked_fill(whole, -torch.inf)
            elif whole:
                another = torch.full_like(another, -torch.inf)
        scale = self.call.temperature if tail == "renormalise" else 1.0
        outcomes = torch.cat([(log_p - log_mass * (tail != "bucket")) / scale, another], dim=1)
        mass = log_mass.exp().float()[:, 0] if tail == "zero" else None
        return outcomes.float(), mass

    def gradient(
        self,
        labels: Tensor | None,
        divergence_scale: Tensor,
        label_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """out (C, V): the gradient of the logits; scales (C,) as of the phases."""
        call, phases, student = self.call, self.phases, self.student
        if self.mass is not None:
            divergence_scale = divergence_scale * self.mass
        of_outcomes = torch.empty_like(self.outcomes)
        phases.gradient(
            self.outcomes, self.given, None, self.statistics, None, divergence_scale, None,
            call.kind, call.mixture, 1.0, 0.0, of_outcomes,
        )  # fmt: skip
        found = of_outcomes[:, :-1] / call.temperature
        if labels is not None and label_scale is not None:
            asked = self.own & (self.place == labels[:, None])
            found = found + label_scale[:, None] * (
                torch.exp(self.logits - self.log_sum_1[:, None]).float() - asked.float()
            )
            labels = labels.masked_fill(asked.any(dim=1), -1)
            self.others[:, 6] = (self.log_sum_1 - self.others[:, 0]).float()
        if call.softcap:
            found = found * (1.0 - (self.logits / call.softcap) ** 2)
        phases.gradient(
            student, None, None, self.others, labels, of_outcomes[:, -1].contiguous(), label_scale,
            "none", 0.0, call.temperature, call.softcap, out,
        )  # fmt: skip
        found = torch.where(self.own & (self.logits != -torch.inf), found, 0.0)
        out.scatter_add_(1, self.place, found.to(out.dtype))
