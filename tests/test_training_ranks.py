"""Two processes train as one does: losses, weights, evaluation, and what stops them or kills them.

All that two processes do is done by one pair, after another pair that is killed: each test reads
its part of what they wrote.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import (
    NO,
    YES,
    ended,
    logs_of,
    make_labelled,
    make_model,
    make_ranked,
    one_thread,
    settings,
    start_ranks,
    young_garbage,
)
from test_training_faults import POISON, poisoned, teacher_with_nan
from transformers import TrainerCallback

from slmperf.check import InputError
from slmperf.distill import DistillationTrainer, PackedBatches
from slmperf.distill.on_policy import OnPolicySampler


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


# Two processes with these settings, and one with those beside them: the rows of a step stay eight.
CASES = {
    "tokens": ({}, {"gradient_accumulation_steps": 4}),
    "examples": (
        {
            "normalization": "examples",
            "sequence_sample": 0.5,
            "packing": False,
            "gradient_accumulation_steps": 2,
        },
        {"gradient_accumulation_steps": 1},
    ),
    "on policy": ({}, {"gradient_accumulation_steps": 4}),
    "adapters in bf16": ({"bf16": True}, {}),
}
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "label_tokens": (NO, YES),
    "per_device_eval_batch_size": 2,
}


class Kill(TrainerCallback):
    """kill -9 of this process between two batches of a step."""

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(folder: Path, case: str, **more) -> DistillationTrainer:
    changes = {
        "max_steps": 5,
        "rows_per_step": 8,
        "adam_epsilon": 1e-2,  # else Adam's ratio of small numbers shows their rounding
        **CASES[case][0],
        **more,
    }
    given: dict = {"eval_dataset": make_ranked(13, seed=7)} if "eval_steps" in changes else {}
    if case == "adapters in bf16":
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if case == "on policy":
        given["on_policy"] = OnPolicySampler(0.5, new_tokens=5, refresh_steps=2)
    return DistillationTrainer(
        make_model(attention_dropout=changes.pop("dropout", 0.0)),
        settings(folder, **changes),
        [*make_ranked(12), *make_labelled(12)],
        teacher=make_model(seed=1),
        **given,
    )


def resumable(folder: Path) -> DistillationTrainer:
    """Each rank drops what its own generator says, and writes text ahead."""
    return trainer_of(
        folder,
        "on policy",
        dropout=0.2,
        max_steps=8,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
    )


def write(out: Path, name: str, trainer: DistillationTrainer, **more) -> None:
    """What one rank saw; both must have the same."""
    rank = trainer.accelerator.process_index
    save_file(
        {key: value.detach().clone() for key, value in trainer.model.named_parameters()},
        out / f"{name}-{rank}.safetensors",
    )
    told = {"losses": trainer.losses, "logs": logs_of(trainer, "loss", "eval_"), **more}
    (out / f"{name}-{rank}.json").write_text(json.dumps(told))


def killed_job(folder: Path) -> None:
    trainer = resumable(folder)
    trainer.add_callback(Kill())
    trainer.train()


def job(folder: Path, killed: Path) -> None:
    for name in CASES:
        trainer = trainer_of(folder / name, name, **(EVALUATED if name == "tokens" else {}))
        trainer.train()
        write(folder, name, trainer)

    for name, where in (("resumed", killed), ("undisturbed", folder / "undisturbed")):
        trainer = resumable(where)
        trainer.train(resume_from_checkpoint=True)
        write(folder, name, trainer)

    # The best checkpoint is that of the last step: nobody loads it before it is whole.
    trainer = trainer_of(
        folder / "best", "tokens", save_strategy="steps", save_steps=2, max_steps=2,
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer.train()
    write(folder, "best", trainer, step=trainer.state.best_global_step)

    # One rank's text alone makes the teacher say NaN.
    config = settings(
        folder / "nan", max_steps=12, save_strategy="steps", save_steps=1, rows_per_step=4
    )
    trainer = DistillationTrainer(make_model(), config, poisoned(), teacher=teacher_with_nan())
    write(folder, "nan", trainer, error=failure(trainer), step=trainer.state.global_step)

    # The disk of the first rank, which writes, is full.
    trainer = trainer_of(folder / "full", "tokens", save_strategy="steps", save_steps=2)
    if trainer.is_world_process_zero():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    error = failure(trainer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(folder, "full", trainer, error=error)


def failure(trainer: DistillationTrainer) -> str | None:
    try:
        trainer.train()
    except InputError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """Where two processes left what they saw."""
    folder, killed = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("killed")
    assert ended(start_ranks(killed_job, killed)) == [-signal.SIGKILL, -signal.SIGKILL]
    assert (killed / "checkpoint-3").is_dir() and not (killed / "checkpoint-6").exists()
    assert ended(start_ranks(job, folder, killed), 200) == [0, 0]
    return folder


def seen(ranks: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Of both ranks, which agree."""
    told = [json.loads((ranks / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    tensors = [load_file(ranks / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert told[0]["losses"] == told[1]["losses"]
    for key, value in tensors[0].items():
        assert torch.equal(tensors[1][key], value), key
    return told[0], tensors[0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, ranks, tmp_path):
    found, weights = seen(ranks, case)
    evaluated, bf16 = EVALUATED if case == "tokens" else {}, "bf16" in case
    one = trainer_of(tmp_path, case, **evaluated, **CASES[case][1])
    begin = {name: value.clone() for name, value in one.model.named_parameters()}
    one.train()
    near = 2e-3 if bf16 else 5e-6
    assert found["losses"] == pytest.approx(one.losses, rel=near)
    logs = logs_of(one, "loss", "eval_")
    assert len(logs) == len(found["logs"]) == 5 + (3 if evaluated else 0)
    for (step, wanted), (other, logged) in zip(logs, found["logs"], strict=True):
        assert step == other and logged == pytest.approx(wanted, rel=10 * near)
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(
            weights[name], value, rtol=2e-2 if bf16 else 1e-4, atol=2e-3 if bf16 else 5e-6
        )
    assert max((weights[name] - value).abs().max() for name, value in begin.items()) > 1e-2


def test_evaluation_on_two_processes_is_that_on_one(ranks, tmp_path):
    """The same weights: the same figures, the last batches being fewer than the processes."""
    found, weights = seen(ranks, "tokens")
    model = make_model()
    model.load_state_dict(weights, strict=False)
    config = settings(tmp_path, label_tokens=(NO, YES), per_device_eval_batch_size=2)
    data = make_ranked(13, seed=7)
    assert len(PackedBatches(data, config, once=True)) % 2 == 1
    trainer = DistillationTrainer(model, config, make_ranked(4), data, teacher=make_model(seed=1))
    wanted = trainer.evaluate()
    _, last = [entry for entry in found["logs"] if "eval_loss" in entry[1]][-1]
    assert set(last) == {"eval_loss", "eval_tokens", "eval_kd", "eval_auc"}
    for name, value in last.items():
        assert value == wanted[name], name


def test_two_killed_processes_go_on_as_if_nothing_had_happened(ranks):
    found, weights = seen(ranks, "resumed")
    wanted, others = seen(ranks, "undisturbed")
    assert found["losses"] == wanted["losses"] and len(wanted["losses"]) == 8
    assert found["logs"] == wanted["logs"]
    for name, value in others.items():
        assert torch.equal(weights[name], value), name


def test_both_load_the_best_checkpoint_of_the_last_step(ranks):
    told, weights = seen(ranks, "best")
    assert told["step"] == 2
    stored = load_file(ranks / "best" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in weights)


def test_nan_on_one_rank_stops_both(ranks):
    seen(ranks, "nan")  # the same weights on both, so neither stepped
    told = [json.loads((ranks / f"nan-{rank}.json").read_text()) for rank in range(2)]
    step = told[0]["step"] + 1
    assert told[1]["step"] == step - 1 >= 1
    having = []
    for rank, one in enumerate(told):
        assert f"the loss is nan at step {step}" in one["error"] and "\n" not in one["error"]
        folder = ranks / "nan" / f"failed-step-{step}-rank-{rank}"
        batch = load_file(folder / "batch-0.safetensors")
        having.append(bool((batch["input_ids"] == POISON).any()))
    assert sorted(having) == [False, True]
    assert (ranks / "nan" / f"checkpoint-{step - 1}").is_dir()
    assert not (ranks / "nan" / f"checkpoint-{step}").exists()


def test_a_disk_that_is_full_for_one_stops_both(ranks):
    for rank in range(2):
        error = json.loads((ranks / f"full-{rank}.json").read_text())["error"]
        assert error is not None and "checkpoint-2" in error and "\n" not in error
    assert not list((ranks / "full").glob("*checkpoint*"))
