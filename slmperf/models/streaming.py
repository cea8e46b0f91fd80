"""StreamedModel: change a checkpoint that does not fit into memory, one decoder block at a time.

Embeddings, last norm and head are held; a block's tensors are there only between the beginning and
the end of `block`. What a block has become is written at once, beside the target folder, which
appears when everything is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.checkpoint import add_older_fields, read_config
from slmperf.models.files import write_folder
from slmperf.models.formats.compressed_tensors import is_quantized, write_config
from slmperf.models.resize import apply_sizes
from slmperf.models.shards import ShardWriter
from slmperf.models.stored import empty_model, stored_tensors
from slmperf.models.structure import (
    FAMILIES,
    block_of,
    decoder_blocks,
    family_of,
    fit_experts,
    layer_name,
    linear_blocks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a checkpoint's folder may hold beside config and weights, and keeps through pruning.
_COMPANIONS = ("generation_config.json", "chat_template.jinja", "merges.txt", "vocab.json")


class StreamedModel(contextlib.AbstractContextManager["StreamedModel"]):
    """The checkpoint in `folder`, on its way to a changed one in `out`.

        with StreamedModel("big", "small") as streamed:
            for index in range(len(streamed.blocks)):
                with streamed.block(index) as block:
                    keep_neurons(block, ...)

    model       the model; the tensors of its blocks are on the meta device
    blocks      its decoder blocks, in order

    Leaving the outer block without an exception does what `finish` does, unless it was called, and
    puts all of it in the place of `out`. On an exception `out` is as it was.

    Blocks may be made smaller, or their linear layers replaced by `QuantizedLinear`; not both.
    Raises InputError for a folder that is no whole checkpoint of a model with floating weights that
    `linear_blocks` or `decoder_blocks` takes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """dtype: of the tensors from here on; None: as they are stored. device: of what is held."""
        self.pruning_note = ""
        self._folder, self._out = Path(folder), Path(out)
        self._dtype, self._device = dtype, torch.device(device)
        config = read_config(self._folder)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{self._folder}: wanted floating weights, found a quantised checkpoint"
            )
        self._stored = stored_tensors(self._folder)
        self.model: PreTrainedModel = empty_model(
            config, dtype or config.dtype or torch.get_default_dtype()
        )
        for module in self.model.modules():  # what is computed and not stored
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        experts = family_of(config) == "mixtral"
        self.blocks = decoder_blocks(self.model) if experts else linear_blocks(self.model)
        fit_experts(self.model)
        self._assign(self.model, "", [name for name in self._stored if block_of(name) is None])
        self.model.tie_weights()
        self._written: set[int] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StreamedModel:
        self._stack = contextlib.ExitStack()
        self._aside = self._stack.enter_context(write_folder(self._out))
        self._shards = ShardWriter(self._aside)
        self._finished = False
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if not self._finished:
                self.finish()

    def first_rows(self) -> dict[str, Tensor]:
        """The first row (of the first expert) of every tensor of the blocks, by the names that the
        model has, read from the files: what tells checkpoints apart at little cost.
        """
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        names = [name for name in self._stored if block_of(name) is not None]
        for file in sorted({self._stored[name] for name in names}):
            with safe_open(file, framework="pt") as stored:
                for name in names:
                    if self._stored[name] == file:
                        part = stored.get_slice(name)
                        found[name] = part[:1] if len(part.get_shape()) > 1 else part[:]
        return {name: row[0] if row.dim() > 1 else row for name, row in _fused(found).items()}

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its tensors, once for each block; they are written and freed when the
        `with` block ends."""
        if index in self._written:
            raise InputError(f"StreamedModel: block {index} is written already, wanted another")
        block = self.blocks[index]
        names = [name for name in self._stored if block_of(name) == index]
        self._assign(block, layer_name(index, ""), names)
        try:
            yield block
            tensors = {layer_name(index, name): one for name, one in block.state_dict().items()}
            self._shards.write(tensors)
            self._written.add(index)
        finally:
            block.to("meta")

    def _assign(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        """Put the stored tensors `names` into the module whose own names follow on `prefix`."""
        from safetensors import safe_open

        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored[name] for name in names}):
            with safe_open(file, framework="pt", device=str(self._device)) as stored:
                for name in names:
                    if self._stored[name] == file:
                        value = stored.get_tensor(name)
                        tensors[name] = value if self._dtype is None else value.to(self._dtype)
        tensors = {name.removeprefix(prefix): value for name, value in _fused(tensors).items()}
        wanted = dict(module.state_dict())
        if prefix == "":
            wanted = {name: tensor for name, tensor in wanted.items() if block_of(name) is None}
            if self.model.config.tie_word_embeddings:
                wanted.pop("lm_head.weight")
                tensors.pop("lm_head.weight", None)
        for name in sorted(set(wanted) | set(tensors)):
            have, want = tensors.get(name), wanted.get(name)
            if have is None or want is None:
                what = "lacks" if have is None else "has an unknown"
                raise InputError(f"{self._folder}: the checkpoint {what} tensor {prefix}{name}")
            if have.shape != want.shape:
                raise InputError(
                    f"{self._folder}: {prefix}{name} is {tuple(have.shape)}, "
                    f"config.json wants {tuple(want.shape)}"
                )
        module.load_state_dict(tensors, strict=False, assign=True)

    def finish(self) -> Path:
        """Copy the blocks that nobody wrote, write the rest, the configuration that the blocks ask
        for and the tokenizer's files. Returns the folder that becomes `out` when the `with` block
        ends, for what else is to be in it.

        Of quantised blocks the configuration says how (see `write_config`), of others the sizes
        (see `apply_sizes`; `pruning_note` then says what it did).
        """
        for index in range(len(self.blocks)):
            if index not in self._written:
                with self.block(index):
                    pass
        rest = {
            name: value for name, value in self.model.state_dict().items() if block_of(name) is None
        }
        if self.model.config.tie_word_embeddings:
            rest.pop("lm_head.weight")
        self._shards.write(rest)
        if is_quantized(self.model):
            write_config(self.model)
        elif family_of(self.model.config) in FAMILIES:
            self.model = apply_sizes(self.model)
            self.blocks, self.pruning_note = self.model.model.layers, self.model.pruning_note
        model = self.model
        if model.config.model_type == "mixtral":
            self._split_experts()
        self._shards.finish()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self._aside)
        add_older_fields(self._aside)
        for file in sorted(self._folder.iterdir()):
            if file.is_file() and (file.name in _COMPANIONS or "token" in file.name):
                shutil.copyfile(file, self._aside / file.name)
        self._finished = True
        return self._aside

    def _split_experts(self) -> None:
        """Stock Mixtral reads each expert's matrices under names of their own."""
        from safetensors.torch import load_file

        for index, file in enumerate(self._shards.files):
            self._shards.rewrite(index, _split(load_file(file)))


# Mixtral's checkpoints: block_sparse_moe.gate.weight, and for each expert e
# block_sparse_moe.experts.e.{w1,w3,w2}.weight: gate (F, D), up (F, D) and down (D, F). In memory:
# mlp.gate.weight, mlp.experts.gate_up_proj (E, 2F, D) and mlp.experts.down_proj (E, D, F).


def _fused(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a block under the names that the module has."""
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): stored[name] for name in stored}
    firsts = [name for name in tensors if name.endswith(".experts.0.w1.weight")]
    for first in firsts:
        start = first.removesuffix("0.w1.weight")
        experts = sum(n.startswith(start) and n.endswith(".w1.weight") for n in tensors)
        gate, down, up = (
            [tensors.pop(f"{start}{e}.w{part}.weight") for e in range(experts)]
            for part in (1, 2, 3)
        )
        pairs = zip(gate, up, strict=True)
        tensors[f"{start}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{start}down_proj"] = torch.stack(down)
    return tensors


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `_fused`."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                start = f"{name.removesuffix('gate_up_proj')}{expert}"
                split[f"{start}.w1.weight"], split[f"{start}.w3.weight"] = both.chunk(2)
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(tensor):
                split[f"{name.removesuffix('down_proj')}{expert}.w2.weight"] = down
        else:
            split[name] = tensor
    return split
