"""counts: operations and bytes of a step, from sizes alone: what should move, and by how much.

    layers    2 N T operations forward for N weights, twice that backward, once more forward where
              layers are checkpointed (but for the last product of each, which nothing needs); the
              teacher's forward alone
    pairs     attention, 4 layers H C a pair of tokens, likewise
    heads     2 V (3 D + D of the teacher) a row: of all T rows, or of the answers alone

Over the (T, V) logits eager makes one tensor after the other (EAGER_BYTES of traffic a logit, up to
EAGER_TENSORS of them at once), where kd_loss works on chunks that stay in a cache or, on a GPU,
pass through memory a few times. So kd_loss can save that traffic and those tensors, and with few
answers nearly all of the heads; layers of student and teacher it cannot touch. The larger a teacher
is beside its vocabulary, the less of a step that is.
"""

from __future__ import annotations

from typing import NamedTuple

from slmperf.bench.roof import Roof
from slmperf.bench.train.problems import DTYPES, Problem
from slmperf.models.shapes import Shape

# Bytes read and written by eager per logit of fp32: forward log_softmax 8, softmax 8, kl_div 32
# (x log x, product, difference), sum 4, cross_entropy 8; backward kl_div 20, log_softmax 12,
# cross_entropy 16, their sum 12.
EAGER_BYTES = 120
# Beside them, where logits come in bf16: both made fp32, and the student's gradient bf16.
CAST_BYTES = 18
# Logits and softmaxes of both models, and the three tensors of kl_div.
EAGER_TENSORS = 7


class Counts(NamedTuple):
    """Of one step.

    layer_flops    student forward and backward, teacher forward, attention included
    head_flops     both heads over all rows
    answer_flops   both heads over the answers alone
    logit_bytes    what eager reads and writes of (T, V) tensors
    logit_mib      what eager holds of them at most
    """

    layer_flops: float
    head_flops: float
    answer_flops: float
    logit_bytes: float
    logit_mib: float

    @property
    def head_share(self) -> float:
        """Of the operations of a step over all rows."""
        return self.head_flops / (self.layer_flops + self.head_flops)

    def expected_us(self, roof: Roof, dtype: str) -> tuple[float, float]:
        """Least microseconds of eager and of kd_loss: products at the machine's best rate, and of
        eager the traffic after them.
        """
        eager = roof.ideal_us(0, int(self.layer_flops + self.head_flops), dtype)
        eager += roof.ideal_us(int(self.logit_bytes), 0, dtype)
        return eager, roof.ideal_us(0, int(self.layer_flops + self.answer_flops), dtype)


def counts_of(problem: Problem) -> Counts:
    """What a step of this problem takes, whoever computes it."""
    student, teacher = problem.student, problem.teacher
    layers = 3 * _forward(student, problem) + _forward(teacher, problem)
    if problem.checkpointing:
        last = 2 * problem.tokens * student.layers * student.hidden * student.intermediate
        layers += _forward(student, problem) - last
    a_row = 2 * student.vocabulary * (3 * student.hidden + teacher.hidden)
    logits = problem.tokens * student.vocabulary
    cast = CAST_BYTES if DTYPES[problem.dtype].itemsize == 2 else 0
    return Counts(
        layer_flops=float(layers),
        head_flops=float(a_row * problem.tokens),
        answer_flops=float(a_row * problem.answers),
        logit_bytes=float((EAGER_BYTES + cast) * logits),
        logit_mib=EAGER_TENSORS * 4 * logits / 2**20,
    )


def _forward(shape: Shape, problem: Problem) -> float:
    """Operations of the layers, each token seeing those before it in its row."""
    pairs = problem.rows * problem.context * (problem.context + 1) / 2
    matrices = 2 * problem.tokens * shape.layers * shape.layer_matrix_parameters
    return matrices + 4 * shape.layers * shape.heads * shape.head_size * pairs
