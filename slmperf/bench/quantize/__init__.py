"""`slmperf bench quantize`: what a layer's quantisation costs, and how good it is; whole models."""
