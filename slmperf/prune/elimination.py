"""osscar: one-shot structured pruning of a linear layer's inputs, with an exact refit.

    minimise  f(V) = 1/2 tr((W - V) H (W - V)') + mu/2 |W - V|^2,   whole groups of columns zero

W (N, d) is the layer's weight, H = X'X (d, d) the Gram matrix of its inputs, and mu a share of the
mean of H's diagonal: the damping pulls the kept weights to the original ones, not to zero. Let M be
(H + mu I)^-1. Taking the columns P out of the current optimum V and refitting all others exactly

    costs 1/2 tr(V_P M_PP^-1 V_P'),   makes V - V_P M_PP^-1 M_P: of V,   M - M_:P M_PP^-1 M_P: of M

so the cheapest group goes, one at a time. This is a Cholesky factorisation of M with diagonal
pivoting: of M and of Q = V'V only the diagonal blocks and the rows of the group that goes are
brought up to date at each step, all the rest once every `_BLOCK` columns by a matrix product.
At the end the kept columns are solved for afresh.

Source: Meng, Ibrahim, Behdin, Hazimeh, Ponomareva, Mazumder, "OSSCAR: One-Shot Structured Pruning
in Vision and Language Models with Combinatorial Optimization", 2024 (arXiv 2403.12983). All
arithmetic is fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError

_BLOCK = 64  # removed columns between two full updates of M and Q
# M_jj (H + mu I)_jj says how far the downdates can shrink M_jj; this much leaves them six digits.
_INFLATION = 1e10


class Pruned(NamedTuple):
    """What `osscar` decided. Indices are of groups, on the CPU."""

    kept: Tensor  # (keep,) int64, ascending
    weight: Tensor  # (N, keep * group_size), refitted, in the dtype of the weight given
    error: float  # 1/2 tr((W - V) H (W - V)') of the weight returned, H without damping
    relative_error: float  # error / (1/2 tr(W H W')); 0 for a layer without output
    order: Tensor  # (removed,) int64: the groups in the order of their removal
    curve: Tensor  # (removed,) fp64: f at its optimum after each removal, never falling


@torch.no_grad()
def osscar(
    gram: Tensor,
    weight: Tensor,
    *,
    group_size: int = 1,
    keep: int | None = None,
    target: Tensor | None = None,
    damping: float = 0.01,
) -> Pruned:
    """Choose the `keep` groups of inputs that a linear layer keeps, and its refitted weight.

    gram: (d, d), X'X over the calibration tokens, unnormalised (only relative damping is
        meaningful).
    weight: (N, d), as torch.nn.Linear holds it. Groups are `group_size` neighbouring columns.
    keep: groups to keep. None removes nothing, but orders all groups.
    target: (N, d), Y'X for wanted outputs Y other than X W'. The layer is then first refitted to Y,
        and `error` is measured from that refit.
    damping: mu over the mean of gram's diagonal. A matrix that is then still close to singular gets
        the least of 1e-9, 1e-8, ... 1e-2 that cures it.

    A smaller `keep` continues the same order: removals are nested. Groups whose inputs are all zero
    in the calibration data go first and cost nothing, the smallest weights first; dead inputs that
    stay keep their original weights.

    Raises InputError for sizes that do not fit, non-finite values, and a gram that is not positive
    semi-definite.
    """
    groups = _check(gram, weight, group_size, keep, target, damping)
    given = weight
    hessian = gram.double()
    hessian = (hessian + hessian.T) / 2
    weight = given.double()
    dead = hessian.diagonal() == 0
    damped, inverse = _definite(hessian, damping * float(hessian.diagonal().mean()), dead)
    optimum = (
        weight if target is None else _refit_to(target.double(), hessian, damped, weight, dead)
    )

    wanted = groups if keep is None else groups - keep
    live = torch.where(dead, 0.0, optimum)
    free = _dead_groups(dead, weight, group_size)[:wanted]
    order, costs = _eliminate(inverse, live, group_size, free, wanted - len(free))
    curve = torch.cat([torch.zeros(len(free), dtype=torch.float64), costs.cumsum(0)])

    removed = order if keep is not None else order[:0]
    mask = torch.ones(groups, dtype=torch.bool, device=gram.device)
    mask[removed.to(gram.device)] = False
    columns = mask.repeat_interleave(group_size)
    refitted = _refit(damped, optimum, live, columns).to(given.dtype)

    difference = optimum.clone()
    difference[:, columns] -= refitted.double()
    error = _energy(hessian, difference)
    whole = _energy(hessian, live)
    relative = error / whole if whole > 0 else 0.0
    return Pruned(mask.nonzero().reshape(-1).cpu(), refitted, error, relative, order, curve)


def _check(
    gram: Tensor,
    weight: Tensor,
    group_size: int,
    keep: int | None,
    target: Tensor | None,
    damping: float,
) -> int:
    if weight.dim() != 2:
        raise InputError(f"osscar: weight is {tuple(weight.shape)}, wanted (N, d)")
    outputs, inputs = weight.shape
    if gram.shape != (inputs, inputs):
        raise InputError(f"osscar: gram is {tuple(gram.shape)}, wanted ({inputs}, {inputs})")
    if target is not None and target.shape != weight.shape:
        raise InputError(f"osscar: target is {tuple(target.shape)}, wanted ({outputs}, {inputs})")
    if group_size < 1 or inputs == 0 or inputs % group_size:
        raise InputError(f"osscar: group_size {group_size} does not divide {inputs} inputs")
    groups = inputs // group_size
    if keep is not None and not 1 <= keep <= groups:
        raise InputError(f"osscar: wanted keep in 1..{groups}, found {keep}")
    if not 0 <= damping < float("inf"):
        raise InputError(f"osscar: wanted damping >= 0, found {damping}")
    for name, tensor in (("gram", gram), ("weight", weight), ("target", target)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"osscar: {name} holds values that are not finite")
    if bool((gram.diagonal() < 0).any()) or bool(gram[gram.diagonal() == 0].any()):
        raise InputError("osscar: gram is not positive semi-definite, wanted X'X")
    return groups


def _definite(hessian: Tensor, damping: float, dead: Tensor) -> tuple[Tensor, Tensor]:
    """H + mu I with 1 on the diagonal of dead inputs, well enough conditioned, and its inverse."""
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    for added in (0.0, *(10.0**power * mean for power in range(-9, -1))):
        damped = hessian.clone()
        damped.diagonal().add_(damping + added)
        damped.diagonal()[dead] = 1.0
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            half = torch.linalg.solve_triangular(factor, identity, upper=False)
            inverse = half.T @ half
            if bool((inverse.diagonal() * damped.diagonal() < _INFLATION).all()):
                return damped, inverse
    raise InputError("osscar: gram is not positive semi-definite, wanted X'X")


def _refit_to(
    target: Tensor, hessian: Tensor, damped: Tensor, weight: Tensor, dead: Tensor
) -> Tensor:
    """The unpruned optimum for other outputs, (Y'X + mu W) (H + mu I)^-1."""
    pull = (damped - hessian).diagonal()
    wanted = target + torch.where(dead, 0.0, pull) * weight
    return torch.where(dead, weight, _solve(damped, wanted))


def _dead_groups(dead: Tensor, weight: Tensor, group_size: int) -> Tensor:
    """Groups without a live input, those of the smallest weights first."""
    groups = dead.view(-1, group_size).all(1).nonzero().reshape(-1)
    size = weight.square().sum(0).view(-1, group_size).sum(1)[groups]
    return groups[torch.argsort(size, stable=True)]


def _eliminate(
    inverse: Tensor, optimum: Tensor, group_size: int, free: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Remove the groups `free`, then the `count` cheapest, one at a time: (order, their costs).

    `inverse` is M (d, d), used up; the groups `free` are zero in `optimum` (N, d) and not coupled.
    """
    size, groups = inverse.shape[0], inverse.shape[0] // group_size
    square = optimum.T @ optimum
    blocks_m = _diagonal_blocks(inverse, group_size)
    blocks_q = _diagonal_blocks(square, group_size)
    alive = torch.ones(groups, dtype=torch.bool, device=inverse.device)
    alive[free] = False
    # Rows waiting for the next full update: M is inverse - L'L, Q is square - U'L - L'U.
    rows_l = inverse.new_empty(max(_BLOCK, group_size), size)
    rows_u = torch.empty_like(rows_l)
    pending = 0
    order, costs = free.tolist(), []
    for _ in range(count):
        cost = _costs(blocks_m, blocks_q).masked_fill(~alive, float("inf"))
        if bool(cost.isnan().any()):
            raise InputError("osscar: gram is too close to singular, wanted a larger damping")
        group = int(cost.argmin())
        order.append(group)
        costs.append(float(cost[group]))
        alive[group] = False

        columns = slice(group * group_size, (group + 1) * group_size)
        done_l, done_u = rows_l[:pending], rows_u[:pending]
        m = inverse[columns] - done_l[:, columns].T @ done_l
        q = square[columns] - done_u[:, columns].T @ done_l - done_l[:, columns].T @ done_u
        factor = torch.linalg.cholesky(m[:, columns])
        new_l = torch.linalg.solve_triangular(factor, m, upper=False)
        z = torch.linalg.solve_triangular(factor, q, upper=False)
        s = torch.linalg.solve_triangular(factor, z[:, columns].T, upper=False)
        new_u = z - s @ new_l / 2

        by_group_l = new_l.view(group_size, groups, group_size).transpose(0, 1)
        by_group_u = new_u.view(group_size, groups, group_size).transpose(0, 1)
        cross = by_group_u.transpose(1, 2) @ by_group_l
        blocks_m -= by_group_l.transpose(1, 2) @ by_group_l
        blocks_q -= cross + cross.transpose(1, 2)

        rows_l[pending : pending + group_size] = new_l
        rows_u[pending : pending + group_size] = new_u
        pending += group_size
        if pending + group_size > len(rows_l):
            done_l, done_u = rows_l[:pending], rows_u[:pending]
            inverse.addmm_(done_l.T, done_l, alpha=-1)
            square.addmm_(done_u.T, done_l, alpha=-1).addmm_(done_l.T, done_u, alpha=-1)
            pending = 0
    return torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)


def _costs(blocks_m: Tensor, blocks_q: Tensor) -> Tensor:
    """1/2 tr(M_gg^-1 Q_gg) >= 0 of every group, NaN where M_gg is not definite: (m,)."""
    if blocks_m.shape[1] == 1:
        cost = blocks_q.reshape(-1) / blocks_m.reshape(-1) / 2
    else:
        # A removed group's block is zero up to rounding: it need not have a factor, and its cost is
        # not read.
        factor, info = torch.linalg.cholesky_ex(blocks_m)
        cost = torch.cholesky_solve(blocks_q, factor).diagonal(dim1=1, dim2=2).sum(1) / 2
        cost = cost.masked_fill(info != 0, float("nan"))
    return cost.clamp(min=0.0)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Copies of the diagonal blocks: (m * size, m * size) -> (m, size, size)."""
    groups = matrix.shape[0] // size
    index = torch.arange(groups, device=matrix.device)
    return matrix.view(groups, size, groups, size)[index, :, index].clone()


def _refit(damped: Tensor, optimum: Tensor, live: Tensor, columns: Tensor) -> Tensor:
    """Exact minimiser over the kept columns K, (N, kept):  V_K = W_K + W_R H_RK H_KK^-1.

    R are the columns removed. A correction of the optimum over all columns, and not a solution from
    nothing, so that removing none changes no bit.
    """
    if bool(columns.all()):
        return optimum
    moved = live[:, ~columns] @ damped[~columns][:, columns]
    return optimum[:, columns] + _solve(damped[columns][:, columns], moved)


def _solve(hessian: Tensor, right: Tensor) -> Tensor:
    """right H^-1, by Cholesky and one round of refinement: (d, d), (N, d) -> (N, d)."""
    factor = torch.linalg.cholesky(hessian)
    solution = torch.cholesky_solve(right.T, factor)
    residual = right.T - hessian @ solution
    return (solution + torch.cholesky_solve(residual, factor)).T


def _energy(hessian: Tensor, difference: Tensor) -> float:
    """1/2 tr(D H D'), never below zero."""
    return max(0.0, float(((difference @ hessian) * difference).sum() / 2))
