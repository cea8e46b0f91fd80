"""Filling a teacher cache from a language model of Transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.cache.files import MANIFEST, CachedHead, CachedTopK, hash_of_model, ranges
from slmperf.distill.cache.writer import TeacherCacheWriter
from slmperf.distill.heads import teacher_head
from slmperf.ops import TeacherHead, TeacherTopK
from slmperf.ops.half_products import project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN = ("keys", "token_weight", "example_of", "labels")  # of a batch, not the model's
_IGNORED = -100  # label of a token that does not count, in Transformers
_LOGITS_BYTES = 2**28  # of a chunk on the way to the k likeliest


class Written(NamedTuple):
    """What one call of `TeacherCache.write` did."""

    examples: int  # written now
    skipped: int  # that were there already
    complete: bool  # every part is finished and the manifest is written


@torch.no_grad()
def write(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer_hash: str | None,
    model_hash: str | None = None,
    top_k: int | None = None,
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] = (0, 1),
    shard_bytes: int = 2**29,
    shard_seconds: float = 600.0,
) -> Written:
    """Run a causal language model over batches and cache what it says where tokens count.

    Called again after a kill, with the same batches, it runs the model only on batches with an
    example that is in no finished shard. The model is evaluated as it is, in its own dtype and
    on its own device; its training mode is restored.

    batches    mappings of the model's own arguments (input_ids (B, L), attention_mask, ...) and
               keys          B integers >= 0 or strings; without them examples are numbered as
                             they come, which only a single part can do
               token_weight  (B, L), as kd_loss takes it: where it is not 0, what the model
                             predicts for the next token is cached. Without it `labels` (B, L)
                             count as Transformers shifts them (position t where labels[t + 1]
                             is not -100), and without these every token
               example_of    (B, L) integers, of rows packed with several examples: the place in
                             `keys` of each token's example, below 0 for padding
               where a 2-D attention_mask is 0 nothing counts
    top_k      None: hidden states, in the dtype of the output layer; else k
    dtype      of the log-probabilities
    model_hash None: that of the model in memory, `hash_of_model`
    part       (i, n): `batches` are those of worker i of n. The workers divide the examples
               among themselves; the last one to finish completes the cache
    others     see TeacherCacheWriter
    """
    training = model.training
    model.eval()
    try:
        # One token: tells the head, also to a worker that has no batch.
        probe = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=model.device)}
        head = teacher_head(model, probe)
        contents: CachedHead | CachedTopK = CachedHead(
            head.weight, head.bias, head.softcap, head.scale
        )
        if top_k is not None:
            contents = CachedTopK(top_k, head.vocabulary, dtype)
        examples = skipped = 0
        with TeacherCacheWriter(
            folder,
            contents,
            model_hash=model_hash or hash_of_model(model),
            tokenizer_hash=tokenizer_hash,
            part=part,
            shard_bytes=shard_bytes,
            shard_seconds=shard_seconds,
        ) as writer:
            for batch in batches:
                keys = batch.get("keys")
                if keys is None:
                    if part != (0, 1):
                        raise InputError(
                            f"TeacherCache: a batch has no keys, expected them in part {part}"
                        )
                    first = examples + skipped
                    keys = range(first, first + len(batch["input_ids"]))
                layout = _layout(batch, len(keys))
                if not writer.missing(keys, layout.tokens).any():
                    skipped += len(keys)
                    continue
                teacher: Any = teacher_head(
                    model,
                    {
                        name: value.to(model.device) if isinstance(value, Tensor) else value
                        for name, value in batch.items()
                        if name not in _OWN
                    },
                    positions=layout.rows,
                )
                teacher = teacher.hidden if top_k is None else top_k_of(teacher, top_k)
                new = writer.append(keys, layout.counts, layout.positions, teacher, layout.tokens)
                examples, skipped = examples + new, skipped + len(keys) - new
    finally:
        model.train(training)
    return Written(examples, skipped, (Path(folder) / MANIFEST).is_file())


def top_k_of(teacher: TeacherHead, k: int) -> TeacherTopK:
    """The k likeliest tokens (T, k) of each row, likeliest first, and their log-probabilities in
    fp32; logits are fp32, of a few rows at a time.
    """
    rows, vocabulary = len(teacher.hidden), teacher.vocabulary
    device = teacher.hidden.device
    indices = torch.empty(rows, k, dtype=torch.int64, device=device)
    log_probs = torch.empty(rows, k, dtype=torch.float32, device=device)
    chunk = max(1, _LOGITS_BYTES // (4 * vocabulary))
    buffer = torch.empty(min(chunk, rows), vocabulary, dtype=torch.float32, device=device)
    for begin in range(0, rows, chunk):
        hidden = teacher.hidden[begin : begin + chunk]
        logits, part = buffer[: len(hidden)], slice(begin, begin + len(hidden))
        project(hidden, teacher.weight, teacher.bias, teacher.scale or 1.0, logits)
        if teacher.softcap is not None:
            logits.div_(teacher.softcap).tanh_().mul_(teacher.softcap)
        largest, indices[part] = logits.topk(k, dim=1)
        log_probs[part] = largest - logits.logsumexp(dim=1, keepdim=True)
    return TeacherTopK(indices, log_probs)


class _Layout(NamedTuple):
    """Where a batch's examples are: `rows` (R,) of its B L tokens count, example by example."""

    counts: np.ndarray  # (E,)
    positions: Tensor  # (R,)
    rows: Tensor  # (R,)
    tokens: list[np.ndarray]  # E times the ids of the whole example


def _layout(batch: Mapping[str, Any], examples: int) -> _Layout:
    ids = batch["input_ids"].cpu().numpy()
    mask, owner = batch.get("attention_mask"), batch.get("example_of")
    if owner is not None:
        owner = np.asarray(owner.cpu() if isinstance(owner, Tensor) else owner).copy()
    else:
        owner = np.repeat(np.arange(len(ids))[:, None], ids.shape[1], axis=1)
    if owner.shape != ids.shape or owner.max(initial=-1) >= examples:
        raise InputError(
            f"TeacherCache: a batch has {examples} keys, expected one for each of {len(ids)} rows "
            "or, with example_of (B, L), for each example"
        )
    if isinstance(mask, Tensor) and mask.dim() == 2:
        owner[mask.cpu().numpy() == 0] = -1
    weight, labels = batch.get("token_weight"), batch.get("labels")
    counting = np.ones(ids.shape, bool)
    if weight is not None:
        counting = weight.cpu().numpy() != 0
    elif labels is not None:
        counting[:, -1:] = False
        counting[:, :-1] = labels.cpu().numpy()[:, 1:] != _IGNORED
        counting[:, :-1] &= owner[:, 1:] == owner[:, :-1]
    if counting.shape != ids.shape:
        raise InputError(
            f"TeacherCache: token_weight is {counting.shape}, expected (B, L) = {ids.shape}"
        )
    flat = owner.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]  # all tokens, example by example
    sizes = np.bincount(flat[order], minlength=examples)
    within = ranges(np.zeros(examples, np.int64), sizes)
    chosen = counting.reshape(-1)[order]
    counts = np.bincount(flat[order[chosen]], minlength=examples)
    return _Layout(
        counts,
        torch.from_numpy(within[chosen]),
        torch.from_numpy(order[chosen]),
        np.split(ids.reshape(-1)[order], np.cumsum(sizes)[:-1]),
    )
