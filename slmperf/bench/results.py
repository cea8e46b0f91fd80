"""Result files: what every bench writes and `slmperf bench compare` and `slmperf plan fit` read.

    {"schema": "slmperf.bench/1",
     "kind": "roof" | "ops" | "layer" | "serve" | "audit" | "gpu-check",
     "date": "2026-11-22T07:02Z",
     "machine": {...}, "roof": {...} or null, "rows": [{...}, ...]}

A row is flat: text, numbers, null and lists of them. Every row has a `name`, unique in its file,
and `time_us` (median), with `low_us` and `high_us` (quartiles) and `samples` beside it; what else
it has depends on the kind.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmperf import arch
from slmperf.check import InputError
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


def write_results(
    path: str | Path,
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    machine: Mapping[str, Any],
    roof: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Write a result file in one step; `more` are further keys of the file."""
    now = datetime.datetime.now(datetime.UTC)
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "date": f"{now:%Y-%m-%dT%H:%MZ}",
        "machine": dict(machine),
        "roof": dict(roof) if roof else None,
        **more,
        "rows": [dict(row) for row in rows],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file's content; InputError where it is something else."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from None
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path}: schema is {found!r}, expected {SCHEMA!r}")
    rows = value.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows
    ):
        raise InputError(f"{path}: expected rows, each with a name")
    return value
