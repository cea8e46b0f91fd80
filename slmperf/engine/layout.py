"""layout: several candidates behind one prefix in a row, and the answer from two rows of the head.

A row is  prefix | candidate 0 | candidate 1 | ...

A token sees the prefix and its own candidate up to itself, never another candidate, and positions
start again after the prefix: every candidate is computed as if it stood there alone (FlashInfer
#1015 calls it multi-item scoring; here without delimiters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slmperf.check import InputError

PADDING = -1  # segment of a padded place; 0 is the prefix, 1..k the candidates


class Row(NamedTuple):
    """One packed row of T tokens; `last` are the places where the answer of each candidate is
    read.
    """

    ids: np.ndarray  # int64 (T,)
    positions: np.ndarray  # int64 (T,)
    segments: np.ndarray  # int64 (T,)
    last: np.ndarray  # int64 (k,)


def pack(prefix: np.ndarray, candidates: Sequence[np.ndarray], *, start: int = 0) -> Row:
    """Lay candidates behind `prefix` (P,); `start` tokens stand before it elsewhere (a cache)."""
    behind = start + len(prefix)
    lengths = np.array([len(one) for one in candidates], np.int64)
    own = [np.arange(behind, behind + length) for length in lengths]
    return Row(
        ids=np.concatenate([np.asarray(part, np.int64) for part in (prefix, *candidates)]),
        positions=np.concatenate([np.arange(start, behind), *own]),
        segments=np.concatenate(
            [np.zeros(len(prefix), np.int64), np.repeat(np.arange(1, len(lengths) + 1), lengths)]
        ),
        last=len(prefix) + np.cumsum(lengths) - 1,
    )


def visible(segments: Tensor) -> Tensor:
    """Segments (B, T) -> bool (B, 1, T, T), True where a query (third axis) may see a key (fourth).

    Padding sees padding, so that no softmax row is empty; nothing reads what comes of it.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (((key == query) | ((key == 0) & (query > 0))) & earlier)[:, None]


def attention_mask(model: nn.Module, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the additive one of `dtype` that sdpa and eager attention both take as it is.

    sdpa would take the bool mask too, but the CPU kernel converts it again in every layer.
    """
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise NotImplementedError(
            f"engine: attention implementation is {implementation!r}, supported are sdpa and eager"
        )
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, lowest)


def check_model(model: nn.Module, answer_ids: tuple[int, int]) -> None:
    """InputError for answer ids outside the vocabulary; NotImplementedError for windowed
    attention.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < model.config.max_position_embeddings:
        raise NotImplementedError(
            f"engine: sliding_window is {window}; supported is attention over the whole prefix"
        )
    if len(answer_ids) != 2 or not all(0 <= one < model.config.vocab_size for one in answer_ids):
        raise InputError(
            f"engine: answer_ids are {tuple(answer_ids)}, "
            f"expected (no, yes) below the vocabulary of {model.config.vocab_size}"
        )


def check_lengths(
    model: nn.Module, prefix: int, candidates: Sequence[np.ndarray], who: str
) -> None:
    """InputError for an empty prefix or candidate, or for positions beyond the trained length."""
    if prefix == 0:
        raise InputError(f"{who}: the prefix is empty, expected at least one token")
    limit = model.config.max_position_embeddings
    longest = 0
    for place, one in enumerate(candidates):
        if len(one) == 0:
            raise InputError(f"{who}: candidate {place} is empty, expected at least one token")
        longest = max(longest, len(one))
    if prefix + longest > limit:
        raise InputError(
            f"{who}: prefix and longest candidate have {prefix} + {longest} tokens, "
            f"expected at most {limit} together (the trained length)"
        )


class AnswerHead:
    """Hidden states -> P(yes): the two answer rows of the language-model head, nothing else of
    it.
    """

    def __init__(self, model: nn.Module, answer_ids: tuple[int, int]) -> None:
        self.head = model.get_output_embeddings()
        self.answer_ids = list(answer_ids)

    def __call__(self, hidden: Tensor) -> np.ndarray:
        """(k, D) -> float64 (k,), softmax over the two answer logits (fp32)."""
        if type(self.head) is nn.Linear:
            weight = self.head.weight[self.answer_ids].float()
            logits = hidden.float() @ weight.T
            if self.head.bias is not None:
                logits = logits + self.head.bias[self.answer_ids].float()
        else:  # a quantised head has no rows to pick
            logits = self.head(hidden)[:, self.answer_ids].float()
        return torch.sigmoid((logits[:, 1] - logits[:, 0]).double()).cpu().numpy()


def decoder(model: nn.Module) -> nn.Module:
    """The model below its head: token ids -> hidden states after the final norm."""
    return model.get_decoder()
