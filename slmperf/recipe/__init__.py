"""recipe: the whole line from a teacher to a small model, as a YAML file names it.

    Recipe.load(path)          what to do: schema.py says what a recipe may contain
    run(recipe, out)           do it, or go on with it; returns slmperf.recipe.results.Results

Names are loaded on first use: reading a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.recipe.runner import run
    from slmperf.recipe.schema import Recipe

__all__ = ["Recipe", "run"]

_HOMES = {"Recipe": "schema", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
