"""OSSCAR's elimination as its paper writes it: what `slmperf.prune.osscar` must equal and outrun.

    remove the `step` cheapest inputs by ||V_j||^2 / (2 M_jj), then
    V <- V - V_P M_PP^-1 M_P:,   M <- M - M_:P M_PP^-1 M_P:

with all of V and M brought up to date at each step: 2 r d (d + N) operations, bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(
    gram: Tensor, weight: Tensor, keep: int, *, step: int = 1, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """(kept (keep,), refitted weight (N, keep)): gram (d, d), weight (N, d), computed in fp64.

    step: inputs removed at once; what does not divide is spread over the first steps.
    """
    size = gram.shape[0]
    damped = gram.double().clone()
    damped.diagonal().add_(damping * float(damped.diagonal().mean()))
    factor = torch.linalg.cholesky(damped)
    identity = torch.eye(size, dtype=torch.float64, device=gram.device)
    half = torch.linalg.solve_triangular(factor, identity, upper=False)
    inverse, current = half.T @ half, weight.double().clone()
    alive = torch.ones(size, dtype=torch.bool, device=gram.device)
    steps = max(1, (size - keep) // step)
    for number in range(steps):
        count = (size - keep) // steps + (number < (size - keep) % steps)
        cost = (current.square().sum(0) / inverse.diagonal() / 2).masked_fill(~alive, torch.inf)
        gone = cost.topk(count, largest=False).indices
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        current -= current[:, gone] @ share
        inverse -= inverse[:, gone] @ share
        alive[gone] = False
        current[:, gone], inverse[gone], inverse[:, gone] = 0.0, 0.0, 0.0
    kept = alive.nonzero().reshape(-1)
    right = (weight.double() @ damped)[:, kept]
    return kept, torch.cholesky_solve(right.T, torch.linalg.cholesky(damped[kept][:, kept])).T


def layer_problem(
    kind: str, seed: int, inputs: int, outputs: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """A Gram matrix (d, d) and a weight (N, d), fp64, of inputs of one kind.

    random      independent normal inputs
    glu         silu(z A) * (z B) of a third as many hidden channels z, as in a gated MLP
    correlated  normal inputs, mixed, of unequal size
    """
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    if kind == "glu":
        hidden = max(4, inputs // 3)
        z = normal(tokens, hidden) / hidden**0.5
        gate, up = z @ normal(hidden, inputs), z @ normal(hidden, inputs)
        x = torch.nn.functional.silu(gate) * up
    elif kind == "correlated":
        scale = torch.rand(inputs, generator=make, dtype=torch.float64) + 0.1
        x = normal(tokens, inputs) @ normal(inputs, inputs) * scale
    else:
        x = normal(tokens, inputs)
    return x.T @ x, normal(outputs, inputs)
