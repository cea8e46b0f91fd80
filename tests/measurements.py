"""Measurements that a latency model would make, for fits that must find it again."""

import numpy as np

from slmperf.models.shapes import SHAPES
from slmperf.plan import LatencyModel
from slmperf.plan.fit import Cell


def measurements(model: LatencyModel, noise: float = 0.0, schemes=("fp8",)) -> list[Cell]:
    """Three shapes, three contexts, cold, siblings and hot; times off by a share of `noise`."""
    generator = np.random.default_rng(0)
    cells = []
    for name in ("8b", "3b", "2.1b"):
        for context in (2048, 8192, 32768):
            for scheme in schemes:
                for items, hot in ((1, False), (4, False), (8, True)):
                    where = (context, 2, scheme, items, 64, hot)
                    cell = Cell(SHAPES[name], *where, ttft_ms=1.0)
                    exact = model.prefill_ms(cell.shape, **cell.settings)
                    time_ms = float(exact) * (1 + noise * generator.standard_normal())
                    cells.append(cell._replace(ttft_ms=time_ms))
    return cells
