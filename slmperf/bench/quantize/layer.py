"""One weight quantised to 4 bits in groups of 128: what it costs and how good it is.

Costs stand beside the matrix product and the factorisation that they are measured by, in one run.
What is allowed is 3 products and 1.5 factorisations for gptq, and above the inputs the memory of
four copies of the weight and two of the Gram matrix for the default method.

matmul      torch.mm of the weight (p, q) and the Gram matrix (q, q), fp32
cholesky    torch.linalg.cholesky of the damped Gram matrix, fp32
pass        one pass of coordinate descent over all columns
30 passes   those of `quantease`, of which nine do not round; on a GPU only
gptq alone  the factor and one sweep over the columns
gptq        the whole call, with scales, the errors of every row and their guard
default     the whole call

Errors are those of `slmperf.testing.spectra`: tr(E H E') on the inputs that calibrated and on
others, by that of gptq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.calibrate.usage import now
from slmperf.ops.weight_spec import Int4, Scales
from slmperf.quant.layer import QuantizedWeight, gptq, quantease, quantize_weight, rtn
from slmperf.quant.layer.columns import Columns, reversed_cholesky
from slmperf.testing.spectra import Kind, spectrum_problem
from slmperf.testing.timing import Call, Timing, peak_mib, rounds_s, sampler, summary

DAMPING = 0.01  # of gptq, over the mean of the diagonal
RELAXED = [1 <= number <= 25 and number % 3 == 1 for number in range(30)]  # quantease's passes
TOKENS = 16  # times as many as inputs: what errors are taken on


class Size(NamedTuple):
    """Outputs and inputs of a layer."""

    outputs: int
    inputs: int

    def __str__(self) -> str:
        return f"quantize {self.outputs}x{self.inputs}"

    @property
    def spec(self) -> Int4:
        """The grid: groups of 128 inputs, or of as many as divide them."""
        return Int4(group_size=math.gcd(128, self.inputs))


class Costs(NamedTuple):
    """A random layer on a device, and what is timed of it."""

    size: Size
    weight: Tensor
    gram: Tensor

    @classmethod
    def of(cls, size: Size, device: str) -> Costs:
        """Inputs of unequal size that have something in common, twice as many as there are."""
        torch.manual_seed(0)
        with torch.device(device):
            channels = (torch.randn(size.inputs) / 2).exp()
            inputs = torch.randn(2 * size.inputs, 16) @ torch.randn(16, size.inputs)
            inputs = (inputs / 4 + torch.randn_like(inputs)) * channels
            weight = torch.randn(size.outputs, size.inputs) / size.inputs**0.5
        return cls(size, weight, inputs.T @ inputs / len(inputs))

    def columns(self) -> Columns:
        """The layer in order of activity, as the default method begins it."""
        order = torch.argsort(self.gram.diagonal(), descending=True, stable=True)
        found = Columns(self.weight, self.gram, self.size.spec, order=order, damping=DAMPING)
        found.set_scales(self.size.spec.scales(self.weight))
        return found

    def rows(self, device: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Result rows; `seconds` of timing for each way, at least five rounds, but one of the
        default method, which takes long."""
        columns, damped = self.columns(), self.columns().gram
        product = torch.empty_like(self.weight)

        def sweep() -> None:
            columns.current.copy_(columns.weight)
            factor = reversed_cholesky(columns.gram)
            assert factor is not None  # it is damped
            columns.gptq(factor)

        def thirty() -> None:
            for relaxed in RELAXED:
                columns.descend(relaxed)

        whole = partial(quantize_weight, self.weight, self.gram, self.size.spec)
        calls: dict[str, Call] = {
            "matmul": partial(torch.mm, self.weight, self.gram, out=product),
            "cholesky": partial(torch.linalg.cholesky, damped),
            "gptq alone": sweep,
            "pass": columns.descend,
            "gptq": partial(whole, method="gptq"),
        }
        if device == "cuda":
            calls["30 passes"] = thirty
        for call in calls.values():
            call()
        # Launches that wait for the device, which no graph holds.
        samplers = {name: sampler([call], device, graph=False) for name, call in calls.items()}
        found = {name: summary(times) for name, times in rounds_s(samplers, seconds).items()}
        allowed = 3 * found["matmul"].time_us + 1.5 * found["cholesky"].time_us
        for name, timing in found.items():
            row = self._row(name, timing, found["matmul"])
            if name.startswith("gptq"):
                row["of_allowed"] = timing.time_us / allowed
            yield row
        where = self.weight.device
        if device == "cuda":
            whole()
        start = now(where)
        whole()
        time = (now(where) - start) * 1e6
        allowed_mib = (4 * self.weight.nbytes + 2 * self.gram.nbytes) / 2**20
        yield self._row("default", Timing(time, time, time, 1), found["matmul"]) | {
            "peak_of_allowed": peak_mib(whole, device) / allowed_mib,
        }

    def _row(self, name: str, timing: Timing, product: Timing) -> dict[str, Any]:
        return {
            "name": f"{self.size} {name}",
            **timing._asdict(),
            "seconds": timing.time_us / 1e6,
            "of_matmul": timing.time_us / product.time_us,
        }


def measure(size: Size, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of a layer's costs."""
    return Costs.of(size, device).rows(device, seconds)


METHODS: dict[str, Callable[..., QuantizedWeight]] = {
    "gptq": gptq,
    "rtn": lambda weight, gram, spec: rtn(weight, spec),
    "gptq, natural order": partial(gptq, order="natural"),
    "quantease": quantease,
    "default": quantize_weight,
}


def errors(kind: Kind, size: Size, device: str) -> Iterator[dict[str, Any]]:
    """Rows of every method's errors on a layer of this spectrum; their times are of one call."""
    tokens = TOKENS * size.inputs
    problem = spectrum_problem(kind, *size, tokens)
    weight = problem.weight.to(device)
    grams = [x.to(device) for x in (problem.inputs.T @ problem.inputs,
                                    problem.held_out.T @ problem.held_out)]  # fmt: skip
    yardstick: list[float] = []
    for name, method in METHODS.items():
        start = now(weight.device)
        made = method(weight, grams[0], size.spec)
        time = (now(weight.device) - start) * 1e6
        wrong = weight - size.spec.decode(made.codes, Scales(made.scale, made.zero_point))
        found = [float(((wrong @ gram) * wrong).sum(dtype=torch.float64)) for gram in grams]
        yardstick = yardstick or found
        yield {
            "name": f"{size} {kind}, {tokens} tokens: {name}",
            **Timing(time, time, time, 1)._asdict(),
            "of_gptq": found[0] / yardstick[0],
            "held_out_of_gptq": found[1] / yardstick[1],
        }


def same_on_both(size: Size, device: str) -> dict[str, Any]:
    """One layer by the default method on the CPU and on `device`: how far the errors are apart."""
    layer = Costs.of(size, "cpu")
    weight, gram = layer.weight.to(device), layer.gram.to(device)
    start = now(weight.device)
    there = quantize_weight(weight, gram, size.spec)
    time = (now(weight.device) - start) * 1e6
    here = quantize_weight(layer.weight, layer.gram, size.spec)
    return {
        "name": f"{size} on both devices",
        **Timing(time, time, time, 1)._asdict(),
        "codes_alike": float((there.codes.cpu() == here.codes).double().mean()),
        "error_apart": abs(there.report.relative_error / here.report.relative_error - 1),
    }
