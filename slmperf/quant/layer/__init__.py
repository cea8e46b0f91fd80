"""The layer solver: `quantize_weight` (solve), over column blocks (columns), with scales (scales)
and the guard of rows (errors)."""

from slmperf.quant.layer.solve import METHODS as METHODS
from slmperf.quant.layer.solve import QuantizedWeight as QuantizedWeight
from slmperf.quant.layer.solve import WeightReport as WeightReport
from slmperf.quant.layer.solve import gptq as gptq
from slmperf.quant.layer.solve import quantease as quantease
from slmperf.quant.layer.solve import quantize_weight as quantize_weight
from slmperf.quant.layer.solve import rtn as rtn
