"""Streamed statistics of what flows into a model's linear layers, for pruning and quantisation."""

from slmperf.calibrate.blocks import BlockStream as BlockStream
from slmperf.calibrate.gram import Gram as Gram
from slmperf.calibrate.gram import calibrate

__all__ = ["calibrate"]
