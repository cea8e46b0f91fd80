"""errors: what a quantised weight does wrong, row by row, and the better of several.

    f_r = e_r H e_r'      e = W - (codes - zero_point) * scale

are computed in fp32, and again in fp64 for those rows where fp32 cannot tell which is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slmperf.ops.weight_spec import Scales, WeightSpec

# Rows of the weight and columns of the Gram matrix at a time, by device: little memory on a
# processor, enough work for a GPU.
_PIECES = {"cpu": (256, 512), "cuda": (8192, 2048)}


@dataclass(frozen=True)
class Layer:
    """A weight (out, in), floating, its Gram matrix (in, in), fp32 or fp64, and the grid."""

    weight: Tensor
    gram: Tensor
    spec: WeightSpec

    def energy(self) -> Tensor:
        """w_r H w_r' of every row, (out,) fp64: the errors of a weight of zeros."""
        everything = torch.arange(len(self.weight), device=self.weight.device)
        return self._errors(everything, torch.float32, None, None)[0]

    def candidate(self, codes: Tensor, scales: Scales) -> Candidate:
        """Codes (out, in) with the errors of their rows."""
        everything = torch.arange(len(codes), device=codes.device)
        return Candidate(codes, scales, *self._errors(everything, torch.float32, codes, scales))

    def better_rows(self, first: Candidate, second: Candidate) -> tuple[Candidate, int]:
        """Of each row the better candidate, the first of equals; how many the second gives.

        Rows change places only where each has scales of its own, or both have the same.
        """
        close = (first.errors - second.errors).abs() <= first.doubt + second.doubt
        unsure = close.nonzero()[:, 0]
        if len(unsure):
            for one in (first, second):
                exact, _ = self._errors(unsure, torch.float64, one.codes, one.scales)
                one.errors[unsure] = exact
        taken = second.errors < first.errors
        count = int(taken.sum())
        if not count:
            return first, 0
        zeros, others = first.scales.zero_point, second.scales.zero_point
        scale, zero_point = first.scales.scale, None
        if self.spec.by_row:
            scale = _chosen(taken, scale, second.scales.scale)
        if zeros is not None and others is not None:
            zero_point = _chosen(taken, zeros, others) if self.spec.by_row else zeros
        made = Candidate(
            _chosen(taken, first.codes, second.codes),
            Scales(scale, zero_point),
            torch.where(taken, second.errors, first.errors),
            torch.where(taken, second.doubt, first.doubt),
        )
        return made, count

    def _errors(
        self, rows: Tensor, dtype: torch.dtype, codes: Tensor | None, scales: Scales | None
    ) -> tuple[Tensor, Tensor]:
        """The errors of some rows, without codes those of zeros, and how far they may be off.

        Computed in dtype, given in fp64. Sums of n products round by about the root of n times
        epsilon of the sum of their sizes, which is at most (sum |e_j| root H_jj)^2.
        """
        shape = (self.weight.shape[0], self.weight.shape[1])
        diagonal = self.gram.diagonal().double()
        mean, root = float(diagonal.mean()) or 1.0, diagonal.sqrt().to(dtype)
        height, width = _PIECES[self.weight.device.type]
        found = torch.zeros(len(rows), dtype=torch.float64, device=self.weight.device)
        sizes = torch.zeros_like(found)
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            own_rows = rows[part]
            error = self.weight[own_rows].detach().to(dtype)
            if codes is not None and scales is not None:
                value = codes.view(torch.int8)[own_rows].view(codes.dtype).to(dtype)
                if scales.zero_point is not None:
                    value -= self.spec.spread(scales.zero_point, shape, own_rows)
                error -= value.mul_(self.spec.spread(scales.scale, shape, own_rows))
            for column in range(0, shape[1], width):
                # H is symmetric: what is above its diagonal counts twice.
                end = min(shape[1], column + width)
                own = (self.gram[:end, column:end] / mean).to(dtype)
                own[:column] *= 2
                product = error[:, :end] @ own
                found[part] += product.mul_(error[:, column:end]).sum(1, dtype=torch.float64)
            sizes[part] = error.abs_() @ root
        doubt = torch.finfo(dtype).eps * (8 + shape[1] ** 0.5) * sizes.square_()
        return (found * mean).clamp_(min=0.0), doubt


@dataclass(frozen=True)
class Candidate:
    """Codes (out, in), their scales, and of every row the error and how far it may be off, (out,)
    fp64. Errors become more exact when candidates are compared."""

    codes: Tensor
    scales: Scales
    errors: Tensor
    doubt: Tensor


def _chosen(taken: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`other` in the rows that are taken, else `one`; torch.where does not know fp8."""
    bits = torch.int8 if one.dtype == torch.float8_e4m3fn else one.dtype
    return torch.where(taken[:, None], other.view(bits), one.view(bits)).view(one.dtype)
