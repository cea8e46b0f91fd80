"""What goes wrong in and after a step: NaN, and disks that are full."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from small_training import (
    ended,
    make_labelled,
    make_model,
    one_thread,
    settings,
    start,
    young_garbage,
)
from transformers import (
    TrainerCallback,
)

from slmperf import models
from slmperf.check import InputError
from slmperf.distill import DistillationTrainer, checkpoint, train
from slmperf.distill.teachers import as_teacher
from slmperf.distill.trainer import batch_loss
from slmperf.models.files import sha256_of


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with young_garbage(), one_thread():
        yield


# --- in a step --------------------------------------------------------------------------------

POISON = 95  # a token of one text alone


def poisoned() -> list[dict]:
    examples = make_labelled(24)
    for one in examples:
        one["input_ids"] = [min(token, POISON - 1) for token in one["input_ids"]]
        marked = np.array(one["labels"]) != -100
        one["labels"] = np.where(marked, one["input_ids"], -100).tolist()
    examples[13]["input_ids"][0] = POISON
    return examples


def teacher_with_nan():
    teacher = make_model(seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[POISON] = float("nan")
    return teacher


class Before(TrainerCallback):
    """Weights at the beginning of the step under way."""

    def on_step_begin(self, args, state, control, model=None, **_):
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def stopped(folder, teacher=None, spoil=None, **changes):
    """A training that stops; the error and the weights at the beginning of its last step."""
    config = settings(
        folder,
        **{"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "rows_per_step": 2}
        | {"gradient_accumulation_steps": 2} | changes,
    )  # fmt: skip
    model = make_model()
    before = Before()
    trainer = DistillationTrainer(model, config, poisoned(), teacher=teacher, callbacks=[before])
    if spoil is not None:
        spoil(trainer)
    with pytest.raises(InputError) as raised:
        trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.weights[name]), name
    assert "\n" not in str(raised.value)
    return trainer, str(raised.value)


def test_nan_stops_before_the_weights_change(tmp_path):
    trainer, told = stopped(tmp_path, teacher_with_nan())
    step = trainer.state.global_step + 1
    assert 2 <= step <= 12 and len(trainer.losses) == step - 1
    folder = tmp_path / f"failed-step-{step}-rank-0"
    assert f"the loss is nan at step {step}" in told and str(folder) in told
    assert f"checkpoint-{step - 1}" in told
    assert json.loads((folder / "failure.json").read_text())["step"] == step

    # The batches, read back, give NaN again with that teacher; and none without it.
    batches = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(batches) == 2
    config, sound = trainer.args, make_model(seed=1, tie_word_embeddings=False)
    student = models.load(tmp_path / f"checkpoint-{step - 1}")
    values = [
        [float(batch_loss(student, as_teacher(one), batch, config).loss) for batch in batches]
        for one in (teacher_with_nan(), sound)
    ]
    assert np.isnan(values[0]).any() and np.isfinite(values[1]).all()
    assert any((batch["input_ids"] == POISON).any() for batch in batches)

    # The last checkpoint goes on as a training that never saw the bad one.
    config = settings(
        tmp_path, max_steps=12, save_strategy="steps", save_steps=1, rows_per_step=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = DistillationTrainer(make_model(), config, poisoned(), teacher=sound)
    trainer.train(resume_from_checkpoint=True)
    config.output_dir = str(tmp_path / "whole")
    whole = DistillationTrainer(make_model(), config, poisoned(), teacher=sound)
    whole.train()
    assert trainer.losses == whole.losses


@pytest.mark.parametrize("factor", [float("inf"), 1e25], ids=["inf", "overflow"])
@pytest.mark.parametrize("clipping", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_gradient_that_is_not_finite_stops_too(factor, clipping, tmp_path):
    """The loss is finite; 1e25: every gradient as well, but not its norm, and clipping would make
    zeros of it at every step to come.
    """

    def spoil(trainer):
        def scale(gradient):
            return gradient * factor if trainer.state.global_step == 2 else gradient

        trainer.model.get_input_embeddings().weight.register_hook(scale)

    trainer, told = stopped(tmp_path, spoil=spoil, max_grad_norm=clipping)
    assert "the gradient's norm is" in told and "at step 3" in told and "checkpoint-2" in told
    assert np.isfinite(trainer.losses).all() and len(trainer.losses) == 2
    assert checkpoint.checkpoints(tmp_path)[-1].name == "checkpoint-2"


# --- after a step -----------------------------------------------------------------------------

FILES = (
    "config.json", "model.safetensors", "optimizer.safetensors", "random-0.safetensors",
    "losses.safetensors", "trainer_state.json", "progress.json",
)  # fmt: skip


def saving(folder: Path, **changes) -> DistillationTrainer:
    base = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DistillationTrainer(
        make_model(attention_dropout=0.2), settings(folder, **(base | changes)), make_labelled(16)
    )


def failing(folder: Path) -> dict:
    """Go on from step 2 and fail at step 4: the error, and what is there afterwards."""
    found: dict = {"error": None}
    try:
        saving(folder).train(resume_from_checkpoint=True)
    except Exception as error:
        found["error"] = [type(error).__name__, str(error)]
    found["folders"] = sorted(one.name for one in folder.glob("*check*"))
    found["digest"] = sha256_of(folder / "checkpoint-2")
    return found


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def cut(owner, name: str, whether) -> None:
    """Calls of owner.name for which whether(path) is true may write files of 60 bytes."""
    write = getattr(owner, name)

    def limited(*given, **more):
        path = next(Path(one) for one in given if isinstance(one, str | Path))
        limit(60 if whether(path) else resource.RLIM_INFINITY)
        try:
            return write(*given, **more)
        finally:
            limit(resource.RLIM_INFINITY)

    setattr(owner, name, limited)


def short_files_job(folder: Path, out: Path) -> None:
    """Each time another file of checkpoint-4 is cut short, by the kernel and in its middle."""
    target = ""  # the file's name

    def whether(path: Path) -> bool:
        if target == "config.json":  # of those that Transformers writes, the first
            return path.name.startswith(".checkpoint-4.")
        return path.parent.name.startswith(".checkpoint-4.") and path.name == target

    cut(safetensors.torch, "serialize_file", whether)
    cut(Path, "write_text", whether)
    cut(models, "write_pretrained", whether)
    found = {}
    for target in FILES:
        found[target] = failing(folder)
    out.write_text(json.dumps(found))


def own_disk(folder: Path, options: bytes) -> bool:
    """Mount a file system in memory that this process alone sees; False where it must not."""
    library = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000  # linux/sched.h
    users, groups = os.getuid(), os.getgid()
    if library.unshare(new_user | new_mounts):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {users} 1")
    Path("/proc/self/gid_map").write_text(f"0 {groups} 1")
    return library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) == 0


def full_disk_job(folder: Path, out: Path) -> None:
    """The same on a file system that has some room left, and no more; it is this process's own."""
    folder.mkdir()
    mine = own_disk(folder, b"size=2m")
    found = {}
    if mine:
        saving(folder, max_steps=2).train()
        for room in (0, 8, 24, 48, 64):
            filler = folder / "filler"
            with open(filler, "wb") as stream:
                free = os.statvfs(folder)
                stream.write(b"x" * (free.f_bavail * free.f_frsize - room * 1024))
            found[f"{room} KiB"] = failing(folder)
            filler.unlink()
        trainer = saving(folder)
        trainer.train(resume_from_checkpoint=True)
        found["losses"] = trainer.losses
    out.write_text(json.dumps(found))


def check_failures(found: dict, digest: str | None, reason: str) -> None:
    for name, one in found.items():
        kind, told = one["error"] or (None, None)
        assert kind == "InputError", (name, kind, told)
        assert "\n" not in told and "checkpoint-4" in told and "checkpoint-2" in told, (name, told)
        assert reason in told, (name, told)
        assert one["folders"] == ["checkpoint-2"], name
        assert digest in (None, one["digest"]), name


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    """Whichever file of a checkpoint does not fit: the one before it stays and is gone on from."""
    wanted, folder = saving(tmp_path / "wanted"), tmp_path / "short"
    wanted.train()
    saving(folder, max_steps=2).train()
    outs = [tmp_path / "short.json", tmp_path / "full.json"]
    jobs = [
        start(short_files_job, folder, outs[0]),
        start(full_disk_job, tmp_path / "disk", outs[1]),
    ]
    digest = sha256_of(folder / "checkpoint-2")
    assert ended(jobs) == [0, 0]

    short, full = (json.loads(path.read_text()) for path in outs)
    assert list(short) == list(FILES)
    check_failures(short, digest, "File too large")
    trainer = saving(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.losses == wanted.losses
    for name, value in wanted.model.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), value), name
    models.load(folder / "checkpoint-4")
    models.load(folder / "checkpoint-6")

    if full:  # where a process may have a file system of its own
        assert full.pop("losses") == wanted.losses
        check_failures(full, None, "No space left")
        assert len({one["digest"] for one in full.values()}) == 1


def test_called_again_train_gives_the_same_result(tmp_path):
    """Also where the checkpoint of the end was not the best one, and is gone."""

    def once(**changes):
        config = settings(tmp_path, **{**given, **changes})
        return train(make_model(), make_labelled(16), config=config, validation=make_labelled(4, 3))

    given = {
        "max_steps": 8, "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
        "save_total_limit": 1,
    }  # fmt: skip
    first, again = once(), once()
    assert first.best_step is not None and first.best_step < 8
    assert again.steps == first.steps == len(first.losses) == 8
    assert np.array_equal(again.losses, first.losses)
    assert again.evaluations == first.evaluations and again.best_loss == first.best_loss
    with pytest.raises(InputError, match="learning_rate") as raised:
        once(learning_rate=0.2)
    assert "\n" not in str(raised.value)
