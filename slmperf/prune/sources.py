"""sources: where the Gram matrices of a model's layers come from, block after block.

A `slmperf.calibrate.BlockStream` is one: every block is run on what the blocks before it, as they
are by then, make of the calibration set. Here are the two that see the unpruned model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from slmperf.calibrate import (
    BlockStream,
    Calibration,
    Gram,
    calibrate,
    fingerprint,
    text_hash,
)
from slmperf.check import InputError
from slmperf.models.structure import decoder_blocks, layer_name
from slmperf.prune.block import BlockSizes, Groups, layer_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batches = Iterable[Mapping[str, Any]]


class Source(Protocol):
    """Where Gram matrices come from: a stream through the blocks, or a pass made before."""

    manifest: dict[str, Any]

    def grams(
        self, index: int, names: Iterable[str], group_sizes: Mapping[str, int]
    ) -> dict[str, Gram]:
        """Gram matrices of the inputs of the named layers of block `index`."""
        ...

    def advance(self, index: int) -> None:
        """Block `index` is as it will be."""
        ...


class OnePass:
    """A calibration made before anything changes, as a source."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.manifest = calibration.manifest

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        calibration: Batches | Calibration,
        wanted: Mapping[tuple[int, str], Groups],
        method: str,
        *,
        model_hash: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> OnePass:
        """Of a Calibration, or of batches: then with `settings` of `calibrate`.

        wanted: what stays of which layer, by block and name within it.
        model_hash: the `fingerprint` of the model; None: to be taken from what is in memory.

        Raises InputError for a Calibration of another model or another tokenizer, and where a layer
        wanted has no fitting, finite Gram matrix.
        """
        names = {layer_name(*key): groups.group_size for key, groups in wanted.items()}
        if isinstance(calibration, Calibration):
            made = calibration
        else:
            settings |= {"group_sizes": names, "tokenizer": tokenizer}
            made = calibrate(model, calibration, list(names), **settings)
        if made.manifest["model"] != (model_hash or fingerprint(model)):
            raise InputError("calibration: wanted Gram matrices of this model, found another's")
        text = made.manifest["tokenizer"]
        if tokenizer is not None and text and text != text_hash(tokenizer):
            raise InputError(
                "calibration: wanted Gram matrices of text in this tokenizer's ids, "
                "found another tokenizer's"
            )
        blocks = decoder_blocks(model)
        for (index, layer), groups in wanted.items():
            name = layer_name(index, layer)
            if name not in made:
                raise InputError(f"{name}: wanted its Gram matrix, the calibration has none")
            gram, inputs = made[name], layer_weight(blocks[index], layer).shape[1]
            if gram.size != inputs:
                raise InputError(f"{name}: wanted {inputs} inputs, the calibration has {gram.size}")
            if method.startswith("norm") and gram.group_size != groups.group_size:
                raise InputError(
                    f"{name}: wanted scores of groups of {groups.group_size} inputs, "
                    f"the calibration has groups of {gram.group_size}"
                )
            if not gram.finite:
                raise InputError(f"{name}: gram holds values that are not finite")
        return cls(made)

    def grams(
        self, index: int, names: Iterable[str], group_sizes: Mapping[str, int]
    ) -> dict[str, Gram]:
        """See Source."""
        return {name: self.calibration[layer_name(index, name)] for name in names}

    def advance(self, index: int) -> None:
        """See Source."""


class UnprunedStream:
    """A stream that runs ahead: it leaves a block before the block changes.

    What mode one_pass sees, without the Gram matrices of all layers at once.
    """

    def __init__(self, stream: BlockStream, sizes: BlockSizes) -> None:
        self.manifest = stream.manifest
        self._stream, self._sizes = stream, sizes
        self._left = -1  # the last block that the stream has left
        self._grams: dict[str, Gram] = {}

    def grams(
        self, index: int, names: Iterable[str], group_sizes: Mapping[str, int]
    ) -> dict[str, Gram]:
        """See Source."""
        if self._left < index:
            wanted = self._sizes.layers(self._stream.blocks[index], index)
            sizes = {name: groups.group_size for name, groups in wanted.items()}
            self._grams = self._stream.grams(index, wanted, sizes)
            self.advance(index)
        return {name: self._grams.pop(name) for name in names}

    def advance(self, index: int) -> None:
        """See Source."""
        if self._left < index:
            self._stream.advance(index)
            self._left = index
