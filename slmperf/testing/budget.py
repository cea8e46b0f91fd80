"""How far a kernel may be from the truth.

Gold is the reference in float64; the twin is the reference in the tested dtype. With maxima over
the tensor, `top` the largest gold value and n the length of the reduction:

    err(kernel) <= 2 (err(twin) + eps_out top + sqrt(n) eps_fp32 top)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS_FP32 = torch.finfo(torch.float32).eps


def limit(
    twin_error: float, top: float, out_dtype: torch.dtype, n: int, floor: float = EPS_FP32**2
) -> float:
    """The largest error that the budget allows; of an output, nothing is asked below `floor`."""
    out = torch.finfo(out_dtype)
    # Nothing is finer than the output's smallest number, which in fp16 is as coarse as 6e-8.
    rounding = max(out.eps * top, out.smallest_normal * out.eps)
    rounding = max(rounding, floor)
    return 2 * (twin_error + rounding + math.sqrt(n) * EPS_FP32 * top)


def check_error(
    what: str, kernel: Tensor, twin: Tensor, gold: Tensor, n: int, least_twin_error: float = 0.0,
    floor: float = EPS_FP32**2,
) -> None:  # fmt: skip
    """Hold a kernel's result against the budget; AssertionError with every number otherwise.

    Infinities and NaN must stand exactly where the gold has them. `least_twin_error` counts where
    the twin's is smaller: a result of one number is right by luck more often than many are.
    """
    assert kernel.dtype == twin.dtype, f"{what}: dtype {kernel.dtype}, twin {twin.dtype}"
    assert kernel.shape == gold.shape, f"{what}: shape {kernel.shape}, gold {gold.shape}"
    if not kernel.numel():
        return
    for name, special in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        here, there = special(kernel), special(gold)
        assert torch.equal(here, there), (
            f"{what}: {name} in {int(here.sum())} places, gold in {int(there.sum())}"
        )
    finite = torch.isfinite(gold) & torch.isfinite(twin)
    if not finite.any():
        return
    truth = gold[finite].double()
    error = (kernel[finite].double() - truth).abs().max().item()
    twin_error = (twin[finite].double() - truth).abs().max().item()
    twin_error = max(twin_error, least_twin_error)
    top = truth.abs().max().item()
    allowed = limit(twin_error, top, kernel.dtype, n, floor)
    numbers = f"twin {twin_error:.3g}, top {top:.3g}, n {n}, {kernel.dtype}"
    assert error <= allowed, f"{what}: error {error:.3g} over {allowed:.3g} ({numbers})"
