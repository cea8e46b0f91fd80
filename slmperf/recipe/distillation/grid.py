"""grid: one stage of a file -> one stage for each point of its grid.

    - name: fkl-ofkl-{tokens}-{fraction}
      stage: distil
      on_policy: {new_tokens: "{tokens}", fraction: "{fraction}"}
      grid: {tokens: [200, 300], fraction: [0.5, 1.0]}

is four stages, fkl-ofkl-200-0_5 to fkl-ofkl-300-1_0. A grid is a mapping of words to the values
that each takes in turn, or a list of mappings where not all combinations are wanted. A text that is
`"{word}"` and nothing else becomes the value, a number where that is one; within a longer text the
value is written out, in a name with `_` for the dot. Every word is used.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from slmperf.check import InputError

_WORD = re.compile(r"\{([A-Za-z_]\w*)\}")
Point = Mapping[str, Any]


def expand(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """The recipe with every `grid` of its stages expanded; InputError opens with `source`."""
    stages = recipe.get("stages")
    if not isinstance(stages, list):
        return recipe  # the schema says what is wrong
    expanded: list[Any] = []
    for number, stage in enumerate(stages):
        if not isinstance(stage, dict) or "grid" not in stage:
            expanded.append(stage)
            continue
        where = f"{source}: stages[{number}] ({stage.get('name')})"
        rest = {key: value for key, value in stage.items() if key != "grid"}
        points = _points(stage["grid"], where)
        _check_words(rest, points[0], where)
        expanded += [_at(rest, point) for point in points]
    return {**recipe, "stages": expanded}


def _points(grid: Any, where: str) -> list[Point]:
    if isinstance(grid, list):
        points = grid
    elif isinstance(grid, dict):
        for word, values in grid.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{where}.grid.{word}: expected a list of values")
        points = [dict(zip(grid, values, strict=True)) for values in _product(grid)]
    else:
        points = []
    if not points or not all(isinstance(point, dict) and point for point in points):
        raise InputError(f"{where}.grid: expected words with lists of values, or a list of points")
    for number, point in enumerate(points):
        if point.keys() != points[0].keys():
            raise InputError(
                f"{where}.grid[{number}]: expected the words {', '.join(points[0])}, "
                f"found {', '.join(map(str, point))}"
            )
        for word, value in point.items():
            if not _WORD.fullmatch(f"{{{word}}}"):
                raise InputError(f"{where}.grid: expected a word of letters, found {word!r}")
            if isinstance(value, list | dict):
                raise InputError(f"{where}.grid.{word}: expected plain values, found a list")
    return points


def _product(grid: Mapping[str, list[Any]]) -> itertools.product[tuple[Any, ...]]:
    return itertools.product(*grid.values())


def _check_words(stage: Mapping[str, Any], point: Point, where: str) -> None:
    """The stage uses every word of the grid, and no others."""
    used = set()
    for path, text in _texts(stage):
        for word in _WORD.findall(text):
            used.add(word)
            if word not in point:
                known = ", ".join(point)
                raise InputError(f"{where}{path}: no word {word!r} in the grid, found {known}")
    for word in point:
        if word not in used:
            raise InputError(f"{where}.grid.{word}: expected {{{word}}} in the stage, found none")


def _texts(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _texts(inner, f"{path}.{key}")]
    return []


def _at(value: Any, point: Point, key: str = "") -> Any:
    """A copy of the value with the words of one point put in."""
    if isinstance(value, dict):
        return {name: _at(inner, point, name) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    whole = _WORD.fullmatch(value)
    if whole and key not in ("name", "from", "teacher"):
        return point[whole[1]]
    # Names have no dots.
    dot = "_" if key in ("name", "from", "teacher") else "."
    return _WORD.sub(lambda word: str(point[word[1]]).replace(".", dot), value)
