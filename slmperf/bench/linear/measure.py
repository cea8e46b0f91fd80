"""One linear layer in a scheme, every way to it, in one run.

A way's inputs are floating: where a scheme rounds them, that and the epilogue are in its time. What
torch has for codes alone ("torch._int_mm") is timed without either. Weights rotate, so that a GPU's
second-level cache does not hold them. The columns:

    copy    bytes of x, weight and y, by the rate of the machine's own copy (its roof)
    roof    the larger of that and of the operations by the rate of the format's product
    of bf16, of fp32   that product's time by this way's, same M, N, K
    of best            the fastest torch op's time by this way's: 1 and more is no slower
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.bench.linear.rivals import Ways, others
from slmperf.bench.roof import Roof
from slmperf.check import InputError
from slmperf.ops import linear
from slmperf.ops.linear.weights import Weight
from slmperf.ops.routing import MISSING, table
from slmperf.testing.linear_cases import SCHEMES, random_weight
from slmperf.testing.timing import rotations, rounds_s, sampler, summary

if TYPE_CHECKING:
    from rich.table import Table

# (N, K) and M of the command: on a GPU those of the paper's models, whole and pruned.
SHAPES = {
    "cpu": ((2048, 2048),),
    "cuda": ((14336, 4096), (4096, 14336), (5120, 3072), (3072, 5120)),
}
ROWS = {"cpu": (1, 16, 128, 1024), "cuda": (1, 4, 16, 64, 2048, 8192)}
BENCHED = ("int4-128", "int8-token", "fp8-token", "fp8-block")
FEW, MANY = 16, 2048  # rows: up to FEW a weight is streamed, from MANY on products count
OURS = "slmperf auto"
CPU_SETS = 4  # of weights and inputs, in turns
_PLAIN = {"torch bf16": torch.bfloat16, "torch fp32": torch.float32}  # of the dequantised weight


def title(scheme: str, shape: tuple[int, int]) -> str:
    """The beginning of the names of a layer's rows."""
    return f"linear {scheme} {shape[0]}x{shape[1]}"


def measure(
    scheme: str,
    shape: tuple[int, int],
    rows: Sequence[int],
    device: str,
    roof: Roof,
    seconds: float,
    refused: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Result rows of one layer, for each M in turn; last the worst of ours, by which it is judged.

    seconds  of timing for each way, at least five rounds
    refused  is given the ways that cannot run, and why
    """
    made: list[dict[str, Any]] = []
    outputs, inputs = shape
    count = CPU_SETS
    if device == "cuda":
        weight = random_weight(scheme, outputs, inputs, torch.bfloat16, "plain", 0)
        count = rotations(sum(one.nbytes for one in _tensors(weight)), device)
    sets = [_to(random_weight(scheme, outputs, inputs, torch.bfloat16, "plain", seed), device)
            for seed in range(count)]  # fmt: skip
    for m in rows:
        found = _rows(scheme, sets, m, device, roof, seconds, refused)
        made += found
        yield from found
    if any(row["way"] == OURS for row in made):
        yield _worst(title(scheme, shape), made)


def _rows(
    scheme: str,
    sets: list[Weight],
    m: int,
    device: str,
    roof: Roof,
    seconds: float,
    refused: dict[str, str],
) -> list[dict[str, Any]]:
    outputs, inputs = sets[0].outputs, sets[0].inputs
    name = f"{title(scheme, (outputs, inputs))} M={m}"
    xs = [torch.randn(m, inputs, device=device).bfloat16() for _ in sets]
    samplers = {}
    for way, make in _ways(sets[0], device).items():
        try:
            calls = [make(weight, x) for weight, x in zip(sets, xs, strict=True)]
            for call in calls:
                call()
            samplers[way] = _again(sampler(calls, device), device)
        except Exception as error:  # a package's own kinds
            refused[f"{name} {way}"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times = {way: summary(taken) for way, taken in rounds_s(samplers, seconds).items()}
    theirs = {way: one.time_us for way, one in times.items() if way.startswith("torch")}
    best_of_ours = min(one.time_us for way, one in times.items() if way.startswith("slmperf"))
    activations = sets[0].activations
    product = torch.bfloat16 if activations is None else sets[0].spec.code_dtype
    quantised = sum(one.nbytes for one in _tensors(sets[0]))
    held = {dtype: outputs * inputs * dtype.itemsize for dtype in _PLAIN.values()}
    flops = 2 * m * outputs * inputs
    made = []
    for way, time in times.items():
        plain = _PLAIN.get(way)
        weight_bytes = quantised if plain is None else held[plain]
        moved = weight_bytes + 2 * m * (inputs + outputs)
        against = {f"over_{dtype}": theirs[f"torch {dtype}"] / time.time_us
                   for dtype in ("bf16", "fp32") if f"torch {dtype}" in theirs}  # fmt: skip
        made.append({
            "name": f"{name} {way}",
            "way": way,
            "rows": m,
            **time._asdict(),
            "launch_us": roof.launch_us,
            "weight_mib": weight_bytes / 2**20,
            "gbs": moved / time.time_us * 1e-3,
            "tflops": flops / time.time_us * 1e-6,
            "copy_share": moved / time.time_us * 1e-3 / roof.copy_gbs,
            "roof_share": roof.share(moved, flops, plain or product, time.time_us),
            **against,
            "over_best": min(theirs.values()) / time.time_us,
            "over_ours": best_of_ours / time.time_us,
        })  # fmt: skip
    return made


def _again(sample: Callable[[], float], device: str) -> Callable[[], float]:
    """A CPU's round after one that does not count: the first finds the caches full of what other
    ways left there, and which way comes first would decide."""

    def second() -> float:
        sample()
        return sample()

    return second if device == "cpu" else sample


def _ways(weight: Weight, device: str) -> Ways:
    """Way -> weight, x -> a call; torch's own begin with "torch", ours with "slmperf"."""

    def ours(impl: str) -> Callable[[Weight, Tensor], Callable[[], Tensor]]:
        return lambda weight, x: partial(linear, x, weight, impl=impl)

    def plain(dtype: torch.dtype) -> Callable[[Weight, Tensor], Callable[[], Tensor]]:
        def make(weight: Weight, x: Tensor) -> Callable[[], Tensor]:
            return partial(torch.nn.functional.linear, x.to(dtype), weight.dequantized().to(dtype))

        return make

    found: Ways = {OURS: ours("auto")}
    for impl, entry in table(weight.op).implementations.items():
        if device in entry.devices and not MISSING[entry.needs]:
            if (device, impl) != ("cpu", "triton"):
                found[f"slmperf {impl}"] = ours(impl)
    for way, dtype in _PLAIN.items():
        if (device, dtype) != ("cuda", torch.float32):
            found[way] = plain(dtype)
    return found | others(weight, device)


def _worst(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds at every M of a range, of `auto`; its time is that of the last."""
    ours = [row for row in rows if row["way"] == OURS]
    found = {key: ours[-1][key] for key in ("time_us", "low_us", "high_us", "samples")}

    def settle(key: str, of: str, taken: list[dict[str, Any]]) -> None:
        if taken and all(of in row for row in taken):
            found[key] = min(row[of] for row in taken)

    few = [row for row in ours if row["rows"] <= FEW]
    many = [row for row in ours if row["rows"] >= MANY]
    settle("copy_share_few", "copy_share", few)
    settle("over_bf16_at_64", "over_bf16", [row for row in ours if row["rows"] == 64])
    settle("over_bf16_many", "over_bf16", many)
    settle("over_best", "over_best", ours)
    settle("over_ours", "over_ours", ours)
    settle("over_ours_many", "over_ours", many)
    settle("over_fp32_from_128", "over_fp32", [row for row in ours if row["rows"] >= 128])
    settle("over_bf16_from_128", "over_bf16", [row for row in ours if row["rows"] >= 128])
    return {"name": f"{name}, worst", "way": OURS, **found}


def problems(
    device: str, scheme: str | None, shape: str | None, rows: str | None
) -> list[tuple[str, tuple[int, int], tuple[int, ...]]]:
    """(scheme, (N, K), every M): the device's own, or those asked for.

    scheme "int4-128"; shape "5120x3072", outputs by inputs; rows "1,16,2048". Raises InputError.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise InputError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")

    def numbers(text: str, sign: str, what: str) -> tuple[int, ...]:
        parts = text.split(sign)
        if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise InputError(f"{what} is {text!r}, expected whole numbers from 1 on")
        return tuple(map(int, parts))

    every = ROWS[device] if rows is None else numbers(rows, ",", "rows")
    shapes: Sequence[tuple[int, ...]] = SHAPES[device]
    if shape is not None:
        shapes = [numbers(shape, "x", "shape")]
        if len(shapes[0]) != 2:
            raise InputError(f"shape is {shape!r}, expected outputs x inputs such as 5120x3072")
    schemes = BENCHED if scheme is None else (scheme,)
    for one in schemes:
        for _, inputs in shapes:
            try:
                SCHEMES[one].spec.scale_shape((1, inputs))
            except InputError as error:
                raise InputError(f"shape is {shape}: {error}") from error
    return [(one, (size[0], size[1]), every) for one in schemes for size in shapes]


def shown(rows: list[dict[str, Any]], refused: dict[str, str]) -> Table:
    """What the command prints."""
    from rich.table import Table

    found = Table(
        "", "us", "launch", "copy", "roof", "of bf16", "of fp32", "of best",
        caption="\n".join(f"{name}: {why}" for name, why in refused.items()) or None,
        caption_justify="left",
    )  # fmt: skip
    for row in rows:
        if "copy_share" not in row:
            found.add_section()
            continue
        ratios = (row.get(key) for key in ("over_bf16", "over_fp32", "over_best"))
        found.add_row(
            row["name"],
            f"{row['time_us']:.4g}",
            f"{row['launch_us']:.3g}",
            f"{row['copy_share']:.0%}",
            f"{row['roof_share']:.0%}",
            *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        )
    return found


def _tensors(weight: Weight) -> list[Tensor]:
    return [one for one in vars(weight).values() if isinstance(one, Tensor)]


def _to(weight: Weight, device: str) -> Weight:
    parts = {name: one.to(device, copy=True) if isinstance(one, Tensor) else one
             for name, one in vars(weight).items()}  # fmt: skip
    return type(weight)(**parts)
