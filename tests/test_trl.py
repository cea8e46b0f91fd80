"""use_kd_loss inside TRL's trainers: the loss and the gradients are TRL's own, in fp32.

Where TRL 1.16 itself is particular, the tests hold that: GKDTrainer samples at its `temperature`
and takes the loss at 1 whatever it is; DistillationTrainer counts the tokens of a step by itself.
"""

# ruff: noqa: E402  (what may not be installed is asked for first)
from __future__ import annotations

import pytest
import torch

for _name in ("trl", "datasets"):
    pytest.importorskip(_name, reason=f"{_name} is not installed")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from slmperf.check import InputError
from slmperf.distill import DistillationLoss, use_kd_loss
from slmperf.ops import ReverseKL, SkewForwardKL

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


def llama(seed, hidden):
    torch.manual_seed(seed)
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, tie_word_embeddings=False)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **shape))


def gemma(seed, hidden):
    torch.manual_seed(seed)
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, head_dim=hidden // 4)
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, **shape, final_logit_softcapping=4.0))


def tokenizer():
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="0", bos_token="1", eos_token="2"
    )


def rows(count=8):
    """Different lengths; of each the first half, and in every third the last token, unlabelled."""
    random = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        length = 8 + number % 5
        ids = torch.randint(3, VOCABULARY, (length,), generator=random)
        labels = ids.clone()
        labels[: length // 2] = -100
        if number % 3 == 0:
            labels[-1] = -100
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


def collate(items):
    width = max(len(item["input_ids"]) for item in items)
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    found = {name: [] for name in pad}
    for item in items:
        item = {**item, "attention_mask": [1] * len(item["input_ids"])}
        for name, value in pad.items():
            found[name].append(item[name] + [value] * (width - len(item[name])))
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.fixture
def build(tmp_path):
    def build(trainer, student=None, teacher=None, **more):
        config = DistillationConfig
        if trainer is not DistillationTrainer:
            config = GOLDConfig if trainer is GOLDTrainer else GKDConfig
        if trainer is GOLDTrainer:
            more = {"use_uld_loss": False, **more}
        more = {"lmbda": 0.0, **more} if config is not DistillationConfig else more
        args = config(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=4, max_steps=2, logging_steps=1,
            gradient_checkpointing=False, **more,
        )  # fmt: skip
        given = {}
        if config is not DistillationConfig:
            given = {"train_dataset": Dataset.from_list(rows()), "data_collator": collate}
            given["eval_dataset"] = Dataset.from_list(rows(4))
        else:
            given["train_dataset"] = Dataset.from_list([{"prompt": "5 6 7"}, {"prompt": "9"}] * 4)
        return trainer(
            model=llama(0, 32) if student is None else student,
            teacher_model=llama(1, 64) if teacher is None else teacher,
            args=args, processing_class=tokenizer(), **given,
        )  # fmt: skip

    return build


def written_batch():
    """What DistillationTrainer makes of prompts: padded on the left, completions on the right."""
    random = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, VOCABULARY, (3, 4), generator=random)
    completion = torch.randint(3, VOCABULARY, (3, 6), generator=random)
    prompt_mask, completion_mask = torch.ones_like(prompt), torch.ones_like(completion)
    prompt_mask[0, :2] = completion_mask[1, 4:] = 0
    tool_mask = torch.ones_like(completion)
    tool_mask[2, 1:3] = 0  # a tool's answer
    return {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion,
        "completion_mask": completion_mask, "tool_mask": tool_mask,
        "num_items_in_batch": torch.tensor(23.0),
    }  # fmt: skip


def outcome(trainer, batch, items=None):
    """Loss, and the gradient of every parameter that has one."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    assert float(wanted[0]) > 1e-3 and found[1].keys() == wanted[1].keys()
    # Gradients that are sums to zero, such as those of key projections' biases, are rounding.
    largest = max(float(value.abs().max()) for value in wanted[1].values())
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-4, atol=2e-6 * largest)


SETTINGS = [(0.0, 1.0), (0.0, 2.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)]


@pytest.mark.parametrize("beta,temperature", SETTINGS)
@pytest.mark.parametrize("trainer", [GKDTrainer, GOLDTrainer, DistillationTrainer])
def test_the_loss_is_trls(build, trainer, beta, temperature):
    one = build(trainer, beta=beta, temperature=temperature)
    batch = written_batch() if trainer is DistillationTrainer else collate(rows(4))
    wanted = [outcome(one, batch, items) for items in (None, torch.tensor(29))]
    use_kd_loss(one)
    for items, gold in zip((None, torch.tensor(29)), wanted, strict=True):
        assert_same(outcome(one, batch, items), gold)
    if trainer is not DistillationTrainer:
        assert wanted[0][0] != wanted[1][0]  # the count is used


def test_temperature_is_in_the_loss_where_trl_has_it_there(build):
    """TRL's GKDTrainer samples with it alone: its loss at 2 is its loss at 1, and so is ours."""
    values = {}
    for trainer in (GKDTrainer, GOLDTrainer):
        for temperature in (1.0, 2.0):
            one = build(trainer, temperature=temperature)
            use_kd_loss(one)
            values[trainer, temperature] = float(outcome(one, collate(rows(4)))[0])
    assert values[GKDTrainer, 2.0] == values[GKDTrainer, 1.0] == values[GOLDTrainer, 1.0]
    assert values[GOLDTrainer, 2.0] < 0.9 * values[GOLDTrainer, 1.0]


@pytest.mark.parametrize("trainer", [GKDTrainer, DistillationTrainer])
def test_softcapped_logits(build, trainer):
    one = build(trainer, student=gemma(0, 32), teacher=llama(1, 64), beta=0.5)
    batch = written_batch() if trainer is DistillationTrainer else collate(rows(4))
    wanted = outcome(one, batch)
    use_kd_loss(one)
    assert_same(outcome(one, batch), wanted)


def test_an_adapter_below_the_output_layer(build):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(
        llama(0, 32),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    one = build(GKDTrainer, student=adapted)
    batch = collate(rows(4))
    wanted = outcome(one, batch)
    use_kd_loss(one)
    assert_same(outcome(one, batch), wanted)
    assert all("lora" in name for name in wanted[1])


@pytest.mark.parametrize("trainer", [GKDTrainer, GOLDTrainer, DistillationTrainer])
def test_training_goes_the_same_way(build, trainer):
    """Two accumulated steps, and what they log."""
    losses = []
    for swapped in (False, True):
        more = {"max_completion_length": 5} if trainer is DistillationTrainer else {}
        one = build(trainer, gradient_accumulation_steps=2, learning_rate=1e-2, **more)
        if swapped:
            use_kd_loss(one)
        torch.manual_seed(0)  # of the completions that are sampled
        one.train()
        losses.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
        if trainer is DistillationTrainer:
            assert any("entropy" in entry for entry in one.state.log_history) is not swapped
        else:
            losses[-1].append(one.evaluate()["eval_loss"])
    assert len(losses[0]) >= 2 and losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_another_loss_than_the_trainers(build):
    one = build(GOLDTrainer, beta=0.5)
    own = outcome(one, collate(rows(4)))[0]
    use_kd_loss(one, DistillationLoss(SkewForwardKL(0.2), cross_entropy=0.3))
    assert float(outcome(one, collate(rows(4)))[0]) > 1.5 * float(own)
    use_kd_loss(one, DistillationLoss(ReverseKL()))
    wanted = build(GOLDTrainer, beta=1.0, temperature=1.0)
    assert_same(outcome(one, collate(rows(4))), outcome(wanted, collate(rows(4))))


def test_beta_is_read_at_every_step(build):
    one = build(GKDTrainer, beta=0.0)
    use_kd_loss(one)
    batch = collate(rows(4))
    first = outcome(one, batch)
    one.beta = 1.0  # as a callback may
    wanted = outcome(build(GKDTrainer, beta=1.0), batch)
    assert abs(float(first[0] - wanted[0])) > 1e-3
    assert_same(outcome(one, batch), wanted)


class _Own(GKDTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_what_is_refused(build, tmp_path):
    uld = build(GOLDTrainer)
    uld.use_uld_loss = True
    images = build(GKDTrainer)
    images._is_vlm = True
    sft = SFTTrainer(
        model=llama(0, 32),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer(),
    )
    cases = [
        (uld, None, "args.use_uld_loss is True, expected False: models of one vocabulary"),
        (images, None, "model is one that sees images, expected a language model"),
        (sft, None, "trainer is TRL's SFTTrainer, expected GKDTrainer or GOLDTrainer or Distil"),
        (build(_Own), None, "loss is None, expected a DistillationLoss: _Own has a compute_loss"),
        (build(GKDTrainer), DistillationLoss(reduction="none"), "loss.reduction is 'none'"),
    ]
    for trainer, loss, said in cases:
        with pytest.raises(InputError) as raised:
            use_kd_loss(trainer, loss)
        assert said in str(raised.value) and "\n" not in str(raised.value)
