"""runner: a recipe on text from its first line to its table, from wherever an earlier run stopped.

Everything that can be wrong with the recipe, the data and the output folder is looked for before
the folder is touched. Then each stage is made (slmperf.recipe.work) and measured, unless its
manifest says that it was.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import NamedTuple

from slmperf.models.files import write_atomically, write_folder
from slmperf.recipe import folder as folders
from slmperf.recipe.console import Voice
from slmperf.recipe.distillation import paper, stages
from slmperf.recipe.distillation.material import Material, prepare
from slmperf.recipe.distillation.report import first_line, print_table, write_report
from slmperf.recipe.distillation.results import Results, SeedResult, StageResult, summarise
from slmperf.recipe.distillation.schema import Recipe
from slmperf.recipe.manifest import Manifest, now, versions
from slmperf.recipe.plan import Job, plan
from slmperf.recipe.reading import blame
from slmperf.recipe.tables import machine_facts
from slmperf.recipe.work import Work, earlier


class Prepared(NamedTuple):
    """A recipe with all that could be found wrong with it looked for."""

    recipe: Recipe
    jobs: list[Job]
    material: Material
    base: Path  # what the recipe's paths are seen from


def open_recipe(recipe: Recipe | str | Path, data: str | Path | None = None) -> Prepared:
    """Read, plan, tokenize, check. InputError in one line for the first thing wrong."""
    base, blamed = Path(), ""
    if not isinstance(recipe, Recipe):
        base, blamed = Path(recipe).parent, f"{recipe}: "
        recipe = Recipe.load(recipe)
    with blame(blamed):
        jobs = plan(recipe, stages.given_shapes(recipe, base))
    source = Path(data) if data is not None else None
    if source is None and recipe.data.source is not None:
        source = base / recipe.data.source
    with blame(blamed):
        material = prepare(recipe.data, source, base)
        stages.check(recipe, jobs, material, base)
    return Prepared(recipe, jobs, material, base)


def run(recipe: Recipe | str | Path, out: str | Path, *, data: str | Path | None = None) -> Results:
    """Run a recipe (or the YAML file of one) into the folder `out`; print the table and report.

    data: a JSONL file that replaces what the recipe names. A run that was stopped goes on in its
    folder, and its figures are those of a run that was never stopped. Raises InputError in one
    line, and leaves no output, for a recipe, data or an output folder that cannot be used.
    """
    started = time.perf_counter()
    command = "" if isinstance(recipe, Recipe) else _command(recipe, out, data)
    given = open_recipe(recipe, data)
    recipe, jobs, material, base = given
    voice, out = Voice(), Path(out)
    voice.say(first_line(material.facts))
    folders.check(out, recipe, material.sha256)
    known = {job.folder: earlier(out / job.folder) for job in jobs}
    begun_before = (out / folders.RUN).is_file()
    with folders.claim(out, recipe, material.sha256):
        voice.log_to(out / "run.log")
        with write_folder(out / "tokenizer") as aside:
            material.tokenizer.save_pretrained(aside)
        work = Work(
            out,
            voice,
            material.tokenizer,
            material.sha256,
            known,
            lambda job, *where: stages.make(job, material, base, *where),
        )
        for number, job in enumerate(jobs, 1):
            title = f"[{number}/{len(jobs)}] {job.folder}"
            manifest = work.finish(job, title)
            if job.stage.evaluate:
                _measure(out / job.folder, manifest, material, voice, title)
        results = tabulate(recipe, jobs, work.done, material)
        results.command = command
        if not begun_before:  # of a run in several parts the last is not the whole
            results.seconds = round(time.perf_counter() - started, 1)
        write_atomically(out / "results.json", results.to_json())
        write_report(results, out)
        print_table(results)
        took = "" if begun_before else f" ({results.seconds:.0f} s)"
        voice.say(f"report: {out / 'report.html'}{took}")
        return results


def _command(recipe: str | Path, out: str | Path, data: str | Path | None) -> str:
    words = ["slmperf", "distill", str(recipe), "--out", str(out)]
    return shlex.join(words + (["--data", str(data)] if data is not None else []))


def _measure(
    folder: Path, manifest: Manifest, material: Material, voice: Voice, title: str
) -> None:
    """Put the validation loss into the manifest, unless it is there."""
    if manifest.metrics is None:
        manifest.metrics = stages.validation_loss(folder, material)
        manifest.write(folder)
    voice.say(f"{title}: validation loss {manifest.metrics['loss']:.4f}")


def tabulate(
    recipe: Recipe, jobs: list[Job], done: dict[str, Manifest], material: Material
) -> Results:
    """The table of the finished stages, in the recipe's groups."""
    measured: dict[str, dict[int, Job]] = {}
    for job in jobs:
        if job.stage.evaluate:
            measured.setdefault(job.stage.name, {})[job.seed] = job
    losses = {
        name: {seed: _metrics(done[job.folder])["loss"] for seed, job in by_seed.items()}
        for name, by_seed in measured.items()
    }
    group, role = paper.REFERENCE
    summaries = summarise(losses, recipe.tables.get(group, {}).get(role))

    def row(name: str, group: str = "", role: str | None = None) -> StageResult:
        first = next(iter(measured[name].values()))
        loss, interval, difference, difference_interval = summaries[name]
        return StageResult(
            name=name,
            title=first.stage.printed,
            kind=first.stage.stage,
            source=first.stage.source,
            teacher=getattr(first.stage, "teacher", None),
            parameters=done[first.folder].parameters,
            seeds=[_seed(done[job.folder]) for job in measured[name].values()],
            loss=loss,
            interval=interval,
            difference=difference,
            difference_interval=difference_interval,
            role=role,
            paper_loss=None if role is None else paper.VALIDATION_LOSSES[group][role].loss,
        )

    # Groups and rows stand in the paper's order, whatever the recipe's.
    groups = {
        group: [
            row(recipe.tables[group][role], group, role)
            for role in paper.VALIDATION_LOSSES[group]
            if role in recipe.tables[group]
        ]
        for group in paper.VALIDATION_LOSSES
        if group in recipe.tables
    }
    shown = {one.name for rows in groups.values() for one in rows}
    others = [row(name) for name in measured if name not in shown]
    return Results(
        recipe=recipe.name,
        data=material.facts,
        date=now()[:10],
        groups={**groups, "stages": others} if others else groups,
        machine=machine_facts(),
        versions=versions(),
        settings=recipe.model_dump(mode="json", by_alias=True),
    )


def _metrics(manifest: Manifest) -> dict[str, float]:
    assert manifest.metrics is not None  # measured before the table is made
    return manifest.metrics


def _seed(manifest: Manifest) -> SeedResult:
    training = manifest.training or {}
    return SeedResult(
        seed=manifest.seed,
        loss=_metrics(manifest)["loss"],
        steps=training.get("steps"),
        best_step=training.get("best_step"),
        train_seconds=training.get("seconds"),
    )
