"""What a pruned or quantised model is, and how its checkpoint is read and written.

Checkpoints are Transformers folders with safetensors only. Names are loaded on first use, so that
the file helpers in `slmperf.models.files` cost no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.models.checkpoint import load as load
    from slmperf.models.checkpoint import parameters as parameters
    from slmperf.models.checkpoint import save as save
    from slmperf.models.checkpoint import weight_bytes as weight_bytes
    from slmperf.models.checkpoint import write_pretrained as write_pretrained
    from slmperf.models.quantized import QuantizedLinear as QuantizedLinear
    from slmperf.models.quantized import replace_linear as replace_linear
    from slmperf.models.structure import shrink as shrink

__all__ = ["QuantizedLinear", "load", "replace_linear", "shrink"]

_HOMES = {
    "QuantizedLinear": "quantized",
    "load": "checkpoint",
    "parameters": "checkpoint",
    "replace_linear": "quantized",
    "save": "checkpoint",
    "shrink": "structure",
    "weight_bytes": "checkpoint",
    "write_pretrained": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
