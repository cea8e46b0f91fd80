"""Local search after the elimination: a kept group for a removed one, the best of all pairs.

With A = H + mu I, W the optimum over all columns, K the kept columns and R the removed ones, let

    P = A_KK^-1      T = P A_KR      C = A_RR - A_RK T      V = W_K + W_R T'      G = W_R C

V are the weights refitted and G what the outputs still pull at the removed columns. Then

    removing i costs  1/2 tr(V_i P_ii^-1 V_i')       adding j gains  1/2 tr(G_j C_jj^-1 G_j')

and after i has gone, j gains as much with  C_jj + T_ij' P_ii^-1 T_ij  and  G_j + V_i P_ii^-1 T_ij
in the places of C_jj and G_j. Of the outputs only the inner products of V and G are needed, so a
search holds two (d, d) matrices:

    B = [-P  T; T' C]    and    S = [V G]'[V G]      (rows and columns where they stand in A)

A group goes or comes by one sweep of both, a rank-1 change for single columns. Each exchange lowers
f, and ends the search where it does not.

Source: section 3 of arXiv 2403.12983, with one group at a time and all pairs weighed exactly; the
sweep operator is Beaton's (Goodnight, "A Tutorial on the SWEEP Operator", 1979). fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmperf.ops.eliminate import removal_costs
from slmperf.prune.layer.refit import Problem

_LEAST = 1e-9  # an exchange that lowers f by less than this share of it is rounding
_PAIRS = 1 << 22  # values of pairs weighed at a time


def search(problem: Problem, mask: Tensor, family: Tensor, swaps: int) -> Tensor:
    """Exchange at most `swaps` groups: mask (m,) of the kept ones -> a mask of no larger f.

    family (m,): groups change places with those of their own family.
    """
    if bool(mask.all()):
        return mask
    size = problem.size
    before = best = problem.objective(mask)
    swept, products = _tableau(problem, mask)
    new = mask.clone()
    for _ in range(swaps):
        change, leaves, comes = _best_pair(swept, products, new, family, size)
        if not change < -_LEAST * best:
            break
        _sweep(swept, products, leaves, size, sign=-1)
        _sweep(swept, products, comes, size, sign=1)
        new[leaves], new[comes] = False, True
        best += change
    # What many sweeps have rounded is not trusted: f itself decides.
    return new if problem.objective(new) < before else mask


def _tableau(problem: Problem, mask: Tensor) -> tuple[Tensor, Tensor]:
    """B and S of a mask, (d, d) each."""
    columns = mask.repeat_interleave(problem.size)
    kept, removed = columns.nonzero().reshape(-1), (~columns).nonzero().reshape(-1)
    swept = problem.gram.to(torch.float64, copy=True)
    swept.diagonal().add_(problem.pull)
    own, beside = swept[kept][:, kept], swept[kept][:, removed]
    factor = torch.linalg.cholesky(own)
    del own
    solved = torch.cholesky_solve(beside, factor)
    rest = swept[removed][:, removed] - beside.T @ solved
    swept[kept[:, None], kept] = -torch.cholesky_inverse(factor)
    swept[kept[:, None], removed] = solved
    swept[removed[:, None], kept] = solved.T
    swept[removed[:, None], removed] = rest
    both = torch.empty_like(problem.live)
    both[:, kept] = problem.live[:, kept] + problem.live[:, removed] @ solved.T
    both[:, removed] = problem.live[:, removed] @ rest
    return swept, both.T @ both


def _best_pair(
    swept: Tensor, products: Tensor, mask: Tensor, family: Tensor, size: int
) -> tuple[float, int, int]:
    """(change of f, the group that leaves, the group that comes) of the best exchange."""
    groups = len(mask)
    b = swept.view(groups, size, groups, size)
    s = products.view(groups, size, groups, size)
    kept, removed = mask.nonzero().reshape(-1), (~mask).nonzero().reshape(-1)
    pivot, square = -b[kept, :, kept], s[kept, :, kept]  # P_ii and V_i'V_i
    cost = removal_costs(pivot, square)
    inverse = torch.linalg.inv(pivot)
    own_c, own_s = b[removed, :, removed], s[removed, :, removed]
    best = (float("inf"), -1, -1)
    for part in torch.arange(len(kept)).split(max(1, _PAIRS // (len(removed) * size * size))):
        some = kept[part]
        t = b[some[:, None], :, removed]  # (i, j, s, s): T_ij
        moved = inverse[part, None] @ t
        c = own_c + t.mT @ moved
        cross = s[some[:, None], :, removed].mT @ moved  # G_j' V_i P_ii^-1 T_ij
        g = own_s + cross + cross.mT + moved.mT @ (square[part, None] @ moved)
        gain = removal_costs(c.flatten(0, 1), g.flatten(0, 1)).view(len(some), len(removed))
        change = cost[part, None] - gain
        change = change.masked_fill(family[some, None] != family[removed], float("inf"))
        change = change.masked_fill(change.isnan(), float("inf"))
        least = int(change.argmin())
        i, j = divmod(least, len(removed))
        if float(change[i, j]) < best[0]:
            best = float(change[i, j]), int(some[i]), int(removed[j])
    return best


def _sweep(swept: Tensor, products: Tensor, group: int, size: int, sign: int) -> None:
    """Let a group in (sign 1) or out (sign -1), in place."""
    own = slice(group * size, (group + 1) * size)
    inverse = torch.linalg.inv(swept[own, own])
    row = swept[own].clone()
    share = inverse @ row  # what the other columns take of the group's
    swept.addmm_(row.T, share, alpha=-1)
    swept[own] = sign * share
    swept[:, own] = sign * share.T
    swept[own, own] = -inverse
    # The products: [V G] changes by - z share, with z the group's own columns.
    share[:, own] = torch.eye(size, dtype=share.dtype, device=share.device) - sign * inverse
    line = products[own].clone()
    inner = line[:, own].clone()
    products.addmm_(share.T, inner @ share)
    products.addmm_(share.T, line, alpha=-1).addmm_(line.T, share, alpha=-1)
