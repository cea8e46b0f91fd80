"""Reading a checkpoint's files: which tensors there are, whether the files are whole, and the model
without weights that they go into."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.check import InputError, one_line
from slmperf.models.shards import INDEX, WEIGHTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class TensorFiles(contextlib.ExitStack):
    """The tensors of a checkpoint, read one at a time; its files stay open inside the `with` block.

    folder, stored  of `stored_tensors`: where the files are, and tensor name -> file
    """

    def __init__(self, folder: Path, stored: Mapping[str, Path]) -> None:
        super().__init__()
        self.folder, self.stored = folder, stored
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """The tensor `name`; InputError where the checkpoint has none."""
        return self._file_of(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, of which only the file's header is read."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def _file_of(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self.stored:
            refuse_incomplete(self.folder, [name], [])
        file = self.stored[name]
        if file not in self._open:
            self._open[file] = self.enter_context(safe_open(file, framework="pt"))
        return self._open[file]


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a configuration, its parameters in `dtype` on the meta device,
    in evaluation mode; what is computed and not stored (rotary frequencies) is there."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def refuse_incomplete(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """InputError where a checkpoint's tensors are not those that its model wants."""
    for found, what in ((missing, "lacks"), (unexpected, "has an unknown")):
        names = sorted(found)
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: the checkpoint {what} tensor {names[0]}{rest}")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of a folder whose safetensors files are all there and whole."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(shards))]
    else:
        raise InputError(f"{folder}: wanted {WEIGHTS} or {INDEX}, found neither")
    return {name: file for file in files for name in _safetensors_names(file)}


def _safetensors_names(file: Path) -> list[str]:
    """The tensors that a safetensors file names; InputError if the file is not as long as its
    header says.

    The header is an 8-byte little-endian length and that many bytes of JSON with each tensor's byte
    range after it (https://github.com/huggingface/safetensors, "Format").
    """
    if not file.is_file():
        raise InputError(f"{file}: wanted a safetensors file, found none")
    found = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        wanted = 8 + length
        if found < max(8, wanted):
            raise InputError(
                f"{file}: truncated: wanted at least {max(8, wanted)} bytes, found {found}"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            wanted += max((int(item["data_offsets"][1]) for item in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a safetensors file: {one_line(error)}") from error
    if found != wanted:
        state = "truncated" if found < wanted else "too long"
        raise InputError(f"{file}: {state}: wanted {wanted} bytes, found {found}")
    return list(header)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError for anything else."""
    if not file.is_file():
        raise InputError(f"{file}: wanted a file, found none")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: wanted a JSON object, found {type(content).__name__}")
    return content
