"""Running a decoder block by block: each block can be changed before its outputs feed the next.

Only the hidden states of the calibration batches are held, once; the arguments that the model
passes to every block (masks, rotary tables, positions) are recorded by running the model with its
blocks bypassed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate.gram import Gram, check_tokens, gather, model_inputs, token_weights
from slmperf.check import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockStream:
    """The calibration batches on their way through the decoder blocks.

    `hidden[b]` (B, T, D) are the inputs of the next block. `blocks` are the model's decoder blocks,
    in order. Per block: read `grams`, change the block, then `advance`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        batches: Iterable[Mapping[str, Any]],
    ) -> None:
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self.weights: list[Tensor | None] = []
        self._arguments: list[list[dict[str, Any]]] = []  # [batch][block]
        for batch in batches:
            self._record(model, batch)
        if not self.hidden:
            raise InputError("calibrate: wanted at least one calibration batch, found none")

    @torch.no_grad()
    def grams(self, index: int, layers: Mapping[str, nn.Module]) -> dict[str, Gram]:
        """Run block `index` over all batches: the Gram matrices of the named layers' inputs."""
        with gather(layers) as gatherer:
            for batch, hidden in enumerate(self.hidden):
                gatherer.weights = self.weights[batch]
                self._run(index, batch, hidden)
        check_tokens(layers, gatherer.grams)
        return gatherer.grams

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states by what block `index`, as it is now, makes of them."""
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self._run(index, batch, hidden)

    def _run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        return self.blocks[index](hidden, **self._arguments[batch][index])

    @torch.no_grad()
    def _record(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        arguments: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def note(module: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            if not first:
                first.append(positional[0])
            arguments.append(named)

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        for block in self.blocks:
            block.forward = _bypass
        try:
            model.base_model(**model_inputs(batch), use_cache=False)
        finally:
            for block in self.blocks:
                del block.forward
            for handle in handles:
                handle.remove()
        self.hidden.append(first[0])
        self.weights.append(token_weights(batch))
        self._arguments.append(arguments)


def _bypass(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states
