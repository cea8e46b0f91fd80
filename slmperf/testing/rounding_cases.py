"""What round_columns is run on, and how its results are judged: on their own, in fp64.

Two right implementations may differ: where a target lies halfway between two values, sums in
another order decide otherwise, and every column after it differs. So what is judged is each column
given the columns before it as they were rounded: is the new value on the grid, and is no other
nearer to the target?
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slmperf.ops.round_columns import round_columns

Tensors = dict[str, Tensor | None]

CODES = {"none": (0.0, 0.0), "int": (-8.0, 7.0), "float": (-448.0, 448.0)}
TOLERANCE = 1e-4  # of a scale: what the targets' fp32 sums lose


@dataclass(frozen=True)
class RoundColumnsCase:
    """One block: its columns and outputs, and how many groups of columns have scales."""

    columns: int
    outputs: int
    groups: int = 2
    grid: str = "int"
    zero_points: bool = False
    keep: bool = False  # whether some weights have to stay 0

    def __str__(self) -> str:
        more = [name for name in ("zero_points", "keep") if getattr(self, name)]
        return "-".join([f"{self.columns}x{self.outputs}x{self.groups}", self.grid, *more])

    def tensors(self, device: str = "cpu") -> Tensors:
        """The op's tensors, the same on every call: weights of a few codes around 0, correlated
        columns, some outputs far beyond the grid."""
        random = torch.Generator().manual_seed(self.columns * 1000 + self.outputs)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=random)

        inputs = normal(2 * self.columns, self.columns) + normal(2 * self.columns, 1)
        reach = 3.0 if self.grid == "int" else 100.0  # codes
        scale = (normal(self.groups, self.outputs) / 4).exp() / reach
        zero_point = torch.randint(-8, 8, scale.shape, generator=random).float()
        found: Tensors = {
            "current": normal(self.columns, self.outputs),
            "gradient": normal(self.columns, self.outputs),
            "coefficients": inputs.T @ inputs / self.columns,
            "scale": scale,
            "zero_point": zero_point if self.zero_points else None,
            # Neighbours of one group and of several, as in an order by size.
            "group": torch.randint(0, self.groups, (self.columns,), generator=random),
            "keep": normal(self.columns, self.outputs) > -1 if self.keep else None,
        }
        current, coefficients = found["current"], found["coefficients"]
        assert current is not None and coefficients is not None
        current[:, ::7] *= 10.0
        above = torch.ones_like(coefficients, dtype=torch.bool).triu(1)
        coefficients.masked_fill_(above, torch.nan)  # nothing of it is read
        return {name: None if x is None else x.to(device) for name, x in found.items()}

    def run(self, tensors: Tensors, impl: str) -> Tensor:
        """The new values; the tensors stay as they are."""
        given = dict(tensors)
        current = given.pop("current")
        assert current is not None
        new = current.clone()
        lowest, highest = CODES[self.grid]
        round_columns(new, **given, lowest=lowest, highest=highest, grid=self.grid, impl=impl)
        return new

    def check(self, tensors: Tensors, new: Tensor) -> None:
        """AssertionError where a new value is not on the grid, or another one is nearer."""
        given = {name: None if x is None else x.cpu() for name, x in tensors.items()}
        found, scale, target = new.cpu().double(), *self._by_column(given, new.cpu().double())
        lowest, highest = CODES[self.grid]
        keep = given["keep"]
        keep = torch.ones_like(found, dtype=torch.bool) if keep is None else keep
        assert not found[~keep].any(), f"{self}: {int((found[~keep] != 0).sum())} of 0 are not"
        if self.grid == "none":
            best = target
        else:
            zero = given["zero_point"]
            zero = torch.zeros_like(scale) if zero is None else zero.double()[given["group"]]
            best = self._nearest(target / scale, zero, lowest, highest) * scale
            off = (self._nearest(found / scale, zero, lowest, highest) * scale - found).abs()
            assert (off <= 1e-6 * (scale + found.abs())).all(), (
                f"{self}: off the grid by {off.max():.3g}"
            )
        worse = ((found - target).abs() - (best - target).abs()) / scale
        worst = float(worse[keep].max())
        assert worst <= TOLERANCE * self.columns, f"{self}: {worst:.3g} of a scale too far"

    def _by_column(self, given: Tensors, new: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and target of every weight in fp64, (columns, outputs), given the new values."""
        wide = {name: x.double() for name, x in given.items() if x is not None}
        below = wide["coefficients"].tril(-1).nan_to_num()
        left = wide["gradient"] - below @ (new - wide["current"])
        target = wide["current"] + left / wide["coefficients"].diagonal()[:, None]
        return wide["scale"][wide["group"].long()], target

    def _nearest(self, ratio: Tensor, zero: Tensor, lowest: float, highest: float) -> Tensor:
        if self.grid == "float":
            rounded = ratio.clamp(lowest, highest).float().to(torch.float8_e4m3fn)
            return rounded.double()
        return (ratio.round() + zero).clamp(lowest, highest) - zero


# Every kernel that a launcher can ask for; shapes make no difference to it.
COMPILED = tuple(
    RoundColumnsCase(5, 3, grid=grid, zero_points=zero_points, keep=keep)
    for grid in CODES
    for zero_points in ((False, True) if grid == "int" else (False,))
    for keep in (False, True)
)
