"""Ops: every case of `slmperf.testing.cases` by every implementation and baseline, a row each.

    op shape dtype setting impl | us | host us | GB/s | TFLOP/s | % roof | x baseline | peak MiB

A row is forward and backward of one case. "us" is the median of interleaved rounds, on a GPU of
graph replays over sets of inputs that together are larger than the second-level cache; "host us" is
what the CPU needs to enqueue the call without a graph. Bytes and operations are the case's least,
so "% roof" is the time of an ideal kernel by that of this one; "x baseline" is against the fastest
baseline that ran beside it: plain torch, torch.compile of it, or an installed rival.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slmperf.bench import rivals
from slmperf.bench.roof import Roof
from slmperf.check import InputError
from slmperf.ops.routing import MISSING, table
from slmperf.testing.battery import Run, Tensors, with_gradients
from slmperf.testing.cases import FAMILIES, Case
from slmperf.testing.timing import (
    Call,
    Timing,
    forward_backward,
    host_us,
    peak_mib,
    rotations,
    rounds_s,
    sampler,
    summary,
)

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("us", "host us", "GB/s", "TFLOP/s", "% roof", "x baseline", "peak MiB")
HEADER = f"op shape dtype setting impl | {' | '.join(COLUMNS)}"
# A result further off than this share of the largest value comes from a mis-wired variant; how
# exact the right ones are is the battery's question.
AGREES_WITHIN = 0.05
# Inputs of a round on a CPU, in eight sets at most: more than its cores' own caches hold. The last
# shared one of a server may be larger; then the rows of small cases come from there.
CPU_ROUND_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """One variant on one case."""

    name: str  # unique in a result file
    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    setting: str
    impl: str
    role: str  # ours, plain, compiled or rival
    time_us: float
    low_us: float  # quartiles
    high_us: float
    samples: int
    host_us: float | None  # None on a CPU, and where the call waits for the device
    gbs: float
    tflops: float | None  # None where the case has no matrix product
    roof_share: float
    baseline: str  # name of the fastest baseline's row
    yardstick: str  # name of the reference's row, by which other runs are compared
    speedup: float  # over the fastest baseline
    plain_speedup: float  # over the fastest uncompiled plain torch
    peak_mib: float

    def cells(self) -> list[str]:
        """The texts under COLUMNS."""
        return [
            f"{self.time_us:.1f}",
            "-" if self.host_us is None else f"{self.host_us:.1f}",
            f"{self.gbs:.1f}",
            "-" if self.tflops is None else f"{self.tflops:.3g}",
            f"{100 * self.roof_share:.0f}",
            f"{self.speedup:.2f}",
            f"{self.peak_mib:.0f}" if self.peak_mib >= 10 else f"{self.peak_mib:.1f}",
        ]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        name = f"{self.op} {shape} {self.dtype} {self.setting} {self.impl}"
        return " | ".join([name, *self.cells()])


class Variant(NamedTuple):
    """One way to a case's result.

    role   ours, plain, compiled or rival
    run    tensors -> the value
    mean   the value is the mean of the reference's rows
    graph  a CUDA graph can hold it
    """

    role: str
    run: Run
    mean: bool = False
    graph: bool = True


class Measured(NamedTuple):
    """Rows of a case; the name of each row that is missing -> why its variant cannot run."""

    rows: list[Row]
    refused: dict[str, str]


def cases_of(op: str | None, device: str) -> list[Case]:
    """What the bench times on a device: every op's cases, or one op's."""
    if op is not None and op not in FAMILIES:
        raise InputError(f"op is {op!r}, expected one of {', '.join(FAMILIES)}")
    names = FAMILIES if op is None else [op]
    return [case for name in names for case in FAMILIES[name].bench[device]]


def variants(case: Case, device: str) -> dict[str, Variant]:
    """Every way to the case's result on a device, by name; nothing is compiled or imported yet.

    Interpreted kernels are left out: their time says nothing.
    """
    found = {
        name: Variant("ours", partial(case.run, impl=name))
        for name, entry in table(case.op).implementations.items()
        if device in entry.devices
        and case.dtype in entry.dtypes
        and not MISSING[entry.needs]
        and (device, entry.needs) != ("cpu", "triton")
    }
    found["reference"] = Variant("plain", case.reference)
    found |= {name: Variant("plain", run) for name, run in case.rivals().items()}
    found["torch.compile"] = Variant("compiled", torch.compile(case.reference, dynamic=False))
    for name, rival in rivals.installed(case.op, device).items():
        found[name] = Variant("rival", _lazily(rival, case), rival.mean, rival.graph)
    return found


def _lazily(rival: rivals.Rival, case: Case) -> Run:
    """The rival's function, made by its first call: only then is its package imported."""
    made: list[Run] = []

    def run(given: Tensors) -> Tensor:
        if not made:
            made.append(rival.make(case))
        return made[0](given)

    return run


def measure(cases: Iterable[Case], device: str, roof: Roof, seconds: float) -> list[Row]:
    """Rows of every case, printed as they come, and a line for each variant that cannot run.

    device   "cpu" or "cuda"
    seconds  of timing per variant, besides compilation; at least five rounds
    """
    rows: list[Row] = []
    print(HEADER)
    for case in cases:
        found = measure_case(case, device, roof, seconds)
        for row in found.rows:
            print(row, flush=True)
        for name, reason in found.refused.items():
            print(f"{name} | refused: {reason}", flush=True)
        rows += found.rows
    return rows


def measure_case(
    case: Case,
    device: str,
    roof: Roof,
    seconds: float,
    ways: dict[str, Variant] | None = None,
) -> Measured:
    """Rows of one case: checked against the reference, then timed in turns.

    `ways` stands in for `variants(case, device)`; it has a reference.
    """
    torch.compiler.reset()  # a limit on recompilations would silently run a later case uncompiled
    ways = variants(case, device) if ways is None else ways
    sets = input_sets(case, device)
    forms = {way.mean for way in ways.values()}
    truth = {mean: _results(case, sets[0], case.reference, mean) for mean in forms}
    calls: dict[str, list[Call]] = {}
    samplers = {}
    refused: dict[str, str] = {}
    for name, way in ways.items():
        try:
            _check(_results(case, sets[0], way.run), truth[way.mean])
            calls[name] = calls_of(case, way, sets)
            samplers[name] = sampler(calls[name], device, way.graph)
        except Exception as error:
            if way.role == "plain":
                raise
            refused[_name(case, name)] = f"{type(error).__name__}: {_one_line(error)}"
    del truth
    times = {name: summary(taken) for name, taken in rounds_s(samplers, seconds).items()}
    del samplers  # and with them the graphs' memory
    rows = _rows(case, device, roof, ways, times, calls)
    if device == "cuda":
        torch.cuda.empty_cache()
    return Measured(rows, refused)


def input_sets(case: Case, device: str) -> list[Tensors]:
    """The case's tensors as leaves, in sets of their own memory: see `rotations`."""
    made = case.tensors(device)
    size = sum(tensor.nbytes for tensor in made.values())
    least = max(1, min(8, -(-CPU_ROUND_BYTES // size))) if device == "cpu" else 2
    return [
        with_gradients(case, {name: tensor.clone() for name, tensor in made.items()})
        for _ in range(rotations(size, device, least))
    ]


def calls_of(case: Case, way: Variant, sets: Sequence[Tensors]) -> list[Call]:
    """Forward and backward of a variant on each set of inputs."""
    leaves = [[given[name] for name in case.differentiable] for given in sets]
    return [forward_backward(way.run, *pair) for pair in zip(sets, leaves, strict=True)]


def _results(case: Case, given: Tensors, run: Run, mean: bool = False) -> list[Tensor]:
    """Value and gradients under one fixed upstream gradient; `mean` takes the mean of the rows."""
    value = run(given).mean() if mean else run(given)
    generator = case.generator(str(value.device.type))
    upstream = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
    leaves = [given[name] for name in case.differentiable]
    if not leaves:
        return [value]
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def _check(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """ValueError where a result is another than the reference's."""
    for what, one, truth in zip(("value", "gradient", "gradient"), found, wanted, strict=False):
        if one.shape != truth.shape:
            raise ValueError(f"its {what} is {tuple(one.shape)}, not {tuple(truth.shape)}")
        one, truth = one.float(), truth.float()
        finite = truth[torch.isfinite(truth)]
        top = finite.abs().max().item() if finite.numel() else 0.0
        if not torch.isclose(one, truth, rtol=0, atol=AGREES_WITHIN * top, equal_nan=True).all():
            worst = (one - truth).abs().max().item()
            raise ValueError(f"its {what} is off by {worst:.3g} where the largest is {top:.3g}")


def _rows(
    case: Case,
    device: str,
    roof: Roof,
    ways: dict[str, Variant],
    times: dict[str, Timing],
    calls: dict[str, list[Call]],
) -> list[Row]:
    baselines = {name: time.time_us for name, time in times.items() if ways[name].role != "ours"}
    plain_us = min(us for name, us in baselines.items() if ways[name].role == "plain")
    baseline = min(baselines, key=baselines.__getitem__)
    return [
        Row(
            name=_name(case, name),
            op=case.op,
            case=str(case),
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            setting=case.setting,
            impl=name if ways[name].graph else f"{name}:eager",
            role=ways[name].role,
            **time._asdict(),
            host_us=host_us(calls[name][0], device) if ways[name].graph else None,
            gbs=case.bytes / time.time_us * 1e-3,
            tflops=case.flops / time.time_us * 1e-6 if case.flops else None,
            roof_share=roof.share(case.bytes, case.flops, case.product_dtype, time.time_us),
            baseline=_name(case, baseline),
            yardstick=_name(case, "reference"),
            speedup=baselines[baseline] / time.time_us,
            plain_speedup=plain_us / time.time_us,
            peak_mib=peak_mib(calls[name][0], device),
        )
        for name, time in times.items()
    ]


def _name(case: Case, impl: str) -> str:
    return f"{case.op} {case} {impl}"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def rows_table(rows: Sequence[Row], refused: dict[str, str], roof: Roof) -> Table:
    """The rows as a rich table, a section per case."""
    from rich.table import Table

    shown = Table(
        title=f"{roof.device}, {roof.threads} threads, copy {roof.copy_gbs:.1f} GB/s",
        title_justify="left",
        caption="\n".join(f"{name}: {reason}" for name, reason in refused.items()) or None,
        caption_justify="left",
    )
    for column in ("case", "impl"):
        shown.add_column(column, overflow="fold")
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1].case != row.case
        last = number == len(rows) - 1 or rows[number + 1].case != row.case
        text = f"{row.op} {'x'.join(map(str, row.shape))}\n{row.dtype} {row.setting}"
        shown.add_row(text if first else "", row.impl, *row.cells(), end_section=last)
    return shown


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a result file."""
    return [asdict(row) for row in rows]
