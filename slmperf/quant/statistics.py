"""Largest magnitudes on calibration text: the scales of what is quantised with fixed scales.

    scale = max |x| / 448        x / scale then reaches the largest value of fp8 e4m3

over the tokens that count, and over all torch.distributed workers. Values that are not finite are
left out, and told of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmperf.calibrate import BlockStream
from slmperf.calibrate.workers import max_of_workers
from slmperf.check import InputError
from slmperf.models.structure import block_name, layer_name
from slmperf.ops.weight_spec import Fp8, stored


class Peaks(NamedTuple):
    """max |x| of the finite values, fp32 (n,), 0 where there are none."""

    largest: Tensor
    note: str  # that some values were not finite, and of what; ""


class FixedScale(NamedTuple):
    """A scale of fp8, fp32 without dimensions, and what there is to say of it."""

    scale: Tensor
    note: str


def input_peaks(stream: BlockStream, index: int, names: Iterable[str]) -> dict[str, Peaks]:
    """Of every channel (in,) of the inputs of named layers of block `index`.

    Raises InputError where no token counts.
    """
    _check_tokens(stream, index)
    layers = {name: stream.blocks[index].get_submodule(name) for name in names}
    found = {name: _none(layer.in_features, layer.weight) for name, layer in layers.items()}

    def take(name: str, inputs: Tensor, batch: int) -> None:
        _add(found[name], inputs)

    stream.each_input(index, found, take)
    return {
        name: _of_workers(f"{layer_name(index, name)}: inputs", peaks)
        for name, peaks in found.items()
    }


def static_input_scales(
    stream: BlockStream, index: int, names: Iterable[str]
) -> dict[str, FixedScale]:
    """Of the inputs of named layers of block `index`.

    Layers that read the same tensor (q, k and v; gate and up) get the same scale.
    Raises InputError as `input_peaks` does.
    """
    return {name: _scale(peaks) for name, peaks in input_peaks(stream, index, names).items()}


@torch.no_grad()
def kv_scales(stream: BlockStream, index: int) -> tuple[FixedScale, FixedScale]:
    """Of what block `index` puts into the cache: of keys, after their rotation, and of values.

    Raises InputError where no token counts.
    """
    _check_tokens(stream, index)
    cache = _Recorded()
    keys, values = (_none(1, next(stream.blocks[index].parameters())) for _ in range(2))
    for _, tokens in stream.outputs(index, past_key_values=cache):
        for peaks, states in ((keys, cache.key), (values, cache.value)):
            rows = states.transpose(1, 2).flatten(0, 1)  # (B, G, T, C) -> (B * T, G, C)
            _add(peaks, tokens.select(rows).reshape(-1, 1))
    where = layer_name(index, "self_attn")
    return (
        _scale(_of_workers(f"{where}: keys", keys)),
        _scale(_of_workers(f"{where}: values", values)),
    )


class _Recorded:
    """A cache that holds nothing but what was put into it last, and hands that on."""

    key: Tensor
    value: Tensor

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(B, G, T, C) each."""
        self.key, self.value = key, value
        return key, value


def _none(size: int, like: Tensor) -> Tensor:
    """Peaks of nothing, (size + 1,): the last is 1 once a value was not finite."""
    return torch.zeros(size + 1, dtype=torch.float32, device=like.device)


def _add(peaks: Tensor, rows: Tensor) -> None:
    """Take rows (n, size) into `peaks`."""
    if not len(rows):
        return
    largest = rows.abs().amax(0).float()
    if not bool(torch.isfinite(largest).all()):
        largest = rows.where(torch.isfinite(rows), 0).abs().amax(0).float()
        peaks[-1] = 1
    torch.maximum(peaks[:-1], largest, out=peaks[:-1])


def _of_workers(what: str, peaks: Tensor) -> Peaks:
    peaks = max_of_workers(peaks)
    note = f"{what}: wanted finite values, found some that are not" if bool(peaks[-1]) else ""
    return Peaks(peaks[:-1], note)


def _check_tokens(stream: BlockStream, index: int) -> None:
    if not stream.manifest["tokens"]:
        raise InputError(
            f"{block_name(index)}: wanted at least one calibration token that counts, found none"
        )


def _scale(peaks: Peaks) -> FixedScale:
    largest, note = peaks.largest.amax(), peaks.note
    if note and not bool(largest):
        return FixedScale(torch.ones_like(largest), f"{note}: a scale of 1")
    told = f"{note}: the scale is of the others" if note else ""
    return FixedScale(stored(largest / Fp8().highest, torch.float32), told)
