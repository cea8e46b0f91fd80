"""Result files: what every bench writes and `slmperf bench compare` and `slmperf plan fit` read.

    {"schema": "slmperf.bench/1",
     "kind": "roof" | "ops" | "kd" | "train" | "layer" | "serve" | "audit" | "gram" |
              "osscar" | "quantize" | "gpu-check",
     "date": "2026-11-22T07:02Z",
     "machine": {...}, "roof": {...} or null, "rows": [{...}, ...]}

A row is flat: text, numbers, null and lists of them (a shape may be a mapping of its sizes). Every
row has a `name`, unique in its file, and `time_us` (median), with `low_us` and `high_us`
(quartiles) and `samples` beside it; where times are to be compared in those of another row, its
name is the `yardstick`. What else a row has depends on the kind.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmperf import arch
from slmperf.check import InputError, check_plot
from slmperf.models.files import write_atomically

SCHEMA = "slmperf.bench/1"


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on; `device` is "cpu" or "cuda"."""
    import torch

    from slmperf import _C, ops

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "device": arch.cuda_name() if device == "cuda" else arch.cpu_name(),
        "kind": device,
        "capability": arch.cuda_capability() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "build": _C.build_facts(),
        "implementations": ops.implementations(),
    }


def check_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu"; InputError for a GPU that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and arch.cuda_capability() is None:
        raise InputError("device is cuda, but torch sees no CUDA device on this machine")
    return ("cuda" if arch.cuda_capability() else "cpu") if device == "auto" else device


def check_files(out: str | Path | None, plot: str | Path | None) -> None:
    """Before minutes of measuring: InputError for a file that could not be written after them.

    The folders of `out` and `plot` are made; None stands for no file.
    """
    if plot is not None:
        check_plot(plot)
    for what, given in (("out", out), ("plot", plot)):
        if given is None:
            continue
        path = Path(given)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Only a file shows it: who is root may write everywhere, and in /proc nobody can.
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise InputError(f"{what} is {path}: cannot write there: {error.strerror}") from None
        if path.is_dir():
            raise InputError(f"{what} is {path}, a folder, expected a file's name")


def write_results(
    path: str | Path,
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    machine: Mapping[str, Any],
    roof: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Write a result file in one step; arguments as of `content`."""
    found = content(kind, rows, machine=machine, roof=roof, **more)
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def content(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    machine: Mapping[str, Any],
    roof: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a result file holds; `more` are further keys of it."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": f"{now:%Y-%m-%dT%H:%MZ}",
        "machine": dict(machine),
        "roof": dict(roof) if roof else None,
        **more,
        "rows": [dict(row) for row in rows],
    }


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file's content; InputError where it is something else, or what every row has is of
    another type.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from None
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema is {found!r}, expected {SCHEMA!r}")
    for key in ("machine", "roof"):
        if not isinstance(value.get(key), dict | None):
            raise InputError(f"{path}: {key} is {_shown(value[key])}, expected an object or null")
    rows = value.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows
    ):
        raise InputError(f"{path}: expected rows, each with a name")
    for row in rows:
        for key, (right, wanted) in _TYPES.items():
            if (given := row.get(key)) is not None and not right(given):
                raise InputError(
                    f"{path}: {key} of row {row['name']!r} is {_shown(given)}, "
                    f"expected {wanted} or null"
                )
    return value


def _is_time(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # neither NaN nor what no float holds
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_TYPES = {
    "time_us": (_is_time, "a number"),
    "low_us": (_is_time, "a number"),
    "high_us": (_is_time, "a number"),
    "samples": (_is_count, "a whole number"),
    "yardstick": (_is_text, "a row's name"),
    "section": (_is_text, "text"),
}


def _shown(value: object) -> str:
    """A value on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
