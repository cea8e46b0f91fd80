"""Tensors in files: what is too large for memory lives in a folder and is paged in as needed."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slmperf.check import InputError


def zeros(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    spill: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Zeros on `device`, or, with a folder to spill to, in a memory-mapped file there.

    The file has no name any more when this returns: its space is free again when the tensor, or the
    process, is gone. Raises InputError where the folder has no room for it.
    """
    if spill is None:
        return torch.zeros(*shape, dtype=dtype, device=device)
    count = math.prod(shape)
    folder = Path(spill)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".spill-", dir=folder)
        try:
            # A full disk must show here: a mapped page without room behind it ends the process.
            os.posix_fallocate(handle, 0, max(1, count) * dtype.itemsize)
            mapped = torch.from_file(path, shared=True, size=max(1, count), dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        size = count * dtype.itemsize / 2**20
        raise InputError(
            f"spill: wanted {size:.0f} MiB in {folder}, found: {error.strerror}"
        ) from error
    return mapped[:count].view(*shape)
