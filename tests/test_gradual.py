"""GradualSchedule: steps that shrink, recover, and survive being killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import llama
from torch import Tensor, nn

from slmperf.calibrate import calibrate, text_hash
from slmperf.check import InputError
from slmperf.data.text import train_text_tokenizer
from slmperf.models import load, save
from slmperf.prune.checkpoint import prune_checkpoint
from slmperf.prune.gradual import GradualSchedule, Step
from slmperf.prune.model import prune_model

STEPS = [
    {"intermediate_size": 40},
    {"intermediate_size": 32, "key_value_heads": 2},
    {"intermediate_size": 24},
]


def batches() -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 64, (4, 20), generator=make)} for _ in range(3)]


def recover(model: nn.Module, teacher: nn.Module, step: Step) -> None:
    """Distil for a few steps on text that is drawn anew, with dropout: both are random."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        ids = torch.randint(0, 64, (4, 16))
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits.softmax(-1)
        found = nn.functional.dropout(model(input_ids=ids).logits, 0.1)
        loss = nn.functional.cross_entropy(found.flatten(0, 1), wanted.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_steps_shrink_recover_and_leave_checkpoints(tmp_path: Path) -> None:
    teacher = llama()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen: list[tuple] = []

    def watched(model: nn.Module, given: nn.Module, step: Step) -> None:
        assert given is teacher and step.folder.is_dir()
        seen.append((step.number, step.of, dict(step.sizes), model.config.intermediate_size))
        recover(model, given, step)

    done: list[tuple[int, int]] = []
    schedule = GradualSchedule(STEPS, watched, tmp_path / "run", {"damping": 0.02})
    reports = schedule.run(teacher, batches(), progress=lambda n, of: done.append((n, of)))
    assert seen == [
        (1, 3, STEPS[0], 40), (2, 3, STEPS[1], 32), (3, 3, STEPS[2], 24),
    ]  # fmt: skip
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert [len(report.layers) for report in reports] == [2, 4, 2]
    assert [report.settings["damping"] for report in reports] == [0.02] * 3
    final = reports[-1].model
    assert final.config.intermediate_size == 24 and final.config.num_key_value_heads == 2
    assert same(final, load(tmp_path / "run" / "step-3")) and reports[0].model is None
    assert load(tmp_path / "run" / "step-1").config.intermediate_size == 40
    assert not list((tmp_path / "run").glob("work-*"))
    # Done means done.
    seen.clear()
    again = GradualSchedule(STEPS, watched, tmp_path / "run", {"damping": 0.02})
    assert same(again.run(teacher, batches())[-1].model, final) and not seen


def test_reports_say_whose_tokenizer_it_was(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(["some words of a text"], 300)
    schedule = GradualSchedule([{"intermediate_size": 32}], folder=tmp_path / "run")
    [report] = schedule.run(llama(), batches(), tokenizer=tokenizer)
    assert report.calibration["tokenizer"] == text_hash(tokenizer)


def test_one_of_several_workers_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Each would write the same folder."""
    monkeypatch.setattr("slmperf.calibrate.workers.workers", lambda: 2)
    save(llama(), None, tmp_path / "dense")
    with pytest.raises(InputError, match="GradualSchedule: wanted one process, found 2 workers"):
        GradualSchedule(STEPS, folder=tmp_path / "run").run(llama(), batches())
    with pytest.raises(InputError, match="prune_checkpoint: wanted one process, found 2 workers"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "small", batches(), intermediate_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_one_step_without_recovery_is_prune_model(tmp_path: Path) -> None:
    teacher = llama()
    direct = prune_model(llama(), batches(), intermediate_size=32).model
    reports = GradualSchedule([{"intermediate_size": 32}], folder=tmp_path).run(teacher, batches())
    assert same(reports[0].model, direct)


def test_the_callback_may_return_another_model(tmp_path: Path) -> None:
    def other(model: nn.Module, teacher: nn.Module, step: Step) -> nn.Module:
        changed = llama(intermediate_size=model.config.intermediate_size)
        with torch.no_grad():
            changed.lm_head.weight.fill_(step.number)
        return changed

    reports = GradualSchedule(STEPS[:1], other, tmp_path).run(llama(), batches())
    assert (reports[0].model.lm_head.weight == 1).all()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_a_step_changes_no_bit(at: int, tmp_path: Path) -> None:
    wanted = GradualSchedule(STEPS, recover, tmp_path / "whole").run(llama(), batches())[-1]
    stopped = []

    def failing(model: nn.Module, teacher: nn.Module, step: Step) -> None:
        (step.folder / "mine").write_text("kept for the next try")
        if step.number == at and not stopped:
            stopped.append(step.number)
            recover(model, teacher, step)
            raise KeyboardInterrupt
        recover(model, teacher, step)

    torch.manual_seed(99)  # whatever the state of the process is
    with pytest.raises(KeyboardInterrupt):
        GradualSchedule(STEPS, failing, tmp_path / "run").run(llama(), batches())
    assert (tmp_path / "run" / f"work-{at}" / "mine").exists()
    assert not (tmp_path / "run" / f"step-{at}").exists()
    torch.rand(7)
    found = GradualSchedule(STEPS, failing, tmp_path / "run").run(llama(), batches())[-1]
    assert same(found.model, wanted.model)
    assert [a.kept for a in found.layers] == [a.kept for a in wanted.layers]
    assert not list((tmp_path / "run").glob("work-*"))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_gradual import STEPS, GradualSchedule, batches, llama, recover
    import slmperf.models.files as files, slmperf.prune.gradual as gradual
    place, folder = sys.argv[1], Path(sys.argv[2])
    def killing(model, teacher, step):
        recover(model, teacher, step)
        if place == f"recover-{{step.number}}":
            os.kill(os.getpid(), signal.SIGKILL)
    replace = files.replace_folder
    def replaced(new, path):  # the checkpoint is written, not yet renamed; or just renamed
        if place == f"write-{{path.name}}":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(new, path)
        if place == f"done-{{path.name}}":
            os.kill(os.getpid(), signal.SIGKILL)
    files.replace_folder = replaced
    GradualSchedule(STEPS, killing, folder).run(llama(), batches())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    ["recover-1", "write-step-1", "done-step-1", "recover-2", "write-step-2", "done-step-3"],
)
def test_a_killed_schedule_goes_on_to_the_same_bits(place: str, tmp_path: Path) -> None:
    _kill_and_resume(place, tmp_path)


def test_a_schedule_killed_in_its_second_step_goes_on(tmp_path: Path) -> None:
    _kill_and_resume("write-step-2", tmp_path)


def _kill_and_resume(place: str, folder: Path) -> None:
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-c", code, place, str(folder / "run")]
    ended = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    wanted = GradualSchedule(STEPS, recover, folder / "whole").run(llama(), batches())[-1]
    found = GradualSchedule(STEPS, recover, folder / "run").run(llama(), batches())[-1]
    assert same(found.model, wanted.model)
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"schedule.json"} | {
        name for n in (1, 2, 3) for name in (f"step-{n}", f"pruning-{n}.json")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": []}, "at least one step, found none"),
        (
            {"sizes": [*STEPS, {"intermediate_size": 32}]},
            "step 4: .* wanted 1..24 .*, found 32",
        ),
        ({"sizes": [{"attention_heads": 3}]}, "step 1: heads: .*nearest legal"),
        ({"sizes": [STEPS[0], {}]}, "step 2: wanted intermediate_size, attention_heads"),
        ({"sizes": [{"intermediate_size": 49}]}, "step 1: intermediate_size: wanted 1..48 .* 49"),
        ({"sizes": [STEPS[0], STEPS[2] | {"method": "obs"}]}, "step 2: method: wanted one of"),
        ({"settings": {"mode": "two_pass"}}, "step 1: mode: wanted one of"),
        ({"settings": {"damping": -1}}, "step 1: damping: wanted"),
        ({"settings": {"dampng": 1}}, "step 1: wanted settings among .*, found dampng"),
        (
            {
                "sizes": [{"attention_heads": 6}, {"attention_heads": 4}],
                "settings": {"heads": "free"},
            },
            "step 2: heads: .* such a layer only loses neurons",
        ),
    ],
)
def test_impossible_schedules_write_nothing(change: dict, message: str, tmp_path: Path) -> None:
    arguments = {"sizes": STEPS, "folder": tmp_path / "run"} | change
    with pytest.raises(InputError, match=message) as caught:
        GradualSchedule(**arguments).run(llama(), batches())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iter(batches()), "read anew .* found a list_iterator"),
        (lambda: calibrate(llama(), batches()), "found Gram matrices"),
        (list, "at least one calibration token, found none"),
        (
            lambda: [one | {"attention_mask": one["input_ids"] * 0} for one in batches()],
            "at least one calibration token, found none",
        ),
        (lambda: batches()[0], "wanted a list of batches, .* found a str"),
    ],
)
def test_unfit_calibrations_write_nothing(make: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        GradualSchedule(STEPS, folder=tmp_path / "run").run(llama(), make())
    assert not (tmp_path / "run").exists()


def test_steps_before_the_last_may_be_deleted(tmp_path: Path) -> None:
    schedule = GradualSchedule(STEPS, recover, tmp_path)
    wanted = schedule.run(llama(), batches())
    shutil.rmtree(tmp_path / "step-1")
    found = schedule.run(llama(), batches())
    assert found == wanted and same(found[-1].model, wanted[-1].model)
    shutil.rmtree(tmp_path / "step-3")  # begins after the second
    found = schedule.run(llama(), batches())
    assert same(found[-1].model, wanted[-1].model) and not (tmp_path / "step-1").exists()
    (tmp_path / "pruning-1.json").unlink()
    with pytest.raises(InputError, match="pruning-1.json: wanted the report"):
        schedule.run(llama(), batches())


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    for text in ("[]", "{", ""):
        (tmp_path / "schedule.json").write_text(text)
        with pytest.raises(InputError, match="wanted what GradualSchedule wrote"):
            GradualSchedule(STEPS, folder=tmp_path).run(llama(), batches())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="wanted a file to write"):
        GradualSchedule(STEPS, folder=tmp_path / "file").run(llama(), batches())


def test_a_folder_belongs_to_one_schedule(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    GradualSchedule(STEPS[:1], folder=folder).run(llama(), batches())
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for schedule, model, data, message in (
        (GradualSchedule(STEPS, folder=folder), llama(), batches(), "another sizes"),
        (GradualSchedule(STEPS[:1], folder=folder, seed=1), llama(), batches(), "another seed"),
        (GradualSchedule(STEPS[:1], folder=folder, settings={"swaps": 1}), llama(), batches(),
         "another settings"),
        (GradualSchedule(STEPS[:1], folder=folder), other, batches(), "another model"),
        (GradualSchedule(STEPS[:1], folder=folder), llama(), batches()[:1], "another calibration"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"schedule.json: .* {message}"):
            schedule.run(model, data)
    plan = json.loads((folder / "schedule.json").read_text())
    assert plan["sizes"] == STEPS[:1] and set(plan) == {
        "sizes", "settings", "seed", "model", "calibration",
    }  # fmt: skip
