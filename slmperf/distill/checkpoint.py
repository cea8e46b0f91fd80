"""Checkpoints inside a training: safetensors and JSON, written aside, flushed, renamed; two kept.

    <folder>/checkpoint-00000120/
        model.safetensors       the parameters by name
        optimizer.safetensors   AdamW: <parameter>/exp_avg, /exp_avg_sq, /step
        random.safetensors      Python's, numpy's and torch's generators as bytes (uint8);
                                losses so far (fp64)
        trainer_state.json      what transformers.Trainer wants to know about its own progress
        progress.json           steps, tokens and seconds so far

The learning rate is a function of the step and is not stored.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slmperf.check import InputError
from slmperf.models.files import write_folder

KEEP = 2
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """How far a training is: steps, tokens (without padding) and seconds of all its runs."""

    step: int
    tokens: int
    seconds: float


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first; half-written ones have hidden names."""
    return sorted(folder.glob("checkpoint-*"))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def write(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: str,
    progress: Progress,
    losses: list[float],
) -> Path:
    """Save everything a resumed run needs, then drop all but the newest two checkpoints."""
    path = folder / f"checkpoint-{progress.step:08d}"
    with write_folder(path) as aside:
        weights = {
            name: value.detach().cpu().contiguous() for name, value in model.named_parameters()
        }
        save_file(weights, aside / "model.safetensors")
        save_file(_moments(model, optimizer), aside / "optimizer.safetensors")
        state = {**_random_states(), "losses": torch.tensor(losses, dtype=torch.float64)}
        save_file(state, aside / "random.safetensors")
        (aside / "trainer_state.json").write_text(trainer_state)
        (aside / "progress.json").write_text(json.dumps(asdict(progress)))
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return path


def read_progress(path: Path) -> tuple[Progress, list[float]]:
    """Steps, tokens, seconds, and the loss of every step so far."""
    progress = Progress(**json.loads((path / "progress.json").read_text()))
    with safe_open(path / "random.safetensors", framework="pt") as stored:
        return progress, stored.get_tensor("losses").tolist()


@torch.no_grad()
def load_model(path: Path, model: torch.nn.Module) -> None:
    """Copy the stored parameters into `model`."""
    stored = load_file(path / "model.safetensors")
    for name, value in model.named_parameters():
        if name not in stored or stored[name].shape != value.shape:
            found = tuple(stored[name].shape) if name in stored else "nothing"
            raise InputError(f"{path}: {name} is {found}, wanted {tuple(value.shape)}")
        value.copy_(stored[name])


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the stored moments back, parameter by parameter."""
    stored = load_file(path / "optimizer.safetensors")
    state = optimizer.state_dict()
    names = _names_in_order(model, optimizer)
    state["state"] = {
        index: {key: stored[f"{name}/{key}"] for key in _MOMENTS}
        for index, name in enumerate(names)
        if f"{name}/step" in stored
    }
    optimizer.load_state_dict(state)


def load_random_states(path: Path) -> None:
    """Set the Python, numpy and torch generators to where they stood."""
    with safe_open(path / "random.safetensors", framework="pt") as stored:
        version, keys, gauss = json.loads(bytes(stored.get_tensor("python").numpy()))
        random.setstate((version, tuple(keys), gauss))
        kind, keys, place, has_gauss, gauss = json.loads(bytes(stored.get_tensor("numpy").numpy()))
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
        torch.set_rng_state(stored.get_tensor("torch"))
        for index in range(torch.cuda.device_count()):
            if f"cuda/{index}" in stored.keys():
                torch.cuda.set_rng_state(stored.get_tensor(f"cuda/{index}"), index)


def _random_states() -> dict[str, Tensor]:
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    states = {
        "python": _bytes(json.dumps(random.getstate())),
        "numpy": _bytes(json.dumps([kind, np.asarray(keys).tolist(), place, has_gauss, gauss])),
        "torch": torch.get_rng_state(),
    }
    for index in range(torch.cuda.device_count()):
        states[f"cuda/{index}"] = torch.cuda.get_rng_state(index)
    return states


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = _names_in_order(model, optimizer)
    return {
        f"{names[index]}/{key}": values[key].detach().cpu().contiguous()
        for index, values in state.items()
        for key in _MOMENTS
    }


def _names_in_order(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which an optimizer's state dict numbers them."""
    names = {id(value): name for name, value in model.named_parameters()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]
