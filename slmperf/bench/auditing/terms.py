"""What a loss is made of: its gradient as a sum of the gradients of known terms.

Per token t the gradient of a loss by the logits is sum_k a_tk * (gradient of term k at t). The a_tk
are found by least squares over the vocabulary, for each token by itself, so that neither token
weights nor the normaliser need be known in advance. Which terms there are is found by adding,
again and again, the one that explains most of what is left.

The gradients come from float64, where terms that nearly coincide (a student close to its teacher
makes all divergences alike) are still told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slmperf.ops import JSD, ForwardKL, ReverseKL, divergence_reference

Kind = ForwardKL | ReverseKL | JSD

TEMPERATURES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)
BETAS = (0.1, 0.25, 0.5, 0.75, 0.9)
_MOST_EXTRA = 4  # terms beyond the configured ones
_WORTH = 0.5  # a further term must leave at most this share of what was left
_STEADY = 0.05  # spread of a further term's weights over the rows
_SEARCH_ELEMENTS = 2**20  # rows x vocabulary on which terms are searched


class Head(NamedTuple):
    """The vocabulary's matrix (V, D) and bias, float64."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class Rows(NamedTuple):
    """Rows of the loss in float64: n tokens, V entries."""

    leaf: Tensor  # (n, D): the logits, D = V, or the hidden states below `head`
    head: Head | None  # (n, D) -> (n, V)
    teacher: Tensor | None  # (n, V) logits
    targets: Tensor | None  # (n,) int64, -100 where there is none
    same_position: Tensor | None  # (n,) int64: the labels without the shift by one

    def at(self, index: Tensor) -> Rows:
        """Some of the rows."""
        parts = (self.teacher, self.targets, self.same_position)
        chosen = [None if part is None else part[index] for part in parts]
        return Rows(self.leaf[index], self.head, *chosen)

    def logits(self, leaf: Tensor) -> Tensor:
        """Student logits (n, V)."""
        return leaf if self.head is None else self.head(leaf)


@dataclass(frozen=True)
class Term:
    """One known term: its name and its value per row, (n, V) logits -> (n,)."""

    name: str
    value: Callable[[Tensor, Rows], Tensor]
    kind: Kind | None = None  # of divergences
    temperature: float = 1.0

    def gradient(self, rows: Rows) -> Tensor:
        """(n, D) by the rows' leaf; 0 where the term is not defined."""
        leaf = rows.leaf.detach().requires_grad_()
        (found,) = torch.autograd.grad(self.value(rows.logits(leaf), rows).sum(), leaf)
        return found.nan_to_num(0.0, 0.0, 0.0)


def divergence_term(kind: Kind, temperature: float) -> Term:
    """D(teacher, student) of slmperf.ops.divergence."""
    name = {ForwardKL: "forward KL", ReverseKL: "reverse KL"}.get(type(kind), "")
    if isinstance(kind, JSD):
        name = f"JSD(beta {kind.beta:.4g})"

    def value(logits: Tensor, rows: Rows) -> Tensor:
        assert rows.teacher is not None
        return divergence_reference(logits, rows.teacher, kind=kind, temperature=temperature)

    return Term(_at(name, temperature), value, kind, temperature)


def _at(name: str, temperature: float) -> str:
    return name if temperature == 1 else f"{name} at temperature {temperature:.4g}"


def _cross_entropy(logits: Tensor, rows: Rows) -> Tensor:
    assert rows.targets is not None
    return F.cross_entropy(logits, rows.targets, reduction="none")


def _unshifted(logits: Tensor, rows: Rows) -> Tensor:
    assert rows.same_position is not None
    return F.cross_entropy(logits, rows.same_position, reduction="none")


def _uniform(logits: Tensor, rows: Rows) -> Tensor:
    value = -torch.log_softmax(logits, -1).mean(-1)
    return value if rows.targets is None else value * (rows.targets != -100)


def _entropy(logits: Tensor, rows: Rows) -> Tensor:
    log_q = torch.log_softmax(logits, -1)
    return -(log_q.exp() * log_q).sum(-1)


def _mean_square_error(logits: Tensor, rows: Rows) -> Tensor:
    assert rows.teacher is not None
    return (logits - rows.teacher).square().mean(-1)


def _total_variation(logits: Tensor, rows: Rows) -> Tensor:
    assert rows.teacher is not None
    return (torch.softmax(logits, -1) - torch.softmax(rows.teacher, -1)).abs().sum(-1) / 2


CROSS_ENTROPY = Term("cross entropy on labels", _cross_entropy)
UNIFORM = Term("label smoothing (cross entropy to uniform)", _uniform)
ALONE = (
    Term("z-loss (logsumexp^2)", lambda logits, rows: logits.logsumexp(-1).square()),
    Term("L2 of logits (mean square)", lambda logits, rows: logits.square().mean(-1)),
    Term("entropy of the student", _entropy),
)
UNSHIFTED = Term("cross entropy on labels of the same position", _unshifted)
WITH_TEACHER = (
    Term("mean square error of logits", _mean_square_error),
    Term("total variation", _total_variation),
)


def known_terms(rows: Rows, temperature: float) -> list[Term]:
    """What is looked for, given what the rows have."""
    terms = list(ALONE)
    if rows.targets is not None:
        terms = [CROSS_ENTROPY, UNIFORM, *terms]
    if rows.same_position is not None:
        terms.append(UNSHIFTED)
    if rows.teacher is not None:
        temperatures = sorted({*TEMPERATURES, temperature})
        terms += WITH_TEACHER
        kinds = (ForwardKL(), ReverseKL())
        terms += [divergence_term(kind, t) for t in temperatures for kind in kinds]
        terms += [divergence_term(JSD(b), t) for t in sorted({1.0, temperature}) for b in BETAS]
        terms += [divergence_term(JSD(0.5), t) for t in temperatures if t not in (1.0, temperature)]
    return terms


class Fit(NamedTuple):
    """The terms that were found; per-row coefficients (n, K), NaN where a term has no gradient."""

    terms: list[Term]
    coefficients: Tensor
    shares: list[float]  # norm of each term's part of the gradient, by the gradient's norm
    residue: float  # norm of what no term explains, by the gradient's norm


class _Explained:
    """Rows of a gradient less their projections on the terms taken so far."""

    def __init__(self, gradient: Tensor) -> None:
        self.left = gradient
        self.basis: list[Tensor] = []
        self.scale = float(gradient.norm())

    @property
    def residue(self) -> float:
        return float(self.left.norm()) / self.scale

    def direction(self, gradient: Tensor) -> Tensor:
        """Unit rows of what is new in a term; zero rows where nothing is."""
        size = gradient.norm(dim=-1, keepdim=True)
        new = gradient
        for _ in range(2):  # the second pass takes what rounding left of the first
            for taken in self.basis:
                new = new - (new * taken).sum(-1, keepdim=True) * taken
        norm = new.norm(dim=-1, keepdim=True)
        return torch.where(norm > 1e-9 * size, new / norm.clamp(min=1e-300), 0.0)

    def gain(self, direction: Tensor) -> float:
        """How much of what is left (squared) the direction explains."""
        return float((self.left * direction).sum(-1).square().sum())

    def take(self, direction: Tensor) -> None:
        self.left = self.left - (self.left * direction).sum(-1, keepdim=True) * direction
        self.basis.append(direction)


def _residue(rows: Rows, gradient: Tensor, terms: Sequence[Term]) -> float:
    explained = _Explained(gradient)
    for term in terms:
        explained.take(explained.direction(term.gradient(rows)))
    return explained.residue


def fit(
    rows: Rows,
    gradient: Tensor,
    weights: Tensor,
    configured: Sequence[Term],
    *,
    temperature: float,
    noise: float,
) -> Fit:
    """Find the terms of a gradient (n, D), rows of zeros left out by the caller.

    weights      (n,) what the rows are expected to weigh
    configured   the terms that are expected
    temperature  at which divergences are looked for beside the usual ones
    noise        relative norm below which nothing is looked for
    """
    few = max(8, min(256, _SEARCH_ELEMENTS // gradient.shape[1]))
    index = _sample(len(gradient), few, gradient.device)
    known = known_terms(rows, temperature)
    terms = _search(rows.at(index), gradient[index], list(configured), known, noise)
    index = _sample(len(gradient), 8 * few, gradient.device)
    some, part, weights = rows.at(index), gradient[index], weights[index]
    found = _solve(some, part, terms)
    if terms and found.residue > noise:
        # A term that merely resembles something unknown comes with another weight in every row.
        main = max(range(len(terms)), key=found.shares.__getitem__)
        mains = found.coefficients[:, main]
        kept = [
            term
            for k, term in enumerate(terms)
            if term in configured
            or spread(found.coefficients[:, k] / weights) < _STEADY
            or (k != main and spread(found.coefficients[:, k] / mains) < _STEADY)
        ]
        if kept != terms:
            found = _solve(some, part, kept)
    everywhere = gradient.new_full((len(gradient), len(found.terms)), math.nan)
    everywhere[index] = found.coefficients
    return found._replace(coefficients=everywhere)


def spread(values: Tensor) -> float:
    """Distance of the quartiles of the finite values other than 0, by their median; 0 for none."""
    values = values[values.isfinite() & (values != 0)]
    if len(values) == 0:
        return 0.0
    low, middle, high = (float(values.quantile(q)) for q in (0.25, 0.5, 0.75))
    return (high - low) / abs(middle) if middle else math.inf


def _solve(rows: Rows, gradient: Tensor, terms: list[Term]) -> Fit:
    if not terms:
        return Fit([], gradient.new_zeros(len(gradient), 0), [], 1.0)
    parts = torch.stack([term.gradient(rows) for term in terms], -1)
    coefficients = _least_squares(parts, gradient)
    filled = coefficients.nan_to_num()
    scale = float(gradient.norm())
    sizes = parts.norm(dim=1) * filled
    left = gradient - (parts @ filled[..., None])[..., 0]
    shares = [float(sizes[:, k].norm()) / scale for k in range(len(terms))]
    return Fit(terms, coefficients, shares, float(left.norm()) / scale)


def _sample(rows: int, wanted: int, device: torch.device) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, wanted), device=device).round().long()


def _search(
    rows: Rows, gradient: Tensor, configured: list[Term], known: list[Term], noise: float
) -> list[Term]:
    explained = _Explained(gradient)
    for term in configured:
        explained.take(explained.direction(term.gradient(rows)))
    added: list[Term] = []
    gradients: list[Tensor] = []
    while explained.residue > noise and len(added) < _MOST_EXTRA:
        gradients = gradients or [term.gradient(rows) for term in known]
        gains = [explained.gain(explained.direction(one)) for one in gradients]
        # The earliest, simplest one of those that explain the same.
        best = next(k for k, gain in enumerate(gains) if gain >= max(gains) * (1 - 1e-6))
        if 1 - gains[best] / float(explained.left.norm()) ** 2 > _WORTH**2:
            break
        explained.take(explained.direction(gradients[best]))
        added.append(known[best])
    del gradients
    found = [*configured, *added]
    # Several divergences may stand for one at a temperature between those that were tried.
    several = sum(term.kind is not None for term in added) > 1
    if (explained.residue > noise or several) and rows.teacher is not None:
        few = _sample(len(gradient), max(4, len(gradient) // 8), gradient.device)
        others = [term for term in found if term.kind is None]
        tuned = _tune(rows.at(few), gradient[few], found, others)
        if _residue(rows, gradient, [tuned, *others]) < max(noise, 1e-3 * explained.residue):
            # What was taken for want of the right number goes; what was configured stays, to be
            # found at 0.
            return [*configured, *(t for t in [tuned, *others] if t not in configured)]
    return found


def _tune(rows: Rows, gradient: Tensor, found: Sequence[Term], others: Sequence[Term]) -> Term:
    """The divergence which, with its temperature or beta set freely, leaves least."""

    def left(term: Term) -> float:
        return _residue(rows, gradient, [term, *others])

    def best(make: Callable[[float], Term], low: float, high: float) -> Term:
        grid = torch.linspace(low, high, 17).tolist()
        middle = min(range(17), key=lambda i: left(make(grid[i])))
        lower, upper = grid[max(0, middle - 1)], grid[min(16, middle + 1)]
        return make(_golden(lambda x: left(make(x)), lower, upper))

    kinds: set[Kind] = {ForwardKL(), ReverseKL()}
    kinds |= {term.kind for term in found if term.kind is not None}
    temperatures = {term.temperature for term in found if term.kind is not None} | {1.0}
    tries = [
        best(lambda x, kind=kind: divergence_term(kind, math.exp(x)), -1.6, 2.7)  # type: ignore[misc]
        for kind in sorted(kinds, key=repr)
    ]
    tries += [
        best(lambda x, t=t: divergence_term(JSD(x), t), 0.02, 0.98)  # type: ignore[misc]
        for t in sorted(temperatures)
    ]
    term = min(tries, key=left)
    assert term.kind is not None
    kind = term.kind
    if isinstance(kind, JSD):
        kind = JSD(float(f"{kind.beta:.4g}"))
    short = divergence_term(kind, float(f"{term.temperature:.4g}"))
    return short if left(short) <= 2 * left(term) + 1e-9 else term


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley between low and high is smallest."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > 1e-8:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2


def _least_squares(parts: Tensor, gradient: Tensor) -> Tensor:
    """Coefficients (n, K) of parts (n, D, K) that make up gradient (n, D); NaN for zero parts."""
    sizes = parts.norm(dim=1)
    there = sizes > 0
    unit = parts / torch.where(there, sizes, 1.0)[:, None, :]
    q, r = torch.linalg.qr(unit)
    solved = torch.linalg.pinv(r, rtol=1e-13) @ (q.transpose(-1, -2) @ gradient[..., None])
    return torch.where(there, solved[..., 0] / torch.where(there, sizes, 1.0), math.nan)
