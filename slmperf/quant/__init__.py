"""Post-training quantisation of decoder weights, written so that engines read it as it is.

quantize_weight, rtn, gptq, quantease    one weight; the grids Int4, Int8, Fp8
smooth                                   outliers of activations moved into weights (SmoothQuant)
quantize_model                           a whole model, block by block, by one of SCHEMES
quantize_checkpoint                      the same from folder to folder, a block in memory at a time

layer/ holds the solver for one weight, command/ `slmperf quantize`; plan, unit, driver and
artefacts are what a whole model's quantisation is made of, folds and statistics what smoothing is.
Formats of checkpoints are `slmperf.models.formats`.

Names are loaded on first use, so that the command line costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.ops.weight_spec import Fp8 as Fp8
    from slmperf.ops.weight_spec import Int4 as Int4
    from slmperf.ops.weight_spec import Int8 as Int8
    from slmperf.ops.weight_spec import WeightSpec as WeightSpec
    from slmperf.quant.checkpoint import quantize_checkpoint as quantize_checkpoint
    from slmperf.quant.layer import METHODS as METHODS
    from slmperf.quant.layer import QuantizedWeight as QuantizedWeight
    from slmperf.quant.layer import WeightReport as WeightReport
    from slmperf.quant.layer import gptq as gptq
    from slmperf.quant.layer import quantease as quantease
    from slmperf.quant.layer import quantize_weight as quantize_weight
    from slmperf.quant.layer import rtn as rtn
    from slmperf.quant.model import quantize_model as quantize_model
    from slmperf.quant.results import LayerQuantized as LayerQuantized
    from slmperf.quant.results import QuantReport as QuantReport
    from slmperf.quant.schemes import SCHEMES as SCHEMES
    from slmperf.quant.schemes import Scheme as Scheme
    from slmperf.quant.schemes import scheme_named as scheme_named
    from slmperf.quant.smoothing import SmoothReport as SmoothReport
    from slmperf.quant.smoothing import smooth as smooth

__all__ = [
    "Fp8",
    "Int4",
    "Int8",
    "gptq",
    "quantease",
    "quantize_model",
    "quantize_weight",
    "rtn",
    "smooth",
]

_SPEC = "slmperf.ops.weight_spec"
_HOMES = {
    "Fp8": _SPEC,
    "Int4": _SPEC,
    "Int8": _SPEC,
    "LayerQuantized": "slmperf.quant.results",
    "METHODS": "slmperf.quant.layer",
    "QuantReport": "slmperf.quant.results",
    "QuantizedWeight": "slmperf.quant.layer",
    "SCHEMES": "slmperf.quant.schemes",
    "Scheme": "slmperf.quant.schemes",
    "SmoothReport": "slmperf.quant.smoothing",
    "WeightReport": "slmperf.quant.layer",
    "WeightSpec": _SPEC,
    "gptq": "slmperf.quant.layer",
    "quantease": "slmperf.quant.layer",
    "quantize_checkpoint": "slmperf.quant.checkpoint",
    "quantize_model": "slmperf.quant.model",
    "quantize_weight": "slmperf.quant.layer",
    "rtn": "slmperf.quant.layer",
    "scheme_named": "slmperf.quant.schemes",
    "smooth": "slmperf.quant.smoothing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
