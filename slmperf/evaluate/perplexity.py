"""perplexity: exp of the mean negative log-likelihood per predicted token, natural logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slmperf.check import InputError

if TYPE_CHECKING:
    import torch


def perplexity(
    model: torch.nn.Module, sequences: Sequence[np.ndarray], *, batch_tokens: int = 8192
) -> float:
    """Perplexity of a causal model over token id sequences (T,) each.

    Every token but the first of its sequence is predicted from those before it; the mean is over
    all predicted tokens. Sequences of one token predict nothing and are passed over. Log-softmax in
    fp32; infinite where fp64 cannot hold it. InputError for a sequence beyond the model's trained
    length, or when nothing is predicted.
    """
    import torch

    ids = sorted((np.asarray(one, np.int64) for one in sequences), key=len)
    ids = [one for one in ids if len(one) > 1]
    if not ids:
        raise InputError("perplexity: no sequence has two tokens, expected at least one")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(ids[-1]) > limit:
        raise InputError(
            f"perplexity: a sequence has {len(ids[-1])} tokens, expected at most {limit} "
            "(the trained length)"
        )
    device = next(model.parameters()).device
    total, count, start = 0.0, 0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        while start < len(ids):
            stop = start + 1
            while stop < len(ids) and len(ids[stop]) * (stop + 1 - start) <= batch_tokens:
                stop += 1
            batch, start = ids[start:stop], stop
            # Padding stands on the right, so causal attention never looks at it.
            padded = np.zeros((len(batch), len(batch[-1])), np.int64)
            target = np.full_like(padded, -100)
            for row, one in enumerate(batch):
                padded[row, : len(one)] = one
                target[row, : len(one) - 1] = one[1:]
            logits = model(torch.from_numpy(padded).to(device), use_cache=False).logits
            wanted = torch.from_numpy(target).to(device).flatten()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum"
            )
            total += loss.item()
            count += sum(len(one) - 1 for one in batch)
    model.train(was_training)
    try:
        return math.exp(total / count)
    except OverflowError:  # a mean above 709.78, of a model that is broken
        return math.inf
