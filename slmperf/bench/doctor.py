"""doctor: what was built, what this machine has, which implementation each op takes.

Beside the command, for a GPU check on an image where no command line can be had (typer needs
pydantic).
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from slmperf import _C, __version__, arch, ops
from slmperf.ops.linear import table


def facts() -> dict[str, dict[str, Any]]:
    """Sections of the doctor's table, in order; values are text, numbers or flat dicts."""

    def installed(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    capability = arch.cuda_capability()
    return {
        "built": {"slmperf": __version__, **_C.build_facts()},
        "machine": {
            "cpu": f"{arch.cpu_name()}, {arch.cpu_count()} usable",
            "cpu_isas": " ".join(arch.cpu_isas()),
            "memory_mib": arch.memory_mib(),
            "threads": arch.threads(),
            "cuda": f"{arch.cuda_name()}, sm_{capability[0]}{capability[1]}"
            if capability
            else "no device",
            "linear": table.described(),
            "system": platform.platform(terse=True),
        },
        "packages": {"python": platform.python_version()}
        | {name: installed(name) for name in ("torch", "triton", "transformers", "numpy")},
        "ops": ops.implementations(),
    }
