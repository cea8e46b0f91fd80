"""distillation: trainings on text, in stages, as a YAML file names them.

    Recipe.load(path)          what to do: schema.py says what a recipe may contain, grid.py how one
                               stage of the file becomes many
    run(recipe, out)           do it, or go on with it
    preview(recipe)            what it would take, as text; writes nothing

Names are loaded on first use: reading a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.recipe.distillation.dry_run import preview
    from slmperf.recipe.distillation.runner import run
    from slmperf.recipe.distillation.schema import Recipe

__all__ = ["Recipe", "preview", "run"]

_HOMES = {"Recipe": "schema", "preview": "dry_run", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
