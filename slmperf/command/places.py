"""places: the folders that a command reads and writes, checked before any weights are read."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slmperf import arch, models
from slmperf.check import InputError
from slmperf.models.checkpoint import read_config
from slmperf.models.files import write_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_new(out: Path) -> None:
    """InputError for a folder with files in it, or for a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: wanted a new or empty folder, found files")


def check_places(out: Path, spill: Path | None) -> None:
    """InputError where `out` is no new folder, or it or the folder `spill` cannot be made."""
    check_new(out)
    check_writable(out)
    if spill is not None:
        check_writable(spill / "spilled")


def check_writable(path: Path) -> None:
    """InputError where no folder can be made beside `path`, or of those above it."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=above):
            pass
    except OSError as error:
        raise InputError(f"{path}: wanted a folder to write to, found: {error.strerror}") from None


@contextlib.contextmanager
def written(out: Path) -> Iterator[None]:
    """InputError in one line where the disk does not take what is written to `out`.

    Errors that name a file elsewhere, which was read or written meanwhile, stay as they are.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None)
        if name is not None and not _belongs(Path(name), out):
            raise
        told = " ".join(str(error).split())
        raise InputError(f"{out}: wanted to write the result, found: {told}") from error


def write_checkpoint(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    finish: Callable[[Path], object],
) -> None:
    """Write a checkpoint with what finish(folder) writes there, all or nothing; see `written`."""
    with written(out), write_folder(out) as aside:
        models.write_pretrained(model, tokenizer, aside)
        finish(aside)


def _belongs(path: Path, out: Path) -> bool:
    """Whether a file is of `out`, or of the hidden folder that is to become it."""
    out = out.absolute()
    return f"{path.absolute()}/".startswith((f"{out}/", str(out.with_name(f".{out.name}."))))


def model_config(folder: Path) -> PretrainedConfig:
    """The configuration of the checkpoint in `folder`; InputError where there is none, or none of a
    causal language model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a checkpoint folder, found none")
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{folder}: wanted a causal language model, found one of type {config.model_type}"
        )
    return config


def full_config(folder: Path, act: str) -> PretrainedConfig:
    """The same of a checkpoint with full weights; act: what is to be done to it, "prune"."""
    config = model_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder}: wanted full weights to {act}, found a quantised model")
    return config


def device() -> str:
    """Where models are run: "cuda" where there is a device, else "cpu"."""
    return "cuda" if arch.cuda_name() else "cpu"


def load_model(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model in its own precision, where it is to run."""
    import torch

    dtype = getattr(config, "dtype", None) or torch.float32
    return models.load(folder, dtype=dtype).to(device())
