"""The loss of a batch: both models up to their logits, and what each token weighs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from slmperf.distill.config import DistillationConfig
from slmperf.distill.heads import same_vocabulary, student_head
from slmperf.distill.loss import DistillationLoss
from slmperf.distill.packing import Batch, inputs_of
from slmperf.distill.teachers import Teacher
from slmperf.ops import KDLoss


def batch_loss(
    model: torch.nn.Module,
    teacher: Teacher | None,
    batch: Batch,
    config: DistillationConfig,
    totals: Tensor | None = None,
) -> KDLoss:
    """The share of a batch of PackedBatches in the loss of a step with such totals (2,); None: its
    own. Layers and head run in bf16 where the configuration says so, the loss in fp32.
    """
    targets = batch.get("targets")
    kd_weight, ce_weight = (0.0, 1.0) if teacher is None else (config.kd_weight, config.ce_weight)
    ce_weight = 0.0 if targets is None else ce_weight
    whole = kd_weight + ce_weight
    loss = DistillationLoss(
        config.kind, cross_entropy=ce_weight / whole, temperature=config.temperature
    )
    device, given = batch["input_ids"].device, None
    # The teacher first, under an autocast of its own: what it takes on its way, casts of its
    # weights among them, is gone before the student's activations.
    if teacher is not None and loss.needs_teacher:
        with autocast(config, device):
            given = teacher.rows(batch)
    with autocast(config, device):
        student = student_head(model, inputs_of(batch), positions=batch["positions"])
    if teacher is not None and given is not None:
        student, given = same_vocabulary(student, given, teacher.vocabulary)
    weight = token_weights(batch, config, totals)
    weight = weight if whole == 1.0 else weight * whole
    return loss(student, given, labels=targets, token_weight=weight, normalizer=1.0)


def token_weights(batch: Batch, config: DistillationConfig, totals: Tensor | None = None) -> Tensor:
    """(n,) fp32, what the loss of each target weighs in a step with such totals (2,); None: the
    batch's own.
    """
    totals = (batch["totals"] if totals is None else totals).clamp(min=1)
    answers = batch["answer_share"] * (config.answer_weight / totals[0])
    return answers + batch["sequence_share"] * (config.sequence_weight / totals[1])


def autocast(config: DistillationConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 for what runs inside, where the configuration says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16)
