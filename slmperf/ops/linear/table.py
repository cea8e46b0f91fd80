"""Which implementation `impl="auto"` of linear takes, and with which config: a visible table.

One file per device class in tables/: `cpu.toml`, whose rows name an instruction set, and one for
each GPU that bench/tune.py was run for, `sm_90.toml` say. The rows that hold for a call stand there
in the order of preference: the first whose implementation can run on this machine is taken. Files
are read once, at first use; nothing is tuned when a model is served.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from slmperf import arch
from slmperf.ops.routing import MISSING, cpu_isa

FOLDER = Path(__file__).resolve().parent / "tables"


class Call(NamedTuple):
    """A product of x (M, K) with a weight (N, K), as far as the tables tell calls apart."""

    op: str  # linear_int4, linear_int8, linear_fp8
    rows: int  # M
    outputs: int  # N
    inputs: int  # K
    dtype: torch.dtype  # of x as it comes
    rounded: bool = False  # whether inputs are or will be codes
    blocks: bool = False  # whether scales are of blocks of 128 x 128
    experts: int = 0  # of a stacked weight; 0: one weight


@dataclass(frozen=True)
class Row:
    """One line of a table: for which calls it holds, what they take."""

    op: str
    impl: str
    rows: int = 0  # M at most, with experts the mean of one's; 0: any
    weights: int = 0  # N K at most; 0: any
    multiple: int = 1  # of which N and K are multiples
    rounded: bool | None = None  # None: either
    blocks: bool | None = None  # None: either
    grouped: bool | None = None  # whether rows go with experts; None: either
    dtype: str = ""  # bfloat16, float32, int8, ...; empty: any
    isa: str = ""  # of a CPU's rows: amx, avx512, avx2, scalar
    config: Mapping[str, int] = field(default_factory=dict)  # a Triton kernel's tile

    def holds(self, call: Call) -> bool:
        """Whether it is for this call; on which device, is not asked."""
        rows = -(-call.rows // call.experts) if call.experts else call.rows
        return (
            self.op == call.op
            and (self.rows == 0 or rows <= self.rows)
            and (self.weights == 0 or call.outputs * call.inputs <= self.weights)
            and math.gcd(call.outputs, call.inputs) % self.multiple == 0
            and self.rounded in (None, call.rounded)
            and self.blocks in (None, call.blocks)
            and self.grouped in (None, call.experts > 0)
            and self.dtype in ("", str(call.dtype).removeprefix("torch."))
        )


@cache
def cpu_class() -> str:
    """The CPU's class: "amx" where its tiles may be used, else the widest instruction set."""
    if MISSING["native"]:
        return "none"
    return "amx" if torch.ops.slmperf.half_products() == 2 else cpu_isa()


@cache
def device_class(capability: int) -> str:
    """Name of the table file for a GPU (90: capability 9.0), the nearest one where it has none.

    Nearest is the newest that is not above it; from 12.0 on, whose blocks have 100 KiB of shared
    memory again, sm_80, whose configs take no more.
    """
    known = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.toml"))
    if capability in known:
        return f"sm_{capability}"
    if capability >= 120:
        return "sm_80"
    return f"sm_{max((one for one in known if one < capability), default=known[0])}"


def described() -> str:
    """Which table this machine's first device uses, in words, for `slmperf doctor`."""
    capability = arch.cuda_capability()
    if capability is None:
        return f"cpu.toml, rows of {cpu_class()}"
    number = 10 * capability[0] + capability[1]
    here, found = f"sm_{number}", device_class(number)
    if here == found:
        return f"{found}.toml"
    return f"{found}.toml, the nearest: there is none for {here}; bench/tune.py makes one"


@cache
def read(name: str) -> tuple[Row, ...]:
    """All rows of a file, in order."""
    fields = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    return tuple(Row(**row) for row in fields["row"])


@lru_cache(maxsize=4096)
def on_gpu(call: Call, capability: int) -> tuple[Row, ...]:
    """The rows that hold for a call on a GPU of this capability (90: 9.0), best first."""
    return tuple(row for row in read(device_class(capability)) if row.holds(call))


@lru_cache(maxsize=4096)
def _on_cpu(call: Call) -> tuple[Row, ...]:
    isa = cpu_class()
    return tuple(row for row in read("cpu") if row.isa == isa and row.holds(call))


def matching(call: Call, device: torch.device) -> tuple[Row, ...]:
    """The rows that hold for a call on a device, best first."""
    if device.type != "cuda":
        return _on_cpu(call)
    major, minor = arch.cuda_capability(device.index or 0) or (9, 0)
    return on_gpu(call, 10 * major + minor)


def tile(call: Call, capability: int) -> Mapping[str, int]:
    """Config of the Triton kernel for a call: of the first row that holds and has one. Empty for
    capability 0, the interpreter, whose tile is the kernel's own."""
    if capability == 0:
        return {}
    return next((row.config for row in on_gpu(call, capability) if row.impl == "triton"), {})
