"""Pruning a whole model with random weights, beside the forwards that no way of doing it avoids.

The calibration set runs through every block twice: once to gather the Gram matrices of its inputs,
once to make the inputs of the next. `times_forwards` is the whole pruning by the time of two such
passes of the unpruned model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slmperf.bench.random_model import forward_seconds, random_model, random_text, single
from slmperf.calibrate.usage import now
from slmperf.models.shapes import Shape
from slmperf.prune.layer.elimination import osscar
from slmperf.prune.model import prune_model
from slmperf.testing.recurrence import layer_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP_TOKENS = 8192  # through a model of one layer: kernels compile, libraries load


class Pruning(NamedTuple):
    """What is pruned to what, and on how much text."""

    shape: Shape
    intermediate_size: int
    attention_heads: int
    tokens: int
    context: int  # tokens of a sequence
    rows: int  # sequences of a batch

    def __str__(self) -> str:
        return (
            f"prune {self.shape} to F {self.intermediate_size}, {self.attention_heads} heads, "
            f"{self.tokens} tokens"
        )


def measure(what: Pruning, mode: str, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the pruning and of its two forwards. One run each: it takes long."""
    small = replace(what.shape, layers=1, name="")
    few = _text(what._replace(tokens=min(what.tokens, WARMUP_TOKENS)), device)
    _prune(random_model(small, what.context, device), few, what, mode)

    model, text = random_model(what.shape, what.context, device), _text(what, device)
    forwards = 2 * forward_seconds(model, text, device)
    yield single(f"{what}, {mode}, two forwards", forwards)
    where = torch.device(device)
    start = now(where)
    report = _prune(model, text, what, mode)
    seconds = now(where) - start
    layers = report.layers
    yield single(f"{what}, {mode}", seconds) | {
        "seconds": seconds,
        "forwards_seconds": forwards,
        "times_forwards": seconds / forwards,
        "calibration_seconds": report.calibration_seconds,
        "gram_seconds": sum(layer.gram_seconds for layer in layers),
        "solve_seconds": sum(layer.solve_seconds for layer in layers),
        "advance_seconds": report.advance_seconds,
        "device_peak_mib": report.device_peak_mib,
        "peak_mib": report.peak_mib,
        "parameters": report.parameters_after,
    }


def same_on_both(inputs: int, outputs: int, keep: int, device: str) -> dict[str, Any]:
    """One layer solved on the CPU and on `device`: a row with how far the answers are apart."""
    problem = layer_problem("correlated", 0, inputs, outputs, 2 * inputs)
    gram, weight = (given.float() for given in problem)
    there, here = gram.to(device), weight.to(device)
    osscar(there, here, keep=keep)
    start = now(there.device)
    found = osscar(there, here, keep=keep)
    seconds = now(there.device) - start
    start = time.perf_counter()
    wanted = osscar(gram, weight, keep=keep)
    return single(f"prune osscar {inputs}x{outputs} to {keep}", seconds) | {
        "cpu_seconds": time.perf_counter() - start,
        "kept_alike": float(torch.isin(found.kept, wanted.kept).double().mean()),
        "error_apart": abs(found.error / wanted.error - 1),
    }


def _text(what: Pruning, device: str) -> list[dict[str, Tensor]]:
    return random_text(what.shape.vocabulary, what.tokens, what.context, what.rows, device)


def _prune(model: PreTrainedModel, text: list[dict[str, Tensor]], what: Pruning, mode: str) -> Any:
    return prune_model(
        model,
        text,
        intermediate_size=what.intermediate_size,
        attention_heads=what.attention_heads,
        mode=mode,
    )
