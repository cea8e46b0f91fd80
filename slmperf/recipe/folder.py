"""folder: the output folder of a run, and whose it is. Of `slmperf run`:

run.json                which recipe on which data; written first
run.log                 what happened, with the time
tokenizer/              the tokenizer of all stages (each checkpoint holds it too)
<stage>/                checkpoint, scores.safetensors, manifest.json (last)
<stage>.training/       checkpoints of its training; gone when the stage is finished
floors/                 scores of the trivial predictors, to compare others with
timings.json            latency of all stages
results.json, report.md, report.html

`slmperf distill` writes the same but floors, scores and timings.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slmperf.check import InputError
from slmperf.models.files import remove_unfinished, write_atomically
from slmperf.recipe.manifest import digest, now, versions
from slmperf.recipe.schema import Recipe

if TYPE_CHECKING:
    from slmperf.recipe.distillation.schema import Recipe as TextRecipe

RUN = "run.json"
LOCK = ".lock"
FORMAT = 1


def recipe_sha256(recipe: Recipe | TextRecipe) -> str:
    """sha256 of a recipe as validated, without the place where its data lie."""
    return digest(recipe.model_dump(mode="json", by_alias=True, exclude={"data": {"source"}}))


def check(out: Path, recipe: Recipe | TextRecipe, data_sha256: str) -> None:
    """InputError unless `out` is absent, empty, or belongs to this very recipe and data."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, found a file")
    file = out / RUN
    if not file.is_file():
        names = sorted(one.name for one in out.iterdir()) if out.is_dir() else []
        names = [name for name in names if not name.startswith(".")]
        if names:
            raise InputError(f"{out}: expected an empty folder or one of a run, found {names[0]}")
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        name, recipe_hash, data_hash = (
            stored[key] for key in ("recipe", "recipe_sha256", "data_sha256")
        )
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: expected what a run writes, found other content") from None
    wanted = recipe_sha256(recipe)
    if recipe_hash != wanted:
        raise InputError(
            f"{out}: holds a run of another recipe, expected {recipe.name} ({wanted[:12]}), "
            f"found {name} ({recipe_hash[:12]})"
        )
    if data_hash != data_sha256:
        raise InputError(
            f"{out}: holds a run on other data (or of another version of slmperf), "
            f"expected {data_sha256[:12]}, found {data_hash[:12]}"
        )


@contextlib.contextmanager
def claim(out: Path, recipe: Recipe | TextRecipe, data_sha256: str) -> Iterator[None]:
    """Make the folder and hold it: a second run in it is refused while this one lives."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another run is at work in it") from None
        for folder in (out, *(one for one in out.iterdir() if one.is_dir())):
            remove_unfinished(folder)
        if not (out / RUN).is_file():
            content = {
                "format": FORMAT,
                "recipe": recipe.name,
                "recipe_sha256": recipe_sha256(recipe),
                "data_sha256": data_sha256,
                "settings": recipe.model_dump(mode="json", by_alias=True),
                "started": now(),
                "versions": versions(),
            }
            write_atomically(out / RUN, json.dumps(content, indent=2) + "\n")
        yield
