"""What a calibration says of the text and the model that it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.calibrate.tokens import Tokens
from slmperf.calibrate.workers import sum_of_workers
from slmperf.check import InputError
from slmperf.models.hashes import canonical, text_state

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
    words what text it is; "model" is its `fingerprint`, "tokenizer" its `text_hash` ("" where not
    given).
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
        "tokenizer": text_hash(tokenizer) if tokenizer is not None else "",
        "model": fingerprint(model),
    }


def fingerprint(model: PreTrainedModel, rows: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """A hash of a model's parameters: names, shapes and the first values of each. It tells models
    apart at little cost, but not those that differ elsewhere.

    rows: the first row of each parameter that is not in memory, by name
        (`StreamedModel.first_rows`); where one is missing, the hash is "".

    Values are rounded to bf16, so that a model loaded in another dtype is the same.
    """
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach() if not parameter.is_meta else rows.get(name)
        if first is None:
            return ""
        while first.dim() > 1:
            first = first[0]
        first = first[:64].bfloat16().cpu().view(torch.int16)
        whole.update(f"{name} {tuple(parameter.shape)} {first.tolist()}\n".encode())
    return whole.hexdigest()


def text_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that makes ids of text: tokens, merges, normalisation. Special tokens are left
    out, because the one for padding is often chosen only when batches are made.
    """
    return hashlib.sha256(canonical(text_state(tokenizer))).hexdigest()


def check_tokenizer(model: PreTrainedTokenizerBase, calibration: PreTrainedTokenizerBase) -> None:
    """InputError where the calibration set's tokenizer gives other ids than the model's."""
    if text_hash(model) == text_hash(calibration):
        return
    wanted, found = model.get_vocab(), calibration.get_vocab()
    if wanted == found:
        raise InputError(
            "calibration: wanted the model's tokenizer, found another of the same "
            f"{len(found)} tokens, which splits text otherwise"
        )
    apart = sorted(token for token in wanted.keys() | found.keys()
                   if wanted.get(token) != found.get(token))  # fmt: skip
    raise InputError(
        f"calibration: wanted the model's tokenizer ({len(wanted)} tokens), found another "
        f"({len(found)} tokens): {apart[0]!r} is {wanted.get(apart[0])} there and "
        f"{found.get(apart[0])} here"
    )
