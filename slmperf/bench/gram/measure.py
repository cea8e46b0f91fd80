"""The update of a Gram matrix beside the machine's own matrix product, in one run.

n rows of d inputs take n d^2 operations (the symmetric half, counted once), a product of the same
factors 2 n d^2. A row's `of_fp32` and `of_same` are its rate by that of torch.mm in fp32 and in the
rows' own dtype; everything that `slmperf.calibrate.Gram.add` does is in it, and in that "with
scores" the activation scores too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate import Gram
from slmperf.check import InputError
from slmperf.testing.timing import Call, Timing, rounds_s, sampler, summary

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (n, d) of the command.
SIZES = {"cpu": ((4096, 2048), (4096, 4096)), "cuda": ((16384, 8192), (16384, 14336))}


def title(rows: int, size: int, dtype: str) -> str:
    """The beginning of the names of a problem's rows."""
    return f"gram {rows}x{size} {dtype}"


def measure(rows: int, size: int, dtype: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """Result rows of one problem; `seconds` of timing for each way, at least five rounds."""
    given = torch.randn(rows, size, device=device)
    inputs = given.to(DTYPES[dtype])
    plain, scored = Gram(size, device=device), Gram(size, group_size=1, device=device)
    factors = {"torch.mm": inputs} | ({} if dtype == "fp32" else {"torch.mm fp32": given})
    products = {
        name: (factor, torch.empty(size, size, dtype=factor.dtype, device=device))
        for name, factor in factors.items()
    }
    calls: dict[str, Call] = {
        name: partial(torch.mm, factor.T, factor, out=out)
        for name, (factor, out) in products.items()
    }
    calls |= {"update": partial(plain.add, inputs), "with scores": partial(scored.add, inputs)}
    # Each is some milliseconds of products: the launches beside them need no graph.
    times = rounds_s(
        {name: sampler([call], device, graph=False) for name, call in calls.items()}, seconds
    )
    same = summary(times["torch.mm"])
    fp32 = summary(times["torch.mm fp32"]) if dtype != "fp32" else same
    return [
        _row(f"{title(rows, size, dtype)} {way}", summary(found), rows * size**2, way, same, fp32)
        for way, found in times.items()
    ]


def _row(
    name: str, timing: Timing, half: int, way: str, same: Timing, fp32: Timing
) -> dict[str, Any]:
    """`half` is n d^2; the products do twice that."""
    done = 2 * half if way.startswith("torch") else half
    rate = done / timing.time_us
    return {
        "name": name,
        **timing._asdict(),
        "tflops": rate / 1e6,
        "of_fp32": rate / (2 * half / fp32.time_us),
        "of_same": rate / (2 * half / same.time_us),
    }


def problems(device: str, rows: int | None, size: int | None) -> list[tuple[int, int, str]]:
    """(n, d, dtype): the device's own, or those of `rows` and `size`."""
    for name, value in (("rows", rows), ("size", size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    sizes = list(SIZES[device])
    if rows is not None or size is not None:
        sizes = [(rows or sizes[-1][0], size or sizes[-1][1])]
    return [(n, d, dtype) for n, d in sizes for dtype in DTYPES]


def table(rows: list[dict[str, Any]]) -> Table:
    """What the command prints."""
    from rich.table import Table

    found = Table("", "ms", "quartiles", "TFLOP/s", "of fp32's rate", "of its own dtype's")
    for row in rows:
        found.add_row(
            row["name"],
            f"{row['time_us'] / 1e3:.4g}",
            f"{row['low_us'] / 1e3:.4g} to {row['high_us'] / 1e3:.4g}",
            f"{row['tflops']:.3g}",
            f"{row['of_fp32']:.2f}",
            f"{row['of_same']:.2f}",
        )
    return found
