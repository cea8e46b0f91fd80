"""Post-training quantisation of decoder weights, saved in the compressed-tensors layout."""

from slmperf.quant.model import QuantReport as QuantReport
from slmperf.quant.model import quantize_model
from slmperf.quant.rounding import Codes as Codes
from slmperf.quant.rounding import Int8, rtn

__all__ = ["Int8", "quantize_model", "rtn"]
