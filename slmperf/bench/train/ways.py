"""ways: from models and batch to the loss of problems.py; what others do, as they do it.

eager                  both models' logits of all tokens; log_softmax, softmax, F.kl_div and
                       F.cross_entropy, each by itself, in fp32; masked mean. As it is written
eager, lean            one log_softmax for divergence and cross entropy, log-targets
eager, answers alone   the same on hidden states of the answers alone: rows are compacted
torch.compile          the lean loss compiled, on a GPU
liger-kernel chunked   LigerFusedLinearJSDLoss at beta 0 with its hard loss, as it comes: 1,024 rows
                       a chunk, compiled; logits rounded to the number format
liger-kernel           LigerFusedLinearJSD and LigerFusedLinearCrossEntropyLoss, on a GPU
kd_loss                student_head, teacher_head and DistillationLoss, on the answers alone
kd_loss, every row     the same where every token has a weight, which is next to 0 without answer
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax, softmax

from slmperf.bench.train.problems import (
    CE_WEIGHT,
    DTYPES,
    EAGER,
    IGNORED,
    KD_WEIGHT,
    OURS,
    TRAINER,
    Batch,
    Models,
    Problem,
)
from slmperf.distill import DistillationLoss, student_head, teacher_head

# Of a row without an answer, beside 1: for rounding it is nothing, for a kernel it is a row.
NEXT_TO_NOTHING = 1e-12

Loss = Callable[[Models, Batch], Tensor]


class Way(NamedTuple):
    """One way to the loss.

    role  ours, plain, compiled or rival
    loss  models and batch -> loss (), with a graph; None: slmperf's trainer, which brings its own
    """

    role: str
    loss: Loss | None


def ways_of(problem: Problem) -> dict[str, Way]:
    """All ways to a problem's loss, by name; rivals only where they are installed."""
    found = {EAGER: Way("plain", _eager(problem)), "eager, lean": Way("plain", _lean(problem))}
    if problem.every > 1:
        found["eager, answers alone"] = Way("plain", _answers_alone(problem))
    if problem.device == "cuda":
        found["torch.compile"] = Way("compiled", _compiled(problem))
    if find_spec("liger_kernel"):
        found["liger-kernel chunked"] = Way("rival", _liger_chunked(problem))
        if problem.device == "cuda":
            found["liger-kernel"] = Way("rival", _liger_fused(problem))
    if problem.every > 1:
        found[f"{OURS}, every row"] = Way("ours", _kd_loss(problem, every_row=True))
    found[OURS] = Way("ours", _kd_loss(problem))
    found[TRAINER] = Way("ours", None)
    return found


def autocast(problem: Problem) -> torch.autocast:
    """Around the models where the number format is bf16."""
    return torch.autocast(problem.device, torch.bfloat16, problem.dtype == "bf16")


def _logits(problem: Problem, models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B L, V) of student and teacher, in fp32."""
    with autocast(problem):
        student = models.student(input_ids=batch.input_ids).logits
        with torch.no_grad():
            teacher = models.teacher(input_ids=batch.input_ids).logits
    return student.flatten(0, 1).float(), teacher.flatten(0, 1).float()


def _hidden(problem: Problem, models: Models, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B L, D) of student and teacher, in the number format."""
    with autocast(problem):
        student = models.student.model(input_ids=batch.input_ids).last_hidden_state
        with torch.no_grad():
            teacher = models.teacher.model(input_ids=batch.input_ids).last_hidden_state
    dtype = DTYPES[problem.dtype]
    return student.flatten(0, 1).to(dtype), teacher.flatten(0, 1).to(dtype)


def _heads(problem: Problem, models: Models) -> tuple[Tensor, Tensor]:
    """(V, D) of both, in the number format."""
    dtype = DTYPES[problem.dtype]
    return models.student.lm_head.weight.to(dtype), models.teacher.lm_head.weight.to(dtype)


def _eager(problem: Problem) -> Loss:
    def loss(models: Models, batch: Batch) -> Tensor:
        student, teacher = _logits(problem, models, batch)
        labels = batch.labels.flatten()
        log_q = log_softmax(student, dim=-1)
        kd = kl_div(log_q, softmax(teacher, dim=-1), reduction="none").sum(dim=-1)
        ce = cross_entropy(student, labels, reduction="none", ignore_index=IGNORED)
        mask = labels != IGNORED
        return ((KD_WEIGHT * kd + CE_WEIGHT * ce) * mask).sum() / mask.sum()

    return loss


def lean_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss of (n, V) logits and (n,) labels with as few tensors as plain torch has for it."""
    log_q, mask = log_softmax(student, dim=-1), labels != IGNORED
    log_p = log_softmax(teacher, dim=-1)
    kd = kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    ce = -log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return ((KD_WEIGHT * kd + CE_WEIGHT * ce) * mask).sum() / mask.sum()


def _lean(problem: Problem, loss_of: Callable[..., Tensor] = lean_loss) -> Loss:
    return lambda models, batch: loss_of(*_logits(problem, models, batch), batch.labels.flatten())


def _compiled(problem: Problem) -> Loss:
    return _lean(problem, torch.compile(lean_loss, dynamic=False))


def _answers_alone(problem: Problem) -> Loss:
    def loss(models: Models, batch: Batch) -> Tensor:
        student, teacher = _hidden(problem, models, batch)
        head, teacher_head = _heads(problem, models)
        logits = linear(student[batch.positions], head).float()
        given = linear(teacher[batch.positions], teacher_head).float()
        return lean_loss(logits, given, batch.targets)

    return loss


def _liger_chunked(problem: Problem) -> Loss:
    made: list[Any] = []

    def loss(models: Models, batch: Batch) -> Tensor:
        if not made:  # only then is its package imported
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            made.append(
                LigerFusedLinearJSDLoss(
                    weight_hard_loss=CE_WEIGHT, weight_soft_loss=KD_WEIGHT, beta=0.0
                )
            )
        student, teacher = _hidden(problem, models, batch)
        head, teacher_head = _heads(problem, models)
        return made[0](student, head, teacher, teacher_head, batch.labels.flatten())

    return loss


def _liger_fused(problem: Problem) -> Loss:
    made: list[Any] = []

    def loss(models: Models, batch: Batch) -> Tensor:
        if not made:
            from liger_kernel.transformers import (
                LigerFusedLinearCrossEntropyLoss,
                LigerFusedLinearJSD,
            )

            made.extend((LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()))
        divergence, hard = made
        student, teacher = _hidden(problem, models, batch)
        head, teacher_head = _heads(problem, models)
        labels = batch.labels.flatten()
        kd = divergence(student, head, teacher, teacher_head, labels)
        return KD_WEIGHT * kd + CE_WEIGHT * hard(head, student, labels)

    return loss


def _kd_loss(problem: Problem, every_row: bool = False) -> Loss:
    weigh = DistillationLoss(cross_entropy=CE_WEIGHT / (KD_WEIGHT + CE_WEIGHT))

    def loss(models: Models, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids}
        positions = None if every_row else batch.positions
        with autocast(problem):  # in the order of the trainer
            teacher = teacher_head(models.teacher, inputs, positions=positions)
            student = student_head(models.student, inputs, positions=positions)
        if not every_row:
            return weigh(student, teacher, labels=batch.targets).loss
        labels = batch.labels.flatten()
        weight = torch.where(labels == IGNORED, NEXT_TO_NOTHING, 1.0)
        return weigh(student, teacher, labels=labels.clamp(min=0), token_weight=weight).loss

    return loss
