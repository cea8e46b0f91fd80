"""Streamed statistics of what flows into a model's linear layers, for pruning and quantisation."""

from slmperf.calibrate.blocks import BlockStream as BlockStream
from slmperf.calibrate.calibration import Calibration as Calibration
from slmperf.calibrate.calibration import calibrate
from slmperf.calibrate.gram import Gram as Gram
from slmperf.calibrate.manifest import check_tokenizer as check_tokenizer
from slmperf.calibrate.manifest import fingerprint as fingerprint
from slmperf.calibrate.manifest import text_hash as text_hash
from slmperf.calibrate.watch import pruned_layers as pruned_layers

__all__ = ["calibrate"]
