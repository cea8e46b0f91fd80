"""kd_loss, in the order in which a call goes through it.

heads.py     what it takes: StudentHead, TeacherHead, TeacherLogits, TeacherTopK
loss.py      formula, reference, schema, autograd, the public function
inputs.py    what a caller may get wrong; sharded heads made whole
chunks.py    the loop over chunks of rows, which all implementations share
rows.py      which rows count; statistics over the ranks of a sharded vocabulary
top_k.py     what a chunk does under a top-k teacher
"""

from slmperf.ops.kd_loss.heads import StudentHead, TeacherHead, TeacherLogits, TeacherTopK
from slmperf.ops.kd_loss.loss import KDLoss, kd_loss, kd_loss_reference

__all__ = [
    "KDLoss",
    "StudentHead",
    "TeacherHead",
    "TeacherLogits",
    "TeacherTopK",
    "kd_loss",
    "kd_loss_reference",
]
