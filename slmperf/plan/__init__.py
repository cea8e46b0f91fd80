"""What a smaller shape would buy, before anybody trains it.

latency    LatencyModel: prefill and decode time from shapes and a few constants; presets/ holds
           those that are shipped
work       flops and bytes of a forward pass: what the latency is made of
fit        constants from measurements: the paper's tables, or what `slmperf bench serve` wrote
search     plan: the shapes that meet a latency, with their bytes and costs
recipe     a choice of them as a recipe for `slmperf run`
plot       latency against parameters
"""

from slmperf.plan.latency import LatencyModel
from slmperf.plan.search import plan

__all__ = ["LatencyModel", "plan"]
