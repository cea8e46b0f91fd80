"""engine: one prefix held open, candidates ranked on it.

    engine = Engine(model, answer_ids)
    prefix = engine.open(prefix_ids)             # once a member: the prefill
    probabilities = engine.score(prefix, candidates)   # P(yes) of each, as often as wanted

The open prefix is the KV cache of its tokens. Scoring reads it and leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slmperf.engine.layout import (
    AnswerHead,
    attention_mask,
    check_lengths,
    check_model,
    decoder,
    pack,
    visible,
)

# Candidate tokens scored in one pass on an open prefix: attention among them is quadratic.
PASS_TOKENS = 512


class OpenPrefix:
    """The KV cache of a prefix: `keys` and `values`, one (1, G, P, C) tensor per layer; `length`
    P.
    """

    def __init__(self, cache: DynamicCache, length: int) -> None:
        self.length = length
        self.keys = [layer.keys for layer in cache.layers]
        self.values = [layer.values for layer in cache.layers]

    @property
    def bytes(self) -> int:
        """Memory of the cached keys and values."""
        return sum(one.numel() * one.element_size() for one in [*self.keys, *self.values])


class _ReadOnlyCache(DynamicCache):
    """An open prefix as Transformers wants a cache: attention sees prefix and new tokens, nothing
    is kept.
    """

    def __init__(self, prefix: OpenPrefix) -> None:
        super().__init__()
        self.prefix = prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.prefix.keys[layer_idx], key_states], dim=-2)
        return keys, torch.cat([self.prefix.values[layer_idx], value_states], dim=-2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.prefix.length


class Engine:
    """Scores candidates with a Transformers causal model; answer_ids = (no, yes).

    The model is used as it is (dtype, device, sdpa or eager attention) and put into evaluation
    mode.
    """

    def __init__(self, model: nn.Module, answer_ids: tuple[int, int]) -> None:
        check_model(model, answer_ids)
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.head = AnswerHead(model, answer_ids)

    @torch.inference_mode()
    def open(self, prefix_ids: np.ndarray) -> OpenPrefix:
        """Prefill: token ids (P,) -> the open prefix. InputError beyond the trained length."""
        check_lengths(self.model, len(prefix_ids), (), "open")
        cache = DynamicCache()
        ids = torch.as_tensor(np.asarray(prefix_ids, np.int64), device=self.device)[None]
        decoder(self.model)(ids, past_key_values=cache, use_cache=True)
        return OpenPrefix(cache, len(prefix_ids))

    @torch.inference_mode()
    def score(self, prefix: OpenPrefix, candidates: Sequence[np.ndarray]) -> np.ndarray:
        """P(yes) of every candidate, float64 (k,); candidates are token ids (c,), of any lengths.

        Each is scored as prefix + candidate alone; only the candidates' tokens are computed. No
        candidates give an empty array.
        """
        check_lengths(self.model, prefix.length, candidates, "score")
        parts = [self._on_prefix(prefix, part) for part in _passes(candidates)]
        return np.concatenate(parts) if parts else np.zeros(0)

    @torch.inference_mode()
    def score_uncached(
        self, prefix_ids: np.ndarray, candidates: Sequence[np.ndarray], *, batch_tokens: int = 16384
    ) -> np.ndarray:
        """The same from nothing: k whole prompts, padded on the right, the prefix computed k
        times.
        """
        check_lengths(self.model, len(prefix_ids), candidates, "score_uncached")
        scores: list[np.ndarray] = []
        longest = len(prefix_ids) + max((len(one) for one in candidates), default=0)
        rows = max(1, batch_tokens // longest)
        for start in range(0, len(candidates), rows):
            part = candidates[start : start + rows]
            width = len(prefix_ids) + max(len(one) for one in part)
            ids = np.zeros((len(part), width), np.int64)
            ids[:, : len(prefix_ids)] = prefix_ids
            for row, one in zip(ids, part, strict=True):
                row[len(prefix_ids) : len(prefix_ids) + len(one)] = one
            hidden = decoder(self.model)(
                torch.from_numpy(ids).to(self.device), use_cache=False
            ).last_hidden_state
            last = torch.tensor([len(prefix_ids) + len(one) - 1 for one in part])
            scores.append(self.head(hidden[torch.arange(len(part)), last.to(self.device)]))
        return np.concatenate(scores) if scores else np.zeros(0)

    def _on_prefix(self, prefix: OpenPrefix, candidates: Sequence[np.ndarray]) -> np.ndarray:
        row = pack(np.zeros(0, np.int64), candidates, start=prefix.length)
        segments = torch.from_numpy(row.segments).to(self.device)[None]
        among = visible(segments)
        behind = among.new_ones(1, 1, len(row.ids), prefix.length)
        hidden = decoder(self.model)(
            torch.from_numpy(row.ids).to(self.device)[None],
            attention_mask=attention_mask(
                self.model, torch.cat([behind, among], dim=-1), self.dtype
            ),
            position_ids=torch.from_numpy(row.positions).to(self.device)[None],
            past_key_values=_ReadOnlyCache(prefix),
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[0, torch.from_numpy(row.last).to(self.device)])


def _passes(candidates: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    """Candidates in order, in runs of at most PASS_TOKENS tokens (one candidate at least)."""
    start, tokens = 0, 0
    for place, one in enumerate(candidates):
        if place > start and tokens + len(one) > PASS_TOKENS:
            yield candidates[start:place]
            start, tokens = place, 0
        tokens += len(one)
    if start < len(candidates):
        yield candidates[start:]
