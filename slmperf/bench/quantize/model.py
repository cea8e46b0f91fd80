"""Quantising a whole model with random weights, beside the forwards that no way of it avoids.

The calibration set runs through every block twice: once to gather the Gram matrices of its inputs,
once, quantised, to make the inputs of the next. `times_forwards` is the whole quantisation by two
passes of the unquantised model, which are timed on a sixteenth of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from slmperf.bench.random_model import forward_seconds, random_model, random_text, single
from slmperf.calibrate.usage import now
from slmperf.models.shapes import Shape
from slmperf.quant.model import quantize_model

if TYPE_CHECKING:
    from torch import Tensor

WARMUP_TOKENS = 8192  # through a model of one layer: kernels compile, libraries load
SHARE = 16  # one batch in so many is timed for the forwards


class Quantizing(NamedTuple):
    """What is quantised, by which scheme, and on how much text."""

    shape: Shape
    scheme: str
    tokens: int
    context: int  # tokens of a sequence
    rows: int  # sequences of a batch

    def __str__(self) -> str:
        return f"quantize {self.shape}, {self.scheme}, {self.tokens} tokens"

    def text(self, tokens: int, device: str) -> list[dict[str, Tensor]]:
        """Random text of so many tokens."""
        return random_text(self.shape.vocabulary, tokens, self.context, self.rows, device)


def measure(what: Quantizing, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the quantisation and of its two forwards. One run: it takes long."""
    small = random_model(replace(what.shape, layers=1, name=""), what.context, device)
    quantize_model(small, what.scheme, what.text(min(what.tokens, WARMUP_TOKENS), device))
    del small

    where = torch.device(device)
    model, text = random_model(what.shape, what.context, device), what.text(what.tokens, device)
    some = text[:: min(SHARE, len(text))]
    forwards = 2 * forward_seconds(model, some, device) * len(text) / len(some)
    yield single(f"{what}, two forwards", forwards)
    start = now(where)
    report = quantize_model(model, what.scheme, text)
    seconds = now(where) - start
    errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
    nearest = [layer.relative_error_rtn or 0.0 for layer in report.layers]
    yield single(str(what), seconds) | {
        "seconds": seconds,
        "forwards_seconds": forwards,
        "times_forwards": seconds / forwards,
        "calibration_seconds": report.calibration_seconds,
        "solve_seconds": sum(layer.seconds for layer in report.layers),
        "device_peak_mib": report.device_peak_mib,
        "peak_mib": report.peak_mib,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "error": sum(errors) / max(1, len(errors)),
        "error_rtn": sum(nearest) / max(1, len(nearest)),
    }
