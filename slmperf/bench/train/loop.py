"""loop: a step in a bare loop, and the same step inside slmperf's DistillationTrainer.

Both make a batch of the examples (slmperf.distill.PackedBatches), take the loss, clip the
gradients, take AdamW's step and drop the gradients. The trainer runs its own loop, so what is timed
beside it runs inside: between two of its steps.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.bench.train.problems import (
    CE_WEIGHT,
    IGNORED,
    KD_WEIGHT,
    MAX_NORM,
    Batch,
    Models,
    Problem,
)
from slmperf.bench.train.ways import Loss

if TYPE_CHECKING:
    from slmperf.distill import DistillationConfig, DistillationTrainer

# Steps of a trainer that others are timed in, at most: it is stopped when there were enough.
MOST_STEPS = 10_000


def take_step(loss: Loss, models: Models, batch: Batch) -> Tensor:
    """One step of a bare loop; its loss (), without a graph."""
    found = loss(models, batch)
    found.backward()
    torch.nn.utils.clip_grad_norm_(models.student.parameters(), MAX_NORM)
    models.optimizer.step()
    models.optimizer.zero_grad()
    return found.detach()


def now(device: str) -> float:
    """Seconds on the clock when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sampler(
    problem: Problem, loss: Loss, models: Models, batches: Iterator[Batch]
) -> Callable[[], float]:
    """A function that takes one step on the next batch and gives its seconds."""

    def sample() -> float:
        start = now(problem.device)
        take_step(loss, models, next(batches))
        return now(problem.device) - start

    return sample


def batches_of(problem: Problem) -> Iterator[Batch]:
    """The batches of the trainer, each made when it is asked for, on the problem's device: the rows
    of the problem's one in another order each time.
    """
    from slmperf.distill import PackedBatches

    with tempfile.TemporaryDirectory() as folder:
        # Now and not with the first batch: settings made inside a training would undo its own.
        packed = PackedBatches(problem.examples(), _config(problem, folder, MOST_STEPS))

    def make(number: int) -> Batch:
        found = packed[number % MOST_STEPS]
        labels = torch.full_like(found["input_ids"], IGNORED)
        labels.view(-1)[found["positions"]] = found["targets"]
        made = Batch(found["input_ids"], labels, found["positions"], found["targets"])
        return Batch(*(one.to(problem.device) for one in made))

    return map(make, itertools.count())


def _config(problem: Problem, folder: str, steps: int) -> DistillationConfig:
    """Of the trainer: the loss of problems.py, a batch a step, nothing saved."""
    from slmperf.distill import DistillationConfig

    return DistillationConfig(
        output_dir=folder,
        context=problem.context,
        packing=False,
        per_device_train_batch_size=problem.rows,
        max_steps=steps,
        max_grad_norm=MAX_NORM,
        kd_weight=KD_WEIGHT,
        ce_weight=CE_WEIGHT,
        answer_weight=1.0,
        sequence_weight=0.0,
        bf16=problem.dtype == "bf16",
        use_cpu=problem.device == "cpu",
        save_strategy="no",
    )


@contextmanager
def trainer_of(
    problem: Problem, models: Models, steps: int, callback: Callable[[str], bool]
) -> Iterator[DistillationTrainer]:
    """A trainer for so many steps on the problem's batches, with the optimizer of the others.

    callback  told "begin" when a step's batch is there, and "end" when the step is done; True from
              "end" stops the training
    """
    from transformers import TrainerCallback

    from slmperf.distill import DistillationTrainer

    class Told(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            callback("begin")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if callback("end"):
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        constant = torch.optim.lr_scheduler.LambdaLR(models.optimizer, lambda step: 1.0)
        trainer = DistillationTrainer(
            models.student,
            _config(problem, folder, steps),
            problem.examples(),
            teacher=models.teacher,
            optimizers=(models.optimizer, constant),
        )
        # The last of all: what the trainer's own callbacks do belongs to its step.
        trainer.add_callback(Told())
        yield trainer


def rounds_s(
    problem: Problem,
    samplers: dict[str, Callable[[], float]],
    models: Models,
    trainer: str | None,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds of a step of every round of each sampler and, under the name `trainer`, of the
    trainer; interleaved, so that the lists' n-th are neighbours.

    Runs for about `seconds` per way, at least 5 rounds after one that warms up. A step of the
    trainer is all from the end of the others' to the end of its own: its batch, what it logs.
    """
    found: dict[str, list[float]] = {name: [] for name in samplers}
    deadline = 0.0
    rounds = 0

    def others() -> bool:
        """One round; whether it was the last."""
        nonlocal deadline, rounds
        for name, sample in samplers.items():
            found[name].append(sample())
        rounds += 1
        if rounds == 1:
            deadline = time.perf_counter() + seconds * len(found)
        return rounds > 5 and time.perf_counter() >= deadline

    if trainer is None:
        while not others():
            pass
    else:
        found[trainer] = []
        resumed = now(problem.device)

        def told(event: str) -> bool:
            nonlocal resumed
            if event == "begin":
                return False
            found[trainer].append(now(problem.device) - resumed)
            last = others()
            resumed = now(problem.device)
            return last

        with trainer_of(problem, models, MOST_STEPS, told) as running:
            running.train()
    return {name: times[1:] for name, times in found.items()}
