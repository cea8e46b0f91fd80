"""kd_loss's row phases in C++ by themselves: shards, memory that is shared, rows without weight."""

import itertools
import math

import pytest
import torch

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
from slmperf.testing.cases import random_logits

OPS = torch.ops.slmperf
KINDS = (
    ForwardKL(), ReverseKL(), JSD(0.3), SkewForwardKL(0.1), SkewReverseKL(0.4), TotalVariation(),
)  # fmt: skip
ROWS, V = 7, 1031
CAP = 30.0
HALVES = (torch.bfloat16, torch.float16)


def example(maker="apart", seed=0):
    """Logits, labels (one of them nowhere), and the scales of a row's two gradients."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = random_logits(maker, (ROWS, V), generator)
    labels = torch.randint(0, V, (ROWS,), generator=generator)
    labels[3] = -100
    scales = torch.randn(2, ROWS, generator=generator)
    return student, teacher, labels, *scales


def run(student, teacher, labels, scale, plain_scale, kind, tau, cuts=(0, V), out=None):
    """All phases over shards of the vocabulary -> divergence, cross entropy, gradient."""
    code, weight = code_of(kind) if kind else ("none", 0.0)
    shards = list(itertools.pairwise(cuts))

    def part(x, begin, end):
        return x[:, begin:end] if kind else None

    walk = OPS.kd_statistics.cpu
    ranges = [walk(student[:, a:b], part(teacher, a, b), labels - a, code, tau, True)
              for a, b in shards]  # fmt: skip
    value, cross_entropy, kept = OPS.kd_join.cpu(torch.cat(ranges, -1), code, tau)
    if code not in ("none", "forward_kl", "reverse_kl"):
        means = [OPS.kd_second.cpu(student[:, a:b], teacher[:, a:b], kept, code, weight, tau)
                 for a, b in shards]  # fmt: skip
        OPS.kd_join_second.cpu(torch.cat(means, -1), code, weight, value, kept)
    out = torch.empty_like(student) if out is None else out
    for a, b in shards:
        OPS.kd_gradient.cpu(student[:, a:b], part(teacher, a, b), kept, labels - a, scale,
                            plain_scale, code, weight, tau, CAP, out[:, a:b])  # fmt: skip
    return value, cross_entropy, out


def reference(student, teacher, labels, scale, plain_scale, kind, tau):
    """The same in fp64 by autograd."""
    free = student.double().requires_grad_()
    value = scale.new_zeros(ROWS).double()
    if kind:
        value = divergence_reference(free, teacher.double(), kind=kind, temperature=tau)
    cross_entropy = torch.nn.functional.cross_entropy(
        free, labels, ignore_index=-100, reduction="none"
    )
    (scale * value + plain_scale * cross_entropy).sum().backward()
    gradient = free.grad
    none = labels == -100  # elsewhere the label: the softmax is left
    gradient[none] += plain_scale[none, None] * torch.softmax(free.detach()[none], -1)
    if not kind:
        gradient += scale[:, None] * torch.softmax(free.detach() / tau, -1) / tau
    return value, cross_entropy, gradient * (1 - (free.detach() / CAP) ** 2)


@pytest.mark.parametrize("cuts", [(0, V), (0, 500, 501, V)], ids=["whole", "shards"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
def test_phases(kind, tau, cuts):
    given = example()
    for found, wanted in zip(
        run(*given, kind, tau, cuts), reference(*given, kind, tau), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
def test_gradient_over_its_logits(kind):
    """In place, and in half precision over the start of each fp32 row: the bits of elsewhere."""
    student, *rest = example()
    wanted = run(student, *rest, kind, 1.0)[2]
    shared = student.clone()
    assert torch.equal(run(shared, *rest, kind, 1.0, out=shared)[2], wanted)
    for half in HALVES:
        shared = student.clone()
        found = run(shared, *rest, kind, 1.0, out=shared.view(half)[:, :V])[2]
        assert torch.equal(found, wanted.to(half))


@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
def test_rows_without_weight_are_zeros(kind):
    student, teacher, labels, scale, plain_scale = example()
    scale[:3], plain_scale[:2] = 0.0, 0.0
    student[0, 5], student[1, 6], teacher[1:3] = math.nan, math.inf, math.nan
    given = student, teacher, labels, scale, plain_scale
    gradient = run(*given, kind, 0.5)[2]
    assert (gradient[:2] == 0).all() and torch.isfinite(gradient).all()
    # What does not count of a row is not looked at either: cross entropy alone.
    torch.testing.assert_close(gradient[2], run(*given, None, 0.5)[2][2])


def test_labels():
    student, teacher, labels, *scales = example()
    labels[0], labels[1] = V, 4
    student[1, 4] = -math.inf
    found = run(student, teacher, labels, *scales, ForwardKL(), 1.0)[1]
    assert found[0] == 0 and found[3] == 0 and found[1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_softcap(dtype):
    sizes = torch.cat([10.0 ** torch.linspace(-4, 3, 300), torch.tensor([0.0, math.inf])])
    logits = torch.stack([sizes, -sizes]).to(dtype)
    wanted = CAP * torch.tanh(logits.double() / CAP)
    OPS.kd_softcap_.cpu(logits, CAP)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), wanted, rtol=3 * rounding, atol=1e-7)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((None, None, "jsd"), "teacher is None, expected logits"),
        ((torch.ones(2, 9), None, "none"), "teacher is a tensor, expected None for kind none"),
        ((torch.ones(2, 5), None, "jsd"), r"teacher is \(2, 5\), expected \(T, V\) = \(2, 9\)"),
        ((torch.ones(9, 2).mT, None, "jsd"), "teacher has gaps between the logits of a row"),
        ((torch.ones(2, 9), torch.ones(2), "jsd"), "labels is Float, expected Long"),
        ((torch.ones(2, 9), None, "fkl"), "kind is fkl, expected forward_kl, reverse_kl, jsd, "),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(RuntimeError, match=f"kd_loss: {message}"):
        OPS.kd_statistics.cpu(torch.ones(2, 9), *arguments, 1.0, True)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (16, 257, 33), (33, 300, 1025)], ids=str)
def test_bf16_products(sizes):
    """bf16 x bf16 -> fp32, odd sizes and rows with gaps, against float64 of the same numbers."""
    if not torch.ops.slmperf.half_products():
        pytest.skip("this processor multiplies bf16 no faster than fp32: weights are widened")
    rows, vocabulary, width = sizes
    hidden, weight = (torch.randn(n, width).bfloat16() for n in (rows, vocabulary))
    bias, buffer = torch.randn(vocabulary), torch.full((rows, vocabulary + 3), torch.nan)
    out = buffer[:, 1 : 1 + vocabulary]
    torch.ops.slmperf.bf16_logits.cpu(hidden, weight, bias, 0.7, out)
    wanted = 0.7 * (hidden.double() @ weight.double().mT + bias)
    assert (out - wanted).abs().max() < 1e-6 * width**0.5 * wanted.abs().max()
    assert buffer[:, 0].isnan().all() and buffer[:, 1 + vocabulary :].isnan().all()
    gradient = torch.randn(rows, 2 * vocabulary).bfloat16()[:, :vocabulary]
    total = torch.full((vocabulary, width), torch.nan)
    wanted = gradient.double().mT @ hidden.double()
    for times, accumulate in ((1, False), (2, True)):
        torch.ops.slmperf.bf16_weight_gradient.cpu(gradient, hidden, total, accumulate)
        error = (total - times * wanted).abs().max()
        assert error < 1e-6 * rows**0.5 * wanted.abs().max()
