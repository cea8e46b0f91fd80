"""Checkpoints inside a training: safetensors and JSON, written aside, flushed, renamed.

    <folder>/checkpoint-120/
        config.json, model.safetensors, ...   the model, and tokenizer, as from_pretrained loads
                                them; of a PEFT model its adapter alone
        optimizer.safetensors   <parameter>/exp_avg and whatever else its optimizer keeps
        random-<rank>.safetensors   Python's, numpy's and torch's generators as bytes (uint8), and
                                what the rank's on-policy sampler holds
        losses.safetensors      of all steps so far (fp64)
        trainer_state.json      what transformers.Trainer knows about its own progress
        progress.json           steps, tokens, seconds; the scheduler; what must be found unchanged

A folder without a leading dot is whole, so a kill or a full disk costs the steps since the last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slmperf import models
from slmperf.check import InputError
from slmperf.models.files import write_folder

RANDOM = "random-{}.safetensors"
_OPTIMIZER, _LOSSES, _PROGRESS = "optimizer.safetensors", "losses.safetensors", "progress.json"
_ADAPTER = "adapter_model.safetensors"
_SAMPLER = "on_policy/"  # prefix of the names of a sampler's tensors


@dataclass(frozen=True)
class Progress:
    """How far a training is: steps, tokens (without padding) and seconds of all its runs."""

    step: int
    tokens: int
    seconds: float
    data: str = ""  # digest of examples and batch sizes
    scheduler: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)  # of the optimizer, what is no tensor


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first; half-written ones have hidden names."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


def write(
    folder: Path,
    model: torch.nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    trainer_state: str,
    progress: Progress,
    losses: list[float],
    ranks: list[dict[str, Tensor]],
) -> Path:
    """Save everything a resumed run needs; `ranks` are their `random_states`.

    InputError where it cannot be written, on a full disk say: nothing is left of it then, and
    earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{progress.step}"
    before = checkpoints(folder)
    try:
        with write_folder(path) as aside:
            models.write_pretrained(model, tokenizer, aside)
            tensors, scalars = _optimizer_state(model, optimizer)
            save_file(tensors, aside / _OPTIMIZER)
            for rank, states in enumerate(ranks):
                save_file(states, aside / RANDOM.format(rank))
            save_file({"losses": torch.tensor(losses, dtype=torch.float64)}, aside / _LOSSES)
            (aside / "trainer_state.json").write_text(trainer_state)
            (aside / _PROGRESS).write_text(json.dumps({**asdict(progress), "scalars": scalars}))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        last = before[-1].name if before else "none"
        raise InputError(
            f"{path}: wanted to write a checkpoint, found {reason}; the last one is {last}"
        ) from error
    return path


def drop_old(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints (None: keep all) and the best one."""
    if keep is None:
        return
    for old in checkpoints(folder)[: -max(keep, 1)]:
        if best is None or old.name != best.name:
            hidden = old.with_name(f".{old.name}.old-{os.getpid()}")
            old.rename(hidden)  # at once gone as a whole: a kill leaves none that is half deleted
            shutil.rmtree(hidden, ignore_errors=True)


def read_progress(path: Path) -> tuple[Progress, list[float]]:
    """How far, and the loss of every step so far."""
    try:
        progress = Progress(**json.loads((path / _PROGRESS).read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(
            f"{path}: wanted a checkpoint of DistillationTrainer, found no {_PROGRESS} of one"
        ) from None
    return progress, load_file(path / _LOSSES)["losses"].tolist()


@torch.no_grad()
def load_model(path: Path, model: torch.nn.Module) -> None:
    """Copy the stored weights into `model`, or the stored adapter into its adapter."""
    if (path / _ADAPTER).is_file():
        from peft import set_peft_model_state_dict

        found: Any = set_peft_model_state_dict(model, load_file(path / _ADAPTER))
        if found.unexpected_keys:
            first = found.unexpected_keys[0]
            raise InputError(f"{path}: holds {first}, wanted the adapter of this model")
        return
    kinds = {value.dtype for value in model.parameters() if value.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    stored = models.load(path, dtype=dtype).state_dict()
    for name, value in model.state_dict().items():
        if name not in stored or stored[name].shape != value.shape:
            found = tuple(stored[name].shape) if name in stored else "nothing"
            raise InputError(f"{path}: {name} is {found}, wanted {tuple(value.shape)}")
        value.copy_(stored[name])


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the stored state back, parameter by parameter."""
    stored = load_file(path / _OPTIMIZER)
    scalars = read_progress(path)[0].scalars
    values: dict[str, dict[str, Any]] = {}
    for whole, value in [*stored.items(), *scalars.items()]:
        name, _, key = whole.rpartition("/")
        values.setdefault(name, {})[key] = value
    names = _names_in_order(model, optimizer)
    unknown = values.keys() - set(names)
    if unknown:
        raise InputError(f"{path}: optimizes {min(unknown)}, wanted a parameter of this training")
    state = optimizer.state_dict()
    state["state"] = {index: values[name] for index, name in enumerate(names) if name in values}
    optimizer.load_state_dict(state)


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """What JSON can hold of a scheduler's state: not functions of the step, which have none."""
    found = {}
    for key, value in scheduler.state_dict().items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        if key != "lr_lambdas":
            found[key] = value
    return found


def load_scheduler(path: Path, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Set the scheduler, and the learning rates that it had set."""
    stored = read_progress(path)[0].scheduler
    scheduler.load_state_dict({**scheduler.state_dict(), **stored})
    for group, rate in zip(optimizer.param_groups, stored["_last_lr"], strict=True):
        group["lr"] = rate


def random_states(sampler: dict[str, Tensor]) -> dict[str, Tensor]:
    """Python's, numpy's and torch's generators, and the tensors of an on-policy sampler."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    states = {
        "python": _bytes(json.dumps(random.getstate())),
        "numpy": _bytes(json.dumps([kind, np.asarray(keys).tolist(), place, has_gauss, gauss])),
        "torch": torch.get_rng_state(),
        **{_SAMPLER + name: value.detach().cpu() for name, value in sampler.items()},
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def load_random_states(path: Path, rank: int) -> None:
    """Set the generators to where they stood; a rank that was not there takes the first one's."""
    file = path / RANDOM.format(rank)
    with safe_open(file if file.is_file() else path / RANDOM.format(0), framework="pt") as stored:
        version, keys, gauss = json.loads(bytes(stored.get_tensor("python").numpy()))
        random.setstate((version, tuple(keys), gauss))
        kind, keys, place, has_gauss, gauss = json.loads(bytes(stored.get_tensor("numpy").numpy()))
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
        torch.set_rng_state(stored.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in stored.keys():
            torch.cuda.set_rng_state(stored.get_tensor("cuda"))


def sampler_state(path: Path, rank: int) -> dict[str, Tensor] | None:
    """The tensors of the rank's on-policy sampler; None for a rank that was not there."""
    file = path / RANDOM.format(rank)
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(_SAMPLER)]
        return {name.removeprefix(_SAMPLER): stored.get_tensor(name) for name in names}


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain numbers by `<parameter>/<key>`."""
    names = _names_in_order(model, optimizer)
    tensors, scalars = {}, {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            name = f"{names[index]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            elif value is None or isinstance(value, bool | int | float | str):
                scalars[name] = value
            else:
                raise InputError(
                    f"checkpoint: the optimizer keeps a {type(value).__name__} as {name}, wanted "
                    "tensors and numbers"
                )
    return tensors, scalars


def _names_in_order(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which an optimizer's state dict numbers them."""
    names = {id(value): name for name, value in model.named_parameters()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]
