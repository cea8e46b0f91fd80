"""columns: a weight on its way to a grid, column block by column block.

Columns of the weight are rows here and stand in processing order, so that the outputs of a column
are neighbours in memory (`slmperf.ops.round_columns`). A block's gradient is one matrix product
over all columns; the columns inside it follow one after the other. Nothing depends on how many
columns a block has but the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.ops.round_columns import round_columns
from slmperf.ops.weight_spec import Scales, WeightSpec

_ROWS = 256  # of the Gram matrix in its own dtype at a time
# Columns of a block by device. A processor keeps the steps of a tile in its first-level cache; a
# GPU wants products large enough to fill it, and few launches.
BLOCK = {"cpu": 64, "cuda": 256}


class Columns:
    """A weight (out, in), its Gram matrix and the values it has so far; p outputs, q inputs.

    order     (q,) int64: the input that each processed column is
    weight    (q, p) fp32
    current   (q, p) fp32: the values so far, the weight itself at first
    error     (q, p) fp32: weight - current
    gram      (q, q) fp32, in processing order, its mean diagonal 1, damped
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        spec: WeightSpec,
        *,
        order: Tensor,
        damping: float = 0.0,
        mask: Tensor | None = None,
        block: int | None = None,
    ) -> None:
        """weight (out, in) floating, gram (in, in) floating; mask (out, in) bool: False stays 0.

        damping is added to the diagonal, times its mean. An input whose diagonal is 0 is rounded on
        its own.
        """
        self.spec, self.order = spec, order
        self._block = block or BLOCK[weight.device.type]
        self.weight = weight.detach().T[order].float()
        self.current = self.weight.clone()
        self.error = torch.zeros_like(self.weight)
        self.gram = normalised(gram, order)
        diagonal = self.gram.diagonal()
        dead = diagonal <= 0
        if dead.any():  # rounding errors of sums may leave something beside a zero
            self.gram[dead] = 0.0
            self.gram[:, dead] = 0.0
        diagonal += damping
        diagonal.masked_fill_(dead, 1.0)
        self._keep = None if mask is None else mask.T[order].contiguous()
        self._shape = (weight.shape[0], weight.shape[1])

    def set_scales(self, scales: Scales) -> None:
        """The grid's scales from now on, shapes as `WeightSpec.scales` gives them."""
        outputs, inputs = self._shape
        group = self.spec.group_of(inputs)
        self._group = torch.div(self.order, group, rounding_mode="floor")

        def by_output(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            if self.spec.block is not None:
                values = values.repeat_interleave(self.spec.block[0], dim=0)[:outputs]
            return values.float().expand(outputs, -1).T.contiguous()

        scale = by_output(scales.scale)
        assert scale is not None  # there always is one
        self._scale, self._zero_point = scale, by_output(scales.zero_point)

    def gptq(self, factor: Tensor) -> None:
        """Round every column once; the columns after it make good what it cannot hold.

        factor: `reversed_cholesky(self.gram)`. current is the weight before.
        """
        size = len(self.order)
        for start in range(0, size, self._block):
            end = min(size, start + self._block)
            # R_ij of i before j is factor[size - 1 - i, size - 1 - j].
            rows = factor[size - end :, size - end : size - start].flip(0, 1)
            gradient = rows[:start].T @ self.error[:start]
            self._round(start, end, gradient, rows[start:].T.contiguous(), relaxed=False)

    def descend(self, relaxed: bool = False) -> None:
        """One pass of coordinate descent over all columns; relaxed: without rounding."""
        size = len(self.order)
        for start in range(0, size, self._block):
            end = min(size, start + self._block)
            gradient = self.gram[start:end] @ self.error
            own = self.gram[start:end, start:end].contiguous()
            self._round(start, end, gradient, own, relaxed=relaxed)

    def _round(
        self, start: int, end: int, gradient: Tensor, coefficients: Tensor, *, relaxed: bool
    ) -> None:
        grid = "none" if relaxed else self.spec.kind
        round_columns(
            self.current[start:end],
            gradient,
            coefficients,
            self._scale,
            self._zero_point,
            group=self._group[start:end],
            keep=None if self._keep is None else self._keep[start:end],
            lowest=self.spec.lowest,
            highest=self.spec.highest,
            grid=grid,
        )
        torch.sub(self.weight[start:end], self.current[start:end], out=self.error[start:end])

    def whole_steps(self, columns: Tensor | slice) -> Tensor:
        """The codes, less the zero point, of some processed columns, whose values are on the grid:
        (columns, p) fp32."""
        steps = self.current[columns] / self._scale[self._group[columns]]
        if self.spec.kind == "float":
            return steps.to(torch.float8_e4m3fn).float()
        return steps.round_()

    def codes(self) -> Tensor:
        """The codes (out, in) of the current values, which are on the grid."""
        made = torch.empty_like(self.current, dtype=self.spec.code_dtype)
        for start in range(0, len(self.order), self._block):
            part = slice(start, start + self._block)
            code = self.whole_steps(part)
            if self._zero_point is not None:
                code += self._zero_point[self._group[part]]
            made[part] = code.to(made.dtype)
        bits = made.view(torch.int8)  # not every operation knows fp8
        return bits.T[:, torch.argsort(self.order)].contiguous().view(made.dtype)


def normalised(gram: Tensor, order: Tensor) -> Tensor:
    """The Gram matrix in processing order in fp32, divided by the mean of its diagonal."""
    mean = gram.diagonal().double().mean()
    scale = torch.where(mean > 0, 1 / mean, 1.0)
    found = torch.empty(gram.shape, dtype=torch.float32, device=gram.device)
    for start in range(0, len(order), _ROWS):  # no second matrix in the Gram's own dtype
        rows = order[start : start + _ROWS]
        found[start : start + _ROWS] = gram[rows][:, order] * scale
    return found


def reversed_cholesky(gram: Tensor) -> Tensor | None:
    """L, lower triangular, with L L' = the matrix with its rows and columns in reverse order.

    Then R = L with both reversed is upper triangular and R R' is the matrix. fp64 where fp32 does
    not find it definite; None where that does not either.
    """
    info = torch.zeros((), dtype=torch.int32, device=gram.device)
    for dtype in (gram.dtype, torch.float64):
        # In the place of a copy whose columns are contiguous, as LAPACK wants them.
        factor = gram.flip(0, 1).to(dtype).mT
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if not bool(info) and bool(torch.isfinite(factor.diagonal()).all()):
            return factor.to(gram.dtype)
    return None
