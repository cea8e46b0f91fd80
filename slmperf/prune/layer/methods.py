"""methods: the ways to choose which groups of inputs a linear layer keeps, behind one interface.

    osscar            exact greedy elimination with a refit (slmperf.prune.layer.elimination)
    osscar+swaps      the same, then single swaps of a kept and a removed group while they help
    norm              the groups with the largest activations (Minitron's score), not refitted
    norm+refit        the same groups, their weights refitted
    magnitude         the groups whose columns of the weight are largest, not refitted
    magnitude+refit   the same groups, their weights refitted

Minitron's score of a group is sqrt(sum over sequences of (mean over its tokens of |a|)^2), with the
L2 norm of the group's inputs for |a| (Muralidharan et al., "Compact Language Models via Pruning and
Knowledge Distillation", 2024, arXiv 2407.14679). `slmperf.calibrate` gathers it with the Gram.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.prune.layer.elimination import osscar
from slmperf.prune.layer.refit import Pruned, keep_groups

_SWAPS = 30  # at most so many where the caller says no number; OSSCAR's released code has 30 rounds


@dataclass(frozen=True)
class LayerProblem:
    """One layer, and how much of it stays. Tensors as `osscar` takes them."""

    gram: Tensor  # (d, d)
    weight: Tensor  # (N, d)
    keep: int | None  # groups; None: all of them stay, but are ordered
    group_size: int = 1  # input columns
    target: Tensor | None = None  # (N, d)
    families: Tensor | None = None  # (m,) int64: the same number leaves each
    scores: Tensor | None = None  # (m,): how active each group is, larger is more
    damping: float = 0.01
    swaps: int = 0


Method = Callable[[LayerProblem], Pruned]


def highest(scores: Tensor, keep: int, families: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `keep` groups of the largest scores, the same number of each family.

    scores: (m,). Returns (kept ascending, removed from the lowest score up), int64 on the CPU;
    of equal scores the first group stays.
    """
    scores = scores.detach().double().cpu()
    ranked = torch.argsort(scores, descending=True, stable=True)
    if families is None:
        chosen = ranked[:keep]
    else:
        each = keep // len(families.unique())
        of = families.cpu()[ranked]
        chosen = torch.cat([ranked[of == family][:each] for family in of.unique()])
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[chosen] = True
    return stays.nonzero().reshape(-1), ranked[~stays[ranked]].flip(0)


def _osscar(problem: LayerProblem, *, swaps: int = 0) -> Pruned:
    return osscar(
        problem.gram,
        problem.weight,
        group_size=problem.group_size,
        keep=problem.keep,
        target=problem.target,
        damping=problem.damping,
        swaps=problem.swaps or swaps,
        families=problem.families,
    )


def _by_norm(problem: LayerProblem, *, refit: bool) -> Pruned:
    if problem.scores is None:
        raise InputError(
            f"norm: wanted activation scores of groups of {problem.group_size}, found none"
        )
    return _scored(problem, problem.scores, refit)


def _by_magnitude(problem: LayerProblem, *, refit: bool) -> Pruned:
    groups = problem.weight.shape[1] // problem.group_size
    columns = problem.weight.float().square().sum(0, dtype=torch.float64)
    return _scored(problem, columns.view(groups, problem.group_size).sum(1), refit)


def _scored(problem: LayerProblem, scores: Tensor, refit: bool) -> Pruned:
    kept, order = highest(scores, problem.keep or 0, problem.families)
    if problem.keep is None:
        kept = torch.arange(len(scores))
    result = keep_groups(
        problem.gram,
        problem.weight,
        kept,
        group_size=problem.group_size,
        target=problem.target,
        damping=problem.damping,
        refit=refit,
    )
    return result._replace(order=order)


METHODS: dict[str, Method] = {
    "osscar": _osscar,
    "osscar+swaps": partial(_osscar, swaps=_SWAPS),
    "norm": partial(_by_norm, refit=False),
    "norm+refit": partial(_by_norm, refit=True),
    "magnitude": partial(_by_magnitude, refit=False),
    "magnitude+refit": partial(_by_magnitude, refit=True),
}
