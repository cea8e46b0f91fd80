"""What a calibration says of the text and the model that it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate.tokens import Tokens
from slmperf.calibrate.workers import sum_of_workers
from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COUNTS = ("batches", "sequences", "tokens")


def manifest(
    model: PreTrainedModel,
    batches: Iterable[Tokens],
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """The counts of a calibration set, over all workers, and where it is from; JSON values.

    "sequences" are those with a token that counts, "tokens" those that count; "source" says in
    words what text it is; "model" is its `fingerprint`, "tokenizer" the hash of its vocabulary (""
    where not given).
    Raises InputError where no worker has a batch.
    """
    counts = torch.zeros(len(COUNTS), dtype=torch.int64)
    for tokens in batches:
        counts += torch.tensor([1, len(tokens.sequence.unique()), tokens.count])
    counts = sum_of_workers(counts)
    if not counts[0]:
        raise InputError("calibrate: wanted at least one calibration batch, found none")
    return {
        **dict(zip(COUNTS, counts.tolist(), strict=True)),
        "source": source,
        "tokenizer": vocabulary_hash(tokenizer) if tokenizer is not None else "",
        "model": fingerprint(model),
    }


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's parameters: names, shapes and the first values of each.

    Values are rounded to bf16, so that a model loaded in another dtype is the same. Empty where
    some of the parameters are not in memory.
    """
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return ""
        first = parameter.detach()[:1].flatten()[:64].bfloat16().cpu().view(torch.int16)
        whole.update(f"{name} {tuple(parameter.shape)} {first.tolist()}\n".encode())
    return whole.hexdigest()


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's tokens and ids."""
    listed = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(listed.encode()).hexdigest()


def check_tokenizer(model: PreTrainedTokenizerBase, calibration: PreTrainedTokenizerBase) -> None:
    """InputError where the calibration set's tokenizer gives other ids than the model's."""
    wanted, found = model.get_vocab(), calibration.get_vocab()
    if wanted == found:
        return
    apart = sorted(token for token in wanted.keys() | found.keys()
                   if wanted.get(token) != found.get(token))  # fmt: skip
    raise InputError(
        f"calibration: wanted the model's tokenizer ({len(wanted)} tokens), found another "
        f"({len(found)} tokens): {apart[0]!r} is {wanted.get(apart[0])} there and "
        f"{found.get(apart[0])} here"
    )
