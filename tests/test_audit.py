"""Audit of one step: planted defects are found with their figure, a clean loss comes out clean.

Over 400 lines: the cases are losses, written out, on the same small models.
"""

from __future__ import annotations

import copy
import math
import random
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    Adafactor,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from slmperf.bench import Formula, audit
from slmperf.bench.auditing import exact
from slmperf.bench.auditing.capture import InexactError, replay, watch
from slmperf.bench.auditing.cost import peak_mib
from slmperf.bench.auditing.step import Declared, audit_step
from slmperf.bench.roof import FORMATS, Roof
from slmperf.check import InputError
from slmperf.distill import DistillationConfig
from slmperf.ops import JSD, ForwardKL, ReverseKL

V, B, L = 64, 3, 16
FORWARD = Formula(ForwardKL())
ROOF = Roof(
    device="test", kind="cpu", driver="-", torch="-", threads=1, copy_gbs=10.0,
    matrix_tflops=dict.fromkeys(FORMATS, 0.1), launch_us=1.0, date="-",
)  # fmt: skip


def make(seed: int, hidden: int = 32, kind: str = "llama", spread: float = 0.3):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=V, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=spread,
    )  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return MixtralForCausalLM(
        MixtralConfig(
            **shape, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def student():
    return make(0).train()


@pytest.fixture(scope="module")
def teacher():
    return make(1, hidden=64).eval()


@pytest.fixture
def batch():
    ids = torch.randint(0, V, (B, L + 1), generator=torch.Generator().manual_seed(3))[:, :L]
    labels = ids.clone()
    labels[:, 0] = -100  # is never a target, so every row but the last of a sequence counts
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kd_loss(
    teacher,
    kind="forward",
    temperature=1.0,
    factor=1.0,
    extra=lambda logits, outputs, targets: 0.0,
    divide=None,
    narrow=lambda logits: logits,
):
    """A loss as trainers write them, with room for what goes wrong in them."""

    def loss(outputs, batch):
        with torch.no_grad():
            given = teacher(input_ids=batch["input_ids"]).logits[:, :-1]
        logits, targets = outputs.logits[:, :-1], batch["labels"][:, 1:]
        keep = targets != -100
        log_p = F.log_softmax(narrow(given).float() / temperature, -1)
        log_q = F.log_softmax(narrow(logits).float() / temperature, -1)
        if kind == "forward":
            values = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        elif kind == "reverse":
            values = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        else:
            beta = torch.tensor(kind)
            log_m = torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))
            values = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True) + (
                1 - beta
            ) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
        total = factor * values[keep].sum() / (keep.sum() if divide is None else divide)
        return total + extra(logits[keep], outputs, targets[keep])

    return loss


class Shows(nn.Module):
    """A model that shows its hidden states."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids, attention_mask, output_hidden_states=True)

    def get_decoder(self):
        return self.inner.get_decoder()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()


def look(student, batch, loss, formula=FORWARD, **more):
    return audit(student, batch, loss, formula=formula, roof=ROOF, **more)


def only(report):
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


def weights(report):
    return {term.name: term.found for term in report.terms if term.share > 1e-6}


def test_a_clean_loss_is_clean(student, teacher, batch):
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0)
    state = torch.random.get_rng_state()
    report = look(student, batch, kd_loss(teacher), optimizer=optimizer)
    assert report.clean and report.judged, report.findings
    assert report.errors["same logits"].norm < 1e-5
    assert report.errors["head in float64 too"].norm < 1e-4
    assert report.errors["same logits"].cosine > 1 - 1e-9
    assert report.loss == pytest.approx(report.formula_loss, rel=1e-5)
    assert report.residue < 1e-9 and report.outside == 0
    assert report.waste.rows == B * L and report.waste.used == B * (L - 1)
    # Neither the weights nor gradients, optimiser and random states have moved.
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1.0
    assert torch.equal(state, torch.random.get_rng_state())
    names = [part.name for part in report.parts]
    assert names == ["forward", "backward", "head and loss, both ways", "optimiser step"]
    assert all(0 < part.low_us <= part.time_us <= part.high_us for part in report.parts)
    assert report.cost.peak_mib > report.cost.logits_mib > 0
    # 45 rows x 64 entries: student, teacher and gradient of 4 bytes; heads of 32 and 64.
    assert report.cost.logits_mib == pytest.approx(45 * 64 * 12 / 2**20)
    assert report.cost.least_tflop == pytest.approx(2 * 45 * 64 * (3 * 32 + 64) / 1e12)
    assert "clean: the loss is the configured formula" in str(report)


@pytest.mark.parametrize(
    "formula,loss",
    [
        (Formula(ReverseKL(), temperature=2.0), dict(kind="reverse", temperature=2.0)),
        (
            Formula(JSD(0.9), 0.9, 0.1, temperature=2.0, temperature_squared=True),
            dict(kind=0.9, temperature=2.0, factor=0.9 * 4,
                 extra=lambda logits, _, targets: 0.1 * F.cross_entropy(logits, targets)),
        ),
        (Formula(ForwardKL(), reduction="sum"), dict(divide=1)),
        (Formula(ForwardKL(), reduction="batchmean"), dict(divide=B)),
    ],
    ids=["reverse", "jsd", "sum", "batchmean"],
)  # fmt: skip
def test_other_clean_formulas(student, teacher, batch, formula, loss):
    report = look(student, batch, kd_loss(teacher, **loss), formula)
    assert report.clean, report.findings
    for term in report.terms:
        assert term.found == pytest.approx(term.configured, rel=1e-6)


def test_hidden_cross_entropy(student, teacher, batch):
    loss = kd_loss(teacher, extra=lambda z, _, y: 0.1 * F.cross_entropy(z, y))
    report = look(student, batch, loss)
    assert only(report).startswith("cross entropy on labels with weight 0.1,")
    assert weights(report) == pytest.approx({"forward KL": 1, "cross entropy on labels": 0.1})
    # Without a formula the same terms are listed, and nothing is judged.
    report = look(student, batch, loss, formula=None)
    assert weights(report) == pytest.approx({"forward KL": 1, "cross entropy on labels": 0.1})
    assert not report.findings and not report.judged and "no formula is known" in str(report)


@pytest.mark.parametrize(
    "extra,name,weight",
    [
        (lambda z, *_: 1e-3 * z.logsumexp(-1).square().mean(), "z-loss (logsumexp^2)", 1e-3),
        (lambda z, *_: 0.02 * z.square().mean(), "L2 of logits (mean square)", 0.02),
        (lambda z, *_: 0.01 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
         "entropy of the student", -0.01),
    ],
    ids=["z-loss", "L2", "entropy"],
)  # fmt: skip
def test_hidden_terms_of_logits(student, teacher, batch, extra, name, weight):
    report = look(student, batch, kd_loss(teacher, extra=extra))
    assert only(report).startswith(f"{name} with weight {weight:.4g},")
    assert weights(report)[name] == pytest.approx(weight, rel=1e-6)
    assert weights(report)["forward KL"] == pytest.approx(1)


@pytest.mark.parametrize(
    "loss,formula,said",
    [
        (dict(temperature=2.0, factor=4.0), Formula(ForwardKL(), temperature=2.0),
         "4 times the formula's (temperature squared is applied"),
        (dict(temperature=2.0), Formula(ForwardKL(), temperature=2.0, temperature_squared=True),
         "0.25 times the formula's (temperature squared is not applied"),
        (dict(divide=B), Formula(ForwardKL()),
         "15 times the formula's (divided by the batch size 3 and not by 45)"),
        (dict(divide=B * L), Formula(ForwardKL()), "(divided by all 48 rows"),
        (dict(divide=1), Formula(ForwardKL()), "(a sum, divided by nothing and not by 45)"),
        (dict(divide=B * (L - 1) * V), Formula(ForwardKL()), "and by the vocabulary 64"),
        (dict(kind=0.1), Formula(JSD(0.9)),
         "JSD(beta 0.1) with weight 1 stands in place of JSD(beta 0.9)"),
        (dict(kind="reverse"), Formula(ForwardKL()), "reverse KL with weight 1 stands in place of"),
        (dict(temperature=1.37), Formula(ForwardKL()),
         "forward KL at temperature 1.37 with weight 1 stands in place of forward KL"),
    ],
    ids=["squared", "not-squared", "batch", "rows", "sum", "vocabulary", "reversed-mixture",
         "reverse", "temperature"],
)  # fmt: skip
def test_wrong_scale_or_divergence(student, teacher, batch, loss, formula, said):
    assert said in only(look(student, batch, kd_loss(teacher, **loss), formula))


def test_hidden_cross_entropy_and_temperature_at_once(student, teacher, batch):
    """Both of what one popular kernel once added silently: half a cross entropy, and 0.9."""
    loss = kd_loss(teacher, 0.5, 0.9, 0.5, lambda z, _, y: 0.5 * F.cross_entropy(z, y))
    report = look(student, batch, loss, Formula(JSD(0.5)))
    assert weights(report) == pytest.approx(
        {"JSD(beta 0.5) at temperature 0.9": 0.5, "cross entropy on labels": 0.5}
    )


def test_rounding_before_the_divergence(student, batch):
    """A student close to its teacher, offset logits: what bf16 drops is most of the gradient."""
    near = copy.deepcopy(student).eval()
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(2e-3 * torch.randn(parameter.shape))
    report = look(student, batch, kd_loss(near, narrow=lambda z: z.bfloat16()))
    assert "the loss rounds" in only(report)
    error = report.errors["same logits"]
    assert error.norm > 0.1 and f"off by {100 * error.norm:.2g}%" in only(report)
    # The formula itself is the right one: its terms are found in the loss as written.
    assert weights(report) == pytest.approx({"forward KL": 1}, rel=1e-6)
    assert look(student, batch, kd_loss(near)).clean

    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16().float()

    for model in (rounded := copy.deepcopy(student), near):
        head = Rounding(model.config.hidden_size, V, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    report = look(rounded, batch, kd_loss(near))
    assert report.errors["same logits"].norm < 0.01
    assert report.errors["head in float64 too"].norm > 0.1
    assert "logits are rounded before the loss" in only(report)


def test_rows_and_padding_for_nothing(student, teacher, batch):
    batch["labels"][:, :12] = -100
    batch["attention_mask"][0, -4:] = 0
    batch["labels"][0, -4:] = -100
    report = look(student, batch, kd_loss(teacher))
    used = 4 * B - 4  # targets 12 to 15, those of the padded sequence gone
    assert (report.waste.rows, report.waste.used) == (B * L, used)
    assert report.waste.padding == 4 and report.waste.positions == B * L
    assert report.waste.head_tflop == pytest.approx(2 * V * (3 * 32 + 64) * (B * L - used) / 1e12)
    assert only(report) == (
        f"{B * L - used} of {B * L} rows of logits ({100 * (B * L - used) / B / L:.1f}%) are "
        "computed for nothing: their gradient is zero"
    )


def test_padding_that_is_trained_on_and_other_weights(student, teacher, batch):
    batch["labels"][:, 10:] = -100

    def everywhere(outputs, batch):
        return kd_loss(teacher)(outputs, {**batch, "labels": batch["input_ids"]})

    found = look(student, batch, everywhere).findings
    assert any(f"{6 * B} rows of weight zero have a gradient" in line for line in found)

    def weighted(outputs, batch):
        by_row = torch.linspace(1, 2, B)[:, None].expand(B, L - 1)
        with torch.no_grad():
            given = teacher(input_ids=batch["input_ids"]).logits[:, :-1]
        values = F.kl_div(
            outputs.logits[:, :-1].log_softmax(-1), given.log_softmax(-1), reduction="none",
            log_target=True,
        ).sum(-1)  # fmt: skip
        return (values * by_row).sum() / by_row.sum()

    del batch["labels"]
    weights = torch.ones(B, L)
    weights[:, -1] = 0
    found = look(student, batch, weighted, weights=weights).findings
    assert len(found) == 1 and "rows do not weigh what the formula gives them" in found[0]
    weights = torch.linspace(1, 2, B)[:, None].repeat(1, L)
    weights[:, -1] = 0
    assert look(student, batch, weighted, weights=weights).clean


def test_a_term_with_other_weights_in_every_row(student, teacher, batch):
    def focal(z, _, y):
        log_q = z.log_softmax(-1)[torch.arange(len(y)), y]
        return (-((1 - log_q.exp()) ** 2) * log_q).mean()

    said = only(look(student, batch, kd_loss(teacher, extra=focal)))
    assert said.startswith("cross entropy on labels") and said.endswith("differs from row to row)")


def test_what_a_loss_draws_is_drawn_again(student, batch):
    """Rows that are chosen at random, in three ways, and dropout before the head."""
    ways = [
        lambda n: torch.rand(n) < 0.5,
        lambda n: torch.tensor([random.random() < 0.5 for _ in range(n)]),
        lambda n: torch.from_numpy(np.random.rand(n) < 0.5),
    ]
    for draw in ways:
        before = random.getstate(), np.random.get_state()[1].copy()

        def loss(outputs, batch, draw=draw):
            logits, targets = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            chosen = draw(len(targets))
            return F.cross_entropy(logits[chosen].float(), targets[chosen])

        report = look(student, batch, loss, formula=None)
        assert report.errors["same logits"].norm < 1e-5
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])

    class Dropping(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.3))

    dropping = copy.deepcopy(student)
    dropping.lm_head = Dropping(dropping.config.hidden_size, V, bias=False)
    plain = Formula(ce_weight=1.0)
    assert look(dropping, batch, lambda outputs, _: outputs.loss, plain).clean


def test_state_that_a_step_moves_is_put_back(student, teacher, batch):
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    counting = copy.deepcopy(student)
    counting.model.layers[0].mlp = Counting(counting.model.layers[0].mlp)
    beside = nn.Parameter(torch.ones(()))  # trained along with the model, but not in it
    beside.grad = torch.full((), 7.0)
    before = copy.deepcopy(counting.state_dict())
    # With a rate of its own it steps at a learning rate of 0 too.
    optimizer = Adafactor([*counting.parameters(), beside], lr=None, relative_step=True)
    loss = kd_loss(teacher)
    report = look(
        counting, batch, lambda o, b: loss(o, b) + 0 * beside.square(), optimizer=optimizer
    )
    assert report.parts[-1].name == "optimiser step"
    assert all(torch.equal(before[name], value) for name, value in counting.state_dict().items())
    assert beside == 1 and beside.grad == 7 and not optimizer.state


def test_what_was_watched_is_gone_when_the_step_is_timed(student, teacher, batch):
    """A step that just fits into memory must find as much of it again."""
    seen = []
    left = []

    def loss(outputs, batch):
        left.append(sum(one() is not None for one in seen[:-1]))
        seen.append(weakref.ref(outputs.logits))
        return kd_loss(teacher)(outputs, batch)

    look(student, batch, loss)
    assert max(left) > 0 and left[-1] == 0


def test_too_little_memory_for_float64(student, teacher, batch, monkeypatch):
    """A sample of the rows is held against the formula, and the report says so."""
    monkeypatch.setattr(exact, "free_bytes", lambda device: 160 * V * 20 / exact.MEMORY_SHARE + 1)
    hidden = kd_loss(teacher, extra=lambda z, _, y: 0.1 * F.cross_entropy(z, y))
    for loss in (kd_loss(teacher), hidden):
        report = look(student, batch, loss)
        assert "on 20 of 48 rows, a seeded sample" in report.reference
        assert "0.000458 GiB, and 0.000191 GiB are to spare" in report.reference
        assert report.errors["same logits"].norm < (1e-5 if loss is not hidden else 1)
        assert report.clean == (loss is not hidden) and report.formula_loss is None
        assert report.waste.used == B * (L - 1)
    assert weights(report)["cross entropy on labels"] == pytest.approx(0.1, rel=1e-3)
    assert any(
        line.startswith("cross entropy on labels with weight 0.1,") for line in report.findings
    )
    assert look(student, batch, hidden, formula=None).reference.startswith("none; the loss")


def test_nothing_to_compare_with_is_no_clean_report(student, batch):
    itself = copy.deepcopy(student).eval()
    with pytest.raises(InputError, match="exact gradient by the logits is 0"):
        look(student, batch, kd_loss(itself))
    with pytest.raises(InputError, match="loss is nan and its gradient by 45 of 48 rows"):
        look(student, batch, lambda outputs, _: outputs.loss * math.nan, Formula(ce_weight=1.0))


def test_gradient_from_elsewhere_than_the_logits(student, teacher, batch):
    def penalty(outputs, batch):
        hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state
        return hidden.square().mean()

    def on_hidden(layer, weight):
        def loss(outputs, batch):
            return kd_loss(teacher)(outputs, batch) + weight * (
                outputs.hidden_states[layer].square().mean()
            )

        return loss

    said = only(look(Shows(student), batch, on_hidden(-1, 0.3)))
    assert "does not come by the logits" in said
    assert "mean square of the last hidden states, weight 0.3" in said
    said = only(look(Shows(student), batch, on_hidden(1, 0.05)))
    assert "mean square of the hidden states 1, weight 0.05" in said

    def decayed(outputs, batch):
        squares = sum(parameter.square().sum() for parameter in student.parameters())
        return kd_loss(teacher)(outputs, batch) + 1e-2 * squares

    said = only(look(student, batch, decayed))
    assert "L2 of the weights (sum of squares), weight 0.01" in said
    # A second call of the body alone is seen too, though its states are in no output.
    found = look(student, batch, lambda o, b: kd_loss(teacher)(o, b) + 0.1 * penalty(o, b)).findings
    assert any("does not come by the logits" in line for line in found)


def test_router_loss(batch):
    model = make(5, kind="mixtral").train()
    inputs = {**batch, "output_router_logits": True}
    plain = Formula(ce_weight=1.0)
    said = only(audit(model, inputs, lambda o, _: o.loss, formula=plain, roof=ROOF))
    assert "the model's auxiliary loss (router balance), weight 0.02" in said


def test_losses_that_do_not_run_in_float64(student, teacher, batch):
    """A kernel's place is taken by the formula; slmperf's own op is such a kernel."""
    from slmperf.ops import divergence

    def by_kernel(kind, weight=0.0):
        def loss(outputs, batch):
            with torch.no_grad():
                given = teacher(input_ids=batch["input_ids"]).logits
            rows = (batch["labels"][:, 1:] != -100).flatten()
            z, t = (x[:, :-1].flatten(0, 1)[rows] for x in (outputs.logits, given))
            targets = batch["labels"][:, 1:].flatten()[rows]
            return divergence(z, t, kind=kind).mean() + weight * F.cross_entropy(z, targets)

        return loss

    report = look(student, batch, by_kernel(JSD(0.5)), Formula(JSD(0.5)))
    assert report.clean and report.reference.startswith("the configured formula in float64 (")
    assert report.errors["same logits"].norm < 1e-5
    report = look(student, batch, by_kernel(JSD(0.5), 0.1), Formula(JSD(0.5)))
    assert weights(report)["cross entropy on labels"] == pytest.approx(0.1, rel=1e-3)
    assert any("cross entropy on labels with weight 0.1," in line for line in report.findings)
    # With neither float64 nor a formula, terms are still found, and no error is claimed.
    report = look(student, batch, by_kernel(ForwardKL()), formula=None)
    assert report.errors == {} and report.reference.startswith("none")
    assert weights(report) == pytest.approx({"forward KL": 1}, rel=1e-3)


def test_heads_that_the_loss_applies(student, teacher, batch):
    """To hidden states, where they count alone or in chunks: its products are the logits."""

    def states(model, batch):
        return model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, :-1]

    def of_some(batch):
        keep = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            given = teacher.lm_head(states(teacher, batch)[keep])
        logits = student.lm_head(states(student, batch)[keep])
        return F.kl_div(
            logits.log_softmax(-1), given.log_softmax(-1), reduction="batchmean", log_target=True
        )

    def of_embeddings(batch):
        embedded = student.get_input_embeddings()(batch["input_ids"])
        return student(inputs_embeds=embedded, labels=batch["labels"]).loss

    def in_chunks(call):
        def of_chunk(hidden, targets):
            logits = student.lm_head(hidden).float()
            return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

        def step(batch):
            hidden, targets = states(student, batch).flatten(0, 1), batch["labels"][:, 1:].flatten()
            chunks = zip(hidden.split(10), targets.split(10), strict=True)
            return sum(call(of_chunk, *chunk) for chunk in chunks) / (targets != -100).sum()

        return step

    batch["labels"][:, :9] = -100
    plain, used = Formula(ce_weight=1.0), 7 * B
    for step, formula, rows, ran in [
        (of_some, FORWARD, used, True),
        (of_embeddings, plain, B * L, True),
        (in_chunks(lambda call, *given: call(*given)), plain, B * (L - 1), True),
        # A part that backward runs again does not run in float64.
        (in_chunks(partial(checkpoint, use_reentrant=False)), plain, B * (L - 1), False),
    ]:
        report = audit_step(step, student, batch, Declared(formula), roof=ROOF)
        assert (report.waste.rows, report.waste.used) == (rows, used)
        assert report.errors["head in float64 too"].norm < 1e-5
        assert all("for nothing" in line for line in report.findings), report.findings
        assert ("the loss function in float64" == report.reference) == ran
        assert ran or "its backward ends with" in report.reference


def test_a_frozen_head_takes_two_products(student, teacher, batch):
    frozen = copy.deepcopy(student)
    frozen.lm_head.requires_grad_(False)
    report = look(frozen, batch, kd_loss(teacher))
    assert report.clean
    assert report.cost.least_tflop == pytest.approx(2 * 45 * V * (2 * 32 + 64) / 1e12)
    assert report.waste.head_tflop == pytest.approx(2 * 3 * V * (2 * 32 + 64) / 1e12)


def test_a_teacher_that_is_trained_too(student, batch):
    trained = make(1, hidden=64)

    def loss(outputs, batch):
        given = trained(input_ids=batch["input_ids"]).logits
        return F.kl_div(outputs.logits.log_softmax(-1), given.softmax(-1), reduction="batchmean")

    with pytest.raises(InputError, match=r"another model have a gradient, expected torch.no_grad"):
        look(student, batch, loss)
    assert all(parameter.grad is None for parameter in trained.parameters())


class _Fused(torch.autograd.Function):
    """Head and cross entropy in one, in fp32: no logits to be seen from outside."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, twice):
        with torch.enable_grad():
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            narrow = [x.numpy(force=True).astype("float32") for x in (h, w)]
            z = torch.from_numpy(narrow[0] @ narrow[1].T)
        q = z.softmax(-1)
        loss = -q.log()[torch.arange(len(q)), targets].mean()
        gradient = (q - F.one_hot(targets, V)) / len(q) * twice
        ctx.save_for_backward(gradient @ weight, gradient.T @ hidden)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        by_hidden, by_weight = ctx.saved_tensors
        return upstream * by_hidden, upstream * by_weight, None, None


def test_a_fused_head(student, batch):
    def loss(twice):
        def fused(outputs, batch):
            keep = (batch["labels"][:, 1:] != -100).flatten()
            hidden = outputs.hidden_states[-1][:, :-1].flatten(0, 1)[keep]
            targets = batch["labels"][:, 1:].flatten()[keep]
            return _Fused.apply(hidden.float(), student.lm_head.weight.float(), targets, twice)

        return fused

    inputs = {**batch, "output_hidden_states": True}

    report = look(Shows(student), inputs, loss(1), Formula(ce_weight=1.0))
    assert report.errors["same hidden states"].norm < 1e-4
    assert weights(report) == pytest.approx({"cross entropy on labels": 1}, rel=1e-3)
    assert report.waste.used == B * (L - 1) and report.cost.least_tflop > 0
    found = look(Shows(student), inputs, loss(2), Formula(ce_weight=1.0)).findings
    assert any("has weight 2 and not 1" in line for line in found)
    # Its logits are computed by the model all the same, and nothing uses them.
    assert any(line.startswith(f"{B * L} of {B * (2 * L - 1)} rows") for line in found)


def test_a_model_that_is_no_transformers_model(batch):
    """Without a known decoder the model's outputs are taken as they are."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(self.embed(input_ids)))

    torch.manual_seed(0)
    given = torch.randn(B, L, V)

    def loss(outputs, batch):
        return F.kl_div(
            outputs.logits.log_softmax(-1), given.softmax(-1), reduction="none"
        ).sum() / (B * L)  # fmt: skip

    del batch["labels"]
    report = look(Tiny(), batch, loss, teacher_logits=given)
    assert report.clean, report.findings
    with pytest.raises(InputError, match="no teacher logits of 48 rows were seen"):
        look(Tiny(), batch, loss)


def test_replay_is_exact(student, batch):
    """Whatever the code asks for, nothing is computed below float64."""

    def step(batch):
        outputs = student(input_ids=batch["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            scaled = outputs.logits.to(torch.bfloat16) @ torch.eye(V)[:, : V // 2]
        buffer = torch.zeros(B, L, dtype=torch.float32)
        buffer += torch.softmax(scaled, -1, dtype=torch.float32).square().sum(-1)
        return buffer.half().mean()

    seen = watch(step, batch, student)
    found = replay(step, batch, seen, recorded=True).loss.detach()
    logits = seen.products[0].result.detach().double()[..., : V // 2]
    assert float(found) == pytest.approx(float(logits.softmax(-1).square().sum(-1).mean()), 1e-14)
    assert abs(float(seen.loss.detach()) / float(found) - 1) > 1e-6


def test_a_loss_that_leaves_float64_is_refused(student, batch):
    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return torch.from_numpy(logits.numpy(force=True).astype("float32").sum(keepdims=True))

        @staticmethod
        def backward(ctx, upstream):
            return torch.ones(B, L, V) * upstream

    def step(batch):
        return Narrow.apply(student(input_ids=batch["input_ids"]).logits)

    for loss in (step, lambda batch: 2 * step(batch)):
        with pytest.raises(InexactError, match="NarrowBackward returns|comes out in float32"):
            replay(loss, batch, watch(loss, batch, student), recorded=True)


def test_peak_memory_is_the_storages_that_live():
    model = nn.Linear(1, 1)
    x = torch.ones(2**18, 1)

    def step(_):
        return (model(x) * 3).exp().log().sum()  # product, scaled, exp, at least, 1 MiB each

    found = peak_mib(step, {}, torch.device("cpu"))
    assert 3 <= found <= 6


def test_formula_reads_text():
    text = "divergence=jsd, beta=0.9, kd_weight=0.9 ce_weight=0.1,temperature=2,reduction=sum"
    assert Formula.parse(text) == Formula(JSD(0.9), 0.9, 0.1, 2.0, reduction="sum")
    assert Formula.parse("ce_weight=1,reduction=12").reduction == 12
    assert Formula.parse("divergence=forward_kl,temperature_squared=true").temperature_squared
    for text, said in [
        ("divergence=kl", "expected forward_kl, reverse_kl or jsd"),
        ("divergence=forward_kl,beta=0.5", "with beta=0.5"),
        ("weight=1", "'weight=1' is not NAME=VALUE"),
        ("ce_weight=one", "ce_weight is 'one', expected a number"),
        ("temperature=1", "has neither a divergence nor a ce_weight"),
        ("ce_weight=1,temperature=0", "temperature is 0.0, expected more than 0"),
    ]:
        with pytest.raises(InputError, match=said):
            Formula.parse(text)


def test_a_divergence_that_no_term_is_known_of():
    config = DistillationConfig("out", divergence="skew_reverse_kl", alpha=0.2)
    with pytest.raises(
        InputError, match=r"divergence is SkewReverseKL\(alpha=0.2\), expected Forw"
    ):
        Formula.of(config)
    assert Formula.of(config, teacher=False).ce_weight == 1.0
    sft = DistillationConfig(
        "out", divergence="skew_reverse_kl", alpha=0.2, kd_weight=0.0, ce_weight=1.0
    )
    assert Formula.of(sft).divergence is None


def test_wrong_input_is_named(student, teacher, batch):
    for loss, more, said in [
        (lambda o, b: o.logits.sum(-1), {}, r"a tensor of shape \(3, 16\), expected a scalar"),
        (lambda o, b: o.logits.detach().sum(), {}, "without a graph"),
        (lambda o, b: student.lm_head.weight.sum(), {}, "no gradient by any logits"),
        (kd_loss(teacher), dict(labels=torch.zeros(5)), r"labels are \(5,\), expected 48"),
        (kd_loss(teacher), dict(weights=torch.ones(5)), r"weights are \(5,\), expected 48"),
        (kd_loss(teacher), dict(teacher_logits=torch.ones(5, V)), "expected 48 rows"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            look(student, batch, loss, **more)
    del batch["labels"]
    with pytest.raises(InputError, match="no labels of 48 rows were found"):
        look(student, batch, lambda o, b: o.logits.square().sum(), Formula(ce_weight=1.0))
    with pytest.raises(InputError, match="batch is list"):
        audit(student, [batch], kd_loss(teacher))
