"""work: the jobs of a plan, each made in its folder unless the manifest there says that it was.

A stage is taken over from an earlier run while its settings, its data and the weights it reads are
the same; a training that was stopped goes on where its last checkpoint stands.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slmperf import models
from slmperf.models.files import write_atomically
from slmperf.recipe import manifest as manifests
from slmperf.recipe.console import Voice
from slmperf.recipe.manifest import Manifest
from slmperf.recipe.plan import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INPUTS = "inputs.json"  # in the folder of a training: what it was begun from
# Of a training's folder, what stays beside the checkpoint; runs is TensorBoard's.
KEPT = ("train.log", "samples.jsonl", "runs")


class Made(Protocol):
    """A stage's model, and what its manifest says about the making."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def training(self) -> dict[str, Any] | None: ...
    @property
    def pruning(self) -> dict[str, Any] | None: ...
    @property
    def quantization(self) -> dict[str, Any] | None: ...


# job, {"from" | "teacher": folder of a finished checkpoint}, folder of the training, progress
Make = Callable[[Job, Mapping[str, Path], Path, Callable[[int, int], None]], Made]


def earlier(folder: Path) -> Manifest | None:
    """The manifest an earlier run left, its files found whole; None for an unfinished stage."""
    manifest = manifests.read(folder)
    if manifest is not None:
        manifests.check_files(folder, manifest)
    return manifest


def settings_of(job: Job) -> dict[str, Any]:
    """What the recipe says about a stage that changes its weights."""
    return job.stage.model_dump(
        mode="json", by_alias=True, exclude={"name", "title", "seeds", "evaluate"}
    )


@dataclass
class Work:
    """Makes the jobs of one run. `known`: a job's folder -> what `earlier` found there."""

    out: Path
    voice: Voice
    tokenizer: PreTrainedTokenizerBase
    data_sha256: str
    known: Mapping[str, Manifest | None]
    make: Make
    texts: Mapping[str, str] = field(default_factory=dict)  # other files read -> SHA-256
    done: dict[str, Manifest] = field(default_factory=dict)

    def finish(self, job: Job, title: str) -> Manifest:
        """The job's manifest, its checkpoint made as far as that is not done yet."""
        inputs = self._inputs(job)
        manifest = self.known[job.folder]
        if manifest is not None and manifest.inputs != inputs:
            self.voice.say(f"{title}: made from other inputs, made again")
            manifest = None
        if manifest is None:
            manifest = self._make(job, inputs, title)
        else:
            self.voice.say(f"{title}: finished before")
            shutil.rmtree(self._training(job), ignore_errors=True)
        self.done[job.folder] = manifest
        return manifest

    def _inputs(self, job: Job) -> dict[str, str]:
        settings = manifests.digest([settings_of(job), job.seed])
        parents = {key: self.done[other.folder].weights for key, other in job.parents.items()}
        name = getattr(job.stage, "calibration_text", None)
        text = {} if name is None else {"calibration_text": self.texts[name]}
        return {"settings": settings, "data": self.data_sha256, **text, **parents}

    def _make(self, job: Job, inputs: dict[str, str], title: str) -> Manifest:
        folder, training = self.out / job.folder, self._training(job)
        begun, started = time.perf_counter(), manifests.now()
        self._begin_training(training, inputs)
        self.voice.say(f"{title}: {job.stage.stage}")
        finished = {key: self.out / other.folder for key, other in job.parents.items()}
        # A training draws its own bar: steps, tokens/s and the time left.
        trains = hasattr(job.stage, "training")
        with self.voice.bar(f"{job.folder}: {job.stage.stage}", show=not trains) as progress:
            made = self.make(job, finished, training, progress)
        models.save(made.model, self.tokenizer, folder)
        for name in KEPT:
            if (training / name).is_dir():
                shutil.copytree(training / name, folder / name)
            elif (training / name).is_file():
                shutil.copy(training / name, folder)
        seconds = time.perf_counter() - begun
        if made.training is not None:  # which may have been stopped and gone on with
            seconds = max(seconds, made.training["seconds"])
        manifest = Manifest(
            stage=job.stage.name,
            kind=job.stage.stage,
            seed=job.seed,
            settings=settings_of(job),
            inputs=inputs,
            files=manifests.files_of(folder),
            versions=manifests.versions(),
            started=started,
            finished=manifests.now(),
            seconds=round(seconds, 3),
            parameters=models.parameters(made.model),
            weight_bytes=models.weight_bytes(made.model),
            training=made.training,
            pruning=made.pruning,
            quantization=made.quantization,
        )
        manifest.write(folder)
        shutil.rmtree(training, ignore_errors=True)
        told = f"{manifest.parameters:,} parameters"
        if made.training is not None:
            tokens, speed = made.training["tokens"], made.training["tokens_per_second"]
            told += f", {tokens:,} tokens at {speed:,.0f} tokens/s"
        self.voice.say(f"{title}: {told} ({seconds:.0f} s)")
        return manifest

    def _training(self, job: Job) -> Path:
        return self.out / f"{job.folder}.training"

    def _begin_training(self, training: Path, inputs: dict[str, str]) -> None:
        """Keep the folder of a training that was begun from these very inputs, drop any other."""
        key = manifests.digest(inputs)
        file = training / INPUTS
        if training.exists() and (not file.is_file() or file.read_text(encoding="utf-8") != key):
            shutil.rmtree(training)
        write_atomically(file, key)
