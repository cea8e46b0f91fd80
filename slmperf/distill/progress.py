"""How a training shows itself: a bar, a plain log file, and the same figures for report_to.

MFU, model flops utilisation, is the flops that the training needs (slmperf.distill.estimate) per
second over those that this device reaches in a plain matrix product, measured once a process. Time
in evaluations and checkpoints counts neither there nor in tokens/s; waiting for batches and the
student's own text does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback

from slmperf.distill.estimate import StepFlops, flops_of, work_of

if TYPE_CHECKING:
    from slmperf.distill.trainer import DistillationTrainer

_PEAK_S = 0.15  # for measuring what a device can do


class LogFile:
    """Lines with a time stamp, each written at once, so that a kill loses none. None: no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def line(self, text: str) -> None:
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


class Bar:
    """A progress bar over the steps of a training. Off a terminal only the log file tells."""

    def __init__(self, name: str, steps: int, done: int, show: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (show and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(name, total=steps, completed=done, speed="", loss="")
        self._bar.start()

    @property
    def shown(self) -> bool:
        return not self._bar.disable

    def update(self, step: int, speed: str, loss: float | None) -> None:
        told = "" if loss is None else f"loss {loss:.4f}"
        self._bar.update(self._task, completed=step, speed=speed, loss=told)

    def close(self) -> None:
        self._bar.stop()


class Clock:
    """Seconds, tokens and flops of a training; seconds and tokens over all its runs."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before, self._tokens_before = seconds, tokens
        self.tokens = tokens
        self._flops: StepFlops | None = None
        self._peak = 0.0
        self._work: Tensor | None = None  # (3,) fp64: tokens, pairs, positions of this rank
        self._start = time.perf_counter()
        self._paused = 0.0

    def begin(self, flops: StepFlops, peak: float) -> None:
        """The first step of this run comes now. peak: flop/s of this rank's device."""
        self._flops, self._peak, self._work = flops, peak, None
        self._tokens_before, self._paused = self.tokens, 0.0
        self._before, self._start = self.seconds, time.perf_counter()

    def pause(self, since: float) -> None:
        """The time from `since` (time.perf_counter) until now was no training."""
        self._paused += time.perf_counter() - since

    def count(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Batches that this rank trains on; nothing waits for a device."""
        for batch in batches:
            work = work_of(batch).double()
            self._work = work if self._work is None else self._work + work

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    @property
    def _training_seconds(self) -> float:
        """Of this run alone, without pauses."""
        return max(time.perf_counter() - self._start - self._paused, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Of this run alone, over all ranks."""
        return (self.tokens - self._tokens_before) / self._training_seconds

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak (0 to 1) that this run's model flops reach; None before its
        first batch. On a GPU this waits for what has been counted.
        """
        if self._flops is None or self._work is None or not self._peak:
            return None
        done = sum(self._flops.at(*self._work.tolist()))
        return done / self._training_seconds / self._peak

    def logs(self) -> dict[str, float]:
        """What is logged beside the loss: tokens_per_second, and mfu where it is known."""
        found = {"tokens_per_second": self.tokens_per_second}
        mfu = self.mfu
        return found if mfu is None else {**found, "mfu": mfu}

    def left(self, steps_done: int, steps_to_do: int) -> str:
        """Time left as h:mm:ss, at the pace of this run; "?" before its first step."""
        if steps_done == 0:
            return "?"
        pace = (time.perf_counter() - self._start) / steps_done
        return str(timedelta(seconds=round(pace * steps_to_do)))


class Reporter(TrainerCallback):
    """Keeps a trainer's clock, and shows its steps: the bar, and train.log in its folder."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        first_rank = trainer.is_world_process_zero()
        self.log = LogFile(trainer.folder / "train.log" if first_rank else None)
        self.bar: Bar | None = None
        self._mark = 0.0  # when training last stood still

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.first = state.global_step
        teacher = getattr(trainer.teacher, "model", None)
        flops = flops_of(trainer.model, teacher if isinstance(teacher, torch.nn.Module) else None)
        dtype = torch.bfloat16 if args.bf16 else next(trainer.model.parameters()).dtype
        trainer.clock.begin(flops, peak_flops(torch.device(args.device), dtype))
        shown = trainer.is_world_process_zero()
        self.bar = Bar(trainer.name, state.max_steps, self.first, shown)
        size = sum(value.numel() for value in trainer.model.parameters())
        batches = trainer.batches
        self.log.line(
            f"{trainer.name}: from step {self.first} of {state.max_steps}, {size:,} parameters, "
            f"{len(batches.lengths):,} sequences with {int(batches.lengths.sum()):,} tokens, "
            f"{str(dtype).removeprefix('torch.')}"
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.clock.count(self.trainer.window)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        every = max(1, int(state.logging_steps))
        due = step == state.max_steps or step % every == 0
        assert self.bar is not None
        if trainer.losses and (due or self.bar.shown):
            recent = trainer.losses[-every:]
            loss = sum(recent) / len(recent)
            found = trainer.clock.logs()
            speed = f"{found['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in found:
                speed += f" MFU {found['mfu']:.1%}"
            self.bar.update(step, speed, loss)
            if due:
                left = trainer.clock.left(step - self.first, state.max_steps - step)
                self.log.line(
                    f"{trainer.name}: step {step}/{state.max_steps} loss {loss:.5f} {speed} "
                    f"left {left}"
                )
        self._mark = time.perf_counter()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if self.bar is None:  # evaluated before any training
            return
        told = " ".join(
            f"{name} {value:.5g}"
            for name, value in (metrics or {}).items()
            if isinstance(value, int | float)
        )
        self.log.line(f"{self.trainer.name}: step {state.global_step} {told}")
        self._pause()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _pause(self) -> None:
        self.trainer.clock.pause(self._mark)
        self._mark = time.perf_counter()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest plain matrix product found in a moment.

    Measured once for a device, dtype and number of threads; the random state is not touched.
    """
    return _measured_peak(str(device), dtype, torch.get_num_threads())


@cache
def _measured_peak(device: str, dtype: torch.dtype, threads: int) -> float:
    kind = torch.device(device).type
    best, start = 0.0, time.perf_counter()
    # Larger ones are faster; one that takes long already says enough.
    for size in (512, 1024, 2048, 4096, 8192):
        first, second = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(first)
        torch.mm(first, second, out=out)
        seconds = min(_seconds(first, second, out, kind) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        used = time.perf_counter() - start
        if used + 8 * 4 * seconds > _PEAK_S:  # the next one: eight times the work, four times
            break
    return best


def _seconds(first: Tensor, second: Tensor, out: Tensor, kind: str) -> float:
    """Of one product."""
    if kind != "cuda":
        start = time.perf_counter()
        torch.mm(first, second, out=out)
        return max(time.perf_counter() - start, 1e-9)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(first.device):
        begin.record()
        torch.mm(first, second, out=out)
        end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) * 1e-3, 1e-9)
