"""results: what a quantisation did, layer by layer and in sum; as plain data it is a JSON file.

`QuantReport.to_json` and `from_json` are exact inverses, except that NaN and infinity become null.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from slmperf.check import InputError
from slmperf.models.files import finite


@dataclass(frozen=True)
class LayerQuantized:
    """What happened to one linear layer.

    Errors are tr(E H E') / tr(W H W'), E the weight minus what its codes stand for, H the Gram
    matrix of the layer's inputs behind the quantised layers before it; W and H are those after
    smoothing. They are None where there was no text.
    """

    name: str  # such as "model.layers.0.mlp.down_proj"
    scheme: str
    method: str  # what made the codes: the one asked for, or "rtn" where that failed
    bits: float  # of the checkpoint, per weight, scales and zero points included
    relative_error: float | None
    relative_error_rtn: float | None  # of rounding to the nearest on the same scheme
    held_out_error: float | None  # the same two on text that calibrated nothing
    held_out_error_rtn: float | None
    damping: float | None  # that the method ended with, over the mean of H's diagonal
    guarded_rows: int  # where a simpler method was the better one; of all layers solved at once
    alpha: float | None  # of the smoothing of its inputs; None: none
    note: str  # "" or why it is not as asked for
    seconds: float  # to solve it, its share where layers were solved at once


@dataclass(frozen=True)
class QuantReport:
    """The layers in the order of the model, and the model before and after."""

    layers: tuple[LayerQuantized, ...]
    tokens: int  # of the calibration set; 0 without one
    bytes_before: int  # of the checkpoint's tensors, tied ones once
    bytes_after: int
    resumed_blocks: int  # that an earlier, unfinished run had made
    calibration_seconds: float  # before the first block
    seconds: float  # in all, of this run
    peak_mib: float  # the most memory that the process held, since it began
    device_peak_mib: float | None  # tensors on the model's CUDA device; None without one
    settings: dict[str, Any]  # scheme, overrides, method, ...
    calibration: dict[str, Any] | None  # the calibration's manifest
    held_out: dict[str, Any] | None  # that of the held-out text

    def to_json(self) -> str:
        """One JSON object; figures that are not finite become null."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        plain["layers"] = [asdict(layer) for layer in self.layers]
        return json.dumps(finite(plain), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> QuantReport:
        """The inverse of to_json; InputError where the text is not one."""
        try:
            plain = json.loads(text)
            layers = tuple(LayerQuantized(**layer) for layer in plain["layers"])
            return cls(**(plain | {"layers": layers}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"quantisation report: wanted what to_json wrote: {error!r}"
            ) from error
