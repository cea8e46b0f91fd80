"""Training goes on after kill -9 as if nothing had happened, and does so with everything that
Trainer lets a user set: adapters, precisions, optimizers, schedules.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from small_training import (
    ended,
    logs_of,
    make_labelled,
    make_model,
    make_ranked,
    one_thread,
    settings,
    start,
    young_garbage,
)
from transformers import TrainerCallback

from slmperf.distill import DistillationTrainer, checkpoint
from slmperf.distill.on_policy import OnPolicySampler


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


# --- kill -9 ----------------------------------------------------------------------------------


class Killed(TrainerCallback):
    """kill -9, of the process itself so that it comes at a known place of a step."""

    def __init__(self, event: str, step: int):
        self.event, self.step = event, step
        if event == "checkpoint":  # when half of its files are written
            write = checkpoint.save_file

            def save_file(tensors, path):
                write(tensors, path)
                if path.parent.name.startswith(f".checkpoint-{step}.") and "random" in path.name:
                    os.kill(os.getpid(), signal.SIGKILL)

            checkpoint.save_file = save_file

    def at(self, event, state):
        if self.event == event and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args, state, control, **_):
        self.at("between two batches of a step", state)

    def on_optimizer_step(self, args, state, control, **_):
        self.at("weights changed, nothing noted", state)


def everything(folder: Path) -> DistillationTrainer:
    """A training with every kind of state: generators, dropout, moments, schedule, the student's
    own text written ahead, a best checkpoint, and a count of evaluations without a better one.
    """
    config = settings(
        folder,
        max_steps=40,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-2,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        sequence_sample=0.5,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
        logging_steps=3,
        early_stopping_patience=3,
        sample_generations=1,
    )
    return DistillationTrainer(
        make_model(attention_dropout=0.2),
        config,
        make_ranked(12),
        make_ranked(6, seed=8),
        teacher=make_model(seed=1),
        on_policy=OnPolicySampler(0.6, new_tokens=4, refresh_steps=3, seed=10),
    )


def killed_job(folder: Path, event: str, step: int) -> None:
    trainer = everything(folder)
    trainer.add_callback(Killed(event, step))
    trainer.train(resume_from_checkpoint=True)


def test_three_kills_change_nothing(tmp_path):
    wanted = everything(tmp_path / "undisturbed")
    wanted.train()
    steps, best = wanted.state.global_step, wanted.state.best_global_step
    assert 12 <= steps < 40 and 0 < best == steps - 6  # it did stop early, three evaluations late

    folder = tmp_path / "killed"
    kills = [
        ("between two batches of a step", 5),
        ("checkpoint", 8),
        ("weights changed, nothing noted", 10),
    ]
    for event, step in kills:
        assert ended([start(killed_job, folder, event, step)]) == [-signal.SIGKILL]
    half = list(folder.glob(".checkpoint-8.*"))
    trainer = everything(folder)
    trainer.train(resume_from_checkpoint=True)

    assert not half or not half[0].exists()
    assert trainer.losses == wanted.losses and len(wanted.losses) == steps
    assert_equal(weights(trainer.model), weights(wanted.model))
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == wanted.state.best_metric
    for names in (("eval_",), ("loss", "grad_norm", "learning_rate")):
        assert logs_of(trainer, *names) == logs_of(wanted, *names)
    assert trainer.clock.tokens == wanted.clock.tokens
    texts = [(one / "samples.jsonl").read_text() for one in (folder, tmp_path / "undisturbed")]
    assert texts[0] == texts[1] and texts[0].count("\n") == steps // 2
    kept = {path.name for path in folder.iterdir() if "checkpoint" in path.name}
    assert kept == {path.name for path in wanted.folder.iterdir() if "checkpoint" in path.name}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        ".safetensors", ".json", ".jsonl", ".log",
    }  # fmt: skip

    # Called once more: it had stopped early, and does not go on.
    again = everything(folder)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and again.losses == wanted.losses
    assert_equal(weights(again.model), weights(wanted.model))


# --- what else can be set ---------------------------------------------------------------------


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])


def own_schedule(kind: str):
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        make = torch.optim.lr_scheduler
        if kind == "plateau":
            return optimizer, make.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        first = make.LinearLR(optimizer, total_iters=3)
        second = make.CosineAnnealingLR(optimizer, 5)
        return optimizer, make.SequentialLR(optimizer, [first, second], milestones=[3])

    return make


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
VARIANTS = {
    "bf16": ({"bf16": True}, {}),
    "lora": ({}, {"peft_config": lora}),
    "lora, checkpointing": ({"gradient_checkpointing": True}, {"peft_config": lora}),
    "offload": ({"offload_optimizer": True}, {}),
    "offload, bf16 weights": ({"offload_optimizer": True}, {"dtype": torch.bfloat16}),
    "adafactor": ({"optim": "adafactor"}, {}),
    "sgd": (
        {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant_with_warmup"},
        {},
    ),
    "own optimizer and schedule": ({}, {"optimizers": own_schedule("sequential")}),
    "plateau": (EVALUATED, {"optimizers": own_schedule("plateau")}),
    "plateau of Trainer": ({**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"}, {}),
}


def variant(folder: Path, name: str) -> DistillationTrainer:
    changes, more = VARIANTS[name]
    model = make_model(attention_dropout=0.2, dtype=more.get("dtype"))
    if "dtype" in more:
        model = model.to(more["dtype"])
    given = {key: value for key, value in more.items() if key != "dtype"}
    if "peft_config" in given:
        given["peft_config"] = given["peft_config"]()
    if "optimizers" in given:
        given["optimizers"] = given["optimizers"](model)
    return DistillationTrainer(
        model,
        settings(folder, max_steps=6, save_strategy="steps", save_steps=3, **changes),
        make_labelled(16),
        make_labelled(4, seed=3) if "eval_strategy" in changes else None,
        teacher=make_model(seed=1),
        **given,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_training_is_the_same(name, tmp_path):
    wanted = variant(tmp_path, name)
    begin = weights(wanted.model)
    wanted.train()
    assert wanted.losses[-1] < wanted.losses[0]
    found = variant(tmp_path, name)
    found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert found.losses == wanted.losses
    assert_equal(weights(found.model), weights(wanted.model))
    assert logs_of(found, "learning_rate", "eval_") == logs_of(wanted, "learning_rate", "eval_")
    changed = {
        name for name, value in weights(wanted.model).items() if not torch.equal(value, begin[name])
    }
    trained = {name for name, value in wanted.model.named_parameters() if value.requires_grad}
    assert changed == trained


def test_adapters_alone_are_trained_and_kept(tmp_path):
    from peft import PeftModel
    from safetensors import safe_open

    trainer = variant(tmp_path, "lora")
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("model*.safetensors"))
    with safe_open(folder / "optimizer.safetensors", "pt") as stored:
        assert all("lora_" in name for name in stored.keys())
    model, base = trainer.model.eval(), make_model()
    ids = torch.arange(12, 24)[None]
    with torch.no_grad():
        wanted, before = model(input_ids=ids).logits, base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, folder).eval()
        assert torch.equal(loaded(input_ids=ids).logits, wanted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    assert type(merged) is type(make_model())


class Gradients(TrainerCallback):
    """Of the first step, as the optimizer gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            named = model.named_parameters()
            self.found = {name: one.grad.clone() for name, one in named if one.grad is not None}


def trained(folder: Path, **changes):
    """Losses, first gradients and final weights of a plain training."""
    given = {name: changes.pop(name) for name in ("peft_config", "teacher") if name in changes}
    trainer = DistillationTrainer(
        make_model(), settings(folder, **changes), make_labelled(24), **given
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.losses, gradients.found, weights(trainer.model)


@pytest.mark.parametrize("adapters", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(adapters, reentrant, tmp_path):
    def run(name, **changes):
        torch.manual_seed(0)  # of the adapters' first weights
        given = {"peft_config": lora()} if adapters else {}
        if adapters:
            given["peft_config"].lora_dropout = 0.0
        return trained(tmp_path / name, **given, **changes)

    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, saving = run("plain"), run("saving", gradient_checkpointing=True, **kwargs)
    assert any(value.abs().max() > 0 for value in plain[1].values())
    assert saving[0] == plain[0]
    assert_equal(saving[1], plain[1])
    assert_equal(saving[2], plain[2])


def test_an_optimizer_in_host_memory_is_adamw(tmp_path):
    common = {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "warmup_steps": 2}
    plain = trained(tmp_path / "plain", optim="adamw_torch_fused", **common)
    hosted = trained(tmp_path / "hosted", offload_optimizer=True, **common)
    assert hosted[0] == plain[0]
    assert_equal(hosted[2], plain[2])


def test_bf16_is_near_fp32_and_leaves_the_model_as_it_is(tmp_path):
    teacher = make_model(seed=1)
    fp32 = trained(tmp_path / "fp32", teacher=teacher)
    bf16 = trained(tmp_path / "bf16", teacher=teacher, bf16=True)
    assert bf16[0] != fp32[0]
    assert bf16[0] == pytest.approx(fp32[0], rel=0.03)
    assert {value.dtype for value in bf16[2].values()} == {torch.float32}
    model = make_model()
    forward = model.forward
    config = settings(tmp_path / "own", bf16=True, max_steps=1)
    DistillationTrainer(model, config, make_labelled(4)).train()
    assert model.forward == forward  # not wrapped: later calls are in fp32
    assert model(input_ids=torch.arange(12, 20)[None]).logits.dtype == torch.float32


def test_a_step_cut_into_batches_is_the_same(tmp_path):
    """Losses of all steps and final weights; Adam's epsilon keeps its ratio of two small numbers
    from making rounding visible.
    """
    common = {
        "rows_per_step": 8,
        "max_steps": 5,
        "adam_epsilon": 1e-2,
        "teacher": make_model(seed=1),
    }
    for more in ({}, {"normalization": "examples", "packing": False, "sequence_sample": 0.5}):
        one = trained(tmp_path / "one", **common, **more)
        four = trained(tmp_path / "four", **common, **more, gradient_accumulation_steps=4)
        assert four[0] == pytest.approx(one[0], rel=2e-6)
        for name, value in one[2].items():
            torch.testing.assert_close(four[2][name], value, rtol=1e-4, atol=2e-6)
