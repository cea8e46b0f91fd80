"""What a token weighs in the loss: its share as an answer, and as part of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.check import InputError


def answer_weights(
    row: Tensor,
    answer: Tensor,
    *,
    answer_weight: float = 0.95,
    sequence_weight: float = 0.05,
) -> Tensor:
    """Weights of T tokens as targets, so that each answered row weighs the same, long or short.

    row     (T,) integers, which row (example) a token belongs to; below 0: to none
    answer  (T,) bool, which tokens are its answer

    Returns (T,) fp32. The answer tokens of a row share `answer_weight`, all its tokens, answers
    included, share `sequence_weight`; a row without an answer is only shown, and weighs nothing.
    Tokens of several sequences may follow each other if no two of their rows have one number. The
    logits of position t - 1 predict token t: shift by one for kd_loss's token_weight. 0.95 and
    0.05 are of arXiv 2502.14305, section 3.
    """
    if row.dim() != 1 or row.shape != answer.shape or answer.dtype != torch.bool:
        raise InputError(
            f"answer_weights: row is {tuple(row.shape)} and answer {tuple(answer.shape)} "
            f"{answer.dtype}, expected (T,) and (T,) torch.bool"
        )
    if row.is_floating_point():
        raise InputError(f"answer_weights: row is {row.dtype}, expected integers")
    rows = row.long() + 1  # 0: none
    marked = answer & (rows > 0)
    answers = torch.bincount(rows[marked], minlength=int(rows.amax()) + 1 if len(rows) else 1)
    example = (rows > 0) & (answers[rows] > 0)
    tokens = torch.bincount(rows[example], minlength=len(answers))
    weights = torch.zeros(len(rows), dtype=torch.float64, device=row.device)
    weights[example] = sequence_weight / tokens[rows[example]].double()
    weights[marked] += answer_weight / answers[rows[marked]].double()
    return weights.float()
