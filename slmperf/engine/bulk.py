"""bulk: the candidates of many members at once, for an evaluation.

Each member is one row (engine.layout), rows of similar length share a batch, and a batch runs once
through the model. Equal to Engine.score up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from slmperf.check import InputError
from slmperf.engine.layout import (
    PADDING,
    AnswerHead,
    Row,
    attention_mask,
    check_lengths,
    check_model,
    decoder,
    pack,
    visible,
)

if TYPE_CHECKING:
    from slmperf.data import RankingPrompt

# A member with many candidates is cut into rows of about this length (or twice the prefix, if
# longer): candidates cannot see each other, so a longer row only adds masked attention.
ROW_TOKENS = 768

# A CPU is fastest while the activations of a batch stay in its caches (d64, 3 layers, one core: 67k
# tokens/s at 2048, 56k at 8192, 40k at 16384); a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


class _Piece(NamedTuple):
    prompt: int
    first: int  # index of the row's first candidate within the prompt
    row: Row


@torch.inference_mode()
def score_prompts(
    model: nn.Module,
    prompts: Sequence[RankingPrompt],
    answer_ids: tuple[int, int],
    *,
    batch_tokens: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """P(yes) of every candidate of every prompt: one float64 array (k,) per prompt, in their order.

    batch_tokens bounds the padded tokens of a batch; None takes BATCH_TOKENS. precision="bf16" runs
    the model under autocast. progress(done, total) is called after each batch with the number of
    real tokens. InputError for prompts beyond the trained length, empty prefixes or candidates.
    """
    check_model(model, answer_ids)
    if precision not in ("fp32", "bf16"):
        raise InputError(f"score_prompts: precision is {precision!r}, expected 'fp32' or 'bf16'")
    pieces = []
    for index, prompt in enumerate(prompts):
        who = f"score_prompts: member {prompt.member}"
        check_lengths(model, len(prompt.prefix), prompt.candidates, who)
        pieces.extend(_cut(index, prompt))
    pieces.sort(key=lambda piece: len(piece.row.ids))
    total, done, start = sum(len(piece.row.ids) for piece in pieces), 0, 0
    scores = [np.zeros(len(prompt.candidates)) for prompt in prompts]
    head, device = AnswerHead(model, answer_ids), next(model.parameters()).device
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    was_training = model.training
    model.eval()
    while start < len(pieces):
        stop = start + 1
        while stop < len(pieces) and len(pieces[stop].row.ids) * (stop + 1 - start) <= batch_tokens:
            stop += 1
        batch, start = pieces[start:stop], stop
        values = _run(model, head, batch, device, precision)
        for piece in batch:
            size = len(piece.row.last)
            scores[piece.prompt][piece.first : piece.first + size] = values[:size]
            values = values[size:]
            done += len(piece.row.ids)
        if progress is not None:
            progress(done, total)
    model.train(was_training)
    return scores


def _cut(index: int, prompt: RankingPrompt) -> list[_Piece]:
    """One prompt -> rows of bounded length, each with the whole prefix."""
    limit = max(ROW_TOKENS, 2 * len(prompt.prefix))
    pieces, first, length = [], 0, len(prompt.prefix)
    for place, one in enumerate(prompt.candidates):
        if place > first and length + len(one) > limit:
            row = pack(prompt.prefix, prompt.candidates[first:place])
            pieces.append(_Piece(index, first, row))
            first, length = place, len(prompt.prefix)
        length += len(one)
    if first < len(prompt.candidates):
        pieces.append(_Piece(index, first, pack(prompt.prefix, prompt.candidates[first:])))
    return pieces


def _run(
    model: nn.Module,
    head: AnswerHead,
    batch: Sequence[_Piece],
    device: torch.device,
    precision: str,
) -> np.ndarray:
    """One padded batch -> the scores of its candidates, row after row."""
    width = max(len(piece.row.ids) for piece in batch)
    ids, positions = np.zeros((2, len(batch), width), np.int64)
    segments = np.full((len(batch), width), PADDING)
    for place, piece in enumerate(batch):
        length = len(piece.row.ids)
        ids[place, :length] = piece.row.ids
        positions[place, :length] = piece.row.positions
        segments[place, :length] = piece.row.segments
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else next(model.parameters()).dtype
    with autocast:
        hidden = decoder(model)(
            torch.from_numpy(ids).to(device),
            attention_mask=attention_mask(
                model, visible(torch.from_numpy(segments).to(device)), dtype
            ),
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
        ).last_hidden_state
    row = np.repeat(np.arange(len(batch)), [len(piece.row.last) for piece in batch])
    last = np.concatenate([piece.row.last for piece in batch])
    return head(hidden[torch.from_numpy(row).to(device), torch.from_numpy(last).to(device)])
