"""osscar of one layer, in one run with what it is measured by.

cholesky     one torch.linalg.cholesky of the same (d, d) in fp64: `of_cholesky` of a row is its
             time by this one's
recurrence   one input at a time with every row brought up to date (slmperf.testing.recurrence):
             `speedup` is its time by osscar's; `same` whether both keep the same inputs
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slmperf.check import InputError
from slmperf.prune import osscar
from slmperf.testing.recurrence import layer_problem, recurrence
from slmperf.testing.timing import Call, peak_mib, rounds_s, sampler, summary

if TYPE_CHECKING:
    from rich.table import Table

LONGEST = 2048  # inputs up to which the recurrence runs


class Layer(NamedTuple):
    """d inputs, N outputs, and how many inputs go."""

    size: int
    outputs: int
    remove: int

    def __str__(self) -> str:
        return f"osscar {self.size}, N {self.outputs}, remove {self.remove}"


# A layer that the recurrence can finish, and one of Llama-3.2-3B.
LAYERS = (Layer(1024, 512, 256), Layer(8192, 3072, 3072))


def measure(layer: Layer, device: str, seconds: float) -> list[dict[str, Any]]:
    """Result rows of one layer; `seconds` of timing for each way, at least five rounds."""
    gram, weight = (
        given.to(device)
        for given in layer_problem("glu", 0, layer.size, layer.outputs, 2 * layer.size)
    )
    keep = layer.size - layer.remove
    damped = gram.clone()
    damped.diagonal().add_(0.01 * float(gram.diagonal().mean()))
    calls: dict[str, Call] = {
        "cholesky": partial(torch.linalg.cholesky, damped),
        "osscar": partial(osscar, gram, weight, keep=keep),
    }
    compared = layer.size <= LONGEST
    if compared:
        calls["recurrence"] = partial(recurrence, gram, weight, keep)
    for call in calls.values():
        call()
    samplers = {name: sampler([call], device, graph=False) for name, call in calls.items()}
    found = {name: summary(times) for name, times in rounds_s(samplers, seconds).items()}
    matrix = layer.size**2 * 8 / 2**20
    rows = []
    for name, timing in found.items():
        row = {
            "name": f"{layer} {name}",
            **timing._asdict(),
            "of_cholesky": timing.time_us / found["cholesky"].time_us,
        }
        if name == "osscar":
            row["peak_matrices"] = peak_mib(calls[name], device) / matrix
        if name == "osscar" and compared:
            kept, _ = recurrence(gram, weight, keep)
            row["speedup"] = found["recurrence"].time_us / timing.time_us
            row["same"] = torch.equal(kept.cpu(), osscar(gram, weight, keep=keep).kept)
        rows.append(row)
    return rows


def problems(size: int | None, outputs: int | None, remove: int | None) -> list[Layer]:
    """The layers of the command: its own two, or the one that is asked for."""
    given = {"size": size, "outputs": outputs, "remove": remove}
    for name, value in given.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    if all(value is None for value in given.values()):
        return list(LAYERS)
    size = size or LAYERS[0].size
    remove = remove or max(1, size // 4)
    if remove >= size:
        raise InputError(f"remove is {remove}, expected less than size {size}")
    return [Layer(size, outputs or max(1, size // 2), remove)]


def table(rows: list[dict[str, Any]]) -> Table:
    """What the command prints."""
    from rich.table import Table

    found = Table("", "ms", "quartiles", "x cholesky", "x recurrence", "same set", "peak, d x d")
    for row in rows:
        found.add_row(
            row["name"],
            f"{row['time_us'] / 1e3:.4g}",
            f"{row['low_us'] / 1e3:.4g} to {row['high_us'] / 1e3:.4g}",
            f"{row['of_cholesky']:.2f}",
            f"{row['speedup']:.1f} faster" if "speedup" in row else "",
            ("yes" if row["same"] else "no") if "same" in row else "",
            f"{row['peak_matrices']:.2f}" if "peak_matrices" in row else "",
        )
    return found
