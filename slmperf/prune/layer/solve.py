"""solve: one layer solved by a method, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slmperf.calibrate import Gram
from slmperf.check import InputError
from slmperf.prune.block import Groups
from slmperf.prune.layer.methods import METHODS, LayerProblem
from slmperf.prune.layer.refit import Pruned, keep_groups
from slmperf.prune.results import LayerPruned


@dataclass(frozen=True)
class Solver:
    """How layers are solved; InputError for settings that no method takes.

    known: layers solved before for fewer groups, by name: then what stays is read from their
        orders, and only the refit is new.
    """

    method: str
    damping: float
    swaps: int
    known: Mapping[str, LayerPruned] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method: wanted one of {', '.join(METHODS)}, found {self.method!r}")
        if not 0 <= self.damping < float("inf"):
            raise InputError(f"damping: wanted a finite number >= 0, found {self.damping}")
        if self.swaps < 0:
            raise InputError(f"swaps: wanted a number >= 0, found {self.swaps}")

    def __call__(
        self, name: str, gram: Gram, weight: Tensor, groups: Groups, gram_seconds: float
    ) -> tuple[Pruned, LayerPruned]:
        """The solution and its record; errors name the layer.

        weight: (N, d). A layer without a token keeps its largest weights.
        """
        start = time.perf_counter()
        matrix = gram.matrix.to(weight.device)
        method = self.method if gram.tokens else "magnitude"
        problem = LayerProblem(
            matrix,
            weight,
            groups.keep,
            group_size=groups.group_size,
            target=None if gram.target is None else gram.target.to(weight.device),
            families=groups.families,
            scores=gram.scores if gram.group_size == groups.group_size else None,
            damping=self.damping,
            swaps=self.swaps,
        )
        try:
            if name in self.known:
                result = _prefix(problem, self.known[name])
            else:
                result = METHODS[method](problem)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if not bool(torch.isfinite(result.weight).all()):
            raise InputError(f"{name}: its refitted weight is beyond what {weight.dtype} holds")
        energy = _energy(matrix, weight, result)
        curve = result.curve / energy if energy > 0 else torch.zeros_like(result.curve)
        return result, LayerPruned(
            name=name,
            method=method,
            groups=weight.shape[1] // groups.group_size,
            group_size=groups.group_size,
            kept=tuple(result.kept.tolist()),
            order=tuple(result.order.tolist()),
            energy=energy,
            error=result.error,
            relative_error=result.relative_error,
            curve=tuple(curve.tolist()),
            tokens=gram.tokens,
            gram_seconds=gram_seconds,
            solve_seconds=time.perf_counter() - start,
        )


def _prefix(problem: LayerProblem, known: LayerPruned) -> Pruned:
    """The first removals of an order, refitted; the curve is of the same units as osscar's."""
    removed = known.order[: known.groups - (problem.keep or 0)]
    stays = torch.ones(known.groups, dtype=torch.bool)
    stays[list(removed)] = False
    result = keep_groups(
        problem.gram,
        problem.weight,
        stays.nonzero().reshape(-1),
        group_size=problem.group_size,
        damping=problem.damping,
    )
    curve = torch.tensor(known.curve[: len(removed)], dtype=torch.float64) * known.energy
    return result._replace(order=torch.tensor(removed, dtype=torch.int64), curve=curve)


def _energy(matrix: Tensor, weight: Tensor, result: Pruned) -> float:
    """1/2 tr(W H W'), from the result where it tells: the product is dear in a wide layer."""
    if result.error > 0:
        return result.error / result.relative_error
    weight = weight.float()
    return float(((weight @ matrix.float()) * weight).sum(dtype=torch.float64) / 2)
