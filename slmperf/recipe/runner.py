"""runner: a recipe from its first line to its report, from wherever an earlier run of it stopped.

Everything that can be wrong with the recipe, the data and the output folder is looked for before
the folder is touched. Then each stage is made, unless its manifest says that this was done from the
same inputs with the same settings; scored, unless the manifest holds its metrics; and at the end
all are timed together.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from slmperf.evaluate import Run
from slmperf.models.files import write_atomically, write_folder
from slmperf.recipe import folder as folders
from slmperf.recipe import material as materials
from slmperf.recipe import timing
from slmperf.recipe.console import Voice
from slmperf.recipe.manifest import SCORES
from slmperf.recipe.material import Material
from slmperf.recipe.plan import Job, plan
from slmperf.recipe.reading import blame
from slmperf.recipe.report import print_table, write_report
from slmperf.recipe.results import Results, StageLatency
from slmperf.recipe.schema import Recipe
from slmperf.recipe.scoring import read_run, score, write_run
from slmperf.recipe.stages import check_training, make
from slmperf.recipe.tables import tabulate
from slmperf.recipe.work import Work, earlier


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
    with blame(blamed):
        jobs = plan(recipe)
    source = Path(data) if data is not None else None
    if source is None and recipe.data.source is not None:
        source = base / recipe.data.source
    voice = Voice()
    rows = materials.read(recipe.data, source)
    voice.say(_opening(source, len(rows)))
    with blame(blamed):
        material = materials.prepare(recipe.data, rows, source.name if source else "")
        texts = [getattr(job.stage, "calibration_text", None) for job in jobs]
        material = material.with_texts(filter(None, texts), base)
        check_training(jobs, material)
        timing.check(recipe.timing, material)
    out = Path(out)
    folders.check(out, recipe, material.sha256)
    known = {job.folder: earlier(out / job.folder) for job in jobs}
    begun_before = (out / folders.RUN).is_file()
    with folders.claim(out, recipe, material.sha256):
        voice.log_to(out / "run.log")
        work = Work(
            out,
            voice,
            material.tokenizer,
            material.sha256,
            known,
            lambda job, *where: make(job, material, *where),
            texts={name: text.sha256 for name, text in material.texts.items()},
        )
        running = _Run(recipe, jobs, material, work)
        return running.finish(None if begun_before else started, command)


def _command(recipe: str | Path, out: str | Path, data: str | Path | None) -> str:
    words = ["slmperf", "run", str(recipe), "--out", str(out)]
    return shlex.join(words + (["--data", str(data)] if data is not None else []))


def _opening(source: Path | None, rows: int) -> str:
    if source is None:
        return f"synthetic data: the embedded world, {rows:,} interactions, because none were given"
    return f"data: {source}, {rows:,} rows"


class _Run:
    """The work on one output folder."""

    def __init__(self, recipe: Recipe, jobs: list[Job], material: Material, work: Work) -> None:
        self.recipe, self.jobs, self.material, self.work = recipe, jobs, material, work
        self.out, self.voice, self.done = work.out, work.voice, work.done

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
        folder, manifest = self.out / job.folder, self.work.finish(job, title)
        if job.stage.evaluate and manifest.metrics is None:
            begun = time.perf_counter()
            with self.voice.bar(f"{job.folder}: score") as progress:
                score(folder, manifest, self.material, progress)
            auc = manifest.metrics["auc_mean"] if manifest.metrics else float("nan")
            self.voice.say(f"{title}: AUC {auc:.4f} ({time.perf_counter() - begun:.0f} s)")

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
