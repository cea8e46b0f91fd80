"""Which tokens of a calibration batch count, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHED, _LARGE = 2**20, 2**26  # elements widened at a time on a processor and on a device


@dataclass(frozen=True)
class Tokens:
    """The n tokens of weight above 0 among the places of a batch, in order.

    index      (n,) int64, their places among the B * T flattened ones; None where it is all of them
    sequence   (n,) int64, ascending: the sequence that each belongs to
    weight     (n,) fp32; None where all are 1
    count      n
    total      the sum of the weights
    sequences  B
    """

    index: Tensor | None
    sequence: Tensor
    weight: Tensor | None
    count: int
    total: float
    sequences: int

    @classmethod
    def of(cls, weights: Tensor | None, shape: Sequence[int], device: torch.device) -> Tokens:
        """Tokens of a batch of places `shape` (B, T), by weights (B, T) >= 0 or None for ones."""
        places = torch.Size(shape).numel()
        each = places // shape[0] if shape[0] else 1
        if weights is None:
            sequence = torch.arange(places, device=device) // max(1, each)
            return cls(None, sequence, None, places, float(places), shape[0])
        flat_shape = tuple(shape[1:]) if shape[0] == 1 else tuple(shape)
        if tuple(weights.shape) not in (tuple(shape), flat_shape):
            raise InputError(f"token weights: wanted {tuple(shape)}, found {tuple(weights.shape)}")
        flat = weights.reshape(-1).to(device)
        index = flat.nonzero()[:, 0]
        used = flat[index].float()
        if len(used) and not bool((used > 0).all() & torch.isfinite(used).all()):
            raise InputError(
                "token weights: wanted finite numbers >= 0, found "
                f"{float(used[~((used > 0) & torch.isfinite(used))][0])}"
            )
        return cls(
            None if len(index) == places else index,
            index // max(1, each),
            None if bool((used == 1).all()) else used,
            len(index),
            float(used.double().sum()),
            shape[0],
        )

    def routed(self, chosen: Tensor, router: Tensor) -> Tokens:
        """Those of the tokens that go to one expert, weighted by the router's weight squared.

        chosen, router: (places, k), where the expert stands among a place's k and the weights its
        outputs are multiplied by; squared, because errors of the outputs are.
        """
        share = (router.float() * chosen).sum(1).square()
        index = torch.arange(len(share), device=share.device) if self.index is None else self.index
        share = share[index] if self.weight is None else share[index] * self.weight
        used = share.nonzero()[:, 0]
        weight = share[used]
        total = float(weight.double().sum())
        sequence = self.sequence[used]
        return Tokens(index[used], sequence, weight, len(used), total, self.sequences)

    def alone(self) -> Tokens:
        """The same tokens where only they have places."""
        return replace(self, index=None)

    def select(self, rows: Tensor) -> Tensor:
        """The chosen rows, (places, d) -> (n, d)."""
        return rows if self.index is None else rows[self.index]

    def means(self, rows: Tensor, group_size: int) -> Tensor:
        """Means over each sequence's tokens of groups' L2 norms: (places, d) -> (sequences, m).

        In fp32, a few rows at a time: what they are widened to stays in the processor's caches.
        """
        weight = torch.ones_like(self.sequence, dtype=torch.float32)
        if self.weight is not None:
            weight = self.weight
        numbers = torch.arange(self.sequences, device=rows.device)[:, None]
        sums = (self.sequence == numbers).float() @ weight
        share = weight / sums[self.sequence]
        means = share.new_zeros(self.sequences, rows.shape[1] // group_size)
        step = max(1, (_CACHED if rows.device.type == "cpu" else _LARGE) // rows.shape[1])
        for begin in range(0, self.count, step):
            part = slice(begin, begin + step)
            norms = (rows[part] if self.index is None else rows[self.index[part]]).abs().float()
            if group_size > 1:
                norms = norms.unflatten(1, (-1, group_size)).norm(dim=2)
            means.addmm_(share[part] * (self.sequence[part] == numbers), norms)
        return means


def token_weights(batch: Mapping[str, Any]) -> Tensor | None:
    """Weights (B, T) of a batch's tokens, or None where all count as one.

    They are `token_weights` times the 2-D `attention_mask`, as far as the batch has them.
    """
    mask, weights = batch.get("attention_mask"), batch.get("token_weights")
    if mask is not None and mask.dim() != 2:
        mask = None  # a full (B, 1, T, T) mask does not say which tokens are padding
    if weights is None or mask is None:
        return (mask > 0) if weights is None and mask is not None else weights
    return weights * (mask > 0)


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What of a batch the model itself takes, on the model's device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("token_weights", "labels", "use_cache")
    }


def places(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(B, T) of a batch."""
    for name in ("input_ids", "inputs_embeds"):
        if batch.get(name) is not None:
            return tuple(batch[name].shape[:2])
    raise InputError("calibrate: wanted input_ids or inputs_embeds in a batch, found neither")


def check_batch(model: PreTrainedModel, batch: Any) -> None:
    """InputError for what is no batch of the model's arguments (ids (B, T), mask and weights of
    their shape), and for ids beyond its vocabulary: the text's tokenizer is another model's.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            "calibrate: wanted a list of batches, each a mapping of the model's arguments, "
            f"found a {type(batch).__name__} in it"
        )
    shape, given = places(batch), batch.get("input_ids")
    wanted_dims = 3 if given is None else 2
    first = batch["inputs_embeds"] if given is None else given
    if first.dim() != wanted_dims or not first.numel():
        letters = "(B, T)" if wanted_dims == 2 else "(B, T, D)"
        raise InputError(
            f"calibrate: wanted a batch of tokens {letters}, found {tuple(first.shape)}"
        )
    mask, weights = batch.get("attention_mask"), batch.get("token_weights")
    for name, tensor in (("attention_mask", mask), ("token_weights", weights)):
        if tensor is None or (name == "attention_mask" and tensor.dim() != 2):
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(f"calibrate: {name}: wanted {shape}, found {tuple(tensor.shape)}")
    if given is None:
        return
    size = model.get_input_embeddings().num_embeddings
    least, most = int(given.min()), int(given.max())
    if least < 0 or most >= size:
        found = least if least < 0 else most
        raise InputError(
            f"calibrate: wanted token ids in 0..{size - 1}, the model's vocabulary, found {found}: "
            "is the text's tokenizer another model's?"
        )
