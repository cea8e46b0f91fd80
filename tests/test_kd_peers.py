"""kd_loss and divergence on the grids that other projects test theirs on, and beside Liger's.

The grids are those of Liger-Kernel, flash-linear-attention, QuACK and Cut Cross-Entropy: shapes,
temperatures, betas, shares of ignored rows, and inputs that are uniform where theirs are. What is
asked of the result is not their tolerances, which in half precision hardly bind (gradients of a
mean are smaller than they), but the budget of every op here. The largest are marked slow.

Liger's own losses run beside ours, interpreted, where the package is installed.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from slmperf.ops import (
    JSD,
    ForwardKL,
    StudentHead,
    TeacherHead,
    TotalVariation,
    divergence,
    kd_loss,
)
from slmperf.ops.routing import interpreted
from slmperf.testing.battery import Truth, results, run_case
from slmperf.testing.case import BF16, FP16, FP32
from slmperf.testing.cases import DivergenceCase
from slmperf.testing.interpreter import cure
from slmperf.testing.kd_cases import KDLossCase

if not torch.cuda.is_available():
    cure()
slow = pytest.mark.slow


@dataclass(frozen=True)
class PeerCase(KDLossCase):
    """A case with inputs as a peer makes them.

    ignored  the label that does not count, and how many rows of a hundred have it
    uniform  hidden states and heads between 0 and 1: logits that share a large part
    """

    ignored: tuple[int, int]
    uniform: bool

    @property
    def ignore_index(self):
        return self.ignored[0]

    def tensors(self, device="cpu"):
        generator = self.generator(device)
        rows, vocabulary, mine, theirs = self.sizes
        made = torch.rand if self.uniform else torch.randn

        def new(*size):
            # Uniform ones as they are; others so that logits are of order 1.
            scale = 1.0 if self.uniform or size[0] == rows else size[-1] ** -0.5
            return (scale * made(*size, generator=generator, device=device)).to(self.dtype)

        found = {"hidden": new(rows, mine), "weight": new(vocabulary, mine)}
        found |= {"teacher_hidden": new(rows, theirs), "teacher_weight": new(vocabulary, theirs)}
        if "bias" in self.differentiable:
            found |= {"bias": new(vocabulary), "teacher_bias": new(vocabulary)}
        if self.cross_entropy or self.ignored[1]:
            labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
            count = rows * self.ignored[1] // 100
            some = torch.randperm(rows, generator=generator, device=device)[:count]
            # A label that is the ignored one by chance does not count either: as theirs.
            found["labels"] = labels.index_fill(0, some, self.ignored[0])
        return found


def peer(sizes, dtype, kind=ForwardKL(), *, logits="fp32", reduced="mean", cross_entropy=0.0,  # noqa: B008
         temperature=1.0, extras="plain", chunk=0, ignored=(-100, 0), uniform=False):  # fmt: skip
    return PeerCase(
        dtype, logits, sizes, kind, "head", reduced, cross_entropy, temperature, extras, "peer",
        chunk, ignored, uniform,
    )  # fmt: skip


def modes(dtype):
    """How logits of an input dtype may be kept on a CPU."""
    return ("fp32", "bf16") if dtype == BF16 else ("fp32",)


# --- Liger's ------------------------------------------------------------------------------------

# B x T, V, hidden size of the teacher; the student's is half of it.
LIGER_SIZES = [
    pytest.param((4 * 423, 1423, 83, 167), id="4x423"),
    pytest.param((8 * 128, 4096, 512, 1024), id="8x128", marks=slow),
]
each_jsd = pytest.mark.parametrize(
    "temperature,beta", [(1.0, 0.5), (2.0, 0.1), (1.0, 0.0), (1.0, 1.0)]
)
each_half = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


@each_half
@each_jsd
@pytest.mark.parametrize("sizes", LIGER_SIZES)
def test_fused_linear_jsd(sizes, temperature, beta, dtype):
    for logits in modes(dtype):
        run_case(peer(sizes, dtype, JSD(beta), temperature=temperature, logits=logits,
                      uniform=True), "cpu")  # fmt: skip


@each_half
@pytest.mark.parametrize("ignore_index,share", [(2, 25), (42, 50), (-100, 100)])
@pytest.mark.parametrize("sizes", LIGER_SIZES)
def test_fused_linear_jsd_ignores(sizes, ignore_index, share, dtype):
    """Also with all rows ignored: 0, and gradients of exactly 0."""
    case = peer(sizes, dtype, JSD(0.5), ignored=(ignore_index, share), uniform=True)
    run_case(case, "cpu")
    if share == 100:
        truth = Truth(case, "cpu")
        assert not any(x.any() for x in results(case, "cpu", truth.tensors, truth.upstream))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 42])
@pytest.mark.parametrize("sizes", [(4, 8, 4, 8), (63, 41, 20, 41)], ids=str)
def test_fused_linear_jsd_tiny(sizes, ignore_index, dtype):
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        for share in (0, 30):
            run_case(
                peer(sizes, dtype, JSD(beta), ignored=(ignore_index, share), uniform=True), "cpu"
            )


@each_half
@pytest.mark.parametrize("extras", ["plain", "bias"])
@pytest.mark.parametrize(
    "temperature,hard,soft,beta", [(1.0, 0.5, 0.5, 0.5), (2.0, 0.0, 1.0, 0.8), (0.5, 1.0, 0.0, 0.2)]
)
@pytest.mark.parametrize(
    "sizes", [(141, 123, 31, 31), pytest.param((1024, 4096, 1024, 1024), marks=slow)], ids=str
)
def test_chunked_jsd(sizes, temperature, hard, soft, beta, extras, dtype):
    """Theirs weighs both parts; ours shares 1 out, which is the same up to a factor."""
    run_case(
        peer(sizes, dtype, JSD(beta), cross_entropy=hard / (hard + soft), temperature=temperature,
             extras=extras, ignored=(-100, 20)), "cpu",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(64, 3200, 128, 256), pytest.param((1024, 3200, 1024, 2048), marks=slow)],
    ids=str,
)
def test_autocast(sizes, dtype):
    """fp32 weights under autocast, against the truth of the weights as autocast rounds them."""
    case = peer(sizes, dtype, JSD(0.5), uniform=True)
    truth = Truth(case, "cpu")
    wide = {name: x.float().requires_grad_(name in case.differentiable)
            for name, x in truth.tensors.items()}  # fmt: skip
    with torch.autocast("cpu", dtype=dtype):
        loss = case.run(wide, "cpu")
    found = torch.autograd.grad(loss, [wide["hidden"], wide["weight"]], truth.upstream.float())
    truth.judge("autocast", [loss.detach(), *(x.to(dtype) for x in found)])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "shape",
    [
        (401, 1271),
        pytest.param((2 * 1024, 3200), marks=slow),
        pytest.param((41 * 401, 1271), marks=slow),
    ],
    ids=str,
)
def test_unfused_jsd(shape, beta, dtype):
    case = DivergenceCase(dtype, *shape, JSD(beta), 1.0, "apart")
    truth = Truth(case, "cpu", torch.full(shape[:1], 2.0))
    truth.judge("cpu, twice the loss", results(case, "cpu", truth.tensors, truth.upstream))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", [ForwardKL(), TotalVariation()], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (401, 1271),
        (3 * 43, 32000),
        pytest.param((512, 32000), marks=slow),  # theirs: 4096 rows
        pytest.param((32 * 1024, 1024), marks=slow),
        pytest.param((256, 128256), marks=slow),  # theirs: 4096 rows
    ],
    ids=str,
)
def test_unfused_kl_and_total_variation(shape, kind, dtype):
    """Reductions are the caller's: none, sum, and both means."""
    case = DivergenceCase(dtype, *shape, kind, 1.0, "apart")
    rows = shape[0]
    for upstream in (torch.ones(rows), torch.full((rows,), 1 / rows), torch.randn(rows)):
        truth = Truth(case, "cpu", upstream)
        truth.judge("cpu", results(case, "cpu", truth.tensors, truth.upstream))
        if math.prod(shape) > 10**6:
            break


# --- flash-linear-attention's, QuACK's, Cut Cross-Entropy's ---------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (32, 32000, 64, 128),  # theirs have 1024 and 2048
        pytest.param((32, 32000, 1024, 1024), marks=slow),
        pytest.param((32, 100000, 512, 1024), marks=slow),
    ],
    ids=str,
)
def test_fused_kl(sizes, dtype):
    run_case(peer(sizes, dtype, uniform=False, chunk=8), "cpu")


def test_a_teacher_that_asks_for_a_gradient_gets_none():
    """flash-linear-attention refuses such a teacher; here it is simply no part of the graph."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    mine = [torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)]
    kd_loss(StudentHead(*mine), TeacherHead(hidden, weight)).loss.backward()
    assert hidden.grad is None and weight.grad is None and mine[0].grad is not None


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("reduced", ["mean", "sum"])
@pytest.mark.parametrize(
    "sizes,chunk,share",
    [
        ((8, 32000, 96, 96), 16, 0),
        ((24, 50264, 96, 96), 16, 0),
        ((128, 2001, 96, 96), 32, 15),
        ((600, 2001, 96, 96), 256, 15),
        pytest.param((24, 128256, 256, 256), 16, 0, marks=slow),
        pytest.param((16, 50264, 512, 512), 16, 0, marks=slow),
        pytest.param((1024, 2001, 768, 768), 256, 15, marks=slow),
    ],
)
def test_chunked_linear_cross_entropy(sizes, chunk, share, reduced, dtype):
    """Ragged last chunks; the cross entropy alone, and beside the divergence."""
    for mixed in (1.0, 0.5):
        case = peer(sizes, dtype, reduced=reduced, cross_entropy=mixed, chunk=chunk,
                    ignored=(-100, share))  # fmt: skip
        run_case(case, "cpu")


def test_three_dimensions_through_views():
    """(B, T, D) hidden states, flattened by the caller: the gradient comes back as (B, T, D)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator).requires_grad_()
    shifted = hidden[:, :-1].flatten(0, 1)  # a copy, since the last position is left out
    weight, theirs = torch.randn(2, 31, 8, generator=generator)
    loss = kd_loss(StudentHead(shifted, weight), TeacherHead(shifted.detach() * 0.5, theirs)).loss
    loss.backward()
    assert hidden.grad.shape == (3, 5, 8) and not hidden.grad[:, -1].any()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("extras", ["plain", "softcap", "bias"])
@pytest.mark.parametrize("sizes", [(256, 512, 128), (252, 507, 128), (252, 507, 123)], ids=str)
def test_cut_cross_entropy(sizes, extras, dtype):
    rows, vocabulary, hidden = sizes
    for reduced in ("none", "mean", "sum"):
        for share in (0, 20):
            case = peer((rows, vocabulary, hidden, hidden), dtype, reduced=reduced, extras=extras,
                        cross_entropy=1.0, ignored=(-100, share))  # fmt: skip
            run_case(case, "cpu")


# --- beside Liger's kernels -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def liger():
    """Liger's two fused distillation losses, their kernels interpreted on CPU tensors."""
    reason = "liger-kernel is not installed (or not on PYTHONPATH)"
    pytest.importorskip("liger_kernel", reason=reason)
    if not interpreted():
        pytest.skip("Triton kernels run on a device here")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD, LigerFusedLinearJSDLoss


def heads(dtype=FP32, rows=12, vocabulary=57, mine=8, theirs=16, gap=None):
    """Leaves of the student, tensors of the teacher, labels with some ignored."""
    generator = torch.Generator().manual_seed(1)

    def new(*size, scale=1.0):
        return scale * torch.randn(*size, generator=generator)

    hidden, weight = new(rows, mine), new(vocabulary, mine)
    teacher = [new(rows, theirs), new(vocabulary, theirs, scale=0.7)]
    if gap is not None:  # logits around 20, the student's `gap` away from its teacher's
        hidden[:, 0], weight[:, 0] = 20.0, 1.0
        teacher = [hidden.clone(), weight.clone()]
        weight[:, 1:] += gap * new(vocabulary, mine - 1)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::4] = -100
    student = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    return student, [x.to(dtype) for x in teacher], labels


def ours(student, teacher, labels, beta, temperature=1.0, **more):
    settings = {"labels": labels, "divergence": JSD(beta), "temperature": temperature} | more
    loss = kd_loss(StudentHead(*student), TeacherHead(*teacher), **settings).loss
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def gold(student, teacher, labels, beta, temperature=1.0):
    wide = [x.detach().double().requires_grad_() for x in student]
    return ours(wide, [x.double() for x in teacher], labels, beta, temperature, impl="reference")


def relative(found, wanted):
    """Largest error of loss and gradients, each by the largest entry of the truth."""
    return [
        ((one.double() - truth).abs().max() / truth.abs().max()).item()
        for one, truth in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_liger_fused_linear_jsd(liger, beta, temperature):
    """In fp32 the two agree: same formula, same ends, same mean over what is not ignored."""
    student, teacher, labels = heads()
    theirs = liger[0](jsd_beta=beta, temperature=temperature)
    loss = theirs(student[0], student[1], teacher[0], teacher[1], labels)
    found = [loss.detach(), *torch.autograd.grad(loss, student)]
    truth = gold(student, teacher, labels, beta, temperature)
    assert max(relative(found, truth)) < 1e-5
    assert max(relative(ours(student, teacher, labels, beta, temperature), truth)) < 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "temperature,hard,soft,beta", [(1.0, 0.5, 0.5, 0.5), (2.0, 0.0, 1.0, 0.8), (0.5, 1.0, 0.0, 0.2)]
)
def test_liger_chunked_jsd(liger, temperature, hard, soft, beta, bias):
    """In fp32 they agree: cross entropy at temperature 1 in both, weights that add up to 1."""
    student, teacher, labels = heads()
    b = torch.linspace(-1, 1, 57).requires_grad_() if bias else None
    given = [*student, b] if bias else student
    theirs = liger[1](weight_hard_loss=hard, weight_soft_loss=soft, beta=beta,
                      temperature=temperature, compiled=False, chunk_size=4)  # fmt: skip
    loss = theirs(student[0], student[1], teacher[0], teacher[1], labels, b)
    found = [loss.detach(), *torch.autograd.grad(loss, given)]
    mine = kd_loss(
        StudentHead(*given), TeacherHead(*teacher), labels=labels, divergence=JSD(beta),
        cross_entropy=hard, temperature=temperature,
    ).loss  # fmt: skip
    wanted = [mine.detach(), *torch.autograd.grad(mine, given)]
    assert max(relative(found, [x.double() for x in wanted])) < 1e-5


def test_liger_scales_its_gradient_twice(liger):
    """They differ: Liger's fused loss multiplies what it saved in place, so that a second backward
    under retain_graph finds gradients that were multiplied already. Ours makes them anew.
    """
    student, teacher, labels = heads()
    truth = gold(student, teacher, labels, 0.5)[1:]
    loss = liger[0](jsd_beta=0.5)(student[0], student[1], teacher[0], teacher[1], labels)
    upstream = torch.tensor(3.0)
    once = [x.clone() for x in torch.autograd.grad(loss, student, upstream, retain_graph=True)]
    twice = torch.autograd.grad(loss, student, upstream, retain_graph=True)
    assert max(relative(once, [3 * x for x in truth])) < 1e-5
    assert max(relative(twice, [9 * x for x in truth])) < 1e-5
    mine = kd_loss(StudentHead(*student), TeacherHead(*teacher), labels=labels,
                   divergence=JSD(0.5)).loss  # fmt: skip
    for _ in range(2):
        found = torch.autograd.grad(mine, student, upstream, retain_graph=True)
        assert max(relative(found, [3 * x for x in truth])) < 2e-6


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_liger_rounds_logits(liger, beta):
    """They differ: bf16 logits around 20 are rounded by up to 1/16, which a student 0.05 from its
    teacher does not survive: the chunked loss (everywhere) and the fused one (where products have
    no fp32 output, as here) lose the gradient. Ours adds up fp32 logits: right to bf16's rounding.
    """
    student, teacher, labels = heads(BF16, rows=24, vocabulary=257, gap=0.05)
    truth = gold(student, teacher, labels, beta)
    for module in (liger[0](jsd_beta=beta), liger[1](0.0, 1.0, beta, compiled=False)):
        loss = module(student[0], student[1], teacher[0], teacher[1], labels)
        assert max(relative(torch.autograd.grad(loss, student), truth[1:])) > 0.2
    assert max(relative(ours(student, teacher, labels, beta), truth)) < 0.02


def test_liger_adds_up_in_half_precision(liger):
    """They differ: by default Liger's fused loss adds the head's gradient up in bf16, chunk after
    chunk, of which there are V / D; it has accum_dtype against that. Ours always adds up in fp32.
    """
    student, teacher, labels = heads(BF16, rows=256, vocabulary=512, mine=4)
    with torch.no_grad():  # small logits, so that their rounding does not hide that of the sums
        student[0] *= 0.0625
        teacher[0] *= 0.0625
    truth = gold(student, teacher, labels, 0.5)[2]

    def error(gradient):
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    def theirs(**more):
        loss = liger[0](jsd_beta=0.5, **more)(*student, *teacher, labels)
        return error(torch.autograd.grad(loss, student)[1])

    mine = [
        error(ours(student, teacher, labels, 0.5, chunk_bytes=size)[2])
        for size in (2 * 4 * 512, 2**20)
    ]
    assert theirs() > 2.5 * theirs(accum_dtype=torch.float32)
    assert max(mine) < 1.1 * min(mine) and max(mine) < 0.004


def test_liger_on_masked_tokens(liger):
    """They differ: where both models mask a token with minus infinity, Liger's interior beta takes
    minus infinity from itself and the loss is NaN; ours is that of the other tokens.
    """
    from liger_kernel.transformers import LigerJSD

    student, teacher = torch.randn(2, 6, 41, generator=torch.Generator().manual_seed(2))
    student[:, 37:], teacher[:, 37:] = -math.inf, -math.inf
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    assert LigerJSD(beta=0.5)(log_q, log_p).isnan()
    found = divergence(student, teacher, kind=JSD(0.5)).mean()
    rest = divergence(student[:, :37], teacher[:, :37], kind=JSD(0.5)).mean()
    torch.testing.assert_close(found, rest)
    torch.testing.assert_close(LigerJSD(beta=0.5)(log_q[:, :37], log_p[:, :37]), rest)


def test_liger_pads_a_smaller_student(liger):
    """They differ: for a teacher of more tokens Liger's chunked loss gives the student logits of 0
    there, which are real probability. Ours asks for the common tokens.
    """
    student, teacher, labels = heads()
    larger = [teacher[0], torch.cat([teacher[1], torch.randn(7, 16)])]
    loss = liger[1](0.0, 1.0, 0.5, compiled=False)(*student, *larger, labels)
    padded = torch.cat([student[0] @ student[1].mT, torch.zeros(12, 7)], dim=1)
    counts = labels != -100
    wanted = divergence(padded, larger[0] @ larger[1].mT, kind=JSD(0.5))[counts].mean()
    torch.testing.assert_close(loss, wanted)
    with pytest.raises(ValueError, match=r"vocabulary of 64, expected the student's 57.*weight"):
        kd_loss(StudentHead(*student), TeacherHead(*larger), divergence=JSD(0.5))
