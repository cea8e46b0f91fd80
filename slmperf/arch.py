"""What this machine is. A leaf: imports nothing of slmperf.

Every answer is found on first request and kept; nothing is asked at import, torch least of all.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

# Native operators, loaded by slmperf.ops; they need no Python and no path to torch.
OPS_LIBRARY = Path(__file__).resolve().parent / "_ops.so"

# Instruction sets that kernels choose from, best first, and the cpuinfo flags that each one needs.
_ISA_FLAGS = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "avx512_vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c"},
}


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


@cache
def cpu_isas() -> tuple[str, ...]:
    """Instruction sets of this processor that kernels choose from, best first, "scalar" last."""
    if platform.machine() == "aarch64":
        return ("neon", "scalar")
    flags = set(_cpuinfo().get("flags", "").split())
    return (*(isa for isa, needs in _ISA_FLAGS.items() if needs <= flags), "scalar")


@cache
def cpu_name() -> str:
    """The processor's name as the kernel tells it, "unknown" where it does not."""
    return _cpuinfo().get("model name", "unknown")


def cache_folder() -> Path:
    """Where what was found out once is kept: $SLMPERF_CACHE, else slmperf in $XDG_CACHE_HOME or
    ~/.cache."""
    if own := os.environ.get("SLMPERF_CACHE"):
        return Path(own)
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "slmperf"


def cpu_count() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


@cache
def memory_mib() -> int:
    """Main memory in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


@cache
def cuda_capability(device: int = 0) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, None where torch sees none. Imports torch."""
    import torch

    if not torch.cuda.is_available() or device >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(device)


@cache
def cuda_name(device: int = 0) -> str | None:
    """Name of a CUDA device, None where torch sees none. Imports torch."""
    import torch

    return torch.cuda.get_device_name(device) if cuda_capability(device) else None


def threads() -> int:
    """Threads that torch's CPU operators use now. Imports torch."""
    import torch

    return torch.get_num_threads()
