"""hashes: what models, tensors and tokenizers are recognised by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Hash(Protocol):
    """What `hashlib` makes."""

    def update(self, content: Any, /) -> None:
        """Take these bytes in."""
        ...


def add_tensors(whole: Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take names, dtypes, shapes and contents into a hash; every byte is read."""
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(content.numpy())


def text_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that makes ids of text, as JSON values: a fast tokenizer's state without padding and
    truncation, which calls change; of others their vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    state = json.loads(backend.to_str())
    return {key: state[key] for key in state if key not in ("padding", "truncation")}


def canonical(value: Any) -> bytes:
    """JSON values as bytes, the same ones for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
