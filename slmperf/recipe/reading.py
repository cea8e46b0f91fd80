"""reading: the YAML text of a recipe -> a checked model, or one line that names the key.

stages[2] (narrow).intermediate: expected greater than or equal to 1, found 0
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from slmperf.check import InputError

Stages = Mapping[str, type[BaseModel]]  # what `stage:` may say -> the model of such a stage
Model = TypeVar("Model", bound=BaseModel)


def stages_of(union: Any) -> dict[str, type[BaseModel]]:
    """The models of an annotated union of stages, by the word in their `stage` field."""
    models = get_args(get_args(union)[0])
    return {get_args(cls.model_fields["stage"].annotation)[0]: cls for cls in models}


def read_text(path: str | Path) -> str:
    """The text of a recipe's file; InputError in one line where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: expected a recipe, {reason}") from None


@contextlib.contextmanager
def blame(prefix: str) -> Iterator[None]:
    """Open the line of an InputError with the file it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """YAML text -> the mapping it holds; `source` opens the line of an InputError."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise InputError(f"{source}:{line} {problem}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise InputError(f"{source}: expected a mapping with name, data and stages, found {found}")
    return value


def validate(model: type[Model], value: Mapping[str, Any], stages: Stages, source: str) -> Model:
    """The mapping as `model`; InputError for the first thing wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = _first_problem(error, value, model, stages)
        raise InputError(f"{source}: {problem}") from None


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number (YAML 1.2) and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key.value!r} is given twice", key.start_mark
            )
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k, True): loader.construct_object(v, True) for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _first_problem(
    error: ValidationError, value: Mapping[str, Any], model: type[BaseModel], stages: Stages
) -> str:
    one = error.errors(include_url=False)[0]
    path, model = _path_and_model(one["loc"], value, model, stages)
    kind, found = one["type"], one.get("input")
    if kind == "extra_forbidden":
        known = ", ".join(field.alias or name for name, field in model.model_fields.items())
        return f"{path}: unknown key, expected one of {known}"
    if kind == "missing":
        return f"{path}: missing key"
    if kind == "union_tag_invalid":
        known, tag = ", ".join(stages), one["ctx"]["tag"]
        return f"{path}.stage: unknown stage {tag!r}, expected one of {known}"
    if kind == "union_tag_not_found":
        return f"{path}: missing key `stage`, expected one of {', '.join(stages)}"
    if kind == "value_error":
        message = str(one["ctx"]["error"])
        return f"{path}: {message}" if path else message
    message = one["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    shown = type(found).__name__ if isinstance(found, (dict, list)) else repr(found)
    return f"{path}: expected {message}, found {shown}"


def _path_and_model(
    loc: tuple[int | str, ...], value: Any, model: type[BaseModel], stages: Stages
) -> tuple[str, type[BaseModel]]:
    """pydantic's location -> the key path in the file, and the model at its end."""
    path, parts = "", list(loc)
    while parts:
        part = parts.pop(0)
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, list) and part < len(value) else None
            if path.startswith("stages["):
                name = value.get("name") if isinstance(value, dict) else None
                path += f" ({name})" if isinstance(name, str) else ""
                if parts and parts[0] in stages:  # the tag of the union, no key of the file
                    model = stages[str(parts.pop(0))]
            continue
        path += f".{part}" if path else str(part)
        value = value.get(part) if isinstance(value, dict) else None
        if parts:
            model = _model_of(model, str(part)) or model
    return path, model


def _model_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            for one in (field.annotation, *get_args(field.annotation)):
                if isinstance(one, type) and issubclass(one, BaseModel):
                    return one
    return None
