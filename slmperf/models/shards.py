"""Writing a checkpoint's tensors file by file, as they come, without holding them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """The safetensors files of a checkpoint in `folder`, and at the end the index over them.

    Names and index are those that Transformers reads: model-00001-of-00004.safetensors and so on
    under model.safetensors.index.json, or model.safetensors alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        self._bytes: list[dict[str, int]] = []  # per file, of each tensor

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors, none of which another call has written, into a file of their own."""
        self.files.append(self.folder / f"part-{len(self.files):05d}.safetensors")
        self._bytes.append({})
        self.rewrite(len(self.files) - 1, tensors)

    def rewrite(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the file of the `index`-th call of `write` again, with these tensors instead."""
        from safetensors.torch import save_file

        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, self.files[index], metadata={"format": "pt"})
        self._bytes[index] = {name: tensor.nbytes for name, tensor in whole.items()}

    def finish(self) -> None:
        """Give the files their names and write the index."""
        count = len(self.files)
        if count == 1:
            self.files[0].rename(self.folder / WEIGHTS)
            return
        homes: dict[str, str] = {}
        for number, (file, names) in enumerate(zip(self.files, self._bytes, strict=True), start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            file.rename(self.folder / name)
            homes |= dict.fromkeys(names, name)
        total = sum(sum(names.values()) for names in self._bytes)
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
