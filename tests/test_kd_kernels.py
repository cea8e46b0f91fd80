"""kd_loss's Triton kernels by themselves, interpreted: row phases, both heads in one product."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence_reference,
)
from slmperf.ops.divergence import code_of
from slmperf.testing.budget import check_error
from slmperf.testing.cases import random_logits
from slmperf.testing.interpreter import cure

if torch.cuda.is_available():
    pytest.skip("the kernels run compiled here, in the battery", allow_module_level=True)
cure()

kernels = importlib.import_module("slmperf.triton_kernels.kd_loss")

BF16 = torch.bfloat16
KINDS = (
    ForwardKL(), ReverseKL(), JSD(0.3), SkewForwardKL(0.1), SkewReverseKL(0.4), TotalVariation(),
)  # fmt: skip


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def pair(rows=5, vocabulary=131, maker="apart", seed=0):
    return random_logits(maker, (rows, vocabulary), torch.Generator().manual_seed(seed))


def phases(student, teacher, labels, code, weight, tau, scales, softcap=0.0, refs=None, cuts=None):
    """Divergence, cross entropy and gradient; `cuts` are the ends of shards of the vocabulary."""
    ends = cuts or [student.shape[1]]
    shards = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    asked = scales[1] is not None

    def here(part):
        """What one shard gets: its logits, and labels counted from its first entry."""
        own = None if teacher is None else teacher[:, part]
        return student[:, part], own, refs, None if labels is None else labels - part.start

    ranges = torch.cat(
        [kernels.statistics(*here(part), code, tau, asked) for part in shards], dim=2
    )
    value, cross_entropy, kept = kernels.join(ranges, code, tau)
    if code not in ("none", "forward_kl", "reverse_kl"):
        sums = [kernels.second(*here(part)[:3], kept, code, weight, tau) for part in shards]
        kernels.join_second(torch.cat(sums, dim=2), code, weight, value, kept)
    out = torch.full_like(student, torch.nan)
    for part in shards:
        *logits, own_labels = here(part)
        kernels.gradient(
            *logits, kept, own_labels, *scales, code, weight, tau, softcap, out[:, part]
        )
    return value, cross_entropy, out


def truth(student, teacher, labels, kind, tau, scales, softcap, dtype):
    """The same by autograd; kind None: cross entropy alone."""
    logits = student.to(dtype).requires_grad_()
    value = torch.zeros(len(logits), dtype=dtype)
    if kind is not None:
        value = divergence_reference(logits, teacher.to(dtype), kind=kind, temperature=tau)
    total, cross_entropy = (scales[0].to(dtype) * value).sum(), torch.zeros_like(value)
    if scales[1] is not None:
        there = (labels >= 0) & (labels < student.shape[1])
        terms = F.cross_entropy(logits, labels.where(there, 0), reduction="none")
        cross_entropy = terms.masked_fill(~there, 0.0)
        total = total + (scales[1].to(dtype) * cross_entropy).sum()
    gradient = torch.zeros_like(logits)
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, logits)
    if softcap:
        gradient = gradient * (1.0 - (logits.detach() / softcap) ** 2)
    return value.detach(), cross_entropy.detach(), gradient


def judge(found, kind, *call):
    """Against float64, by the house's budget; `call` as of truth, without the dtype."""
    gold = truth(*call[:3], kind, *call[3:], torch.float64)
    twin = truth(*call[:3], kind, *call[3:], torch.float32)
    names = ("divergence", "cross entropy", "gradient")
    for name, one, there, gold_one in zip(names, found, twin, gold, strict=True):
        check_error(f"{kind} {name}", one, there, gold_one, call[0].shape[1])


def row_scales(rows, with_labels=True, seed=5):
    return normal(rows, seed=seed), normal(rows, seed=seed + 1) if with_labels else None


@pytest.mark.parametrize(
    "maker,tau,softcap,cuts",
    [("apart", 1.0, 0.0, None), ("close", 0.35, 0.0, [3, 70, 131]), ("rising", 2.0, 30.0, None)],
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_phases(kind, maker, tau, softcap, cuts):
    """Divergence and cross entropy together; one row in one piece, or in shards of any size."""
    student, teacher = pair(maker=maker)
    labels, scales = torch.tensor([0, 130, 64, 63, 7]), row_scales(5)
    call = (student, teacher, labels, tau, scales, softcap)
    code, weight = code_of(kind)
    judge(phases(*call[:3], code, weight, *call[3:], cuts=cuts), kind, *call)


def test_no_label():
    """A label outside the vocabulary, another shard's perhaps: q is pushed down, nothing up."""
    student, teacher = pair(3)
    labels, scales = torch.tensor([-100, 131, 5]), (torch.ones(3), torch.ones(3))
    code, weight = code_of(ForwardKL())
    _, found, gradient = phases(student, teacher, labels, code, weight, 1.0, scales)
    q = torch.softmax(student, dim=1)
    onehot = F.one_hot(torch.tensor([0, 0, 5]), 131) * torch.tensor([[0], [0], [1]])
    torch.testing.assert_close(gradient, 2 * q - torch.softmax(teacher, dim=1) - onehot)
    assert found[:2].tolist() == [0.0, 0.0] and found[2] > 0


def test_a_label_ruled_out_costs_infinitely_much():
    student, teacher = pair(2, maker="masked")
    labels = student.isneginf().int().argmax(dim=1)
    _, found, _ = phases(student, teacher, labels, "forward_kl", 0.0, 1.0, row_scales(2))
    assert torch.isposinf(found).all()


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_without_a_teacher(tau):
    """The softmax of the student alone: cross entropy, and with its own scale q itself."""
    student, _ = pair(4, 70)
    labels = torch.tensor([0, 69, 64, 3])
    alone = (torch.zeros(4), normal(4))
    found = phases(student, None, labels, "none", 0.0, tau, alone)
    judge(found, None, student, None, labels, tau, alone, 0.0)
    scales = (normal(4), None)
    _, _, found = phases(student, None, None, "none", 0.0, tau, scales)
    wanted = scales[0][:, None] * torch.softmax(student / tau, dim=1) / tau
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_without_weight_are_zeros(kind):
    """Whatever they hold; and a divergence without weight cannot spoil the cross entropy."""
    student, teacher = pair(4, 70)
    student[0, ::2], teacher[0], student[1, 5], teacher[2, 3] = (
        math.nan,
        math.inf,
        math.inf,
        -math.inf,
    )
    scales = (torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, -0.0, 1.0, 1.0]))
    labels = torch.tensor([1, 2, 3, 4])
    *_, found = phases(student, teacher, labels, *code_of(kind), 1.0, scales)
    assert torch.equal(found[:2], torch.zeros(2, 70))
    wanted = torch.softmax(student[2], dim=0) - F.one_hot(labels[2], 70)
    torch.testing.assert_close(found[2], wanted)


def test_in_place_strided_and_of_two_dtypes():
    student, teacher = pair(3, 70)
    scales, labels = row_scales(3), torch.tensor([1, 2, 69])
    buffer = torch.full((3, 90), math.nan, dtype=BF16)
    inside = buffer[:, 7:77]
    inside.copy_(student)
    wide = torch.full((3, 75), math.nan)
    wide[:, :70] = teacher
    code, weight = code_of(JSD(0.3))
    call = (inside.float(), teacher, labels, code, weight, 0.7, scales)
    wanted = phases(*call)[2]
    ranges = kernels.statistics(inside, wide[:, :70], None, labels, code, 0.7, True)
    value, _, kept = kernels.join(ranges, code, 0.7)
    sums = kernels.second(inside, wide[:, :70], None, kept, code, weight, 0.7)
    kernels.join_second(sums, code, weight, value, kept)
    kernels.gradient(
        inside, wide[:, :70], None, kept, labels, *scales, code, weight, 0.7, 0.0, inside
    )
    assert torch.equal(inside, wanted.to(BF16))
    assert torch.isnan(buffer[:, :7]).all() and torch.isnan(buffer[:, 77:]).all()


def test_no_rows():
    nothing, none = torch.empty(0, 70), torch.empty(0)
    found = phases(nothing, nothing, None, "jsd", 0.5, 1.0, (none, None))
    assert [tuple(one.shape) for one in found] == [(0,), (0,), (0, 70)]
    kernels.softcap_(nothing, 30.0)
    kernels.scale_(nothing, torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_softcap(dtype):
    """Accurate near 0, at infinity, and in rows that are a part of longer ones."""
    buffer = (60 * normal(3, 90)).to(dtype)
    buffer[0, 10:14] = torch.tensor([1e-4, -1e-3, math.inf, -math.inf])
    beside, wanted = buffer.clone(), 30.0 * torch.tanh(buffer[:, 10:80].double() / 30.0)
    kernels.softcap_(buffer[:, 10:80], 30.0)
    rtol = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(buffer[:, 10:80].double(), wanted, rtol=rtol, atol=0.0)
    assert torch.equal(buffer[:, :10], beside[:, :10])
    assert torch.equal(buffer[:, 80:], beside[:, 80:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_scale(dtype):
    x = normal(9, 251).to(dtype)
    wanted = (x.float() * -2.3).to(dtype)
    kernels.scale_(x, torch.tensor(-2.3))
    assert torch.equal(x, wanted)
    x[3, 4] = math.nan
    kernels.scale_(x, torch.tensor(1.0))
    wanted[3, 4] = math.nan
    torch.testing.assert_close(x, wanted, rtol=0.0, atol=0.0, equal_nan=True)


# --- both heads in one product ------------------------------------------------------------------


def heads(rows, vocabulary, widths=(33, 70), seed=0):
    """Hidden states and weights in bf16 of two models whose logits have standard deviation 3."""
    found = []
    for index, width in enumerate(widths):
        hidden = normal(rows, width, seed=seed + 2 * index)
        weight = 3 * normal(vocabulary, width, seed=seed + 2 * index + 1) / math.sqrt(width)
        found.append((hidden.to(BF16), weight.to(BF16)))
    return found


def differences(student, teacher, biases=(None, None), scales=(1.0, 1.0), caps=(0.0, 0.0)):
    """difference_logits into buffers with room to the right, and logits in float64."""
    rows, vocabulary = len(student[0]), len(student[1])
    tiles = -(-vocabulary // kernels.DIFFERENCE_TILE)
    gap, out = (torch.full((rows, vocabulary + 9), math.nan, dtype=BF16) for _ in range(2))
    refs = torch.full((rows, tiles, 2), math.nan)
    models = zip((student, teacher), biases, scales, caps, strict=True)
    arguments = [(*head, bias, scale, cap) for head, bias, scale, cap in models]
    kernels.difference_logits(
        *arguments[0], *arguments[1], gap[:, :vocabulary], out[:, :vocabulary], refs
    )
    assert torch.isnan(gap[:, vocabulary:]).all() and torch.isnan(out[:, vocabulary:]).all()
    logits = []
    for hidden, weight, bias, scale, cap in arguments:
        z = hidden.double() @ weight.double().mT
        z = scale * (z if bias is None else z + bias.double())
        logits.append(cap * torch.tanh(z / cap) if cap else z)
    return gap[:, :vocabulary], out[:, :vocabulary], refs, *logits


def restored(gap, teacher, refs):
    """s, t and s - t in float64 from what is stored."""
    vocabulary = gap.shape[1]
    references = refs.double().repeat_interleave(kernels.DIFFERENCE_TILE, dim=1)[:, :vocabulary]
    t, less = teacher.double() + references[..., 0], gap.double() + references[..., 1]
    ruled_out = teacher.isneginf()
    return torch.where(ruled_out, references[..., 0], t) + less, t, less


@pytest.mark.parametrize(
    "rows,vocabulary,scales,caps",
    [
        (1, 1, (1.0, 1.0), (0.0, 0.0)),
        (19, 131, (1.0, 1.0), (0.0, 0.0)),
        (3, 257, (0.7, 1.3), (0.0, 5.0)),
        (17, 128, (2.0, 0.5), (6.0, 0.0)),
        (5, 140, (1.0, 1.0), (7.0, 6.0)),
    ],
)
def test_difference_logits(rows, vocabulary, scales, caps):
    """Any shape, two hidden sizes, scales and softcaps: each stored number is near its own."""
    student, teacher = heads(rows, vocabulary)
    biases = normal(vocabulary).to(BF16), normal(vocabulary, seed=1)
    found = differences(student, teacher, biases, scales, caps)
    _, t, less = restored(*found[:3])
    s_gold, t_gold = found[3:]
    top = t_gold.max()
    assert (t - t_gold).abs().max() <= (top - t_gold).max() * 2**-8 + 1e-5
    assert (less - (s_gold - t_gold)).abs().max() <= (s_gold - t_gold).abs().max() * 2**-7
    # The tile's largest teacher logit is its reference, and exact.
    assert (found[1].amax(dim=1) == 0).all()


def test_difference_logits_take_rows_of_longer_ones():
    """Hidden states and weights with strides; what lies beside them is not read."""
    plain = heads(5, 130)
    views = []
    for parts in plain:
        inside = []
        for part in parts:
            buffer = torch.full((len(part), part.shape[1] + 11), math.nan, dtype=BF16)
            buffer[:, 3:-8] = part
            inside.append(buffer[:, 3:-8])
        views.append(inside)
    for one, other in zip(differences(*views)[:3], differences(*plain)[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("caps", [(0.0, 0.0), (9.0, 0.0), (0.0, 9.0)])
def test_differences_of_minus_infinity(caps):
    """A bias rules out entries in both models, in one, and a whole tile of one or of both."""
    rows, vocabulary, infinity = 4, 3 * 128 + 70, -math.inf
    student, teacher = heads(rows, vocabulary)
    bias, teacher_bias = torch.full((vocabulary,), 20.0), torch.full((vocabulary,), 20.0)
    bias[:5], teacher_bias[3:9] = infinity, infinity
    teacher_bias[128:256], bias[256:384] = infinity, infinity
    bias[-70:], teacher_bias[-70:] = infinity, infinity
    gap, out, refs, s_gold, t_gold = differences(
        student, teacher, (bias, teacher_bias.to(BF16)), caps=caps
    )
    assert torch.isfinite(refs).all()
    s, t, _ = restored(gap, out, refs)
    assert torch.equal(s.isneginf(), s_gold.isneginf())
    assert torch.equal(t.isneginf(), t_gold.isneginf())
    for found, gold in ((s, s_gold), (t, t_gold)):
        there = gold.isfinite()
        assert (found - gold)[there].abs().max() < 0.15
    # ... and where both are finite, their difference is as good as if nothing were ruled out.
    both = s_gold.isfinite() & t_gold.isfinite()
    gold = (s_gold - t_gold)[both]
    assert ((s - t)[both] - gold).abs().max() <= gold.abs().max() * 2**-7
    # The phases take all of it: both distributions are right, and what is ruled out stays out.
    scales = (torch.ones(rows), None)
    q, p = torch.softmax(s_gold, dim=1), torch.softmax(t_gold, dim=1)
    for kind in (ForwardKL(), JSD(0.5), TotalVariation()):
        _, _, found = phases(gap, out, None, *code_of(kind), 1.0, scales, refs=refs)
        assert torch.isfinite(found).all()
        if kind == ForwardKL():
            assert (found - (q - p)).abs().max() < 0.02
            assert (found[(q == 0) & (p == 0)] == 0).all()


def near_models(gap, offset_between, rows=12, vocabulary=300, width=40, offset=20.0):
    """Logits of standard deviation 3 around an offset, the student's `gap` away from its teacher's.

    Hidden states and weights are exact in bf16; the student has one more dimension, for the gap.
    """
    (hidden, weight), _ = heads(rows, vocabulary, (width, width))
    hidden[:, 0], weight[:, 0] = 4.0, offset / 4.0
    wider = torch.cat([hidden, normal(rows, 1, seed=8).sign().to(BF16)], dim=1)
    weight_of_gap = gap * normal(vocabulary, 1, seed=9)
    heavier = torch.cat([weight, weight_of_gap.to(BF16)], dim=1)
    heavier[:, 0] += offset_between / 4.0
    return (wider, heavier), (hidden, weight)


def relative(found, gold):
    return ((found.double() - gold).norm() / gold.norm()).item()


@pytest.mark.parametrize("offset_between", [0.0, 3.0])
@pytest.mark.parametrize("gap", [0.1, 0.01])
def test_gradient_of_a_student_near_its_teacher(gap, offset_between):
    """Below 1% from differences in bf16, written over them, where bf16 logits lose the gradient."""
    gap_out, out, refs, s, t = differences(*near_models(gap, offset_between))
    gold = torch.softmax(s, dim=1) - torch.softmax(t, dim=1)
    rounded = torch.softmax(s.to(BF16).double(), 1) - torch.softmax(t.to(BF16).double(), 1)
    assert relative(rounded, gold) > 0.3
    scale = torch.ones(len(s))
    ranges = kernels.statistics(gap_out, out, refs, None, "forward_kl", 1.0, False)
    value, _, kept = kernels.join(ranges, "forward_kl", 1.0)
    kernels.gradient(
        gap_out, out, refs, kept, None, scale, None, "forward_kl", 0.0, 1.0, 0.0, gap_out
    )
    assert relative(gap_out, gold) < 0.01
    wanted = divergence_reference(s, t)
    assert relative(value, wanted) < 0.02


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_other_kinds_from_differences(kind):
    student, teacher = near_models(0.1, 1.0, rows=4)
    gap_out, out, refs, s, t = differences(student, teacher)
    labels, scales = torch.tensor([3, 0, 299, 128]), (torch.ones(4), torch.full((4,), 1e-3))
    gold = truth(s, t, labels, kind, 2.0, scales, 0.0, torch.float64)
    found = phases(gap_out, out, labels, *code_of(kind), 2.0, scales, refs=refs)
    for one, there in zip(found, gold, strict=True):
        assert relative(one, there) < 0.01
