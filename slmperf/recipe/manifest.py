"""manifest: what one finished stage was made from and what came out, beside its checkpoint.

A stage's folder gets its manifest last, so a folder with a manifest is a whole one. The manifest
names the checkpoint's files with size and sha256, and everything the stage depends on: a stage is
taken over from an earlier run only while all of that is still the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmperf.check import InputError
from slmperf.models.files import sha256_of, write_atomically

NAME = "manifest.json"
SCORES = "scores.safetensors"
FORMAT = 1


@dataclass
class Manifest:
    """One stage under one seed, once its checkpoint is whole."""

    stage: str
    kind: str
    seed: int
    settings: dict[str, Any]  # the stage as the recipe gives it
    inputs: dict[str, str]  # data, tokenizer, from, teacher -> sha256
    files: dict[str, dict[str, Any]]  # file of the checkpoint -> {bytes, sha256}
    versions: dict[str, str]
    started: str  # ISO time, UTC
    finished: str
    seconds: float  # of a training that was stopped: those of all its parts
    parameters: int
    weight_bytes: int
    training: dict[str, Any] | None = None  # tokens, tokens per second, loss curve
    pruning: dict[str, Any] | None = None  # error of each layer
    quantization: dict[str, Any] | None = None  # scheme, bytes, mean error, those of each layer
    metrics: dict[str, Any] | None = None  # None until it is scored
    format: int = field(default=FORMAT)

    @property
    def weights(self) -> str:
        """sha256 over the hashes of the weight files: all that a later stage sees of this one."""
        names = [name for name in self.files if name.endswith(".safetensors") and name != SCORES]
        return digest({name: self.files[name]["sha256"] for name in names})

    def write(self, folder: Path) -> None:
        """Write it into the folder of its stage, in one step."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        write_atomically(folder / NAME, text)


def read(folder: Path) -> Manifest | None:
    """The manifest in a folder, None where there is none; InputError if it cannot be read."""
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["format"]
        if found == FORMAT:
            return Manifest(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a manifest: {' '.join(str(error).split())}") from None
    raise InputError(f"{file}: expected format {FORMAT}, found {found}")


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a stage's folder but the manifest."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != NAME and not file.name.startswith(".")
    }


def check_files(folder: Path, manifest: Manifest) -> None:
    """InputError for a file of a finished stage that is missing, cut off or changed."""
    for name, want in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file}: expected a file of {want['bytes']} bytes, found none")
        found = file.stat().st_size
        if found != want["bytes"]:
            state = "truncated" if found < want["bytes"] else "too long"
            raise InputError(f"{file}: {state}: expected {want['bytes']} bytes, found {found}")
        if sha256_of(file) != want["sha256"]:
            raise InputError(
                f"{file}: expected sha256 {want['sha256'][:16]}..., found other content"
            )


def digest(value: Any) -> str:
    """sha256 of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """The time in UTC, ISO, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what the figures of a stage depend on."""
    packages = ("slmperf", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
