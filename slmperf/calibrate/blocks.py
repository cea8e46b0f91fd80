"""Running a decoder block by block: each block can be changed before its outputs feed the next.

Only the hidden states of the calibration batches are held (twice where a dense model gives the
targets), in memory or in files. The arguments that the model passes to every block (masks, rotary
tables, positions) are recorded by running the model with its blocks bypassed; where they would be
larger than the hidden states, they are recorded again whenever they are needed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate.gram import Gram
from slmperf.calibrate.manifest import manifest
from slmperf.calibrate.storage import zeros
from slmperf.calibrate.tokens import Tokens, check_batch, model_inputs, token_weights
from slmperf.calibrate.watch import Dense, Watch, check
from slmperf.models.structure import layer_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHARE = 16  # hidden states that are spilled leave this part of their size for arguments in memory


class BlockStream:
    """The calibration batches on their way through the decoder blocks.

    `hidden[b]` (B, T, D) are the inputs of the next block; `manifest` is what a `Calibration` has.
    Per block: read `grams`, `each_input` and `outputs` (as often as wanted: the block may change in
    between), change the block, then `advance`. Only the block at hand is run or copied, so blocks
    may be loaded one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        batches: Iterable[Mapping[str, Any]],
        *,
        spill: str | os.PathLike[str] | None = None,
        dense_target: bool = False,
        source: str = "",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Record the inputs of the first block.

        batches: the model's arguments, each optionally with `token_weights` (B, T) >= 0.
        spill: a folder; hidden states and Gram matrices live in memory-mapped files there.
        dense_target: a second stream goes through the blocks as they were before any change, and
            every Gram has as its `target` the outputs (without bias) that would make the hidden
            states those of this stream: the dense layer's, and what was lost before (`Dense`).
        source, tokenizer: what `manifest` says of the batches, as in `calibrate`.

        Raises InputError for token ids beyond the vocabulary, and where there are no batches.
        """
        self.blocks = blocks
        self.hidden: list[Tensor] = []
        self._dense: list[Tensor] = []  # the same of the dense stream
        self._dense_target = dense_target
        self._original: tuple[int, nn.Module] | None = None  # index, the block before any change
        self._model = model
        self._batches: list[Mapping[str, Any]] = []
        self._tokens: list[Tokens] = []
        self._arguments: list[list[dict[str, Any]] | None] = []  # [batch][block]
        self._spill = spill
        for batch in batches:
            self._record(batch)
        self.manifest = manifest(model, self._tokens, source, tokenizer)

    @torch.no_grad()
    def grams(
        self, index: int, names: Iterable[str], group_sizes: Mapping[str, int] | None = None
    ) -> dict[str, Gram]:
        """Run block `index` over all batches: the Gram matrices of the named layers' inputs.

        names: within the block ("mlp.down_proj", "mlp.experts.5.down_proj").
        group_sizes: by name or its last part, for layers whose activation scores are wanted.

        With torch.distributed every worker gets the sums of all.
        Raises InputError for a layer without tokens or with inputs that are not finite, by name.
        """
        block = self.blocks[index]
        watch = Watch(block, names)
        grams = watch.grams(sizes=group_sizes or {}, target=self._dense_target, spill=self._spill)
        original = self._before_changes(index)
        for batch, tokens in enumerate(self._tokens):
            dense = None
            if original is not None:
                dense = Dense(original)
                dense_watch = Watch(original, watch.names).inputs(dense.note)
                with dense_watch, dense.streams("dense", original):
                    self._run(original, index, batch, self._dense[batch])
            own = nullcontext() if dense is None else dense.streams("own", block)
            with watch.inputs(partial(watch.add, grams, tokens, dense)), own:
                self._run(block, index, batch, self.hidden[batch])
        for gram in grams.values():
            gram.sum_over_workers()
        check(grams, layer_name(index, ""))
        return grams

    @torch.no_grad()
    def each_input(
        self, index: int, names: Iterable[str], take: Callable[[str, Tensor, int], object]
    ) -> None:
        """Run block `index` over all batches: take(name, inputs, batch number) before each of the
        named layers runs.

        names: modules within the block, as `get_submodule` takes them; InputError for another.
        inputs: (n, d) in the model's dtype, of the n tokens of the batch that count; none where all
            of it is padding.
        """
        watch = Watch(self.blocks[index], names)
        for batch, tokens in enumerate(self._tokens):

            def chosen(
                name: str,
                arguments: tuple[Tensor, ...],
                tokens: Tokens = tokens,
                batch: int = batch,
            ) -> None:
                take(name, tokens.select(arguments[0].flatten(0, -2)), batch)

            with watch.inputs(chosen):
                self._run(self.blocks[index], index, batch, self.hidden[batch])

    @torch.no_grad()
    def outputs(
        self,
        index: int,
        block: nn.Module | None = None,
        *,
        batches: Iterable[int] | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Iterator[tuple[Tensor, Tokens]]:
        """Run block `index` over the batches of these numbers (None: all): what it makes of each,
        (B, T, D), and the tokens that count.

        block: run in its place. dtype: of what it is given, where it has another than the model.
        arguments: in the place of what the model passes to its blocks (`past_key_values`).
        """
        block = self.blocks[index] if block is None else block
        for batch in range(len(self.hidden)) if batches is None else batches:
            hidden = self._run(block, index, batch, self.hidden[batch], arguments, dtype)
            yield hidden, self._tokens[batch]

    @property
    def token_counts(self) -> list[int]:
        """Tokens that count, batch by batch."""
        return [tokens.count for tokens in self._tokens]

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Replace the hidden states by what block `index`, as it is now, makes of them."""
        block, original = self.blocks[index], self._before_changes(index)
        for batch, hidden in enumerate(self.hidden):
            self._keep(self.hidden, batch, self._run(block, index, batch, hidden))
            if original is not None:
                dense = self._dense[batch]
                self._keep(self._dense, batch, self._run(original, index, batch, dense))
        self._original = None

    def _before_changes(self, index: int) -> nn.Module | None:
        """A copy of the block as it was when first asked for; None without a dense stream."""
        if not self._dense_target:
            return None
        if self._original is None or self._original[0] != index:
            self._original = (index, copy.deepcopy(self.blocks[index]))
        return self._original[1]

    def _run(
        self,
        block: nn.Module,
        index: int,
        batch: int,
        hidden: Tensor,
        other: Mapping[str, Any] = MappingProxyType({}),
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """What `block` makes of `hidden`; `other`, `dtype`: see `outputs`."""
        kept = self._arguments[batch]
        arguments = kept if kept is not None else self._pass(self._batches[batch])[1]
        given: dict[str, Any] = {**arguments[index], **other}
        if dtype is not None:
            hidden, given = torch.utils._pytree.tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x,
                (hidden, given),
            )
        device = next(block.parameters()).device
        return block(hidden.to(device), **given)

    def _keep(self, where: list[Tensor], batch: int, hidden: Tensor) -> None:
        if self._spill is None:
            where[batch] = hidden
        else:
            where[batch].copy_(hidden)

    @torch.no_grad()
    def _record(self, batch: Mapping[str, Any]) -> None:
        check_batch(self._model, batch)
        hidden, arguments = self._pass(batch)
        leaves = [x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves}
        allowed = hidden.nbytes if self._spill is None else hidden.nbytes // _SHARE
        self._arguments.append(arguments if sum(held.values()) <= allowed else None)
        self._batches.append(batch)
        weights = token_weights(batch)
        self._tokens.append(Tokens.of(weights, hidden.shape[:2], hidden.device))
        for where in [self.hidden] + [self._dense] * self._dense_target:
            if self._spill is None:
                where.append(hidden)
            else:
                where.append(zeros(hidden.shape, hidden.dtype, spill=self._spill))
                where[-1].copy_(hidden)

    @torch.no_grad()
    def _pass(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        """The inputs of the first block, and the arguments of each."""
        arguments: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def note(module: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            if not first:
                first.append(positional[0])
            arguments.append(named)

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        # An instance may have a forward of its own: accelerate's hooks are put in that way.
        own = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = _bypass
        try:
            device = self._model.get_input_embeddings().weight.device
            self._model.base_model(**model_inputs(batch, device), use_cache=False)
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward
            for handle in handles:
                handle.remove()
        return first[0], arguments


def _bypass(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states
