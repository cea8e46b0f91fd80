"""The real Llama of 3 million parameters in the shared data, as a Transformers model.

The file is llama2.c's version 2, Q8_0: a header of 256 bytes, the norms in fp32, then every matrix
as int8 values and one fp32 scale for each 64 of them, in a fixed order.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from stories260k import Sizes, llama
from transformers import LlamaForCausalLM

TOKENS = "tok4096.bin"


def load_stories3m(data: Path) -> LlamaForCausalLM:
    raw = (data / "models-agpl" / "stories3M-q80.bin").read_bytes()
    magic, version, *header = struct.unpack("<Ii7i", raw[:36])
    shared, group = struct.unpack("<Bi", raw[36:41])
    assert (magic, version, shared, group) == (0x616B3432, 2, 1, 64)
    sizes = Sizes(*header)
    position = 256

    def norms(*shape: int) -> torch.Tensor:
        nonlocal position
        values = np.frombuffer(raw, "<f4", int(np.prod(shape)), position)
        position += values.nbytes
        return torch.from_numpy(values.copy()).view(shape)

    def matrix(*shape: int) -> torch.Tensor:
        nonlocal position
        values = np.frombuffer(raw, np.int8, int(np.prod(shape)), position)
        position += values.nbytes
        scales = np.frombuffer(raw, "<f4", values.size // group, position)
        position += scales.nbytes
        whole = values.reshape(-1, group).astype(np.float32) * scales[:, None]
        return torch.from_numpy(whole).view(shape)

    def matrices(*shape: int) -> torch.Tensor:
        return torch.stack([matrix(*shape) for _ in range(sizes.layers)])

    hidden, mlp = sizes.hidden, sizes.mlp
    keys = sizes.kv_heads * (hidden // sizes.heads)
    tensors = {
        "attention_norm": norms(sizes.layers, hidden),
        "mlp_norm": norms(sizes.layers, hidden),
        "norm": norms(hidden),
        "embedding": matrix(sizes.vocabulary, hidden),
        "q": matrices(hidden, hidden),
        "k": matrices(keys, hidden),
        "v": matrices(keys, hidden),
        "o": matrices(hidden, hidden),
        "gate": matrices(mlp, hidden),
        "down": matrices(hidden, mlp),
        "up": matrices(mlp, hidden),
    }
    assert position == len(raw)
    return llama(sizes, tensors)
