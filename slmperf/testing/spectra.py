"""Weights and inputs on which methods of quantisation are told apart.

A layer's inputs are Gaussian: standard deviations that fall exponentially along random orthogonal
directions, then a factor for each input channel. So neighbouring columns of the Gram matrix are
correlated, as in real layers, and channels differ in size. What the kinds were chosen for is the
error of rounding to the nearest, 4 bits in groups of 128 with scales of the largest value,
relative to GPTQ's in the order of the Gram matrix's diagonal (act-order, static groups, 1%
damping), at 256 to 1024 inputs:

    mild    1.9    every channel has a size of its own, none stands out
    steep   6.9    directions fall further, and one channel in 64 is ten times as large
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["mild", "steep"]


class _Spectrum(NamedTuple):
    decay: float  # e-foldings between the largest and the smallest direction's deviation
    spread: float  # standard deviation of a channel's log size
    outliers: int  # one channel in so many; 0: none
    gain: float  # how much larger an outlier is


SPECTRA: dict[Kind, _Spectrum] = {
    "mild": _Spectrum(decay=1.55, spread=0.7, outliers=0, gain=1.0),
    "steep": _Spectrum(decay=3.3, spread=0.2, outliers=64, gain=10.0),
}


class SpectrumProblem(NamedTuple):
    """A layer to quantise, and inputs to judge it by; all fp32."""

    weight: Tensor  # (outputs, inputs)
    inputs: Tensor  # (tokens, inputs)
    held_out: Tensor  # (tokens, inputs), others of the same distribution


def spectrum_problem(
    kind: Kind, outputs: int, inputs: int, tokens: int, seed: int = 0
) -> SpectrumProblem:
    """A random layer (outputs, inputs) and twice `tokens` inputs; the same for the same arguments.

    Its Gram matrix is X'X. Costs a QR factorisation of (inputs, inputs).
    """
    spectrum = SPECTRA[kind]
    random = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=random))
    deviations = torch.linspace(0, -spectrum.decay, inputs).exp()
    channels = (spectrum.spread * torch.randn(inputs, generator=random)).exp()
    if spectrum.outliers:
        chosen = torch.randperm(inputs, generator=random)[: inputs // spectrum.outliers]
        channels[chosen] *= spectrum.gain
    mixing = deviations[:, None] * directions.T * channels
    weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
    seen, unseen = (torch.randn(tokens, inputs, generator=random) @ mixing for _ in range(2))
    return SpectrumProblem(weight, seen, unseen)
