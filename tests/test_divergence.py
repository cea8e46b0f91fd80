"""divergence: what needs no reference, and what a caller may get wrong. (Battery: test_ops.py.)"""

import importlib
import math
import warnings

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence,
    divergence_reference,
    implementations,
)
from slmperf.ops.routing import cpu_isa, interpreted
from slmperf.testing.cases import random_logits
from slmperf.testing.interpreter import cure

GPU = torch.cuda.is_available()
if not GPU:
    cure()
KINDS = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.5),
    JSD(0.1),
    SkewForwardKL(),
    SkewReverseKL(0.4),
    TotalVariation(),
)
# On CPU tensors, which Triton takes only where no device is there to compile for.
KERNELS = ("cpu", "triton") if interpreted() else ("cpu",)


def pair(rows=5, vocabulary=131, dtype=torch.float32, maker="apart", seed=0):
    logits = random_logits(maker, (rows, vocabulary), torch.Generator().manual_seed(seed))
    return [x.to(dtype) for x in logits]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference_gradient(kind):
    """The reference against finite differences, with entries that both models mask."""
    student, teacher = (x.double() for x in pair(2, 9, maker="masked"))
    alive = torch.isfinite(student)

    def value(free):
        return divergence_reference(
            student.masked_scatter(alive, free), teacher, kind=kind, temperature=1.3
        )

    assert torch.autograd.gradcheck(value, student[alive].requires_grad_())


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zero_at_equality_and_positive_elsewhere(kind, impl):
    student, teacher = pair(maker="masked")
    same = teacher.clone().requires_grad_()
    value = divergence(same, teacher, kind=kind, impl=impl)
    value.sum().backward()
    limit = 1e-7 if impl == "reference" else 0.0
    assert value.abs().max() <= limit and same.grad.abs().max() <= limit
    assert (divergence(student, teacher, kind=kind, impl=impl) > 0).all()


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_symmetries(kind, impl):
    """A constant added to a row changes nothing; the temperature divides the logits."""
    student, teacher = pair()
    value = divergence(student, teacher, kind=kind, temperature=2.0, impl=impl)
    shifted = divergence(student + 8.0, teacher - 4.0, kind=kind, temperature=2.0, impl=impl)
    cooled = divergence(student / 2.0, teacher / 2.0, kind=kind, impl=impl)
    torch.testing.assert_close(shifted, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cooled, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_kinds_are_related(impl):
    student, teacher = pair()
    forward = divergence(student, teacher, kind=ForwardKL(), impl=impl)
    torch.testing.assert_close(divergence(teacher, student, kind=ReverseKL(), impl=impl), forward)
    mirrored = divergence(teacher, student, kind=JSD(0.3), impl=impl)
    torch.testing.assert_close(divergence(student, teacher, kind=JSD(0.7), impl=impl), mirrored)
    skewed = divergence(teacher, student, kind=SkewForwardKL(0.3), impl=impl)
    torch.testing.assert_close(
        divergence(student, teacher, kind=SkewReverseKL(0.3), impl=impl), skewed
    )
    mild = torch.randn(3, 50), torch.randn(3, 50)  # no jump at a skew of 0
    for skew, plain in ((SkewForwardKL(1e-4), ForwardKL()), (SkewReverseKL(1e-4), ReverseKL())):
        near = divergence(*mild, kind=skew, impl=impl)
        torch.testing.assert_close(
            near, divergence(*mild, kind=plain, impl=impl), rtol=1e-2, atol=1e-3
        )
    halves = [divergence(student, teacher, kind=kind(0.5), impl=impl)
              for kind in (SkewForwardKL, SkewReverseKL)]  # fmt: skip
    balanced = divergence(student, teacher, kind=JSD(0.5), impl=impl)
    torch.testing.assert_close(balanced, sum(halves) / 2)
    apart = divergence(student, teacher, kind=TotalVariation(), impl=impl)
    turned = divergence(teacher, student, kind=TotalVariation(), impl=impl)
    torch.testing.assert_close(apart, turned)
    assert (apart <= torch.sqrt(forward / 2)).all() and (apart < 1).all()  # Pinsker
    assert (mirrored < math.log(2)).all()
    # First order in beta: JSD / beta tends to the forward KL (logarithmically slowly).
    with pytest.warns(UserWarning, match="near an end"):
        small = divergence(student, teacher, kind=JSD(1e-6), impl=impl) / 1e-6
    assert ((small < forward) & (small > 0.5 * forward)).all()


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_one_sided_masks(impl):
    """What one model forbids and the other allows: +inf for one KL, finite for what is bounded."""
    student, teacher = pair(4, 70)
    student[1, 3] = -math.inf  # the teacher allows it
    teacher[2, 65] = -math.inf  # the student allows it
    student.requires_grad_()
    forward = divergence(student, teacher, kind=ForwardKL(), impl=impl)
    assert torch.isposinf(forward).tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(forward.sum(), student)
    wanted = torch.softmax(student.detach(), 1) - torch.softmax(teacher, 1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    reverse = divergence(student, teacher, kind=ReverseKL(), impl=impl)
    assert torch.isposinf(reverse).tolist() == [False, False, True, False]
    for kind in KINDS[2:]:
        bounded = divergence(student, teacher, kind=kind, impl=impl)
        (gradient,) = torch.autograd.grad(bounded.sum(), student)
        assert torch.isfinite(bounded).all() and torch.isfinite(gradient).all()
        assert gradient[1, 3] == 0


@pytest.mark.parametrize(
    "kind", [JSD(0.5), JSD(0.05), SkewForwardKL(), SkewReverseKL(0.4), TotalVariation()], ids=str
)
def test_a_sure_student_keeps_its_gradient(kind):
    """One token has nearly all of q and little of p: the gradient there is a small difference."""
    student, teacher = torch.zeros(2, 1, 200)
    student[0, 7], teacher[0, 9] = 24.0, 12.0
    student[0, 30:] += torch.linspace(0, 3, 170)
    wide = student.double().requires_grad_()
    divergence_reference(wide, teacher.double(), kind=kind).sum().backward()
    student.requires_grad_()
    divergence(student, teacher, kind=kind, impl="cpu").sum().backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize(
    "end,kind",
    [
        (JSD(0), ForwardKL()),
        (JSD(1), ReverseKL()),
        (JSD(1, rescale=True), ReverseKL()),
        (SkewForwardKL(0), ForwardKL()),
        (SkewReverseKL(0), ReverseKL()),
    ],
    ids=str,
)
def test_ends_are_the_divergences_that_they_stand_for(end, kind, impl):
    student, teacher = pair()
    found = divergence(student, teacher, kind=end, impl=impl)
    assert torch.equal(found, divergence(student, teacher, kind=kind, impl=impl))


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_rescale_divides_value_and_gradient(impl):
    student, teacher = pair()
    student.requires_grad_()
    plain, rescaled = (
        divergence(student, teacher, kind=JSD(0.2, rescale=rescale), impl=impl)
        for rescale in (False, True)
    )
    torch.testing.assert_close(rescaled, plain / (0.2 * 0.8))
    (gradient,) = torch.autograd.grad(rescaled.sum(), student)
    (wanted,) = torch.autograd.grad(plain.sum() / (0.2 * 0.8), student)
    torch.testing.assert_close(gradient, wanted)


def test_only_a_small_beta_warns():
    with pytest.warns(UserWarning, match=r"JSD: beta is 0.005; near an end"):
        JSD(0.005)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JSD(0.005, rescale=True)
        JSD(0.0)
        JSD(0.01)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_stays_in_its_row(kind, impl):
    student, teacher = pair(3, 70)
    student[1, 66], teacher[2, 0] = math.nan, math.nan
    value = divergence(student.requires_grad_(), teacher, kind=kind, impl=impl)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert torch.isnan(value).tolist() == [False, True, True]
    assert torch.isfinite(gradient[0]).all()
    if impl == "cpu" or kind != TotalVariation():  # the sign of NaN is 0 in torch and Triton
        assert torch.isnan(gradient[1:]).any(dim=1).all()


def test_only_the_student_learns():
    student, teacher = (x.requires_grad_() for x in pair())
    for impl in (*KERNELS, "reference"):
        divergence(student, teacher, impl=impl).sum().backward()
        assert student.grad is not None and teacher.grad is None
        student.grad = None


def test_second_derivatives_are_refused():
    student, teacher = pair()
    for impl in KERNELS:
        value = divergence(student.requires_grad_(), teacher, impl=impl)
        (gradient,) = torch.autograd.grad(value.sum(), student, create_graph=True)
        with pytest.raises(NotImplementedError, match="reference"):
            gradient.sum().backward()


S, T = pair()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(student=S, teacher=T[:, :7]), r"teacher is \(5, 7\), expected \(T, V\) = \(5, 131\)"),
        (dict(student=S[0], teacher=T), r"student is \(131,\), expected \(T, V\)"),
        (dict(student=S[:, :0], teacher=T[:, :0]), "V is 0"),
        (dict(student=S, teacher=T.half()), "teacher is torch.float16 on cpu"),
        (dict(student=S, teacher=T, temperature=0.0), "temperature is 0.0"),
        (dict(student=S, teacher=T, temperature=math.nan), "temperature is nan"),
        (dict(student=S, teacher=T, kind="fkl"), "kind is 'fkl', expected one of ForwardKL"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        divergence(**arguments)
    assert str(caught.value).startswith("divergence: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind,name,values,message",
    [
        (JSD, "beta", (-0.1, 1.5, math.nan), "expected 0 <= beta <= 1"),
        (SkewForwardKL, "alpha", (-0.1, 1.0, math.nan), "expected 0 <= alpha < 1"),
        (SkewReverseKL, "alpha", (-0.1, 1.0, math.nan), "expected 0 <= alpha < 1"),
    ],
)
def test_weights_outside_their_range_are_refused(kind, name, values, message):
    for value in values:
        with pytest.raises(InputError, match=rf"^{kind.__name__}: {name} is {value}, {message}$"):
            kind(value)


@pytest.mark.parametrize(
    "impl,tensors",
    [("auto", (S.double(), T.double())), ("cuda", (S, T)), ("cpu", (S.to("meta"), T.to("meta"))),
     ("auto", (S.to("meta"), T.to("meta"))), ("nothing", (S, T))],
)  # fmt: skip
def test_unsupported_says_what_there_is(impl, tensors):
    with pytest.raises(NotImplementedError, match="there is: cpu .*; triton .*; reference "):
        divergence(*tensors, impl=impl)
    divergence(*tensors, impl="reference")


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        divergence(S, T, impl="triton")


def test_operators_check_for_themselves():
    """Callers who come straight to the operator are told as much as the public function tells."""
    op = torch.ops.slmperf.divergence.cpu
    with pytest.raises(RuntimeError, match=r"teacher is \(5, 7\), expected \(T, V\) = \(5, 131\)"):
        op(S, T[:, :7].contiguous(), "forward_kl", 0.0, 1.0)
    with pytest.raises(RuntimeError, match="teacher is Half, expected Float"):
        op(S, T.half(), "forward_kl", 0.0, 1.0)
    with pytest.raises(RuntimeError, match="kind is fkl, expected forward_kl, reverse_kl, jsd, "):
        op(S, T, "fkl", 0.0, 1.0)
    with pytest.raises(RuntimeError, match="student is Double"):
        op(S.double(), T.double(), "forward_kl", 0.0, 1.0)


def test_implementations_are_told():
    states = implementations()["divergence"]
    assert states["auto"] == "cuda: triton, cpu: cpu"
    assert states["cpu"] == f"ready ({cpu_isa()})" and states["reference"] == "ready"
    assert states["triton"] == ("ready" if GPU else "ready (interpreted)")


def test_missing_library_is_named(monkeypatch):
    """Without _ops.so the import still works; asking for it says how to get it."""
    routing = importlib.import_module("slmperf.ops.routing")
    monkeypatch.setattr(routing, "MISSING", routing.MISSING | {"native": "_ops.so is not built"})
    assert implementations()["divergence"]["cpu"] == "_ops.so is not built"
    with pytest.raises(NotImplementedError, match="cpu .*_ops.so is not built"):
        divergence(S, T)


@pytest.mark.slow
def test_inductor():
    """The default compiler around the op, and around the reference as the bench's baseline."""
    student, teacher = pair()
    for impl in ("cpu", "reference"):
        compiled = torch.compile(
            lambda s, t, impl=impl: divergence(s, t, impl=impl).sum(), fullgraph=True
        )
        leaf = student.clone().requires_grad_()
        compiled(leaf, teacher).backward()
        twin = student.clone().requires_grad_()
        divergence(twin, teacher, impl=impl).sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad)
