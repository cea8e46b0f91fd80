"""The roof: what this machine does at best, by plain torch, in the same run as what it judges.

    copy      bytes read and written per second by a large copy
    matrix    TFLOP/s of a large square product per number format, the best of some sizes
    launch    microseconds per tiny operator called one after the other: what a small op costs

Measured roofs are kept in the user's cache folder by device, driver, torch version and threads. A
kept one is taken only when a short copy of this run comes within 15% of its copy rate.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from slmperf import arch
from slmperf.models.files import write_atomically
from slmperf.testing.timing import Timing, copy_rates_gbs, copy_roof_gbs, sampler, summary

if TYPE_CHECKING:
    from rich.table import Table

Dtype: TypeAlias = "torch.dtype | str"
SCHEMA = "slmperf.roof/1"
FORMATS = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
# On a CPU large enough that a last-level cache of tens of MiB does not hold source and target; one
# of hundreds does, and then this is the rate of that cache, as it is for the inputs of the benches.
COPY_MIB = {"cpu": (128, 256), "cuda": (512, 1024, 2048)}
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
CONFIRMED_WITHIN = 0.15
# A format whose product is slower than fp32's by this factor is emulated, number by number.
EMULATED = 0.01
_OF_DTYPE = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Roof:
    """Rates of one device, the best of some rounds each, and what they were taken on.

    `as_json` is what files hold; `rows` are those of a result file of its own.
    """

    device: str  # its name
    kind: str  # cpu or cuda
    driver: str  # the GPU's driver; on a CPU the operating system's kernel
    torch: str
    threads: int
    copy_gbs: float  # bytes read plus bytes written
    matrix_tflops: Mapping[str, float | None]  # by FORMATS; None where it cannot
    launch_us: float
    date: str
    missing: Mapping[str, str] = field(default_factory=dict)  # format -> why it has no rate
    # Of all rounds, by what was done: a GB copied, a TFLOP, a launch. Empty in a kept roof.
    times: Mapping[str, Timing] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What a kept roof is found by."""
        return self.device, self.kind, self.driver, self.torch, self.threads

    def ideal_us(self, bytes: int, flops: int, dtype: Dtype) -> float:
        """Least microseconds for this traffic and these operations, one beside the other.

        dtype is torch's or one of FORMATS; one without a rate here counts at the fp32 rate.
        """
        name = dtype if isinstance(dtype, str) else _OF_DTYPE.get(dtype, "fp32")
        rate = self.matrix_tflops.get(name) or self.matrix_tflops["fp32"] or float("inf")
        return max(bytes / self.copy_gbs * 1e-3, flops / rate * 1e-6)

    def share(self, bytes: int, flops: int, dtype: Dtype, time_us: float) -> float:
        """Share of the roof: 1 is a call as fast as the copy or the matrix product allows."""
        return self.ideal_us(bytes, flops, dtype) / time_us

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file; without `times`."""
        return {key: value for key, value in asdict(self).items() if key != "times"}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a result file: the time of one GB copied, one TFLOP per format, one launch.

        Medians of all rounds, where the roof itself is the best of them: `best_us`.
        """
        best_us = {"copy, 1 GB": 1e6 / self.copy_gbs, "launch": self.launch_us}
        for name, rate in self.matrix_tflops.items():
            best_us |= {f"matrix product {name}, 1 TFLOP": 1e6 / rate} if rate else {}
        return [
            {"name": f"{self.kind} {name}", **time._asdict(), "best_us": best_us[name]}
            for name, time in self.times.items()
        ]


def measure_roof(device: str) -> Roof:
    """Measure everything anew: seconds on a CPU, about ten on a GPU."""
    kind = device
    with _plain_fp32():
        copies = max((copy_rates_gbs(kind, mib) for mib in COPY_MIB[kind]), key=max)
        times = {"copy, 1 GB": summary([1 / rate for rate in copies])}
        rates: dict[str, float | None] = {}
        missing: dict[str, str] = {}
        for name in FORMATS:
            try:
                found = _matrix_tflops(name, kind, rates.get("fp32") or 0.0)
                rates[name] = max(found)
                times[f"matrix product {name}, 1 TFLOP"] = summary([1 / rate for rate in found])
            except (RuntimeError, NotImplementedError) as error:
                rates[name] = None
                missing[name] = str(error).strip().splitlines()[0][:160]
            if kind == "cuda":
                torch.cuda.empty_cache()
        launches = _launches_s(kind)
        times["launch"] = summary(launches)
    return Roof(
        device=_device_name(kind),
        kind=kind,
        driver=_driver(kind),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        copy_gbs=max(copies),
        matrix_tflops=rates,
        launch_us=min(launches) * 1e6,
        date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%MZ}",
        missing=missing,
        times=times,
    )


@cache
def roof(device: str) -> Roof:
    """The roof of "cpu" or "cuda", confirmed or measured in this process; asked for once in it."""
    kept = kept_roof(device)
    if kept is not None:
        now = copy_roof_gbs(device, COPY_MIB[device][0])
        if abs(now / kept.copy_gbs - 1) <= CONFIRMED_WITHIN:
            return kept
    found = measure_roof(device)
    with contextlib.suppress(OSError):  # a home that cannot be written costs the next run seconds
        keep(found)
    return found


def kept_roof(device: str) -> Roof | None:
    """What the cache holds for this device, driver, torch and number of threads, if anything."""
    wanted = (
        _device_name(device), device, _driver(device), torch.__version__, torch.get_num_threads()
    )  # fmt: skip
    return next((one for one in _kept() if one.key == wanted), None)


def keep(found: Roof) -> None:
    """Store a roof in place of the one with the same key."""
    others = [one.as_json() for one in _kept() if one.key != found.key]
    content = {"schema": SCHEMA, "roofs": [*others, found.as_json()]}
    write_atomically(cache_file(), json.dumps(content, indent=1) + "\n")


def roof_table(now: Roof, before: Roof | None) -> Table:
    """What was measured, beside what was kept before, as a rich table."""
    from rich.table import Table

    shown = Table(
        title=f"{now.device}, {now.threads} threads, driver {now.driver}, torch {now.torch}",
        title_justify="left",
        caption="\n".join(f"{name}: {why}" for name, why in now.missing.items()) or None,
        caption_justify="left",
    )
    shown.add_column("what", no_wrap=True)
    for column in ("measured", f"before{f', {before.date}' if before else ''}"):
        shown.add_column(column, justify="right", no_wrap=True)

    def figures(one: Roof) -> list[str]:
        rates = [one.matrix_tflops[name] for name in FORMATS]
        matrix = ["-" if rate is None else f"{rate:.4g} TFLOP/s" for rate in rates]
        return [f"{one.copy_gbs:.4g} GB/s", *matrix, f"{one.launch_us:.3g} us"]

    names = ["copy, read + written", *(f"matrix product {name}" for name in FORMATS), "launch"]
    old = figures(before) if before else ["-"] * len(names)
    for row in zip(names, figures(now), old, strict=True):
        shown.add_row(*row)
    return shown


def cache_file() -> Path:
    """Where roofs are kept between runs."""
    return arch.cache_folder() / "roof.json"


def _kept() -> list[Roof]:
    """Every roof of the cache file; none where it is missing, broken or of another schema."""
    try:
        value = json.loads(cache_file().read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            return []
        found = [Roof(**entry) for entry in value["roofs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [one for one in found if _sound(one)]


def _sound(one: Roof) -> bool:
    """Whether what came from a file holds numbers where numbers belong."""
    rates = one.matrix_tflops
    return (
        all(
            isinstance(text, str)
            for text in (one.device, one.kind, one.driver, one.torch, one.date)
        )
        and isinstance(one.threads, int)
        and isinstance(one.missing, Mapping)
        and isinstance(rates, Mapping)
        and set(rates) == set(FORMATS)
        and all(rate is None or _positive(rate) for rate in rates.values())
        and _positive(one.copy_gbs)
        and _positive(one.launch_us)
    )


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def _device_name(kind: str) -> str:
    return (arch.cuda_name() if kind == "cuda" else arch.cpu_name()) or "unknown"


def _driver(kind: str) -> str:
    """The GPU's driver version, or the operating system's kernel."""
    if kind == "cpu":
        return platform.release()
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"Module.*?\s(\d+\.[\d.]+)\s", text)
        if found:
            return found[1]
    return f"CUDA {torch.version.cuda}"  # WSL and some containers hide the driver's own version


@contextlib.contextmanager
def _plain_fp32() -> Iterator[None]:
    """fp32 products in fp32, whatever the process has set; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _matrix_tflops(name: str, kind: str, fp32: float) -> list[float]:
    """TFLOP/s of every round at the best size; RuntimeError or NotImplementedError, saying why,
    where none.
    """
    if name == "tf32":
        if kind == "cpu" or (arch.cuda_capability() or (0, 0)) < (8, 0):
            raise NotImplementedError("tf32 is a format of GPUs from sm_80 on")
        torch.set_float32_matmul_precision("high")
    try:
        if kind == "cpu" and name == "fp8":
            tried = max(_product_tflops(name, kind, 64))
            if tried < EMULATED * fp32:
                raise NotImplementedError(
                    f"emulated: {tried * 1e3:.2g} GFLOP/s where fp32 has {fp32 * 1e3:.3g}"
                )
        return max((_product_tflops(name, kind, size) for size in MATRIX_SIZES[kind]), key=max)
    finally:
        torch.set_float32_matmul_precision("highest")


def _product_tflops(name: str, kind: str, size: int) -> list[float]:
    """TFLOP/s of at least two rounds at one size."""
    sample = sampler([_product(name, kind, size)], kind)
    found, deadline = [sample()], time.perf_counter() + 0.3
    for _ in range(100):
        found.append(sample())
        if time.perf_counter() > deadline:
            break
    return [2 * size**3 / seconds / 1e12 for seconds in found]


def _product(name: str, kind: str, size: int) -> Callable[[], object]:
    """One square product; the right factor of the narrow formats lies as cuBLAS wants it."""
    left = torch.randn(size, size, device=kind)
    if name == "int8":
        narrow = (16 * left).to(torch.int8)
        return lambda: torch._int_mm(narrow, narrow.t())
    if name == "fp8":
        small, one = left.to(torch.float8_e4m3fn), torch.ones((), device=kind)
        # On a GPU the fast accumulation is what the tensor cores reach at best.
        return lambda: torch._scaled_mm(
            small, small.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=kind == "cuda"
        )
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    factor = left.to(dtypes.get(name, torch.float32))
    out = torch.empty_like(factor)
    return lambda: torch.mm(factor, factor, out=out)


def _launches_s(kind: str, calls: int = 500) -> list[float]:
    """Seconds per operator on one element, called one after the other, no graph; of ten rounds."""
    x = torch.zeros(1, device=kind)
    found = []
    for _ in range(10):
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        if kind == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / calls)
    return found
