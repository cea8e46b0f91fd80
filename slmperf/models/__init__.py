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
    from slmperf.models.engines.export import export_for_engine as export_for_engine
    from slmperf.models.engines.export import permute_kv_heads as permute_kv_heads
    from slmperf.models.masked import from_masked as from_masked
    from slmperf.models.pruned import PrunedForCausalLM as PrunedForCausalLM
    from slmperf.models.quantized import LinearScheme as LinearScheme
    from slmperf.models.quantized import QuantizedLinear as QuantizedLinear
    from slmperf.models.quantized import replace_linear as replace_linear
    from slmperf.models.resize import apply_sizes as apply_sizes
    from slmperf.models.resize import shrink as shrink
    from slmperf.models.streaming import StreamedModel as StreamedModel
    from slmperf.models.structure import Sizes as Sizes
    from slmperf.models.structure import sizes_of as sizes_of

__all__ = ["PrunedForCausalLM", "QuantizedLinear", "load", "replace_linear", "shrink"]

_HOMES = {
    "LinearScheme": "quantized",
    "PrunedForCausalLM": "pruned",
    "QuantizedLinear": "quantized",
    "Sizes": "structure",
    "StreamedModel": "streaming",
    "apply_sizes": "resize",
    "export_for_engine": "engines.export",
    "from_masked": "masked",
    "load": "checkpoint",
    "parameters": "checkpoint",
    "permute_kv_heads": "engines.export",
    "replace_linear": "quantized",
    "save": "checkpoint",
    "shrink": "resize",
    "sizes_of": "structure",
    "weight_bytes": "checkpoint",
    "write_pretrained": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
