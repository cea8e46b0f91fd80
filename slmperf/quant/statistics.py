"""Largest magnitudes on calibration text: the scales of what is quantised with fixed scales.

    scale = max |x| / 448        x / scale then reaches the largest value of fp8 e4m3

over the tokens that count, and over all torch.distributed workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from slmperf.calibrate import BlockStream
from slmperf.calibrate.workers import max_of_workers
from slmperf.check import InputError
from slmperf.ops.weight_spec import Fp8, stored


def input_peaks(stream: BlockStream, index: int, names: Iterable[str]) -> dict[str, Tensor]:
    """max |x| of every channel of the inputs of named layers of block `index`, fp32 (in,) each.

    Raises InputError, by name, for inputs that are not finite and where no token counts.
    """
    _check_tokens(stream, index)
    layers = {name: stream.blocks[index].get_submodule(name) for name in names}
    found = {name: _none(layer.in_features, layer.weight) for name, layer in layers.items()}

    def take(name: str, inputs: Tensor, batch: int) -> None:
        found[name] = _larger(found[name], inputs)

    stream.each_input(index, found, take)
    return {
        name: _finite(f"model.layers.{index}.{name}: inputs", max_of_workers(peaks))
        for name, peaks in found.items()
    }


def static_input_scales(stream: BlockStream, index: int, names: Iterable[str]) -> dict[str, Tensor]:
    """The fp8 scale of the inputs of named layers of block `index`: fp32, without dimensions.

    Layers that read the same tensor (q, k and v; gate and up) get the same scale.
    Raises InputError as `input_peaks` does.
    """
    return {name: _scale(peaks.amax()) for name, peaks in input_peaks(stream, index, names).items()}


@torch.no_grad()
def kv_scales(stream: BlockStream, index: int) -> tuple[Tensor, Tensor]:
    """The fp8 scales of what block `index` puts into the cache, fp32 (1,) each: of keys, after
    their rotation, and of values.

    Raises InputError for values that are not finite and where no token counts.
    """
    _check_tokens(stream, index)
    cache = _Recorded()
    peaks = _none(2, next(stream.blocks[index].parameters()))  # of keys, of values
    for _, tokens in stream.outputs(index, past_key_values=cache):
        for place, states in enumerate((cache.key, cache.value)):
            rows = states.transpose(1, 2).flatten(0, 1)  # (B, G, T, C) -> (B * T, G, C)
            peaks[place] = _larger(peaks[place], tokens.select(rows).flatten())
    scale = _scale(
        _finite(f"model.layers.{index}.self_attn: keys or values", max_of_workers(peaks))
    )
    return scale[:1], scale[1:]


class _Recorded:
    """A cache that holds nothing but what was put into it last, and hands that on."""

    key: Tensor
    value: Tensor

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(B, G, T, C) each."""
        self.key, self.value = key, value
        return key, value


def _none(size: int, like: Tensor) -> Tensor:
    """Peaks of nothing."""
    return torch.zeros(size, dtype=torch.float32, device=like.device)


def _larger(peaks: Tensor, rows: Tensor) -> Tensor:
    """The larger of `peaks` and max |rows| over the first dimension; NaN where one is."""
    return torch.maximum(peaks, rows.abs().amax(0).float()) if len(rows) else peaks


def _check_tokens(stream: BlockStream, index: int) -> None:
    if not stream.manifest["tokens"]:
        raise InputError(
            f"model.layers.{index}: wanted at least one calibration token that counts, found none"
        )


def _finite(what: str, peaks: Tensor) -> Tensor:
    if not bool(torch.isfinite(peaks).all()):
        raise InputError(f"{what}: wanted finite values, found some that are not")
    return peaks


def _scale(peaks: Tensor) -> Tensor:
    return stored(peaks / Fp8().highest, torch.float32)
