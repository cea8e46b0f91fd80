"""Rows of a measurement, one per case and implementation.

    op shape dtype setting impl | us | GB/s | % roof | x baseline | peak MiB

A row is forward and backward of one case. Bytes are the case's least traffic, so that "% roof" is
the share of the measured copy rate which an ideal kernel would reach; "x baseline" is against the
fastest plain-torch way that ran beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slmperf.ops.routing import table
from slmperf.testing.battery import Run, with_gradients
from slmperf.testing.cases import Case
from slmperf.testing.timing import Call, forward_backward, median_us, peak_mib, rotations

HEADER = "op shape dtype setting impl | us | GB/s | % roof | x baseline | peak MiB"


@dataclass(frozen=True)
class Row:
    """One implementation on one case."""

    op: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    setting: str
    impl: str
    time_us: float
    gbs: float
    roof_share: float
    speedup: float  # over the fastest baseline of the same case
    peak_mib: float | None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.0f}"
        name = f"{self.op} {shape} {self.dtype} {self.setting} {self.impl}"
        roof = f"{100 * self.roof_share:.0f}"
        return (
            f"{name} | {self.time_us:.1f} | {self.gbs:.1f} | {roof} | {self.speedup:.2f} | {peak}"
        )


def _calls(case: Case, impl: str, device: str) -> dict[str, list[Call]]:
    """The implementation, plain torch, and on a GPU plain torch compiled: a call per input set."""
    ways: dict[str, Run] = {
        impl: lambda given: case.run(given, impl),
        "reference": case.reference,
        **case.rivals(),
    }
    if device == "cuda":
        ways["torch.compile"] = torch.compile(case.reference)
    sets = [
        with_gradients(case, case.tensors(device)) for _ in range(rotations(case.bytes, device))
    ]
    leaves = [[given[name] for name in case.differentiable] for given in sets]
    return {
        name: [forward_backward(run, *pair) for pair in zip(sets, leaves, strict=True)]
        for name, run in ways.items()
    }


def measure(cases: Iterable[Case], device: str, roof_gbs: float, seconds: float) -> list[Row]:
    """Rows of every case, printed as they come: what `impl="auto"` takes, and its baselines."""
    rows: list[Row] = []
    print(HEADER)
    for case in cases:
        impl = table(case.op).auto[device]
        calls = _calls(case, impl, device)
        times = median_us(calls, device, seconds)
        baseline_us = min(time_us for name, time_us in times.items() if name != impl)
        for name, time_us in times.items():
            gbs = case.bytes / time_us * 1e-3
            row = Row(
                op=case.op,
                case=str(case),
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                setting=case.setting,
                impl=name,
                time_us=time_us,
                gbs=gbs,
                roof_share=gbs / roof_gbs,
                speedup=baseline_us / time_us,
                peak_mib=peak_mib(calls[name][0], device),
            )
            print(row, flush=True)
            rows.append(row)
        del calls
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows
