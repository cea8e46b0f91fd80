"""Teaching a small model from a large one: what is minimised, the loop, and resuming it.

DistillationTrainer     transformers.Trainer with batches, loss and checkpoints of its own
DistillationConfig      its settings: TrainingArguments and ours
OnPolicySampler         batches of the student's own text
train                   one call, resumable: what recipes use
DistillationLoss        slmperf.ops.kd_loss as a module, for loops of your own
student_head            runs a language model of Transformers up to its logits, as the loss wants it
teacher_head            the same of the teacher
answer_weights          the share of answer tokens and of whole rows in the loss
use_kd_loss             the same loss inside TRL's trainers and other transformers.Trainers
TeacherCache            a teacher's hidden states or top-k at the tokens that count, on disk
CachedTeacher           a cache as a teacher, with a choice of what stands for the tail of a top-k
ServerTeacher           a teacher behind an OpenAI-compatible server
PaddedGeneration, ContinuousBatching, ServerGenerator   where the student's own text comes from
CompletionServer        such a server, for a teacher or for text
write_teacher_text      text that a teacher writes, to train on as it stands
"""

from slmperf.distill.cache import TeacherCache, TeacherCacheWriter, hash_of_model, hash_of_tokenizer
from slmperf.distill.config import DistillationConfig
from slmperf.distill.drop_in import use_kd_loss
from slmperf.distill.heads import student_head, teacher_head
from slmperf.distill.loss import DistillationLoss
from slmperf.distill.on_policy import (
    ContinuousBatching,
    OnPolicySampler,
    PaddedGeneration,
    ServerGenerator,
)
from slmperf.distill.packing import PackedBatches
from slmperf.distill.run import TrainResult, train
from slmperf.distill.server import CompletionServer
from slmperf.distill.teacher_text import read_teacher_text, write_teacher_text
from slmperf.distill.teachers import CachedTeacher, ServerTeacher
from slmperf.distill.trainer import DistillationTrainer
from slmperf.distill.weights import answer_weights

__all__ = [
    "CachedTeacher",
    "CompletionServer",
    "ContinuousBatching",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationTrainer",
    "OnPolicySampler",
    "PackedBatches",
    "PaddedGeneration",
    "ServerGenerator",
    "ServerTeacher",
    "TeacherCache",
    "TeacherCacheWriter",
    "TrainResult",
    "answer_weights",
    "hash_of_model",
    "hash_of_tokenizer",
    "read_teacher_text",
    "student_head",
    "teacher_head",
    "train",
    "use_kd_loss",
    "write_teacher_text",
]
