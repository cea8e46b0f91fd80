"""kd_loss: what a caller may get wrong: ValueError that names argument, wanted and found."""

import math
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops import (
    JSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    StudentHead,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
)

NAN = math.nan
HIDDEN, WEIGHT, BIAS = torch.randn(5, 16), torch.randn(13, 16), torch.randn(13)
THEIRS, THEIR_WEIGHT = torch.randn(5, 12), torch.randn(13, 12)
LABELS = torch.arange(5)


def altered(**more):
    """Arguments of a good call with something else in their place."""
    return {
        "student": StudentHead(HIDDEN, WEIGHT, BIAS),
        "teacher": TeacherHead(THEIRS, THEIR_WEIGHT),
    } | more


def top_k(**more):
    log_probs, indices = torch.log_softmax(THEIRS @ THEIR_WEIGHT.mT, dim=-1).topk(5)
    given = {"indices": indices, "log_probs": log_probs} | more
    return TeacherTopK(**given)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: altered(student=HIDDEN), "student is Tensor, expected a StudentHead"),
        (lambda: altered(teacher=THEIRS), "teacher is Tensor, expected TeacherHead"),
        (lambda: altered(teacher=None), "teacher is None, expected one, since cross_entropy is 0"),
        (
            lambda: altered(teacher=TeacherHead(THEIRS, THEIR_WEIGHT[:11])),
            r"teacher has a vocabulary of 11, expected the student's 13; .*weight\[:11\]",
        ),
        (
            lambda: altered(teacher=TeacherHead(THEIRS[:4], THEIR_WEIGHT)),
            "teacher has 4 rows, expected T = 5",
        ),
        (lambda: altered(teacher=TeacherLogits(torch.zeros(4, 13))), "teacher has 4 rows"),
        (lambda: altered(teacher=TeacherLogits(torch.zeros(5, 14))), "a vocabulary of 14"),
        (lambda: altered(teacher=TeacherLogits(torch.zeros(5, 13, device="meta"))), "is on meta"),
        (lambda: altered(labels=LABELS[:4]), r"labels is \(4,\), expected \(T,\) = \(5,\)"),
        (lambda: altered(labels=LABELS.int()), "labels is torch.int32, expected torch.int64"),
        (lambda: altered(cross_entropy=0.5), "labels is None, expected .* cross_entropy=0.5"),
        (lambda: altered(labels=LABELS + 9, cross_entropy=0.5), "labels holds 13, expected 0 to"),
        (lambda: altered(labels=LABELS - 1, cross_entropy=0.5), "labels holds -1, expected 0 to"),
        (lambda: altered(token_weight=torch.ones(6)), r"token_weight is \(6,\), expected \(T,\)"),
        (lambda: altered(token_weight=LABELS), "token_weight is torch.int64, expected torch.fl"),
        (lambda: altered(cross_entropy=1.5), "cross_entropy is 1.5, expected 0 to 1"),
        (lambda: altered(cross_entropy=NAN), "cross_entropy is nan, expected 0 to 1"),
        (lambda: altered(temperature=0.0), "temperature is 0.0, expected a finite number > 0"),
        (lambda: altered(temperature=math.inf), "temperature is inf, expected a finite number"),
        (lambda: altered(temperature=NAN), "temperature is nan, expected a finite number > 0"),
        (lambda: altered(reduction="batchmean"), "reduction is 'batchmean', expected mean or sum"),
        (lambda: altered(reduction="sum", normalizer=3.0), "normalizer is given, expected None"),
        (lambda: altered(normalizer=torch.ones(2)), r"normalizer is \(2,\), expected one number"),
        (lambda: altered(logits="fp8"), "logits is 'fp8', expected auto or fp32 or bf16 or diff"),
        (lambda: altered(logits="bf16"), "logits is 'bf16' with torch.float32 inputs, expected"),
        (lambda: altered(logits="difference"), "logits is 'difference', expected bfloat16 hidden"),
        (lambda: altered(divergence="fkl"), "kind is 'fkl', expected one of ForwardKL"),
        (lambda: altered(rows=torch.ones(2, 2)), r"rows is \(2, 2\) torch.float32, expected \(n"),
        (lambda: altered(rows=torch.tensor([5])), "rows holds 5 to 5, expected 0 to 4"),
        (lambda: altered(rows=torch.tensor([-1])), "rows holds -1 to -1, expected 0 to 4"),
        (lambda: altered(rows=torch.tensor([1, 3, 1])), "rows holds 1 twice, expected each once"),
        (lambda: altered(chunk_bytes=0), "chunk_bytes is 0, expected at least 1"),
        (lambda: altered(capacity=0), "capacity is 0, expected at least 1"),
        (lambda: altered(vocabulary=[1, 1]), r"vocabulary is \[1, 1\], expected different ids"),
        (lambda: altered(vocabulary=[13]), r"vocabulary is \[13\], expected .* from 0 to 12"),
        (lambda: altered(vocabulary=[]), r"vocabulary is \(0,\), expected \(K,\), K >= 1"),
        (
            lambda: altered(vocabulary=[1, 2], labels=LABELS, cross_entropy=0.1),
            r"labels holds 0, expected one of vocabulary \[1, 2\]",
        ),
        (lambda: altered(vocabulary=[1, 2], teacher=top_k()), "vocabulary is given, expected Te"),
        (
            lambda: altered(teacher=top_k(), divergence=ReverseKL()),
            r"divergence is ReverseKL\(\) with tail='renormalise', expected tail='bucket'",
        ),
        (
            lambda: altered(teacher=top_k(tail="zero"), divergence=JSD(0.5)),
            r"tail is 'zero', expected divergence=ForwardKL\(\)",
        ),
        (
            lambda: altered(teacher=top_k(tail="bucket"), temperature=2.0),
            "temperature is 2.0 with tail='bucket', expected 1",
        ),
        (
            lambda: altered(teacher=top_k(indices=torch.full((5, 5), 3))),
            "TeacherTopK.indices holds 3 twice in a row",
        ),
        (
            lambda: altered(teacher=top_k(indices=torch.arange(25).reshape(5, 5))),
            "TeacherTopK.indices holds 13, expected 0 to 12",
        ),
        (
            lambda: altered(student=StudentHead(HIDDEN, WEIGHT[:0]),
                            teacher=TeacherHead(THEIRS, THEIR_WEIGHT[:0])),
            r"student.weight is \(0, 16\), expected at least one row",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        kd_loss(**make(), impl="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda: StudentHead(HIDDEN[0], WEIGHT),
            r"StudentHead: hidden is \(16,\), expected \(T",
        ),
        (
            lambda: StudentHead(HIDDEN, WEIGHT[:, :7]),
            r"StudentHead: weight is \(13, 7\), expected \(V, D\) = \(13, 16\)",
        ),
        (
            lambda: TeacherHead(THEIRS, THEIR_WEIGHT, BIAS[:3]),
            r"TeacherHead: bias is \(3,\), expected \(V,\) = \(13,\)",
        ),
        (
            lambda: StudentHead(HIDDEN, WEIGHT.half()),
            "StudentHead: weight is torch.float16, expected hidden's torch.float32",
        ),
        (lambda: StudentHead(HIDDEN, WEIGHT, softcap=0.0), "softcap is 0.0, expected a finite"),
        (lambda: StudentHead(HIDDEN, WEIGHT, softcap=-3.0), "softcap is -3.0"),
        (lambda: TeacherHead(HIDDEN, WEIGHT, scale=NAN), "TeacherHead: scale is nan"),
        (
            lambda: TeacherLogits(HIDDEN[0]),
            r"TeacherLogits: logits is \(16,\), expected \(T, V\)",
        ),
        (lambda: top_k(tail="drop"), "tail is 'drop', expected renormalise or zero or bucket"),
        (lambda: top_k(indices=LABELS[:, None].int()), r"TeacherTopK: "),
        (
            lambda: top_k(indices=torch.zeros(5, 5)),
            "indices is torch.float32, expected torch.int64",
        ),
        (lambda: top_k(log_probs=torch.zeros(5, 4)), r"log_probs is \(5, 4\), expected \(T, K\)"),
        (lambda: JSD(-0.1), "JSD: beta is -0.1, expected 0 <= beta <= 1"),
        (lambda: JSD(1.01), "JSD: beta is 1.01"),
        (lambda: JSD(NAN), "JSD: beta is nan"),
        (lambda: SkewForwardKL(1.0), "SkewForwardKL: alpha is 1.0, expected 0 <= alpha < 1"),
        (lambda: SkewReverseKL(-0.5), "SkewReverseKL: alpha is -0.5"),
    ],
)
def test_parts_say_what_is_wrong_with_them(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_unsupported_says_what_there_is():
    wide = StudentHead(HIDDEN.double(), WEIGHT.double())
    teacher = TeacherHead(THEIRS.double(), THEIR_WEIGHT.double())
    for impl in ("auto", "cpu", "cuda", "triton", "nothing"):
        with pytest.raises(NotImplementedError, match="there is: cpu .*; triton .*; reference "):
            kd_loss(wide, teacher, impl=impl)
    kd_loss(wide, teacher, impl="reference")


def test_labels_are_not_looked_at_where_they_do_not_count():
    """Out of range matters for the cross entropy alone, and in rows that count."""
    labels = LABELS + 9
    kd_loss(**altered(labels=labels), impl="cpu")
    weight = (labels < 13).float()
    loss = kd_loss(
        **altered(labels=labels, token_weight=weight, cross_entropy=0.5), impl="cpu"
    ).loss
    assert loss.isfinite()


@pytest.fixture
def zero_3(monkeypatch):
    """deepspeed.zero.GatheredParameters on parameters that remember their whole."""

    @contextmanager
    def gathered(parameters):
        for one in parameters:
            one.data = one.whole
        yield
        for one in parameters:
            one.data = torch.empty(0)

    module = ModuleType("deepspeed")
    module.zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", module)

    def parameter(whole):
        found = torch.nn.Parameter(torch.empty(0))
        found.whole, found.ds_shape = whole, whole.shape
        return found

    return parameter, gathered


def test_heads_under_zero_3(zero_3):
    parameter, gathered = zero_3
    hidden, weight, given = torch.randn(4, 5), torch.randn(31, 5), torch.randn(31, 5)
    student, teacher = parameter(weight), parameter(given)
    with pytest.raises(InputError, match="released by ZeRO-3.*GatheredParameters"):
        kd_loss(StudentHead(hidden, student), TeacherHead(hidden, teacher))
    with gathered([student]):
        kd_loss(StudentHead(hidden, student), TeacherHead(hidden, teacher)).loss.backward()
        found = student.grad.clone()
    assert teacher.numel() == 0, "the teacher's is released again"
    leaf = weight.requires_grad_()
    kd_loss(StudentHead(hidden, leaf), TeacherHead(hidden, given)).loss.backward()
    assert torch.equal(found, leaf.grad)
