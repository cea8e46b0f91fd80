"""Gram matrices of linear-layer inputs x_t, streamed:   H = sum_t w_t x_t x_t'

Pruning by least squares and the error-compensating quantisers see their calibration data only
through H. Products are taken in fp32 over at most `_ROWS` tokens and added up in fp64, so the error
does not grow with the number of tokens. Padding never enters H: w_t is 0 where the attention mask
is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 4096  # tokens in one fp32 product


class Gram:
    """H (d, d) in fp64, the sum of the token weights, the number of tokens with weight above 0."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.weight = 0.0
        self.tokens = 0

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens: `inputs` (..., d), floating; `weights` (...) >= 0, or None for ones."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if weights is not None:
            flat = weights.reshape(-1)
            used = flat > 0
            rows, flat = rows[used], flat[used].to(rows.device, torch.float64)
            self.weight += float(flat.sum())
        else:
            self.weight += len(rows)
        self.tokens += len(rows)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].float()
            if weights is not None:
                part = part * flat[start : start + _ROWS, None].sqrt().float()
            self.matrix += (part.T @ part).double()


def token_weights(batch: Mapping[str, Any]) -> Tensor | None:
    """Weights (B, T) of a batch's tokens, or None where all count as one.

    They are `token_weights` times the 2-D `attention_mask`, as far as the batch has them.
    """
    mask, weights = batch.get("attention_mask"), batch.get("token_weights")
    if mask is not None and mask.dim() != 2:
        mask = None  # a full (B, 1, T, T) mask does not say which tokens are padding
    if weights is None or mask is None:
        return mask if weights is None else weights
    return weights * (mask > 0)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model itself takes."""
    return {name: value for name, value in batch.items() if name not in ("token_weights", "labels")}


class Gatherer:
    """Gram matrices of the layers being watched; `weights` are the current batch's."""

    def __init__(self) -> None:
        self.grams: dict[str, Gram] = {}
        self.weights: Tensor | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        if name not in self.grams:
            self.grams[name] = Gram(inputs.shape[-1], inputs.device)
        self.grams[name].add(inputs, self.weights)


@contextlib.contextmanager
def gather(layers: Mapping[str, nn.Module]) -> Iterator[Gatherer]:
    """Inside the `with`, every forward of a layer in `layers` adds its inputs to its matrix."""
    gatherer = Gatherer()

    def hook(name: str) -> Any:
        return lambda module, arguments: gatherer.add(name, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield gatherer
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], layers: Iterable[str]
) -> dict[str, Gram]:
    """Gram matrices of the inputs of the named linear layers, in one pass over `batches`.

    `batches` are the model's own arguments (input_ids (B, T), attention_mask (B, T), ...), each
    optionally with `token_weights` (B, T) >= 0. `layers` are module names such as
    "model.layers.0.mlp.down_proj". All matrices are held at once: d^2 * 8 bytes for each layer. The
    model's training mode is restored.

    Raises InputError for a layer that the model lacks, and for batches without a single token.
    """
    modules = {}
    for name in layers:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"calibrate: {type(model).__name__} has no layer {name}") from error
    training = model.training
    model.eval()
    try:
        with gather(modules) as gatherer:
            for batch in batches:
                gatherer.weights = token_weights(batch)
                model(**model_inputs(batch), use_cache=False)
    finally:
        model.train(training)
    check_tokens(modules, gatherer.grams)
    return gatherer.grams


def check_tokens(layers: Iterable[str], grams: Mapping[str, Gram]) -> None:
    """InputError for a layer that saw no token."""
    for name in layers:
        if name not in grams or grams[name].tokens == 0:
            raise InputError(
                f"calibrate: wanted at least one calibration token for {name}, found none"
            )
