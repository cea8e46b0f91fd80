"""Matrix products of low precision with fp32 results, for kd_loss, gram and teachers' heads.

torch's own wherever it has them: products of one dtype, and on CUDA bf16 x bf16 -> fp32. On a CPU
bf16 x bf16 -> fp32 is C++ (csrc/cpu/half_products.cpp) where the processor multiplies bf16;
everything else goes through blocks of the weight widened to fp32, a few MiB at a time, which is
exact and at fp32's speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slmperf.ops.routing import MISSING

_BLOCK = 2**21  # weights widened at a time: 8 MiB of fp32
# MKL is slower at products of 192 to some 350 rows than at two of half as many.
_MKL_ROWS = 176


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 x bf16 -> fp32 runs at bf16's speed on this device."""
    if device.type != "cpu":
        return True
    return not MISSING["native"] and torch.ops.slmperf.half_products()


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> None:
    """out (C, V) = scale (hidden (C, D) weight (V, D)' + bias (V,)), in out's dtype."""
    if hidden.dtype == out.dtype:
        pieces = 1
        if out.device.type == "cpu":
            pieces = -(-hidden.shape[0] // _MKL_ROWS)
        for rows, part in zip(hidden.chunk(pieces), out.chunk(pieces), strict=True):
            if bias is not None:
                torch.addmm(bias.to(out.dtype), rows, weight.mT, beta=scale, alpha=scale, out=part)
            elif scale != 1.0:
                torch.addmm(part, rows, weight.mT, beta=0.0, alpha=scale, out=part)
            else:
                torch.mm(rows, weight.mT, out=part)
        return
    if (
        hidden.dtype == torch.bfloat16
        and hidden.device.type == "cpu"
        and has_bf16_units(out.device)
    ):
        torch.ops.slmperf.bf16_logits.cpu(hidden, weight, bias, scale, out)
        return
    if hidden.device.type == "cuda" and out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.mT, out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for begin, end in _blocks(weight):
            torch.mm(wide, weight[begin:end].to(out.dtype).mT, out=out[:, begin:end])
    if bias is not None:
        out.add_(bias)
    if scale != 1.0:
        out.mul_(scale)


def hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (C, D) = gradient (C, V) weight (V, D), added up in fp32, in out's dtype."""
    if gradient.dtype == weight.dtype == torch.float32 and out.device.type == "cpu":
        # A sum over so many entries leaves MKL nothing else to share among threads than the few
        # rows; cut into eighths it is faster, and the same for any number of threads.
        each = weight.shape[0] // 8
        cut = 8 * each
        parts = gradient[:, :cut].unflatten(1, (8, each)).transpose(0, 1)
        torch.sum(torch.bmm(parts, weight[:cut].unflatten(0, (8, each))), dim=0, out=out)
        out.addmm_(gradient[:, cut:], weight[cut:])
        return
    if gradient.dtype == weight.dtype:
        torch.mm(gradient, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for begin, end in _blocks(weight):
        total.addmm_(gradient[:, begin:end].float(), weight[begin:end].float())
    out.copy_(total)


def weight_gradient(gradient: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
    """total (V, D) += gradient (C, V)' hidden (C, D), or = where it is the first."""
    beta = 0.0 if first else 1.0
    if gradient.dtype == hidden.dtype == total.dtype and first:
        torch.mm(gradient.mT, hidden, out=total)
    elif gradient.dtype == hidden.dtype == total.dtype:
        total.addmm_(gradient.mT, hidden)
    elif gradient.dtype == hidden.dtype and hidden.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(
            total, gradient.mT, hidden, total.dtype, beta=beta, alpha=1.0, out=total
        )
    elif gradient.dtype == hidden.dtype == torch.bfloat16 and has_bf16_units(total.device):
        torch.ops.slmperf.bf16_weight_gradient.cpu(gradient, hidden, total, not first)
    else:
        wide = hidden.float()
        for begin, end in _blocks(total):
            total[begin:end].addmm_(gradient[:, begin:end].float().mT, wide, beta=beta)


def _blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of the vocabulary."""
    size = max(1, _BLOCK // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], size):
        yield begin, min(begin + size, weight.shape[0])
