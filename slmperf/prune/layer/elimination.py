"""osscar: one-shot structured pruning of a linear layer's inputs, with an exact refit.

The problem is in refit.py. Let M be (H + mu I)^-1. Taking the columns P out of the current optimum
V and refitting all others exactly

    costs 1/2 tr(V_P M_PP^-1 V_P'),   makes V - V_P M_PP^-1 M_P: of V,   M - M_:P M_PP^-1 M_P: of M

so the cheapest group goes, one at a time: a Cholesky factorisation of M that picks its pivots by
cost. Of M and of Q = V'V only what the next pivots need is brought up to date. The rows likely to
go soon are kept current, `_ROUND` pivots at a time (slmperf.ops.eliminate makes the pivots); all
others wait until they become likely, and most never do: r pivots cost about 3 r^2 d operations in
matrix products, in place of the 6 r d^2 of a factorisation that updates everything.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.models.structure import group_columns
from slmperf.ops.eliminate import eliminate
from slmperf.prune.layer.refit import Problem, Pruned
from slmperf.prune.layer.swaps import search

_ROUND = 32  # pivots between two updates of the current rows
# Rows become current in lots, so that the products are wide: up to so many of the cheapest, as soon
# as a pivot was not among them or fewer than the other number are left.
_CURRENT, _FEWEST = 384, 64


@torch.no_grad()
def osscar(
    gram: Tensor,
    weight: Tensor,
    *,
    group_size: int = 1,
    keep: int | None = None,
    target: Tensor | None = None,
    damping: float = 0.01,
    swaps: int = 0,
    families: Tensor | None = None,
) -> Pruned:
    """Choose the `keep` groups of inputs that a linear layer keeps, and its refitted weight.

    gram: (d, d) fp32 or fp64, X'X over the calibration tokens, unnormalised (only relative damping
        is meaningful).
    weight: (N, d), as torch.nn.Linear holds it. Groups are `group_size` neighbouring columns.
    keep: groups to keep. None removes nothing, but orders all groups.
    target: (N, d), Y'X for wanted outputs Y other than X W'. The layer is then first refitted to Y,
        and `error` is measured from that refit.
    damping: mu over the mean of gram's diagonal. A matrix that is then still close to singular gets
        the least of 1e-9, 1e-8, ... 1e-2 that cures it.
    swaps: at most so many exchanges of a kept group for a removed one afterwards, each the best of
        all pairs, as long as f falls (swaps.py). `order` and `curve` remain those of the
        elimination.
    families: (m,) int64, the family of each group; then the same number stays in each: `keep` over
        the number of families; without `keep` one of every family goes before the next one does.
        For query heads, the KV head that they read.

    A smaller `keep` continues the same order: removals are nested. Groups whose inputs are all zero
    in the calibration data go first and cost nothing, the smallest weights first; dead inputs that
    stay keep their original weights. On a GPU, everything is computed there.

    Raises InputError for sizes that do not fit, non-finite values, and a gram that is not symmetric
    or not positive semi-definite.
    """
    problem = Problem("osscar", gram, weight, group_size=group_size, target=target, damping=damping)
    groups = problem.groups
    if keep is not None and not (isinstance(keep, Integral) and 1 <= keep <= groups):
        raise InputError(f"osscar: wanted keep in 1..{groups}, found {keep}")
    if not isinstance(swaps, Integral) or swaps < 0:
        raise InputError(f"osscar: wanted swaps >= 0, found {swaps}")
    family, quota, rounds = _families(groups, keep, families, gram.device)

    free = problem.dead_groups()
    free = free[:0] if rounds > 1 else _within(free, family, quota)
    inverse = problem.inverse()
    square, whole = problem.square()
    order, costs = _eliminate(inverse, square, group_size, free, family, quota, rounds)
    del square
    curve = torch.cat([costs.new_zeros(len(free)), costs.cumsum(0)])

    mask = torch.ones(groups, dtype=torch.bool, device=gram.device)
    if keep is not None:
        mask[order] = False
    columns = mask.repeat_interleave(group_size)
    if keep is None or not len(costs):
        fitted = problem.refit(columns)
    else:
        removed = group_columns(order[len(free) :], group_size)
        fitted = problem.refit_by(inverse[: len(removed)], removed, columns)
    del inverse
    if keep is not None and swaps:
        exchanged = search(problem, mask, family, swaps)
        if not torch.equal(exchanged, mask):
            mask = exchanged
            fitted = problem.refit(mask.repeat_interleave(group_size))
    return problem.result(mask, fitted, whole, order, curve)


def _families(
    groups: int, keep: int | None, families: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """(m,) family of each group, numbered from 0; (f,) how many leave each at a time; how often."""
    if families is None:
        leave = groups if keep is None else groups - keep
        family = torch.zeros(groups, dtype=torch.int64, device=device)
        return family, torch.tensor([leave], device=device), 1
    families = torch.as_tensor(families)
    if families.shape != (groups,) or families.is_floating_point():
        raise InputError(
            f"osscar: families is {tuple(families.shape)} {families.dtype}, "
            f"wanted ({groups},) int64"
        )
    family = families.to(device).unique(return_inverse=True)[1]
    sizes = family.bincount()
    least, most = int(sizes.min()), int(sizes.max())
    if keep is None:
        if least != most:
            raise InputError(
                f"osscar: families have {least} to {most} groups, wanted as many in each, or keep"
            )
        return family, torch.ones_like(sizes), most
    each, rest = divmod(keep, len(sizes))
    if rest or each > least:
        raise InputError(
            f"osscar: keep is {keep}, wanted a multiple of the {len(sizes)} families, "
            f"at most {least} from each"
        )
    return family, sizes - each, 1


def _within(groups: Tensor, family: Tensor, quota: Tensor) -> Tensor:
    """The first of `groups` that their families can spare; `quota` is what they spare after it."""
    spared: list[int] = []
    for group in groups.tolist():
        if int(quota[family[group]]) > 0:
            quota[family[group]] -= 1
            spared.append(group)
    return groups.new_tensor(spared)


def _eliminate(
    inverse: Tensor,
    square: Tensor,
    group_size: int,
    free: Tensor,
    family: Tensor,
    quota: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Remove the groups `free`, then the cheapest, one at a time: (order, costs of the latter).

    `inverse` is M (d, d), `square` Q (d, d), both used up; the groups `free` are zero in Q and not
    coupled in M. `quota` (f,) says how many go from each family, `rounds` times over.
    """
    groups, device = inverse.shape[0] // group_size, inverse.device
    each = int(quota.sum())
    count = rounds * each
    # Single columns on a CPU; elsewhere launches cost more than the products that waiting saves.
    lazy = group_size == 1 and device.type == "cpu"
    state = {
        "blocks_m": _diagonal_blocks(inverse, group_size),
        "blocks_q": _diagonal_blocks(square, group_size),
        "order": torch.arange(groups, device=device),
        "place": torch.arange(groups, device=device),
        "alive": torch.ones(groups, dtype=torch.bool, device=device),
        "family": family,
        "quota": quota.clone(),
    }
    state["alive"][free] = False
    made, active, missed = 0, 0 if lazy else groups, False
    costs: list[Tensor] = []
    while made < count:
        if made and made % each == 0:
            state["quota"].copy_(quota)
        steps = min(_ROUND, each - made % each)
        if lazy and (missed or active - made < min(_FEWEST, count - made)):
            wanted = min(_CURRENT, 2 * (count - made))
            active = _activate(inverse, square, state, made, active, wanted)
        done = eliminate(inverse, square, **state, start=made, steps=steps, active=active)
        if bool(done.isnan().any()):
            raise InputError("osscar: gram is too close to singular, wanted a larger damping")
        done = done[done.isfinite()]
        if not len(done) and missed:
            raise InputError("osscar: gram and weight are too large, wanted a finite error in fp64")
        costs.append(done)
        _update(inverse, square, state["order"], group_size, made, made + len(done), active)
        made += len(done)
        missed = len(done) < steps
    order = torch.cat([free, state["order"][:made]])
    return order, torch.cat([inverse.new_empty(0), *costs])


def _activate(
    inverse: Tensor,
    square: Tensor,
    state: dict[str, Tensor],
    made: int,
    active: int,
    wanted: int,
) -> int:
    """Make the rows of the `wanted` cheapest groups current; the new end of the current rows."""
    order, place = state["order"], state["place"]
    removable = state["alive"] & (state["quota"] > 0)[state["family"]]
    cost = state["blocks_q"].reshape(-1) / state["blocks_m"].reshape(-1)
    cost = cost.masked_fill(~removable, float("inf"))
    cheapest = cost.topk(min(wanted, int(removable.sum())), largest=False).indices
    new = cheapest[place[cheapest] >= active]
    if not len(new):
        return active
    # The new rows change places with what stands right behind the current ones.
    end = active + len(new)
    from_ = place[new]
    there = order[active:end]
    stay = there[~torch.isin(there, new)]
    to = from_[from_ >= end]
    for matrix in (inverse, square):
        rows = matrix[from_]
        matrix[to] = matrix[place[stay]]
        matrix[active:end] = rows
    order[to], place[stay] = stay, to
    order[active:end] = new
    place[new] = torch.arange(active, end)
    _bring_up(inverse, square, slice(0, made), slice(active, end), new)
    return end


def _update(
    inverse: Tensor,
    square: Tensor,
    order: Tensor,
    group_size: int,
    start: int,
    made: int,
    active: int,
) -> None:
    """Bring the current rows that are left up to date with the pivots start..made."""
    done = slice(start * group_size, made * group_size)
    left = slice(made * group_size, active * group_size)
    columns = group_columns(order[made:active], group_size)
    _bring_up(inverse, square, done, left, columns)


def _bring_up(inverse: Tensor, square: Tensor, done: slice, rows: slice, columns: Tensor) -> None:
    """Update the rows of M and Q that belong to `columns` with the L and U in the rows `done`."""
    done_l, done_u = inverse[done], square[done]
    ahead_l, ahead_u = done_l[:, columns].T, done_u[:, columns].T
    inverse[rows].addmm_(ahead_l, done_l, alpha=-1)
    square[rows].addmm_(ahead_u, done_l, alpha=-1).addmm_(ahead_l, done_u, alpha=-1)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Copies of the diagonal blocks: (m * size, m * size) -> (m, size, size)."""
    groups = matrix.shape[0] // size
    index = torch.arange(groups, device=matrix.device)
    return matrix.view(groups, size, groups, size)[index, :, index].clone()
