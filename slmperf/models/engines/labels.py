"""LabelHead: the rows of a model's head that answers are read from, in place of the whole head.

Scoring asks for the logits of a few tokens; the head of a small model with a large vocabulary is a
good part of its weights. Engines want a logit for every token: of the others it is so low that none
of them is sampled, and that probabilities are those among the labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NEVER = -1e30  # finite, for JSON has no infinity


def check_labels(labels: Any, tokens: int) -> None:
    """InputError unless `labels` is a list of different tokens of a vocabulary of so many."""
    if (
        not isinstance(labels, list)
        or not labels
        or any(type(label) is not int or not 0 <= label < tokens for label in labels)
        or len(set(labels)) < len(labels)
    ):
        raise InputError(
            f"label_token_ids is {labels!r}, wanted a list of different tokens below {tokens}"
        )


class LabelHead(nn.Module):
    """Rows (L, D) of the head, in the dtype that is the default when it is made.

    Raises InputError for `label_token_ids` that are no tokens, or named twice.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        labels, tokens = config.label_token_ids, config.vocab_size
        check_labels(labels, tokens)
        self.labels, self.vocab_size = labels, tokens
        self.source = (
            "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        )
        self.weight = nn.Parameter(torch.empty(len(labels), config.hidden_size), False)
        self.register_buffer("places", torch.tensor(labels), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> logits (N, V) fp32."""
        found = hidden.float() @ self.weight.float().T
        return found.new_full((len(found), self.vocab_size), NEVER).index_copy(
            1, self.places, found
        )

    def of_checkpoint(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint's tensors by name, with this head's rows as lm_head.weight.

        Raises InputError for a head that is quantised.
        """
        for name, tensor in weights:
            if name == self.source:
                yield "lm_head.weight", tensor[self.labels]
            elif name.startswith("lm_head.") and name != "lm_head.weight":
                raise InputError(
                    f"{name}: the head is quantised, wanted plain rows for label_token_ids"
                )
            if not name.startswith("lm_head."):
                yield name, tensor
