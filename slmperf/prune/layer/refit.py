"""The least-squares problem of one linear layer that loses inputs, and its exact refit.

    minimise  f(V) = 1/2 tr((W - V) H (W - V)') + mu/2 |W - V|^2,   whole groups of columns zero

W (N, d) is the layer's weight, H = X'X (d, d) the Gram matrix of its inputs, and mu a share of the
mean of H's diagonal: the damping pulls the kept weights to the original ones, not to zero. For the
kept columns K and the removed ones R the optimum is  V_K = W_K + W_R H_RK (H_KK + mu I)^-1.

Source: Meng, Ibrahim, Behdin, Hazimeh, Ponomareva, Mazumder, "OSSCAR: One-Shot Structured Pruning
in Vision and Language Models with Combinatorial Optimization", 2024 (arXiv 2403.12983). All
arithmetic is fp64. The Gram matrix is never copied whole but for its factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError

# M_jj (H + mu I)_jj says how far the downdates can shrink M_jj; this much leaves them six digits.
_INFLATION = 1e10
# What is added to a matrix that is still close to singular, over the mean of its diagonal.
_JITTER = (0.0, *(10.0**power for power in range(-9, -1)))
# X'X comes out of a matrix product in fp32 symmetric to 1e-6; more is another matrix.
_ASYMMETRY = 1e-4
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of weights
# A solution whose residual, over the right-hand side, is not below this is corrected once or twice.
_RESIDUAL = 1e-11


class Pruned(NamedTuple):
    """What a layer keeps. Indices are of groups, on the CPU."""

    kept: Tensor  # (keep,) int64, ascending
    weight: Tensor  # (N, keep * group_size), in the dtype of the weight given
    error: float  # 1/2 tr((W - V) H (W - V)') of the weight returned, H without damping
    relative_error: float  # error / (1/2 tr(W H W')), W refitted to a target; 0 without output
    # (removed,) int64: the groups in the order of their removal, before any swaps; empty if unknown
    order: Tensor
    curve: Tensor  # (removed,) fp64: f at its optimum after each removal, never falling


class Problem:
    """A checked layer: gram (d, d) fp32 or fp64, weight (N, d), groups of `size` columns.

    op names the caller in errors. InputError for sizes that do not fit, values that are not finite,
    and a gram that is not symmetric or not positive semi-definite.
    """

    def __init__(
        self,
        op: str,
        gram: Tensor,
        weight: Tensor,
        *,
        group_size: int,
        target: Tensor | None,
        damping: float,
    ) -> None:
        self.op, self.gram, self.size = op, gram, group_size
        _check(op, gram, weight, group_size, target, damping)
        self.groups = weight.shape[1] // group_size
        self.dtype = weight.dtype
        self.weight = weight.double()
        diagonal = gram.diagonal().double()
        self.mean = float(diagonal.mean())
        self.dead = diagonal == 0
        # What damping adds to the diagonal; dead inputs get 1, which decouples them.
        self.pull = torch.full_like(diagonal, damping * self.mean).masked_fill(self.dead, 1.0)
        self.optimum = self.weight
        if target is not None:
            wanted = target.double() + torch.where(self.dead, 0.0, self.pull) * self.weight
            every = torch.ones_like(self.dead)
            self.optimum = torch.where(self.dead, self.weight, self._solve(wanted, every))
        # Dead inputs carry nothing, whatever their weights.
        alive = not bool(self.dead.any())
        self.live = self.optimum if alive else torch.where(self.dead, 0.0, self.optimum)

    def inverse(self) -> Tensor:
        """(H + mu I)^-1, (d, d), well enough conditioned to be downdated; may raise `pull`."""
        for added in _JITTER:
            factor = self._factor(added)
            if factor is None:
                continue
            # LAPACK's columns are its rows: so read, the factor is inverted where it stands.
            inverse = torch.cholesky_inverse(factor.mT, upper=True, out=factor.mT)
            damped = self.gram.diagonal().double() + self.pull + self._jitter(added)
            if bool((inverse.diagonal() * damped < _INFLATION).all()):
                self.pull = self.pull + self._jitter(added)
                return inverse.mT.contiguous()
        raise self._singular()

    def square(self) -> tuple[Tensor, float]:
        """Q = V'V (d, d) of the optimum, and its energy 1/2 tr(V H V'): (d, d), one number."""
        square = self.weight.new_empty(self.gram.shape)
        energy = 0.0
        for begin, end, part in _lower_products(self.live):
            square[begin:end, :end] = part
            square[:begin, begin:end] = part[:, :begin].T
            energy += self._energy_of(begin, end, part)
        return square, max(0.0, energy)

    def energy(self, difference: Tensor) -> float:
        """1/2 tr(D H D') >= 0 of D (N, d), H without damping."""
        parts = _lower_products(difference)
        return max(0.0, sum(self._energy_of(begin, end, part) for begin, end, part in parts))

    def refit(self, columns: Tensor) -> Tensor:
        """The minimiser over the columns of a mask (d,): (N, kept columns) fp64.

        A correction of the optimum over all columns, and not a solution from nothing, so that
        removing none changes no bit.
        """
        if bool(columns.all()):
            return self.optimum
        kept, removed = columns.nonzero().reshape(-1), (~columns).nonzero().reshape(-1)
        moved = self.live[:, removed] @ self._coupling(removed, kept)
        return self.optimum[:, kept] + self._solve(moved, columns)

    def refit_by(self, factor: Tensor, removed: Tensor, columns: Tensor) -> Tensor:
        """The same from the factor that an elimination leaves, a third of the work.

        factor (r, d): T^-T M_R: with M_RR = T'T, for the columns R = `removed` (r,) in the order of
        their pivots; then V_K = W_K - W_R T^-1 factor_:K. A few outputs are held against the
        optimum's equations, and `refit` takes over where downdates of M have lost digits.
        """
        kept = columns.nonzero().reshape(-1)
        half = torch.linalg.solve_triangular(
            factor[:, removed], self.live[:, removed], upper=True, left=False
        )
        change = -half @ factor[:, kept]
        some = _few(len(change), change.device)
        going = self.live[some].masked_fill(columns, 0.0)
        coming = torch.zeros_like(going)
        coming[:, kept] = change[some]
        moved, held = self._through(torch.cat([going, coming]))[:, kept].chunk(2)
        missing = moved - held - change[some] * self.pull[kept]
        if bool(missing.abs().amax() > _RESIDUAL * moved.abs().amax()):
            return self.refit(columns)
        return self.optimum[:, kept] + change

    def objective(self, mask: Tensor) -> float:
        """f at its optimum for the groups of a mask (m,)."""
        columns = mask.repeat_interleave(self.size)
        difference = self.live.clone()
        difference[:, columns] -= torch.where(self.dead[columns], 0.0, self.refit(columns))
        pulled = (difference.square().sum(0) * self.pull).sum() / 2
        return self.energy(difference) + float(pulled)

    def result(
        self, mask: Tensor, weight: Tensor, whole: float, order: Tensor, curve: Tensor
    ) -> Pruned:
        """`weight` (N, kept columns) fp64 for the groups of a mask (m,), with its errors.

        whole: the energy of the optimum over all columns.
        """
        weight = weight.to(self.dtype)
        columns = mask.repeat_interleave(self.size)
        difference = self.optimum.clone()
        difference[:, columns] -= weight
        error = self.energy(difference)
        relative = error / whole if whole > 0 else 0.0
        kept = mask.nonzero().reshape(-1).cpu()
        return Pruned(kept, weight, error, relative, order.cpu(), curve.cpu())

    def dead_groups(self) -> Tensor:
        """Groups without a live input, those of the smallest weights first."""
        groups = self.dead.view(-1, self.size).all(1).nonzero().reshape(-1)
        if not len(groups):
            return groups
        size = self.weight.square().sum(0).view(-1, self.size).sum(1)[groups]
        return groups[torch.argsort(size, stable=True)]

    def _energy_of(self, begin: int, end: int, part: Tensor) -> float:
        rows = self.gram[begin:end, :end].to(torch.float64)
        # Row by row without a product in memory. What stands beside the block counts twice.
        twice = torch.linalg.vecdot(rows, part).sum()
        return float(twice - torch.linalg.vecdot(rows[:, begin:], part[:, begin:]).sum() / 2)

    def _solve(self, right: Tensor, columns: Tensor) -> Tensor:
        """right (H_KK + mu I)^-1 for the columns K of a mask, by Cholesky: (N, k) -> (N, k)."""
        for added in _JITTER:
            factor = self._factor(added, columns)
            if factor is not None:
                break
        else:
            raise self._singular()
        kept = columns.nonzero().reshape(-1)
        solution = torch.cholesky_solve(right.T, factor).T
        some = _few(len(right), right.device)
        for _ in range(2):
            # A few outputs tell whether the correction is worth its products.
            missing = right[some] - self._times(solution[some], kept)
            if bool(missing.abs().amax() <= _RESIDUAL * right[some].abs().amax()):
                break
            residual = right - self._times(solution, kept)
            solution = solution + torch.cholesky_solve(residual.T, factor).T
        return solution

    def _through(self, rows: Tensor) -> Tensor:
        """rows H, a strip of the matrix at a time: (n, d) -> (n, d)."""
        strips = _strips(self.gram.shape[0], 16)
        parts = (rows[:, begin:end] @ self.gram[begin:end].double() for begin, end in strips)
        return sum(parts, torch.zeros_like(rows))

    def _coupling(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.gram.index_select(0, rows).index_select(1, columns).double()

    def _times(self, left: Tensor, kept: Tensor) -> Tensor:
        """left (H_KK + mu I), a strip of the matrix at a time: (n, k) -> (n, k)."""
        product = left * self.pull[kept]
        for part in torch.arange(len(kept), device=left.device).split(1024):
            product += left[:, part] @ self._coupling(kept[part], kept)
        return product

    def _factor(self, added: float, columns: Tensor | None = None) -> Tensor | None:
        """Lower Cholesky factor of H + mu I, or of its rows and columns of a mask; None: not
        definite."""
        pull = self.pull + self._jitter(added)
        if columns is None or bool(columns.all()):
            damped = self.gram.to(torch.float64, copy=True)
        else:
            kept = columns.nonzero().reshape(-1)
            damped = self._coupling(kept, kept)
            pull = pull[kept]
        damped.diagonal().add_(pull)
        return _cholesky(damped)

    def _jitter(self, added: float) -> Tensor:
        jitter = torch.full_like(self.pull, added * self.mean)
        return jitter.masked_fill(self.dead, 0.0)

    def _singular(self) -> InputError:
        return InputError(f"{self.op}: gram is not positive semi-definite, wanted X'X")


@torch.no_grad()
def keep_groups(
    gram: Tensor,
    weight: Tensor,
    kept: Tensor,
    *,
    group_size: int = 1,
    target: Tensor | None = None,
    damping: float = 0.01,
    refit: bool = True,
) -> Pruned:
    """The layer with the groups `kept` (k,) int64 and no others; `order` and `curve` are empty.

    refit: with the best weights for them; else with the columns as they are. The other arguments,
    and the errors, are those of `osscar`.
    """
    problem = Problem(
        "keep_groups", gram, weight, group_size=group_size, target=target, damping=damping
    )
    mask = torch.zeros(problem.groups, dtype=torch.bool, device=gram.device)
    kept = torch.as_tensor(kept, dtype=torch.int64, device=gram.device).reshape(-1)
    if kept.numel() == 0 or not bool(((kept >= 0) & (kept < problem.groups)).all()):
        raise InputError(f"keep_groups: wanted one group or more in 0..{problem.groups - 1}")
    mask[kept] = True
    if int(mask.sum()) != len(kept):
        raise InputError("keep_groups: kept names a group twice")
    columns = mask.repeat_interleave(group_size)
    fitted = problem.refit(columns) if refit else problem.weight[:, columns]
    whole = problem.energy(problem.live)
    return problem.result(mask, fitted, whole, kept.new_empty(0), problem.weight.new_empty(0))


def _few(count: int, device: torch.device) -> Tensor:
    """At most 16 of so many rows, spread evenly."""
    return torch.linspace(0, count - 1, min(16, count), device=device).long()


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor of a matrix, in its place on a CPU; None where it is not definite.

    LAPACK's own runs at a third of the speed of matrix products on the CPUs measured; halves joined
    by triangular solves and products are 1.5 to 2 times as fast.
    """
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        return None if int(info) else factor
    return matrix.tril_() if _factor_lower(matrix) else None


def _factor_lower(matrix: Tensor) -> bool:
    size = matrix.shape[0]
    if size <= 256:
        factor, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return int(info) == 0
    half = (size // 2 + 63) // 64 * 64  # whole cache lines
    first, second = matrix[:half, :half], matrix[half:, half:]
    if not _factor_lower(first):
        return False
    below = torch.linalg.solve_triangular(first.mT, matrix[half:, :half], upper=True, left=False)
    matrix[half:, :half] = below
    for begin, end in _strips(size - half, 4):
        second[begin:end, :end].addmm_(below[begin:end], below[:end].mT, alpha=-1)
    return _factor_lower(second)


def _strips(size: int, count: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of about `count` strips, wide enough for matrix products at full speed."""
    step = max(128, -(-size // count))
    for begin in range(0, size, step):
        yield begin, min(size, begin + step)


def _lower_products(values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, rows begin..end of V'V up to column end) of V (N, d), strip by strip.

    The half that symmetry leaves.
    """
    for begin, end in _strips(values.shape[1], 16):
        yield begin, end, values[:, begin:end].T @ values[:, :end]


def _check(
    op: str,
    gram: Tensor,
    weight: Tensor,
    group_size: int,
    target: Tensor | None,
    damping: float,
) -> None:
    if weight.dim() != 2 or not len(weight):
        raise InputError(f"{op}: weight is {tuple(weight.shape)}, wanted (N, d), N >= 1")
    if weight.dtype not in _DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise InputError(f"{op}: weight is {weight.dtype}, wanted {wanted}")
    outputs, inputs = weight.shape
    if gram.shape != (inputs, inputs):
        raise InputError(f"{op}: gram is {tuple(gram.shape)}, wanted ({inputs}, {inputs})")
    if target is not None and target.shape != weight.shape:
        raise InputError(f"{op}: target is {tuple(target.shape)}, wanted ({outputs}, {inputs})")
    if not isinstance(group_size, Integral) or group_size < 1 or inputs == 0 or inputs % group_size:
        raise InputError(f"{op}: group_size {group_size} does not divide {inputs} inputs")
    if not 0 <= damping < float("inf"):
        raise InputError(f"{op}: wanted damping >= 0, found {damping}")
    if gram.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{op}: gram is {gram.dtype}, wanted torch.float32 or torch.float64")
    for name, tensor in (("weight", weight), ("target", target)):
        if tensor is None or not tensor.numel():
            continue
        if tensor.device != gram.device:
            raise InputError(f"{op}: {name} is on {tensor.device}, wanted {gram.device}")
        # Without a temporary of its size; NaN passes through both.
        if not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
            raise InputError(f"{op}: {name} holds values that are not finite")
    largest = float(gram.diagonal().abs().max())
    for begin, end in _strips(inputs, 64):
        # A difference of values that are not finite is NaN.
        apart = float((gram[begin:end, :end] - gram[:end, begin:end].T).abs_().max())
        if not math.isfinite(apart):
            raise InputError(f"{op}: gram holds values that are not finite")
        if apart > _ASYMMETRY * largest:
            raise InputError(
                f"{op}: gram is not symmetric, wanted X'X: two halves differ by {apart:.3g} "
                f"beside a diagonal of up to {largest:.3g}"
            )
    dead = gram.diagonal() == 0
    if bool((gram.diagonal() < 0).any()) or (bool(dead.any()) and bool(gram[dead].any())):
        raise InputError(f"{op}: gram is not positive semi-definite, wanted X'X")
