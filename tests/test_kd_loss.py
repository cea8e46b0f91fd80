"""kd_loss: what its values mean, gradients under use, memory, mistakes. (Battery: test_ops.py.)

Longer than 400 lines: one operator has all these arguments, and each is held to what it says.
"""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    StudentHead,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    TotalVariation,
    divergence,
    kd_loss,
)
from slmperf.ops.routing import interpreted
from slmperf.testing.interpreter import cure
from slmperf.testing.timing import peak_mib

GPU = torch.cuda.is_available()
if not GPU:
    cure()
KINDS = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.3),
    JSD(0.2, rescale=True),
    SkewForwardKL(0.1),
    SkewReverseKL(0.2),
    TotalVariation(),
)
# On CPU tensors, which Triton takes only where no device is there to compile for.
KERNELS = ("cpu", "triton") if interpreted() else ("cpu",)
# What implementations share (chunks.py) is tried on one; interpreted kernels take a second a call.
each_kernel = pytest.mark.parametrize("impl", KERNELS)
each_impl = pytest.mark.parametrize("impl", [*KERNELS, "reference"])
quick_impl = pytest.mark.parametrize("impl", ["cpu", "reference"])
NAN = math.nan


class Problem:
    """Two heads of different sizes and what else a call takes; small enough for the interpreter."""

    def __init__(
        self, rows=7, vocabulary=53, seed=0, dtype=torch.float32, device="cpu", sizes=(16, 12)
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary

        def normal(*size, scale=1.0):
            made = scale * torch.randn(*size, generator=self.generator, dtype=torch.float64)
            return made.to(device, dtype)

        mine, theirs = sizes
        self.hidden = normal(rows, mine).requires_grad_()
        self.weight = normal(vocabulary, mine, scale=3 / mine**0.5).requires_grad_()
        self.bias = normal(vocabulary).requires_grad_()
        self.teacher_hidden = normal(rows, theirs)
        self.teacher_weight = normal(vocabulary, theirs, scale=3 / theirs**0.5)
        self.labels = torch.randint(vocabulary, (rows,), generator=self.generator).to(device)
        self.token_weight = (0.5 + torch.rand(rows, generator=self.generator)).to(device)
        self.leaves = [self.hidden, self.weight, self.bias]

    @property
    def student(self):
        return StudentHead(self.hidden, self.weight, self.bias)

    def teacher(self, kind="head"):
        head = TeacherHead(self.teacher_hidden, self.teacher_weight)
        if kind == "head":
            return head
        logits = self.teacher_hidden @ self.teacher_weight.mT
        if kind == "logits":
            return TeacherLogits(logits)
        log_probs, indices = torch.log_softmax(logits.float(), dim=-1).topk(5)
        return TeacherTopK(
            indices, log_probs.to(torch.promote_types(logits.dtype, torch.float32)), kind
        )

    def all(self, **more):
        """Every optional tensor of a call."""
        given = {"labels": self.labels, "token_weight": self.token_weight, "cross_entropy": 0.3}
        return given | more

    def gradients(self, loss, upstream=None, **more):
        return torch.autograd.grad(loss, self.leaves, upstream, **more)


TEACHERS = ("head", "logits", "renormalise", "zero", "bucket")


def fits(kind, teacher):
    """Whether a divergence is defined for a teacher."""
    if teacher == "zero":
        return kind == ForwardKL()
    return teacher != "renormalise" or kind != ReverseKL()


def assert_close(found, wanted, tolerance=2e-6):
    """Within fp32 rounding of the largest entry of each tensor."""
    for one, truth in zip(found, wanted, strict=True):
        top = truth.detach().abs().max().item() if truth.numel() else 0.0
        torch.testing.assert_close(one, truth, rtol=0, atol=tolerance * top)


# --- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference_gradient(kind, teacher):
    """Against finite differences, with everything that a head can have."""
    if not fits(kind, teacher):
        pytest.skip("infinite, or no distribution: kd_loss refuses it, see test_kd_inputs.py")
    given = Problem(3, 7, dtype=torch.float64, sizes=(3, 4))
    temperature = 1.0 if teacher in ("zero", "bucket") else 1.3

    def value(hidden, weight, bias):
        return kd_loss(
            StudentHead(hidden, weight, bias, softcap=6.0, scale=0.7),
            given.teacher(teacher),
            **given.all(divergence=kind, temperature=temperature),
            impl="reference",
        ).loss

    assert torch.autograd.gradcheck(value, given.leaves)


@quick_impl
def test_parts_and_reductions(impl):
    """loss = (1 - c) D + c CE per token; sum, mean and normalizer of it."""
    given = Problem()
    z = torch.nn.functional.linear(given.hidden, given.weight, given.bias)
    kd = divergence(z, given.teacher("logits").logits, kind=JSD(0.3), temperature=2.0)
    ce = cross_entropy(z, given.labels, reduction="none")
    weight = given.token_weight.clone()
    weight[2] = 0.0
    labels = given.labels.clone()
    labels[4] = -100
    counts = weight.masked_fill(labels == -100, 0.0)

    def call(**more):
        more = {"labels": labels, "token_weight": weight, "cross_entropy": 0.3} | more
        return kd_loss(given.student, given.teacher(), divergence=JSD(0.3), temperature=2.0,
                       impl=impl, **more)  # fmt: skip

    rows = call(reduction="none")
    wanted = [counts * (0.7 * kd + 0.3 * ce), counts * kd, counts * ce]
    assert_close(rows, wanted, 1e-5)
    assert [part.requires_grad for part in rows] == [True, False, False]
    assert_close(call(reduction="sum"), [one.sum() for one in wanted], 1e-5)
    assert_close(call(), [one.sum() / counts.sum() for one in wanted], 1e-5)
    for normalizer in (17.0, torch.tensor(17.0)):
        assert_close(call(normalizer=normalizer), [one.sum() / 17 for one in wanted], 1e-5)
    plain = call(cross_entropy=0.0, reduction="none")
    assert_close(plain[:2], [counts * kd, counts * kd], 1e-5)
    assert not plain.cross_entropy.any()  # a part without weight is not computed
    assert_close([call(tau_squared=True).divergence], [4 * call().divergence])


@quick_impl
def test_ignore_index(impl):
    given = Problem()
    labels = given.labels.clone()
    labels[:3] = 42
    gone = torch.arange(7) < 3
    found = kd_loss(given.student, given.teacher(), labels=labels, ignore_index=42, impl=impl)
    kept = kd_loss(
        given.student, given.teacher(), token_weight=(~gone).float(), reduction="mean", impl=impl
    )
    assert_close([found.loss], [kept.loss])


def test_ends_are_the_two_divergences():
    """JSD(0), JSD(1) and skews of 0 are the KLs by special case: the same bits."""
    given = Problem()

    def value(kind):
        return kd_loss(given.student, given.teacher(), divergence=kind, impl="cpu").loss

    assert value(JSD(0.0)) == value(SkewForwardKL(0.0)) == value(ForwardKL())
    assert value(JSD(1.0)) == value(SkewReverseKL(0.0)) == value(ReverseKL())
    rescaled = value(JSD(0.2, rescale=True))
    torch.testing.assert_close(rescaled, value(JSD(0.2)) / (0.2 * 0.8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JSD(0.0), JSD(1.0), JSD(1e-3, rescale=True)
    with pytest.warns(UserWarning, match="near an end"):
        JSD(1e-3)


@each_impl
def test_fused_linear_cross_entropy(impl):
    """No teacher, cross_entropy=1."""
    given = Problem()
    labels = given.labels.clone()
    labels[1] = -100
    loss = kd_loss(given.student, None, labels=labels, cross_entropy=1.0, impl=impl)
    z = torch.nn.functional.linear(given.hidden, given.weight, given.bias)
    wanted = cross_entropy(z, labels)
    assert_close([loss.loss, loss.cross_entropy], [wanted, wanted])
    assert loss.divergence == 0
    assert_close(given.gradients(loss.loss), given.gradients(wanted))


@each_impl
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_top_k_of_everything_is_the_whole_teacher(impl, tail):
    given = Problem()
    logits = given.teacher("logits").logits
    log_probs, indices = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True)
    for kind in (ForwardKL(), JSD(0.3)):
        settings = given.all(divergence=kind)
        found = kd_loss(given.student, TeacherTopK(indices, log_probs, tail), **settings, impl=impl)
        wanted = kd_loss(given.student, TeacherLogits(logits), **settings, impl="reference")
        assert_close(found, wanted, 1e-5)
        assert_close(given.gradients(found.loss), given.gradients(wanted.loss), 1e-5)


@quick_impl
def test_answer_tokens(impl):
    """vocabulary=[ids]: the softmax is over them alone, labels are token ids."""
    given = Problem()
    ids = [31, 4, 50]
    labels = torch.tensor(ids)[torch.arange(7) % 3]
    labels[0] = -100
    for teacher in ("head", "logits"):
        settings = {"divergence": JSD(0.4), "cross_entropy": 0.5, "vocabulary": ids, "impl": impl}
        found = kd_loss(given.student, given.teacher(teacher), labels=labels, **settings)
        z = torch.nn.functional.linear(given.hidden, given.weight, given.bias)[:, ids]
        kd = divergence(z, given.teacher("logits").logits[:, ids], kind=JSD(0.4))
        ce = cross_entropy(z, torch.arange(7) % 3, reduction="none")
        wanted = (0.5 * kd + 0.5 * ce)[1:].mean()
        assert_close([found.loss], [wanted], 1e-5)
        gradients = given.gradients(found.loss)
        assert_close(gradients, given.gradients(wanted), 1e-5)
        others = torch.ones(53, dtype=torch.bool).index_fill(0, torch.tensor(ids), False)
        assert not gradients[1][others].any()


# --- gradients under use ------------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(impl, reduction):
    """What the forward made is scaled in place; a second backward makes its gradients anew."""
    given = Problem()
    loss = kd_loss(given.student, given.teacher(), **given.all(reduction=reduction), impl=impl).loss
    upstream = torch.full_like(loss, 2.5)
    first = [x.clone() for x in given.gradients(loss, upstream, retain_graph=True)]
    second = given.gradients(loss, upstream, retain_graph=True)
    third = given.gradients(loss, torch.full_like(loss, 1.0))
    assert_close(second, first)
    assert_close([2.5 * x for x in third], first)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_numbers(reduction):
    given = Problem()

    def gradients(upstream):
        settings = given.all(divergence=ReverseKL(), reduction=reduction)
        loss = kd_loss(given.student, given.teacher(), **settings, impl="cpu").loss
        return given.gradients(upstream * loss)

    unit = gradients(1.0)
    for upstream in (0.0, 2.5, -1.0):
        assert_close(gradients(upstream), [upstream * x for x in unit])


@each_kernel
@pytest.mark.parametrize("kind", [ForwardKL(), JSD(0.3)], ids=str)
def test_upstream_per_token(impl, kind):
    """reduction="none": every row's own number, 0 and negative ones among them."""
    given = Problem()
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0, 0.0, 1.0])
    found, wanted = (
        given.gradients(
            kd_loss(
                given.student, given.teacher(), **given.all(divergence=kind, reduction="none"),
                impl=one,
            ).loss,
            upstream,
        )
        for one in (impl, "reference")
    )  # fmt: skip
    assert_close(found, wanted, 1e-5)
    assert not found[0][upstream == 0].any()


def test_loss_beside_another():
    """Tied weights and hidden states that another loss uses too: gradients add up."""
    given = Problem()
    loss = kd_loss(given.student, given.teacher(), impl="cpu").loss
    other = (given.weight[3] * given.hidden[2]).sum()
    both = given.gradients(3.0 * loss + other)
    one = given.gradients(kd_loss(given.student, given.teacher(), impl="cpu").loss)
    wanted = [3.0 * x for x in one]
    wanted[0][2] += given.weight[3].detach()
    wanted[1][3] += given.hidden[2].detach()
    assert_close(both, wanted)


def test_only_the_student_learns():
    given = Problem()
    given.teacher_hidden.requires_grad_()
    given.teacher_weight.requires_grad_()
    for impl in (*KERNELS, "reference"):
        for teacher in ("head", "logits", "bucket"):
            kd_loss(given.student, given.teacher(teacher), impl=impl).loss.backward()
    assert given.teacher_hidden.grad is None and given.teacher_weight.grad is None
    assert given.weight.grad.any()


def test_second_derivatives_are_refused():
    given = Problem()
    for impl in KERNELS:
        for reduction in ("mean", "none"):
            loss = kd_loss(given.student, given.teacher(), reduction=reduction, impl=impl).loss
            with pytest.raises(NotImplementedError, match="reference"):
                gradient = torch.autograd.grad(loss.sum(), given.hidden, create_graph=True)[0]
                gradient.sum().backward()


def test_partly_frozen():
    """Every subset of what may learn gets what it gets when all learn."""
    given = Problem()
    wanted = given.gradients(kd_loss(given.student, given.teacher(), impl="cpu").loss)
    for frozen in ([1], [1, 2], [0], [0, 1], [0, 2]):
        for index, leaf in enumerate(given.leaves):
            leaf.requires_grad_(index not in frozen)
        kept = [leaf for leaf in given.leaves if leaf.requires_grad]
        loss = kd_loss(given.student, given.teacher(), impl="cpu").loss
        found = torch.autograd.grad(loss, kept)
        assert_close(found, [x for i, x in enumerate(wanted) if i not in frozen])


# --- rows that do not count ---------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_of_no_weight_may_hold_nan(impl, teacher):
    """Through weights, labels, and a collator's list: the same as if these rows were not there."""
    given = Problem()
    gone, alive = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5])
    whole = given.teacher(teacher)
    settings = {"cross_entropy": 0.3, "impl": impl}

    def cut(rows):
        if teacher == "head":
            return replace(whole, hidden=whole.hidden[rows])
        if teacher == "logits":
            return TeacherLogits(whole.logits[rows])
        return replace(whole, indices=whole.indices[rows], log_probs=whole.log_probs[rows])

    def spoilt():
        if teacher == "head":
            return replace(whole, hidden=whole.hidden.index_fill(0, gone, NAN))
        if teacher == "logits":
            return TeacherLogits(whole.logits.index_fill(0, gone, NAN))
        return replace(whole, log_probs=whole.log_probs.index_fill(0, gone, NAN))

    few = StudentHead(given.hidden[alive], given.weight, given.bias)
    wanted = kd_loss(
        few, cut(alive), labels=given.labels[alive], token_weight=given.token_weight[alive],
        **settings,
    )  # fmt: skip
    wanted_gradients = given.gradients(wanted.loss)
    hidden = given.hidden.detach().index_fill(0, gone, NAN).requires_grad_()
    student = StudentHead(hidden, given.weight, given.bias)
    weight = given.token_weight.index_fill(0, gone, 0.0)
    labels = given.labels.index_fill(0, gone, -100)
    for rows in (
        {"labels": given.labels, "token_weight": weight},
        {"labels": labels, "token_weight": given.token_weight},
        {"labels": given.labels, "token_weight": given.token_weight, "rows": alive},
        # A list that has more than what counts: the others are masked, as on a device.
        {"labels": labels, "token_weight": weight, "rows": torch.arange(7)},
    ):
        found = kd_loss(student, spoilt(), **rows, **settings)
        assert_close(found, wanted)
        gradients = torch.autograd.grad(found.loss, [hidden, given.weight, given.bias])
        assert_close(gradients, wanted_gradients)
        assert not gradients[0][gone].any()


@quick_impl
def test_listed_rows(impl):
    """rows from the collator, in any order, also with a value per token."""
    given = Problem()
    rows = torch.tensor([5, 0, 3])
    listed = torch.zeros(7).index_fill(0, rows, 1.0)
    for reduction in ("mean", "sum", "none"):
        settings = {"labels": given.labels, "cross_entropy": 0.3, "reduction": reduction}
        found = kd_loss(given.student, given.teacher(), rows=rows, **settings, impl=impl)
        wanted = kd_loss(given.student, given.teacher(), token_weight=listed, **settings, impl=impl)
        assert_close(found, wanted)
        upstream = torch.ones_like(found.loss)
        assert_close(given.gradients(found.loss, upstream), given.gradients(wanted.loss, upstream))


@quick_impl
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(impl, reduction):
    """Loss and gradients are exactly 0, never NaN; so with an empty list, and without any token."""
    given = Problem()
    ignored = torch.full_like(given.labels, -100)
    none = torch.tensor([], dtype=torch.int64)
    for settings in ({"labels": ignored}, {"labels": given.labels, "rows": none}):
        found = kd_loss(
            given.student, given.teacher(), **settings, cross_entropy=0.3, reduction=reduction,
            impl=impl,
        )  # fmt: skip
        for part in found:
            assert not part.any() and not part.isnan().any()
        for gradient in given.gradients(found.loss.sum()):
            assert not gradient.any() and not gradient.isnan().any()


# --- chunks, threads, accumulation ---------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("teacher", ["head", "logits", "bucket"])
@pytest.mark.parametrize("kind", [ForwardKL(), TotalVariation()], ids=str)
def test_chunks_do_not_matter(impl, kind, teacher):
    given = Problem(rows=11 if impl == "cpu" else 5)
    weight = given.token_weight.index_fill(0, torch.tensor([3]), 0.0)
    row_bytes = 2 * 4 * given.vocabulary
    results = []
    for rows in (1, 2, 4, 7, 11) if impl == "cpu" else (2, 5):
        loss = kd_loss(
            given.student,
            given.teacher(teacher),
            **given.all(divergence=kind, token_weight=weight),
            chunk_bytes=rows * row_bytes,
            impl=impl,
        ).loss
        results.append([loss.detach(), *given.gradients(loss)])
    for found in results[:-1]:
        assert_close(found, results[-1])


def test_threads_do_not_matter():
    """Products may round otherwise; rows of logits that add up exactly give the same bits."""
    given = Problem(rows=19, vocabulary=2049)
    hidden = (4 * given.hidden.detach()).round().requires_grad_()
    weight = (8 * given.weight.detach()).round().div(8).requires_grad_()
    logits = TeacherLogits((8 * given.teacher("logits").logits).round() / 8)
    threads = torch.get_num_threads()
    for kind in KINDS:
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                loss = kd_loss(
                    StudentHead(hidden, weight), logits, labels=given.labels, cross_entropy=0.3,
                    divergence=kind, reduction="none", impl="cpu",
                ).loss  # fmt: skip
                gradients = torch.autograd.grad(loss, [hidden, weight], torch.ones_like(loss))
                found.append((loss.detach(), *gradients))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0])
            assert_close(other, found[0])


def test_accumulated_gradients():
    """Parts of a batch, each by the normalizer of all, add up to the whole batch."""
    given = Problem(rows=12)
    total = given.token_weight.sum()
    whole = kd_loss(given.student, given.teacher(), **given.all(), impl="cpu").loss
    wanted = [whole.detach(), *given.gradients(whole)]
    found = None
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        loss = kd_loss(
            StudentHead(given.hidden[begin:end], given.weight, given.bias),
            TeacherHead(given.teacher_hidden[begin:end], given.teacher_weight),
            labels=given.labels[begin:end],
            token_weight=given.token_weight[begin:end],
            cross_entropy=0.3,
            normalizer=total,
            impl="cpu",
        ).loss
        part = [loss.detach(), *given.gradients(loss)]
        found = part if found is None else [a + b for a, b in zip(found, part, strict=True)]
    assert_close(found, wanted)


# --- memory -------------------------------------------------------------------------------------


def allocations(call):
    """Sizes in bytes of all that a call allocates through torch."""
    call()
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    events = profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def step(given, teacher="head", **more):
    """A call of forward and backward, for what memory it needs; 16 rows of logits at a time."""
    settings = {"chunk_bytes": 16 * 2 * 4 * given.vocabulary, "impl": "cpu"} | more
    leaves = [leaf for leaf in given.leaves if leaf.requires_grad]
    taken = given.teacher(teacher)

    def call():
        loss = kd_loss(given.student, taken, **given.all(**settings)).loss
        if loss.requires_grad:
            torch.autograd.grad(loss.sum(), leaves)

    return call


@pytest.mark.parametrize("teacher", ["head", "logits", "bucket"])
@pytest.mark.parametrize("kind", [ForwardKL(), JSD(0.5)], ids=str)
def test_memory_does_not_depend_on_tokens(kind, teacher):
    vocabulary, hidden = 4001, 16
    peaks = {}
    for rows in (256, 768):
        given = Problem(rows, vocabulary, sizes=(hidden, hidden))
        call = step(given, teacher, divergence=kind)
        assert max(allocations(call)) < rows * vocabulary * 2 / 2  # half as much in bf16
        peaks[rows] = peak_mib(call, "cpu")
    # Gradient of the hidden states, a copy of both models', some ten numbers a row.
    of_tokens = (768 - 256) * (4 * 4 * hidden + 128) / 2**20
    assert peaks[768] - peaks[256] <= of_tokens
    # Two buffers of logits, and the gradient of the head.
    assert peaks[768] <= (16 * 2 * 4 + 4 * hidden + 64) * vocabulary / 2**20 + of_tokens * 2


def test_rows_that_do_not_count_cost_nothing():
    """One row in 128: neither logits nor copies of the others."""
    given = Problem(1024, 2001, sizes=(64, 48))
    given.token_weight = (torch.arange(1024) % 128 == 0).float()
    given.weight.requires_grad_(False)
    sizes = allocations(step(given, chunk_bytes=None))
    assert max(sizes) <= given.hidden.nbytes  # its gradient; otherwise 8 rows of everything
    assert sum(size > 8 * 2001 * 4 for size in sizes) <= 2


def test_frozen_head_has_no_gradient():
    given = Problem(40, 3001, sizes=(64, 48))
    weight = given.weight.nbytes
    assert max(allocations(step(given))) >= weight
    given.weight.requires_grad_(False)
    assert max(allocations(step(given))) < weight
    kd_loss(given.student, given.teacher(), impl="cpu").loss.backward()
    assert given.weight.grad is None and given.hidden.grad is not None


def test_no_grad_computes_no_gradient():
    given = Problem(40, 3001, sizes=(64, 48))

    def call():
        with torch.no_grad():
            loss = kd_loss(given.student, given.teacher(), chunk_bytes=2**18, impl="cpu").loss
        assert not loss.requires_grad

    sizes = allocations(call)
    assert max(sizes) <= 2**18 and not {given.weight.nbytes, given.hidden.nbytes} & set(sizes)


def test_no_grad_gives_the_same_loss():
    given = Problem()
    for kind in KINDS:
        settings = given.all(divergence=kind)
        with torch.no_grad():
            quiet = kd_loss(given.student, given.teacher(), **settings, impl="cpu")
        assert_close(quiet, kd_loss(given.student, given.teacher(), **settings, impl="cpu"))


# --- dtypes, autocast, logits -------------------------------------------------------------------


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast(impl, dtype):
    """fp32 weights under autocast: as if both heads had been cast, gradients in fp32."""
    given = Problem()
    with torch.autocast("cpu", dtype=dtype):
        found = kd_loss(given.student, given.teacher(), **given.all(), impl=impl)
    cast = StudentHead(*(leaf.to(dtype) for leaf in given.leaves))
    teacher = TeacherHead(given.teacher_hidden.to(dtype), given.teacher_weight.to(dtype))
    wanted = kd_loss(cast, teacher, **given.all(), impl=impl)
    assert torch.equal(found.loss, wanted.loss)
    gradients = given.gradients(found.loss)
    assert all(x.dtype == torch.float32 for x in gradients)
    assert_close(gradients, given.gradients(wanted.loss))


@each_kernel
def test_teacher_of_another_dtype(impl):
    given, half = Problem(), torch.bfloat16
    teacher = TeacherHead(given.teacher_hidden.to(half), given.teacher_weight.to(half))
    found = kd_loss(given.student, teacher, **given.all(), impl=impl)
    wanted = kd_loss(given.student, teacher, **given.all(), impl="reference")
    assert_close(found, wanted, 1e-5)
    assert_close(given.gradients(found.loss), given.gradients(wanted.loss), 1e-5)


def close_heads(gap, offset, rows=4, vocabulary=131, width=32, device="cpu"):
    """A bf16 student whose logits are `gap` away from its teacher's, `offset` above 0."""
    given = Problem(rows, vocabulary, sizes=(width, width))
    hidden, weight = given.hidden.detach(), given.weight.detach()
    hidden[:, 0], weight[:, 0] = offset, 1.0
    student, teacher = weight.clone(), weight.clone()
    student[:, -1], teacher[:, -1] = gap * torch.randn(vocabulary, generator=given.generator), 0.0
    hidden[:, -1] = 1.0
    cast = [x.to(device, torch.bfloat16) for x in (hidden, student, hidden, teacher)]
    return StudentHead(cast[0].requires_grad_(), cast[1].requires_grad_()), TeacherHead(*cast[2:])


def gradient_error(student, teacher, **settings):
    """Relative error (Frobenius) of the gradient of the logits, seen through both products."""
    wide = StudentHead(
        *(x.detach().double().requires_grad_() for x in (student.hidden, student.weight))
    )
    given = TeacherHead(teacher.hidden.double(), teacher.weight.double())
    kind = settings.pop("divergence")
    truth = kd_loss(wide, given, divergence=kind, reduction="sum", impl="reference").loss
    found = kd_loss(student, teacher, divergence=kind, reduction="sum", **settings).loss
    pairs = zip(
        torch.autograd.grad(found, [student.hidden, student.weight]),
        torch.autograd.grad(truth, [wide.hidden, wide.weight]),
        strict=True,
    )
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("kind", [ForwardKL(), JSD(0.5)], ids=str)
def test_difference_logits_near_the_teacher(kind, gap):
    """The gradient of a student near its teacher: right to 1 % where bf16 logits lose it."""
    heads = close_heads(gap, 20.0, device="cuda" if GPU else "cpu")
    error = gradient_error(*heads, divergence=kind, logits="difference", impl="triton")
    rounded = gradient_error(*heads, divergence=kind, logits="bf16")
    assert error < 0.01 and gradient_error(*heads, divergence=kind, logits="fp32") < 0.01
    assert rounded > (0.5 if gap <= 0.1 else 0.03)


def test_difference_is_the_default_where_it_can_be():
    from slmperf.ops.kd_loss.inputs import logits_mode

    student, teacher = close_heads(0.1, 0.0)
    assert logits_mode("auto", "cpu", student, teacher) == "fp32"
    with pytest.raises(NotImplementedError, match="difference.*there is: triton"):
        kd_loss(student, teacher, logits="difference", impl="cpu")


# --- compiled -----------------------------------------------------------------------------------


def compiled_step(given, backend, **settings):
    @torch.compile(fullgraph=True, backend=backend)
    def loss(hidden, weight, bias, labels, token_weight):
        return kd_loss(
            StudentHead(hidden * 1.5, weight, bias), given.teacher(), labels=labels,
            token_weight=token_weight, cross_entropy=0.3, **settings,
        ).loss.mul(2.0)  # fmt: skip

    return loss(*given.leaves, given.labels, given.token_weight)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(backend, reduction):
    """One graph around the loss, with work before and after; backward twice."""
    torch.compiler.reset()
    given = Problem()
    found = compiled_step(given, backend, reduction=reduction, impl="cpu")
    upstream = torch.full_like(found, 0.5)
    student = StudentHead(given.hidden * 1.5, given.weight, given.bias)
    wanted = (
        2.0 * kd_loss(student, given.teacher(), **given.all(reduction=reduction), impl="cpu").loss
    )
    assert_close([found], [wanted])
    truth = given.gradients(wanted, upstream)
    assert_close(given.gradients(found, upstream, retain_graph=True), truth)
    assert_close(given.gradients(found, upstream), truth)


def test_operator_without_gradients():
    """opcheck where nothing, and where not everything, asks for a gradient."""
    from slmperf.testing.cases import FAMILIES

    case = FAMILIES["kd_loss"].checked[0]
    for frozen in (("hidden", "weight", "bias"), ("weight",)):
        tensors = {
            name: tensor.requires_grad_(name in case.differentiable and name not in frozen)
            for name, tensor in case.tensors().items()
        }
        torch.library.opcheck(*case.operator(tensors, "cpu"))


# --- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
def test_capacity_on_device():
    """Rows packed on the device without a wait; more than fit make the loss NaN."""
    given = Problem(64, 1001, device="cuda")
    weight = (torch.arange(64, device="cuda") % 8 == 0).float()
    wanted = kd_loss(given.student, given.teacher(), token_weight=weight).loss
    truth = given.gradients(wanted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kd_loss(given.student, given.teacher(), token_weight=weight, capacity=10).loss
        gradients = given.gradients(found)
        lost = kd_loss(given.student, given.teacher(), token_weight=weight, capacity=7).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close([found], [wanted])
    assert_close(gradients, truth)
    assert lost.isnan()


@pytest.mark.gpu
def test_labels_out_of_range_on_device():
    """Looking at them would wait for the device: their rows are NaN, the others are not."""
    given = Problem(6, 101, device="cuda")
    given.labels[2] = 101
    rows = kd_loss(given.student, given.teacher(), **given.all(reduction="none")).loss
    assert rows.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.gpu
def test_in_a_cuda_graph():
    given = Problem(64, 1001, dtype=torch.bfloat16, device="cuda")
    from slmperf.testing.timing import replayed

    kept = []

    def call():
        loss = kd_loss(given.student, given.teacher(), **given.all()).loss
        kept[:] = [loss.detach(), *given.gradients(loss)]

    call()
    wanted = [x.clone() for x in kept]
    replayed([call])()
    torch.cuda.synchronize()
    assert_close(kept, wanted, 1e-2)
