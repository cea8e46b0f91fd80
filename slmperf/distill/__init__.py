"""Teaching a small model from a large one: what is minimised, the loop, and resuming it.

train                   a model, sequences, a teacher or none -> trained in place, resumable
DistillationConfig      its settings
DistillationTrainer     transformers.Trainer with batches and loss of its own
DistillationLoss        slmperf.ops.kd_loss as a module, for loops of your own
student_head            runs a language model of Transformers up to its logits, as the loss wants it
teacher_head            the same of the teacher
answer_weights          the share of answer tokens and of whole rows in the loss
use_kd_loss             the same loss inside TRL's trainers and other transformers.Trainers
TeacherCache            a teacher's hidden states or top-k at the tokens that count, on disk
"""

from slmperf.distill.cache import TeacherCache, TeacherCacheWriter, hash_of_model, hash_of_tokenizer
from slmperf.distill.config import DistillationConfig
from slmperf.distill.drop_in import use_kd_loss
from slmperf.distill.heads import student_head, teacher_head
from slmperf.distill.loss import DistillationLoss
from slmperf.distill.packing import PackedBatches
from slmperf.distill.run import TrainResult, train
from slmperf.distill.trainer import DistillationTrainer
from slmperf.distill.weights import answer_weights

__all__ = [
    "DistillationConfig",
    "DistillationLoss",
    "DistillationTrainer",
    "PackedBatches",
    "TeacherCache",
    "TeacherCacheWriter",
    "TrainResult",
    "answer_weights",
    "hash_of_model",
    "hash_of_tokenizer",
    "student_head",
    "teacher_head",
    "train",
    "use_kd_loss",
]
