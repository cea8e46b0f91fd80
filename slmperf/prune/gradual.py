"""gradual: prune in steps, with a recovery after each: less is lost at once than is won back.

Each step shrinks what the last one left and hands it to a callback, which trains it, for instance
by distillation from the unpruned model. When a step is done its model is a checkpoint in
`folder`/step-1, step-2, ...; a schedule that is run again begins after the last of them, and those
before it may be deleted. Every step begins from the checkpoint before it, read from the disk, and
with the same random seed, so a run that was stopped anywhere ends with the same bits as one that
was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.calibrate import Calibration
from slmperf.calibrate.tokens import check_batch, token_weights
from slmperf.calibrate.workers import check_single
from slmperf.check import InputError
from slmperf.models.checkpoint import load, write_pretrained
from slmperf.models.files import write_atomically, write_folder
from slmperf.models.hashes import add_tensors
from slmperf.models.structure import decoder_blocks
from slmperf.prune.block import SIZES, BlockSizes
from slmperf.prune.heads import head_maps
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import check_mode, prune_model
from slmperf.prune.results import PruneReport
from slmperf.prune.sources import Batches

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCHEDULE = "schedule.json"
# What a step may be told: the arguments of prune_model that are plain values.
_ARGUMENTS = (*SIZES, "mode", "method", "damping", "swaps", "source", "spill")


@dataclass(frozen=True)
class Step:
    """One step of a schedule, as the recovery callback sees it."""

    number: int  # 1, 2, ...
    of: int
    sizes: Mapping[str, Any]  # what this step prunes to, in the words of `prune_model`
    report: PruneReport  # of this step's pruning
    folder: Path  # for the callback's own checkpoints; deleted when the step is done


Recovery = Callable[["PreTrainedModel", "PreTrainedModel", Step], "PreTrainedModel | None"]


@dataclass
class GradualSchedule:
    """Prune a model in several steps, each followed by a recovery.

    sizes: per step the sizes that `prune_model` takes, {"intermediate_size": 6656} and so on; a
        size that a step does not name stays as it is. A step may name settings of its own, too.
    recover: called as recover(model, teacher, step) with the pruned model and the unpruned one,
        which it must not change. It trains the model in place, or returns the one to go on with.
        None: no recovery.
    folder: of the steps' checkpoints.
    settings: further arguments of `prune_model`: mode, method, damping, heads, spill ...
    seed: the random state of torch at the begin of step i is that of manual_seed(seed + i).
    """

    sizes: Sequence[Mapping[str, Any]]
    recover: Recovery | None = None
    folder: str | PathLike[str] = "gradual"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def run(
        self,
        model: PreTrainedModel,
        calibration: Batches,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[PruneReport]:
        """Run the steps that are not yet done: the reports of all steps; the last has the model.

        model: the teacher; it stays as it is, a copy is pruned.
        calibration: batches as `prune_model` takes them, the same ones whenever they are iterated:
            every step reads them anew.
        tokenizer: of model and text: written into the checkpoints, its hash into the reports.
        progress: called as progress(steps done, steps).

        Raises InputError, before anything is computed or written, in one of several
        torch.distributed workers, for sizes that a step cannot
        have, a calibration without tokens or one that can be read only once, and a folder that
        holds another schedule or one of another model or calibration.
        """
        check_single("GradualSchedule")
        plan = self._checked(model, calibration)
        path, last = Path(self.folder) / _SCHEDULE, len(self.sizes)
        if not path.exists():
            try:
                write_atomically(path, json.dumps(plan, indent=2) + "\n")
            except OSError as error:
                raise InputError(f"{path}: wanted a file to write, found {error}") from error
        finished = [n for n in range(1, last + 1) if self._place(n).is_dir()]
        done = max((n for n in finished if self._report(n).is_file()), default=0)
        for number in range(1, last + 1):
            if number > done:
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed + number)
                    self._step(number, model, calibration, tokenizer)
            shutil.rmtree(self._work(number), ignore_errors=True)
            if progress is not None:
                progress(number, last)
        reports = [self._read(n) for n in range(1, last + 1)]
        return [*reports[:-1], replace(reports[-1], model=self._load(last, model))]

    def _step(
        self,
        number: int,
        teacher: PreTrainedModel,
        calibration: Batches,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        student = copy.deepcopy(teacher) if number == 1 else self._load(number - 1, teacher)
        sizes = self.sizes[number - 1]
        student.requires_grad_(True)
        report = prune_model(
            student, calibration, **{**self.settings, **sizes}, tokenizer=tokenizer
        )
        student = report.model
        if self.recover is not None:
            work = self._work(number)
            work.mkdir(exist_ok=True)
            step = Step(number, len(self.sizes), sizes, report, work)
            returned = self.recover(student, teacher, step)
            student = student if returned is None else returned
        write_atomically(self._report(number), report.to_json())
        with write_folder(self._place(number)) as aside:
            write_pretrained(student, tokenizer, aside)

    def _checked(self, model: PreTrainedModel, calibration: Batches) -> dict[str, Any]:
        """What schedule.json says of this schedule, once it is known to be possible."""
        if not self.sizes:
            raise InputError("GradualSchedule: wanted the sizes of at least one step, found none")
        if isinstance(calibration, Calibration):
            raise InputError(
                "GradualSchedule: wanted batches, which every step runs through its own model, "
                "found Gram matrices"
            )
        if iter(calibration) is calibration:
            raise InputError(
                "GradualSchedule: wanted batches that every step can read anew (a list, say), "
                f"found a {type(calibration).__name__}"
            )
        decoder_blocks(model)
        config: Any = model.config
        for number, sizes in enumerate(self.sizes, start=1):
            try:
                config = _after(config, _checked_step({**self.settings, **sizes}, config))
            except InputError as error:
                raise InputError(f"GradualSchedule: step {number}: {error}") from error
        plan = {
            "sizes": self.sizes,
            "settings": {key: one for key, one in self.settings.items() if key != "spill"},
            "seed": self.seed,
            "model": _digest(model.state_dict().items()),
            "calibration": _digest(_tensors(model, calibration)),
        }
        plan = json.loads(json.dumps(plan, default=_plain))
        path = Path(self.folder) / _SCHEDULE
        if path.exists():
            before = _schedule(path)
            other = [key for key, value in plan.items() if before.get(key) != value]
            if other:
                raise InputError(
                    f"{path}: wanted the schedule that the folder was begun with, "
                    f"found another {' and '.join(other)}"
                )
        return plan

    def _read(self, number: int) -> PruneReport:
        path = self._report(number)
        if not path.is_file():
            raise InputError(f"{path}: wanted the report of a finished step, found none")
        return PruneReport.from_json(path.read_text())

    def _report(self, number: int) -> Path:
        return Path(self.folder) / f"pruning-{number}.json"

    def _place(self, number: int) -> Path:
        return Path(self.folder) / f"step-{number}"

    def _work(self, number: int) -> Path:
        return Path(self.folder) / f"work-{number}"

    def _load(self, number: int, teacher: PreTrainedModel) -> PreTrainedModel:
        return load(self._place(number), dtype=teacher.dtype).to(teacher.device)


def _checked_step(asked: Mapping[str, Any], config: Any) -> BlockSizes:
    """The sizes of a step of a model of this config; InputError for settings it cannot have."""
    unknown = [name for name in asked if name not in _ARGUMENTS]
    if unknown:
        raise InputError(f"wanted settings among {', '.join(_ARGUMENTS)}, found {unknown[0]}")
    solver = {key: asked[key] for key in ("method", "damping", "swaps") if key in asked}
    Solver(**{"method": "osscar", "damping": 0.01, "swaps": 0, **solver})
    check_mode(asked.get("mode", "sequential"), ())
    return BlockSizes.of(config, **{key: asked[key] for key in SIZES if key in asked})


def _schedule(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text())
        if isinstance(before, dict):
            return before
    except (OSError, ValueError):
        pass
    raise InputError(f"{path}: wanted what GradualSchedule wrote, found something else")


def _plain(value: Any) -> Any:
    """What JSON has for numbers and arrays of numpy's, and for paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _tensors(model: PreTrainedModel, calibration: Batches) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a calibration set; InputError for what is none, or has no token."""
    tokens = 0
    for batch in calibration:
        check_batch(model, batch)
        weights = token_weights(batch)
        tokens += int((weights > 0).sum()) if weights is not None else 1
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                yield name, value
    if not tokens:
        raise InputError(
            "GradualSchedule: wanted batches with at least one calibration token, found none"
        )


def _after(config: Any, sizes: BlockSizes) -> SimpleNamespace:
    """Of the config of a model so pruned, what the sizes of the next step are checked against."""
    layers = zip(
        sizes.neurons, sizes.heads.attention_heads, sizes.heads.key_value_heads, strict=True
    )
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    # Which heads mode free takes is not known yet: unequally many of each group, in general.
    free = sizes.heads.mode == "free"
    now = [free and sizes.heads.prunes(layer) for layer in range(len(sizes.neurons))]
    maps = [() if new or old else None for new, old in zip(now, head_maps(config), strict=True)]
    return SimpleNamespace(
        is_heterogeneous=True,
        head_dim=sizes.heads.head_size,
        num_hidden_layers=len(sizes.neurons),
        per_layer_config=[
            SimpleNamespace(**dict(zip(names, one, strict=True)), head_map=mapped)
            for one, mapped in zip(layers, maps, strict=True)
        ],
    )


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    whole = hashlib.sha256()
    add_tensors(whole, tensors)
    return whole.hexdigest()
