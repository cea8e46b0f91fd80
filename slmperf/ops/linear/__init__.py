"""Low-precision linear layers; the public function is linear.py's, the weights weights.py's."""

from slmperf.ops.linear.experts import stack_experts as stack_experts
from slmperf.ops.linear.linear import linear as linear
from slmperf.ops.linear.quantize_input import quantize_input as quantize_input
from slmperf.ops.linear.weights import Fp8Weight as Fp8Weight
from slmperf.ops.linear.weights import Int4Weight as Int4Weight
from slmperf.ops.linear.weights import Int8Weight as Int8Weight
from slmperf.ops.linear.weights import QuantizedInput as QuantizedInput
