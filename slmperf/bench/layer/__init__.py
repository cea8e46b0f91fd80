"""One Transformer block, part by part: where a layer's time goes, pruned beside unpruned.

measure   times the parts and the whole, for several shapes in turns
block     the block as named steps, one function a part, in each scheme
options   what the command was asked for: shapes, contexts, schemes, and what fits into memory
report    tables and lines
plot      stacked bars
"""

from slmperf.bench.layer.measure import LayerTime, PartTime, measure_layer, measure_layers

__all__ = ["LayerTime", "PartTime", "measure_layer", "measure_layers"]
