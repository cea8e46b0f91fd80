"""eliminate: the next pivots of a Cholesky factorisation with the cheapest group first.

The inner loop of `slmperf.prune.osscar`. M (d, d) is the inverse of a damped Gram matrix and
Q = V'V (d, d), where V (N, d) is the current optimum of a linear layer. Taking group g (s
neighbouring columns) out of the layer and refitting all others

    costs 1/2 tr(M_gg^-1 Q_gg)    and with  F F' = M_gg,  L = F^-1 M_g:,  Z = F^-1 Q_g:,
                                            U = Z - 1/2 (Z_:g F^-T) L                      makes
    M <- M - L'L                  Q <- Q - U'L - L'U

The cheapest group goes, then the cheapest of those that are left. Of M and Q only the rows of the
group that goes and the diagonal blocks are brought up to date at each pivot; all other rows wait
for the caller, who does many pivots at once by matrix products.

    inverse, square   M and Q, fp64 (d, d). Columns stay where they are, blocks of s rows are
                      exchanged: block b holds the rows of group order[b], and place[order[b]] = b.
                      The first `start` blocks are the L and U of the pivots before this call; the
                      blocks up to `active` are up to date with them; what follows is not
    blocks_m, blocks_q   (m, s, s) fp64, the diagonal blocks of M and Q, always up to date
    alive             (m,) bool: groups that may go
    family, quota     (m,) int64, (f,) int64: how many groups may still go from each family
    -> costs          (steps,) fp64: of the pivots made, which are order[start : start + made].
                      Then inf: a pivot whose rows are not up to date ends the call. NaN where a
                      diagonal block has lost definiteness; nothing after it is of use

Everything but family is changed in place. Formula: arXiv 2403.12983, one group at a time; the
lazy updates are those of LAPACK's pivoted Cholesky (Hammarling, Higham, Lucas 2007).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.check import check_shapes
from slmperf.ops.routing import Implementation, routes

SCHEMA = (
    "(Tensor(a!) inverse, Tensor(b!) square, Tensor(c!) blocks_m, Tensor(d!) blocks_q,"
    " Tensor(e!) order, Tensor(f!) place, Tensor(g!) alive, Tensor family, Tensor(h!) quota,"
    " int start, int steps, int active) -> Tensor"
)


def eliminate_reference(
    inverse: Tensor,
    square: Tensor,
    blocks_m: Tensor,
    blocks_q: Tensor,
    order: Tensor,
    place: Tensor,
    alive: Tensor,
    family: Tensor,
    quota: Tensor,
    start: int,
    steps: int,
    active: int,
) -> Tensor:
    """The pivots in plain torch. Nothing waits for a GPU where all of the rows are current."""
    groups, size, _ = blocks_m.shape
    costs = inverse.new_full((steps,), float("inf"))
    within = torch.arange(size, device=inverse.device)
    for step in range(steps):
        removable = alive & (quota > 0)[family]
        cost = removal_costs(blocks_m, blocks_q).masked_fill(~removable, float("inf"))
        group = cost.argmin().reshape(1)
        block = place[group]
        if active < groups and int(block) >= active:
            break
        costs[step] = cost[group][0]
        pivot = start + step
        columns, rows = group * size + within, block * size + within
        done = slice(start * size, pivot * size)
        done_l, done_u = inverse[done], square[done]
        ahead_l, ahead_u = done_l[:, columns].T, done_u[:, columns].T
        m = inverse[rows] - ahead_l @ done_l
        q = square[rows] - ahead_u @ done_l - ahead_l @ done_u
        factor, _ = torch.linalg.cholesky_ex(m[:, columns])
        new_l = torch.linalg.solve_triangular(factor, m, upper=False)
        z = torch.linalg.solve_triangular(factor, q, upper=False)
        s = torch.linalg.solve_triangular(factor, z[:, columns].T, upper=False)
        new_u = z - s @ new_l / 2

        first = slice(pivot * size, (pivot + 1) * size)
        inverse[rows], square[rows] = inverse[first].clone(), square[first].clone()
        inverse[first], square[first] = new_l, new_u
        moved = order[pivot : pivot + 1].clone()
        order[block], place[moved] = moved, block
        order[pivot : pivot + 1] = group
        place[group] = pivot
        alive[group] = False
        quota[family[group]] -= 1
        of_l = new_l.view(size, groups, size).transpose(0, 1)
        of_u = new_u.view(size, groups, size).transpose(0, 1)
        cross = of_u.transpose(1, 2) @ of_l
        blocks_m -= of_l.transpose(1, 2) @ of_l
        blocks_q -= cross + cross.transpose(1, 2)
    return costs


def removal_costs(blocks_m: Tensor, blocks_q: Tensor) -> Tensor:
    """1/2 tr(M_gg^-1 Q_gg) >= 0 of blocks (m, s, s), NaN where M_gg is not definite: (m,)."""
    if blocks_m.shape[1] == 1:
        m = blocks_m.reshape(-1)
        return (blocks_q.reshape(-1) / m / 2).clamp(min=0.0).masked_fill(~(m > 0), float("nan"))
    factor, info = torch.linalg.cholesky_ex(blocks_m)
    cost = torch.cholesky_solve(blocks_q, factor).diagonal(dim1=1, dim2=2).sum(1) / 2
    return cost.clamp(min=0.0).masked_fill(info != 0, float("nan"))


# The C++ loop is for single columns, where thousands of pivots are small; groups are few.
ROUTES = routes(
    "eliminate",
    {"cpu": "cpu", "cuda": "reference"},
    cpu=Implementation(("cpu",), (torch.float64,), "native"),
    reference=Implementation((), (torch.float64,)),
)


def _fake(inverse: Tensor, *others: Any) -> Tensor:
    return inverse.new_empty((others[-2],))  # steps


torch.library.define("slmperf::eliminate.cpu", SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.define("slmperf::eliminate.reference", SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.register_fake("slmperf::eliminate.cpu", _fake)
torch.library.register_fake("slmperf::eliminate.reference", _fake)
torch.library.impl("slmperf::eliminate.reference", ("cpu", "cuda"))(eliminate_reference)


def eliminate(
    inverse: Tensor,
    square: Tensor,
    blocks_m: Tensor,
    blocks_q: Tensor,
    order: Tensor,
    place: Tensor,
    alive: Tensor,
    family: Tensor,
    quota: Tensor,
    *,
    start: int,
    steps: int,
    active: int,
    impl: str = "auto",
) -> Tensor:
    """The next `steps` pivots, or fewer: their costs (steps,), inf for those not made.

    Shapes and meanings are above. impl: "auto" takes "cpu" (C++) for single columns on the CPU,
    else "reference". ValueError for shapes that do not fit, NotImplementedError for another dtype
    than fp64 or an implementation that cannot run here.
    """
    check_shapes(
        "eliminate",
        blocks_m=(blocks_m, "m s s"),
        blocks_q=(blocks_q, "m s s"),
        order=(order, "m"),
        place=(place, "m"),
        alive=(alive, "m"),
        family=(family, "m"),
        inverse=(inverse, "d d"),
        square=(square, "d d"),
    )
    groups, size, _ = blocks_m.shape
    if groups * size != inverse.shape[0]:
        raise ValueError(
            f"eliminate: blocks_m is {tuple(blocks_m.shape)}, expected m * s = {inverse.shape[0]}"
        )
    if not 0 <= start <= active <= groups or not 0 <= steps <= groups - start:
        raise ValueError(
            f"eliminate: start {start}, steps {steps}, active {active} do not fit {groups} groups"
        )
    if impl == "auto" and size > 1:
        impl = "reference"
    name = ROUTES.choose(impl, inverse)
    if name == "cpu" and size > 1:
        raise NotImplementedError(f"eliminate: impl='cpu' takes groups of 1 column, found {size}")
    op = getattr(torch.ops.slmperf.eliminate, name)
    return op(
        inverse,
        square,
        blocks_m,
        blocks_q,
        order,
        place,
        alive,
        family,
        quota,
        start,
        steps,
        active,
    )
