"""The loss on what Transformers models return, token weights, and other trainers' loss swapped."""

from __future__ import annotations

import importlib.util
import itertools
import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    Trainer,
    TrainingArguments,
)

from slmperf.check import InputError
from slmperf.distill import (
    DistillationLoss,
    answer_weights,
    student_head,
    teacher_head,
    use_kd_loss,
)
from slmperf.ops import JSD, ForwardKL, ReverseKL, divergence_reference, kd_loss

VOCABULARY = 61
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, initializer_range=0.5,
)  # fmt: skip
# What each does to its logits is under another name of its configuration.
CONFIGS = {
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma 2": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0),
    "recurrent gemma": lambda: RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, logits_soft_cap=3.0, w_init_variance_scale=1.0,
    ),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=6.0),
    "falcon h1": lambda: FalconH1Config(
        **SHAPE, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=1,
    ),
    "phi, with a bias": lambda: PhiConfig(**SHAPE),
    "opt, projected": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, init_std=0.5,
    ),
}  # fmt: skip
SCALINGS = {"gemma 2": 5.0, "recurrent gemma": 3.0, "cohere": 0.25, "granite": 1 / 6}


def model_of(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    return model


def inputs_of(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(head) -> torch.Tensor:
    z = F.linear(head.hidden, head.weight, head.bias) * (head.scale or 1.0)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_gives_the_models_own_logits(name):
    model, inputs = model_of(name), inputs_of()
    whole = model(**inputs).logits.flatten(0, 1)
    head = student_head(model, inputs)
    torch.testing.assert_close(logits_of(head), whole, rtol=1e-5, atol=1e-5)
    assert SCALINGS.get(name) in (None, head.scale, head.softcap)
    assert (head.bias is not None) == ("bias" in name)
    some = torch.tensor([3, 17, 8])
    part = teacher_head(model, inputs, positions=some)
    assert part.hidden.shape[0] == 3 and not part.hidden.requires_grad
    torch.testing.assert_close(logits_of(part), whole[some], rtol=1e-5, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks  # nothing is left on the model


@pytest.mark.parametrize(
    "student,teacher", [("gemma 2", "cohere"), ("granite", "phi, with a bias")]
)
def test_the_loss_of_two_models_and_its_gradients(student, teacher):
    """Against the formula on both models' logits, with every gradient of the student."""
    model, large, inputs = model_of(student), model_of(teacher, seed=1), inputs_of()
    labels = torch.randint(0, VOCABULARY, (18,))
    labels[::5] = -100
    loss = DistillationLoss(JSD(0.3), cross_entropy=0.25, temperature=2.0, tau_squared=True)
    found = loss(student_head(model, inputs), teacher_head(large, inputs), labels=labels)
    found.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    z, counted = model(**inputs).logits.flatten(0, 1), labels != -100
    kd = 4.0 * divergence_reference(
        z, large(**inputs).logits.flatten(0, 1), kind=JSD(0.3), temperature=2.0
    )
    gold = 0.75 * kd[counted].mean() + 0.25 * F.cross_entropy(z, labels)
    gold.backward()
    torch.testing.assert_close(found.loss, gold, rtol=1e-5, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], value.grad, rtol=1e-4, atol=2e-6 * float(value.grad.abs().max() + 1)
        )
    assert all(value.grad is None for value in large.parameters())


def test_autocast_is_the_heads_too():
    model, inputs = model_of("llama, tied"), inputs_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert student_head(model, inputs).hidden.dtype == torch.bfloat16
        assert student_head(model, inputs, dtype=torch.float32).hidden.dtype == torch.float32
    assert student_head(model.bfloat16(), inputs).weight.dtype == torch.bfloat16


def test_compiled_models_are_seen_through():
    model, plain = model_of("gemma 2"), model_of("gemma 2")
    model.compile(backend="eager")
    for seed in range(3):
        whole = plain(**inputs_of(seed)).logits.flatten(0, 1)
        found = logits_of(student_head(model, inputs_of(seed)))
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


class _Odd(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output


class _Longer(LlamaForCausalLM):
    """Puts tokens of its own before the given ones, as prompt tuning does."""

    def forward(self, input_ids, **kwargs):
        return super().forward(F.pad(input_ids, (2, 0), value=5), use_cache=False)


class _Functional(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return {"logits": F.linear(self.model(input_ids)[0], self.lm_head.weight)}


@pytest.mark.parametrize(
    "cls,said",
    [
        (_Odd, "the logits of _Odd are not those of its output layer under no scaling"),
        (_Longer, r"_Longer gives its output layer \(2, 11, 32\), expected \(2, 9\) positions"),
        (_Functional, "_Functional called its output layer 0 times, expected once"),
    ],
)
def test_models_whose_logits_are_not_known_are_refused(cls, said):
    inputs = {"input_ids": inputs_of()["input_ids"]}
    with pytest.raises(InputError, match=said):
        student_head(cls(LlamaConfig(**SHAPE)), inputs)


def test_output_layers_with_an_adapter_are_refused():
    model = model_of("llama, tied")
    model.lm_head.base_layer = nn.Identity()  # as PEFT's layers hold what they adapt
    with pytest.raises(InputError, match="expected one whose product is with `weight` alone"):
        student_head(model, inputs_of())
    with pytest.raises(InputError, match="Linear has no output layer"):
        student_head(nn.Linear(2, 2), inputs_of())
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(InputError, match=r"expected fully_shard \(FSDP2\)"):
        student_head(wrapper, inputs_of())


# The module itself.


def test_the_module_is_kd_loss():
    model, large, inputs = model_of("llama, tied"), model_of("llama, tied", seed=1), inputs_of()
    student, teacher = student_head(model, inputs), teacher_head(large, inputs)
    given = dict(labels=torch.full((18,), 7), token_weight=torch.rand(18), vocabulary=[5, 7, 9])
    settings = dict(cross_entropy=0.5, temperature=0.7, tau_squared=True, reduction="none")
    found = DistillationLoss(ReverseKL(), **settings)(student, teacher, **given)
    wanted = kd_loss(student, teacher, divergence=ReverseKL(), **settings, **given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found.loss.shape == (18,)
    loss = DistillationLoss(JSD(0.5), temperature=2.0, logits="fp32")
    assert str(loss) == (
        "DistillationLoss(JSD(beta=0.5, rescale=False), temperature=2.0, logits='fp32')"
    )
    assert not list(loss.parameters())


def test_float64_is_for_the_reference():
    model, large, inputs = model_of("llama, tied"), model_of("llama, tied", seed=1), inputs_of()
    wide = student_head(model.double(), inputs), teacher_head(large.double(), inputs)
    found = DistillationLoss(ForwardKL())(*wide).loss
    assert found.dtype == torch.float64
    gold = divergence_reference(*(logits_of(one) for one in wide), kind=ForwardKL()).mean()
    torch.testing.assert_close(found, gold, rtol=1e-12, atol=0)


def test_what_is_no_divergence_is_refused():
    with pytest.raises(InputError, match="divergence is 'forward_kl', expected ForwardKL"):
        DistillationLoss("forward_kl")


# Token weights.


def test_answer_weights_by_hand():
    #                  shown   | row 0: two answers     | no answer | row 7: one token
    row = torch.tensor([-1, -1, 0, 0, 0, 0, 2, 2, 7])
    answer = torch.tensor([False, True, False, True, False, True, False, False, True])
    found = answer_weights(row, answer, answer_weight=0.9, sequence_weight=0.2)
    wanted = [0, 0, 0.05, 0.5, 0.05, 0.5, 0, 0, 1.1]
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert float(answer_weights(row, answer).sum()) == pytest.approx(2.0)  # 0.95 + 0.05 a row
    assert answer_weights(row[:0], answer[:0]).shape == (0,)
    assert not answer_weights(torch.full((3,), -1), torch.ones(3, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    "row,answer,said",
    [
        (
            torch.zeros(3).long(),
            torch.ones(4, dtype=torch.bool),
            r"row is \(3,\) and answer \(4,\)",
        ),
        (torch.zeros(3).long(), torch.ones(3), r"torch\.float32, expected \(T,\) and \(T,\)"),
        (
            torch.zeros(3),
            torch.ones(3, dtype=torch.bool),
            "row is torch.float32, expected integers",
        ),
    ],
)
def test_answer_weights_refuse(row, answer, said):
    with pytest.raises(InputError, match=said):
        answer_weights(row, answer)


# Trainers of others.


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", **more)


def test_a_swapped_loss_divides_as_trainer_does(tmp_path):
    """Loss and gradients of a Trainer without a loss of its own: cross entropy, over the tokens of
    a whole accumulated step or of the batch alone.
    """
    model, inputs = model_of("gemma 2"), inputs_of()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, :4] = -100
    trainer = Trainer(model, arguments(tmp_path))
    for items in (None, torch.tensor(31)):
        plain = trainer.compute_loss(model, {**inputs, "labels": labels}, num_items_in_batch=items)
        plain.backward()
        wanted = {name: value.grad.clone() for name, value in model.named_parameters()}
        model.zero_grad()
        swapped = Trainer(model, arguments(tmp_path))
        use_kd_loss(swapped, DistillationLoss(cross_entropy=1.0))
        batch = {**inputs, "labels": labels}
        found, outputs = swapped.compute_loss(model, batch, True, num_items_in_batch=items)
        assert "labels" in batch and not outputs
        found.backward()
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)
        for name, value in model.named_parameters():
            near = 2e-6 * float(wanted[name].abs().max() + 1)
            torch.testing.assert_close(value.grad, wanted[name], rtol=1e-4, atol=near)
        model.zero_grad()


def test_a_batch_without_labels_that_count(tmp_path):
    model = model_of("llama, tied")
    trainer = Trainer(model, arguments(tmp_path))
    use_kd_loss(trainer, DistillationLoss(), teacher=model_of("llama, tied", seed=1))
    inputs = inputs_of()
    ignored = torch.full_like(inputs["input_ids"], -100)
    loss = trainer.compute_loss(model, {**inputs, "labels": ignored})
    loss.backward()
    assert loss.item() == 0.0
    assert all(not value.grad.any() for value in model.parameters() if value.grad is not None)


def test_settings_that_would_be_ignored_are_refused(tmp_path):
    model, loss, teacher = model_of("llama, tied"), DistillationLoss(), model_of("llama, tied", 1)

    def of(**more):
        return Trainer(model, arguments(tmp_path), **more)

    smoothed = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    routed = of()
    routed.model = model_of("llama, tied")
    routed.model.config.output_router_logits = True
    cases = [
        (model, loss, teacher, "trainer is LlamaForCausalLM, expected a transformers.Trainer"),
        (of(), None, teacher, "loss is None, expected a DistillationLoss"),
        (of(), loss, None, "teacher is None, expected a model, or a loss with cross_entropy=1.0"),
        (of(), DistillationLoss(reduction="sum"), teacher, "loss.reduction is 'sum'"),
        (of(), DistillationLoss(ignore_index=0), teacher, "loss.ignore_index is 0, expected -100"),
        (of(compute_metrics=len), loss, teacher, "trainer.compute_metrics is given"),
        (of(compute_loss_func=len), loss, teacher, "trainer.compute_loss_func is given"),
        (smoothed, loss, teacher, "args.label_smoothing_factor is 0.1, expected 0"),
        (routed, loss, teacher, "config.output_router_logits is True"),
    ]
    for trainer, given, large, said in cases:
        with pytest.raises(InputError) as raised:
            use_kd_loss(trainer, given, teacher=large)
        assert said in str(raised.value) and "\n" not in str(raised.value)
    plain = of()
    use_kd_loss(plain, loss, teacher=teacher)
    with pytest.raises(InputError, match="a batch holds .*, expected labels among them"):
        plain.compute_loss(model, inputs_of())


def table(text: str) -> dict[str, list[float]]:
    """The lines of numbers that an example prints, by their first word."""
    rows = [line.split() for line in text.splitlines() if line[:1].isalpha()]
    return {row[0]: [float(value) for value in row[1:]] for row in rows}


@pytest.mark.parametrize("name,needs", [("kd_in_transformers", "torch"), ("kd_in_trl", "trl")])
def test_examples(name, needs, root, capsys):
    """Logits first, then kd_loss: the same losses, which fall."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    runpy.run_path(str(root / "examples" / f"{name}.py"), run_name="__main__")
    before, after = table(capsys.readouterr().out).values()
    assert len(before) == 6 and before == pytest.approx(after, rel=1e-4, abs=1.1e-4)
    assert after[-1] < after[0]
    assert len({round(one, 3) for one in itertools.chain(before, after)}) > 3
