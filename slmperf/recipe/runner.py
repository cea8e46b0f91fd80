"""runner: a recipe from its first line to its report, from wherever an earlier run of it stopped.

Everything that can be wrong with the recipe, the data and the output folder is looked for before
the folder is touched. Then each stage is made, unless its manifest says that this was done from the
same inputs with the same settings; scored, unless the manifest holds its metrics; and at the end
all are timed together.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from slmperf import models
from slmperf.check import InputError
from slmperf.evaluate import Run
from slmperf.models.files import write_atomically, write_folder
from slmperf.recipe import folder as folders
from slmperf.recipe import manifest as manifests
from slmperf.recipe import material as materials
from slmperf.recipe import timing
from slmperf.recipe.console import Voice
from slmperf.recipe.manifest import SCORES, Manifest
from slmperf.recipe.material import Material
from slmperf.recipe.plan import Job, plan
from slmperf.recipe.report import print_table, write_report
from slmperf.recipe.results import Results, StageLatency
from slmperf.recipe.schema import Recipe
from slmperf.recipe.scoring import read_run, score, write_run
from slmperf.recipe.stages import check_training, make, settings_of
from slmperf.recipe.tables import tabulate

INPUTS = "inputs.json"  # in the folder of a training: what it was begun from
LOG = "train.log"  # there too: slmperf.distill's


def run(recipe: Recipe | str | Path, out: str | Path, *, data: str | Path | None = None) -> Results:
    """Run a recipe (or the YAML file of one) into the folder `out`; print the table and report.

    data: interactions that replace what the recipe names. A run that was stopped goes on in its
    folder: finished stages are not computed again, a training goes on from its last checkpoint, and
    the metrics are those of a run that was never stopped. Raises InputError in one line, and leaves
    no output, for a recipe, data or an output folder that cannot be used.
    """
    started = time.perf_counter()
    base, blamed, command = Path(), "", ""
    if not isinstance(recipe, Recipe):
        base, blamed, command = Path(recipe).parent, f"{recipe}: ", _command(recipe, out, data)
        recipe = Recipe.load(recipe)
    with _blame(blamed):
        jobs = plan(recipe)
    source = Path(data) if data is not None else None
    if source is None and recipe.data.source is not None:
        source = base / recipe.data.source
    voice = Voice()
    rows = materials.read(recipe.data, source)
    voice.say(_opening(source, len(rows)))
    with _blame(blamed):
        material = materials.prepare(recipe.data, rows, source.name if source else "")
        check_training(jobs, material)
        timing.check(recipe.timing, material)
    out = Path(out)
    folders.check(out, recipe, material)
    known = {job.folder: _earlier(out / job.folder) for job in jobs}
    begun_before = (out / folders.RUN).is_file()
    with folders.claim(out, recipe, material):
        voice.log_to(out / "run.log")
        work = _Run(recipe, jobs, material, out, voice, known)
        return work.finish(None if begun_before else started, command)


@contextlib.contextmanager
def _blame(prefix: str) -> Iterator[None]:
    """Open the line of an InputError with the file it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _command(recipe: str | Path, out: str | Path, data: str | Path | None) -> str:
    words = ["slmperf", "run", str(recipe), "--out", str(out)]
    return shlex.join(words + (["--data", str(data)] if data is not None else []))


def _opening(source: Path | None, rows: int) -> str:
    if source is None:
        return f"synthetic data: the embedded world, {rows:,} interactions, because none were given"
    return f"data: {source}, {rows:,} rows"


def _earlier(folder: Path) -> Manifest | None:
    """The manifest an earlier run left, its files found whole; None for an unfinished stage."""
    manifest = manifests.read(folder)
    if manifest is not None:
        manifests.check_files(folder, manifest)
    return manifest


class _Run:
    """The work on one output folder."""

    def __init__(
        self,
        recipe: Recipe,
        jobs: list[Job],
        material: Material,
        out: Path,
        voice: Voice,
        known: dict[str, Manifest | None],
    ) -> None:
        self.recipe, self.jobs, self.material = recipe, jobs, material
        self.out, self.voice, self.known = out, voice, known
        self.done: dict[str, Manifest] = {}

    def finish(self, started: float | None, command: str) -> Results:
        """All stages, floors, timings, tables. started: None for a run that goes on."""
        with write_folder(self.out / "tokenizer") as aside:
            self.material.tokenizer.save_pretrained(aside)
        for number, job in enumerate(self.jobs, 1):
            self._stage(job, f"[{number}/{len(self.jobs)}] {job.folder}")
        scored = [job for job in self.jobs if job.stage.evaluate]
        scores = {job.folder: read_run(self.out / job.folder / SCORES) for job in scored}
        floors = self._floors()
        latencies = self._timings(scored)
        self.voice.note("intervals")
        results = tabulate(
            self.recipe, self.jobs, self.done, scores, floors, latencies, self.material
        )
        results.command = command
        if started is not None:  # of a run in several parts the last is not the whole
            results.seconds = round(time.perf_counter() - started, 1)
        write_atomically(self.out / "results.json", results.to_json())
        write_report(results, self.out)
        print_table(results)
        took = "" if started is None else f" ({time.perf_counter() - started:.0f} s)"
        self.voice.say(f"report: {self.out / 'report.html'}{took}")
        return results

    def _stage(self, job: Job, title: str) -> None:
        """Make and score one job, as far as that is not done yet."""
        inputs = self._inputs(job)
        folder, manifest = self.out / job.folder, self.known[job.folder]
        if manifest is not None and manifest.inputs != inputs:
            self.voice.say(f"{title}: made from other inputs, made again")
            manifest = None
        if manifest is None:
            manifest = self._make(job, inputs, title)
        else:
            self.voice.say(f"{title}: finished before")
            shutil.rmtree(self._training(job), ignore_errors=True)
        if job.stage.evaluate and manifest.metrics is None:
            begun = time.perf_counter()
            with self.voice.bar(f"{job.folder}: score") as progress:
                score(folder, manifest, self.material, progress)
            auc = manifest.metrics["auc_mean"] if manifest.metrics else float("nan")
            self.voice.say(f"{title}: AUC {auc:.4f} ({time.perf_counter() - begun:.0f} s)")
        self.done[job.folder] = manifest

    def _inputs(self, job: Job) -> dict[str, str]:
        settings = manifests.digest([settings_of(job), job.seed])
        parents = {key: self.done[other.folder].weights for key, other in job.parents.items()}
        return {"settings": settings, "data": self.material.sha256, **parents}

    def _make(self, job: Job, inputs: dict[str, str], title: str) -> Manifest:
        folder, training = self.out / job.folder, self._training(job)
        begun, started = time.perf_counter(), manifests.now()
        self._begin_training(training, inputs)
        self.voice.say(f"{title}: {job.stage.stage}")
        finished = {key: self.out / other.folder for key, other in job.parents.items()}
        # A training draws its own bar: steps, tokens/s and the time left.
        trains = hasattr(job.stage, "training")
        with self.voice.bar(f"{job.folder}: {job.stage.stage}", show=not trains) as progress:
            made = make(job, self.material, finished, training, progress)
        models.save(made.model, self.material.tokenizer, folder)
        if (training / LOG).is_file():
            shutil.copy(training / LOG, folder)
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

    def _floors(self) -> dict[str, Run]:
        """Scores of the trivial predictors on the same rows: name -> run."""
        found = self.material.floors()
        for name, scores in found.items():
            write_run(scores, self.out / "floors" / f"{name.replace(' ', '-')}.safetensors")
        return found

    def _timings(self, scored: list[Job]) -> dict[str, StageLatency]:
        """One model of each stage speaks for all its seeds."""
        first: dict[str, Job] = {}
        for job in scored:
            first.setdefault(job.stage.name, job)
        stages = {
            name: (self.out / job.folder, self.done[job.folder]) for name, job in first.items()
        }
        with self.voice.bar("latency") as progress:
            return timing.measure(
                self.recipe.timing, stages, self.material, self.out / "timings.json", progress
            )
