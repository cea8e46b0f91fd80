"""calibrate: one pass over a calibration set, the Gram matrices of many layers at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate.gram import Gram
from slmperf.calibrate.manifest import COUNTS, manifest
from slmperf.calibrate.tokens import Tokens, check_batch, model_inputs, places, token_weights
from slmperf.calibrate.watch import Watch, check, pruned_layers
from slmperf.check import InputError
from slmperf.models.files import write_folder
from slmperf.models.structure import decoder_blocks, layer_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MANIFEST = "manifest.json"


class Calibration(Mapping[str, Gram]):
    """Gram matrices by layer name ("model.layers.0.mlp.down_proj"), and what they come from.

    manifest: see `slmperf.calibrate.manifest`.
    """

    def __init__(self, grams: Mapping[str, Gram], manifest: Mapping[str, Any]) -> None:
        self.manifest = dict(manifest)
        self._grams = dict(grams)

    def __getitem__(self, name: str) -> Gram:
        return self._grams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams)

    def __len__(self) -> int:
        return len(self._grams)

    def merge(self, other: Calibration) -> None:
        """Add another calibration of the same model and layers, on other text.

        Raises InputError, with nothing changed, where model, tokenizer or layers are others.
        """
        for key in ("model", "tokenizer"):
            mine, theirs = self.manifest[key], other.manifest[key]
            if mine != theirs:
                raise InputError(
                    f"Calibration.merge: wanted the same {key}, found {mine!r} and {theirs!r}"
                )
        if set(self) != set(other):
            name = min(set(self) ^ set(other))
            raise InputError(f"Calibration.merge: wanted the same layers, found {name} in one only")
        for name, gram in self.items():
            if gram.kind != other[name].kind:
                raise InputError(
                    f"Calibration.merge: {name}: wanted (inputs, group_size, outputs) = "
                    f"{gram.kind}, found {other[name].kind}"
                )
        for name, gram in self.items():
            gram.merge(other[name])
        for key in COUNTS:
            self.manifest[key] += other.manifest[key]
        if other.manifest["source"] != self.manifest["source"]:
            self.manifest["source"] += f" + {other.manifest['source']}"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder in one step: manifest.json, and a safetensors file for each layer.

        Raises InputError where a file stands in the way.
        """
        for place in (Path(folder), *Path(folder).parents):
            if place.is_file():
                raise InputError(
                    f"{place}: wanted a folder to write a calibration to, found a file"
                )
        with write_folder(folder) as aside:
            for name, gram in self.items():
                gram.save(aside / f"{name}.safetensors")
            stored = {"layers": list(self), **self.manifest}
            (aside / _MANIFEST).write_text(json.dumps(stored, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote; matrices are mapped from the files as they are needed.

        Raises InputError for a folder that is none.
        """
        path = Path(folder) / _MANIFEST
        try:
            manifest = json.loads(path.read_text())
            layers = [str(name) for name in manifest.pop("layers")]
            for key in (*COUNTS, "source", "tokenizer", "model"):
                manifest[key]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: wanted a calibration as slmperf saves it: {error}"
            ) from error
        return cls(
            {name: Gram.load(Path(folder) / f"{name}.safetensors") for name in layers}, manifest
        )


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    layers: Iterable[str] | None = None,
    *,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | os.PathLike[str] | None = None,
    group_sizes: Mapping[str, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Gram matrices of the inputs of the named linear layers, in one pass over `batches`.

    batches: the model's own arguments (input_ids (B, T), attention_mask (B, T), ...), each
        optionally with `token_weights` (B, T) >= 0, such as 1 on the tokens of an answer.
    layers: module names; None: of every decoder block the layers that pruning makes smaller
        (`pruned_layers`), those of experts as "model.layers.0.mlp.experts.5.down_proj".
    source, tokenizer: what the manifest says of the text, "in-domain: clicks.jsonl" or "generic:
        c4.jsonl", and of its ids.
    spill: a folder; the matrices live in memory-mapped files there: 4 d^2 bytes for each layer.
        None: in memory, beside the weights.
    group_sizes: by a layer's name or the last part of it, for those whose activation scores are
        wanted (`Gram.scores`). None: 1 for down_proj and a whole KV group for o_proj where `layers`
        is None, else none.
    progress: called as progress(batches done) after each batch.

    With torch.distributed every worker brings its own batches and gets the sums of all. The model's
    training mode is restored.

    Raises InputError for a layer that the model lacks, for token ids beyond its vocabulary, for no
    batches, for a model that is not in memory, and, by name, for a layer without a token or with
    inputs that are not finite.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        raise InputError("calibrate: wanted a model in memory, found weights on the meta device")
    if isinstance(batches, Sequence):
        for batch in batches:
            check_batch(model, batch)
    if layers is None:
        named = default_layers(model)
        layers, sizes = list(named), named if group_sizes is None else dict(group_sizes)
    else:
        sizes = dict(group_sizes or {})
    watch = Watch(model, layers)
    grams = watch.grams(sizes=sizes, target=False, spill=spill)
    seen: list[Tokens] = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            check_batch(model, batch)
            tokens = Tokens.of(token_weights(batch), places(batch), device)
            seen.append(tokens)
            with watch.inputs(partial(watch.add, grams, tokens, None)):
                model(**model_inputs(batch, device), use_cache=False)
            if progress is not None:
                progress(len(seen))
    finally:
        model.train(training)
    about = manifest(model, seen, source, tokenizer)
    for gram in grams.values():
        gram.sum_over_workers()
    check(grams)
    return Calibration(grams, about)


def default_layers(model: PreTrainedModel) -> dict[str, int]:
    """What pruning makes smaller, by module name, and the sizes of the groups that leave whole."""
    found = {}
    for index, block in enumerate(decoder_blocks(model)):
        attention: Any = block.self_attn
        for name in pruned_layers(block):
            # With a head map num_key_value_groups is 1: only single heads leave such a layer.
            whole = attention.head_dim * attention.num_key_value_groups
            size = whole if name.endswith("o_proj") else 1
            found[layer_name(index, name)] = size
    return found
