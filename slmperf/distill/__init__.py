"""Teaching a small model from a large one: what is minimised, the loop, and resuming it.

train                   a model, sequences, a teacher or none -> trained in place, resumable
DistillationConfig      its settings
DistillationLoss        kd_weight * D(teacher, student) + ce_weight * CE, weighted per token
DistillationTrainer     transformers.Trainer with both
"""

from slmperf.distill.config import DistillationConfig
from slmperf.distill.loss import DistillationLoss, LossParts
from slmperf.distill.packing import PackedBatches
from slmperf.distill.run import TrainResult, train
from slmperf.distill.trainer import DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationLoss",
    "DistillationTrainer",
    "LossParts",
    "PackedBatches",
    "TrainResult",
    "train",
]
