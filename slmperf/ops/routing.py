"""Which implementation of an op a call takes: one table per op, and no silent fallback.

An op registers one overload per implementation (`slmperf::divergence.cpu`,
`slmperf::divergence.triton`), so a graph shows which one it holds, and two implementations for
the same device never overwrite each other. `impl="auto"` looks the device up in the op's table;
anything that cannot run raises NotImplementedError with what can.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from slmperf import arch

HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def _load_native() -> str:
    """Load slmperf/_ops.so; return why it is not there, or an empty string."""
    if not arch.OPS_LIBRARY.exists():
        return "slmperf/_ops.so is not built (make install)"
    try:
        torch.ops.load_library(str(arch.OPS_LIBRARY))
    except (
        OSError
    ) as error:  # built against something that this torch is not: say so when asked for
        return f"slmperf/_ops.so does not load: {error}"
    return ""


def _find_cuda_kernels() -> str:
    """How kernels in CUDA C++ come: "built in" to _ops.so, by "NVRTC" at first use, or "" not."""
    if not MISSING["native"] and hasattr(torch.ops.slmperf, "linear_int4_launch"):
        return "built in"
    return "NVRTC" if find_spec("cupy") else ""


# Why an implementation cannot run here, by what it needs; found once, at import, so that routing is
# table look-ups alone and a compiler can trace it.
MISSING: dict[str, str] = {
    "": "",
    "native": _load_native(),
    "triton": "" if find_spec("triton") else "triton is not installed",
}
CUDA_KERNELS = _find_cuda_kernels()
MISSING["cuda"] = (
    "" if CUDA_KERNELS else "built without nvcc, and CuPy is not installed (slmperf[nvrtc])"
)


@dataclass(frozen=True)
class Implementation:
    """What one implementation takes: device types (empty: any), dtypes, and what must be there."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT
    needs: str = ""

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{' or '.join(self.devices) or 'any device'}; {dtypes}"


@dataclass(frozen=True)
class Routes:
    """The implementations of one op, and which of them `impl="auto"` means on a device type."""

    op: str
    auto: Mapping[str, str]
    implementations: Mapping[str, Implementation]

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether an implementation can run here and takes a tensor of this device and dtype."""
        found = self.implementations.get(name)
        return (
            found is not None
            and (not found.devices or tensor.device.type in found.devices)
            and tensor.dtype in found.dtypes
            and not MISSING[found.needs]
        )

    def choose(self, impl: str, tensor: torch.Tensor) -> str:
        """Name of the implementation for `impl` and a tensor of this device and dtype."""
        name = self.auto.get(tensor.device.type, "") if impl == "auto" else impl
        if not self.takes(name, tensor):
            raise NotImplementedError(self._refusal(impl, tensor))
        return name

    def _refusal(self, impl: str, tensor: torch.Tensor) -> str:
        supported = "; ".join(
            f"{name} ({MISSING[entry.needs] or entry})"
            for name, entry in self.implementations.items()
        )
        asked = f"impl={impl!r} on {tensor.device.type} tensors of {tensor.dtype}"
        return f"{self.op}: {asked} is not supported; there is: {supported}".replace("torch.", "")


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors here (TRITON_INTERPRET=1, triton's own switch)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_interpreter(op: str, tensor: torch.Tensor) -> None:
    """NotImplementedError for a CPU tensor where no interpreter takes the place of a GPU."""
    if tensor.device.type == "cpu" and not interpreted():
        raise NotImplementedError(
            f"{op}: impl='triton' takes CPU tensors only under TRITON_INTERPRET=1"
        )


_ROUTES: dict[str, Routes] = {}


def table(op: str) -> Routes:
    """The table of an op."""
    return _ROUTES[op]


def routes(op: str, auto: Mapping[str, str], **implementations: Implementation) -> Routes:
    """Make the table of an op and list it for `implementations()`."""
    _ROUTES[op] = Routes(op, auto, implementations)
    return _ROUTES[op]


def implementations() -> dict[str, dict[str, str]]:
    """Per op: `"auto"` (what it takes on each device type) and every implementation's state here.

    A state is "ready", "ready (with what)" or the reason why it cannot run on this machine.
    """
    return {
        op: {
            "auto": ", ".join(f"{device}: {name}" for device, name in table.auto.items()),
            **{name: _state(entry) for name, entry in table.implementations.items()},
        }
        for op, table in sorted(_ROUTES.items())
    }


def _state(entry: Implementation) -> str:
    if MISSING[entry.needs]:
        return MISSING[entry.needs]
    if entry.needs == "native" and "cpu" in entry.devices:
        return f"ready ({cpu_isa()})"
    kernels = f"kernels {CUDA_KERNELS}" if entry.needs == "cuda" else ""
    if "cuda" in entry.devices and not torch.cuda.is_available():
        if "cpu" in entry.devices and (interpreted() or entry.needs != "triton"):
            return "ready (interpreted)" if entry.needs == "triton" else "ready"
        return f"no CUDA device ({kernels})" if kernels else "no CUDA device"
    return f"ready ({kernels})" if kernels else "ready"


torch.library.define("slmperf::cpu_isa", "() -> int")


def cpu_isa() -> str:
    """Instruction set that the C++ kernels chose on this processor: avx512, avx2 or scalar."""
    if MISSING["native"]:
        raise NotImplementedError(MISSING["native"])
    return ("scalar", "avx2", "avx512")[torch.ops.slmperf.cpu_isa()]
