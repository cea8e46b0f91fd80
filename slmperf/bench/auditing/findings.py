"""What differs from the formula, said in sentences with the figure and, where known, the cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from slmperf.bench.auditing.outside import Outside
from slmperf.bench.auditing.report import Formula, FoundTerm, GradientError, Waste
from slmperf.bench.auditing.terms import Fit, Term, spread

_GRADIENT = 0.01  # relative error of the gradient that is worth a sentence
_WEIGHT = 0.01  # relative difference of a term's weight
_SPREAD = 0.02  # of the rows' weights
_UNEVEN = 0.05  # spread of a further term's weights over the rows
_WASTE = 0.1  # share of rows or positions


class Evidence(NamedTuple):
    """All that was measured about the loss of one step."""

    formula: Formula | None
    errors: Mapping[str, GradientError]
    fit: Fit
    terms: Sequence[FoundTerm]
    weights: Tensor  # (n,) float64 of all rows
    fitted: Tensor  # (m,) numbers of the rows of `fit`
    used: Tensor  # (n,) bool: rows with a gradient
    normaliser: float
    batch_size: int
    vocabulary: int
    noise: float
    outside: Outside
    waste: Waste


def found_terms(
    fitted: Fit, weights: Tensor, normaliser: float, configured: Sequence[tuple[Term, float]] | None
) -> list[FoundTerm]:
    """Weights of the terms before the division by N; weights (n,) of the fitted rows."""
    meant = {term.name: weight for term, weight in configured or ()}
    terms = []
    for k, (term, share) in enumerate(zip(fitted.terms, fitted.shares, strict=True)):
        ratio = (fitted.coefficients[:, k] / weights)[weights > 0]
        ratio = ratio[ratio.isfinite()]
        found = float(ratio.median()) * normaliser if len(ratio) else 0.0
        expected = meant.get(term.name, 0.0) if configured is not None else None
        terms.append(FoundTerm(term.name, expected, found, share))
    return terms


def findings(evidence: Evidence) -> Iterator[str]:
    """One sentence each, the gravest first."""
    yield from _terms(evidence)
    yield from _rows(evidence)
    yield from _outside(evidence.outside)
    yield from _gradient(evidence.errors)
    waste = evidence.waste
    unused = waste.rows - waste.used
    if unused > _WASTE * waste.rows:
        yield (
            f"{unused:,} of {waste.rows:,} rows of logits ({100 * unused / waste.rows:.1f}%) are "
            "computed for nothing: their gradient is zero"
        )
    if waste.padding is not None and waste.positions and waste.padding > _WASTE * waste.positions:
        yield (
            f"{waste.padding:,} of {waste.positions:,} positions "
            f"({100 * waste.padding / waste.positions:.1f}%) are padding, through the whole network"
        )


def _gradient(errors: Mapping[str, GradientError]) -> Iterator[str]:
    floor = max((e.norm for name, e in errors.items() if name.startswith("exact")), default=0.0)
    same = max((e.norm for name, e in errors.items() if name.startswith("same")), default=0.0)
    head = errors.get("head in float64 too")
    limit = max(_GRADIENT, 4 * floor)
    if same > limit:
        yield (
            f"the gradient is off by {100 * same:.2g}% of its norm although the logits are the "
            "same: the loss rounds (or does not compute what it says)"
        )
    elif head is not None and head.norm > limit:
        yield (
            f"the gradient is off by {100 * head.norm:.2g}% of its norm against a head in float64: "
            "logits are rounded before the loss"
        )


def _terms(evidence: Evidence) -> Iterator[str]:
    formula = evidence.formula
    if formula is None:
        return
    ratios: dict[str, float] = {}
    gone = max(10 * evidence.noise, 1e-5)
    divergences = {term.name for term in evidence.fit.terms if term.kind is not None}
    missing = [term for term in evidence.terms if term.configured and term.share <= gone]
    extra = [term for term in evidence.terms if not term.configured and term.share > gone]
    for lost in missing:
        other = next((term for term in extra if {term.name, lost.name} <= divergences), None)
        if other is None:
            yield f"{lost.name} is missing, weight {lost.configured:.4g} by the formula"
        else:
            extra.remove(other)
            yield (
                f"{other.name} with weight {other.found:.4g} stands in place of {lost.name} with "
                f"weight {lost.configured:.4g}"
            )
    unexplained = evidence.fit.residue > max(10 * evidence.noise, 1e-4)
    about = "something like " if unexplained else ""
    for term in extra:
        own = evidence.fit.coefficients[:, [one.name for one in evidence.terms].index(term.name)]
        uneven = spread(own / evidence.weights[evidence.fitted]) > _UNEVEN
        yield (
            f"{about}{term.name} with weight {term.found:.4g}, which the formula does not have"
            + (" (the median: it differs from row to row)" if uneven else "")
        )
    kept = [term for term in evidence.terms if term.configured and term.share > gone]
    for term in kept:
        assert term.configured is not None
        if abs(term.found / term.configured - 1) > max(_WEIGHT, 3 * evidence.noise):
            ratios[term.name] = term.found / term.configured
    common = len(ratios) == len(kept) and len(kept) > 1
    if common and max(ratios.values()) - min(ratios.values()) < _WEIGHT * min(ratios.values()):
        ratio = next(iter(ratios.values()))
        yield f"the loss is {ratio:.4g} times the formula's{_cause(ratio, evidence, formula)}"
    else:
        for term in kept:
            if term.name in ratios:
                ratio = ratios[term.name]
                cause = _cause(ratio, evidence, formula)
                yield (
                    f"{term.name} has weight {term.found:.4g} and not {term.configured:.4g}: "
                    f"{ratio:.4g} times the formula's{cause}"
                )
    if unexplained:
        yield (
            f"{100 * evidence.fit.residue:.2g}% of the gradient by the logits is explained by no "
            "known term"
        )


def _cause(ratio: float, evidence: Evidence, formula: Formula) -> str:
    """What a ratio is known for; empty where nothing fits to 0.5%."""
    squared = formula.temperature**2
    causes: dict[str, float] = {}
    if formula.temperature != 1:
        causes["temperature squared is applied, which the formula does not ask for"] = squared
        causes["temperature squared is not applied, which the formula asks for"] = 1 / squared
    n = evidence.normaliser
    rows, used = len(evidence.used), int(evidence.used.sum())
    divisors = {
        "a sum, divided by nothing": 1.0,
        f"divided by the batch size {evidence.batch_size}": float(evidence.batch_size),
        f"divided by the {used} rows that have a gradient": float(used),
        f"divided by all {rows} rows, those of weight zero too": float(rows),
        "divided by the sum of the weights": float(evidence.weights.sum()),
    }
    known: dict[float, str] = {}
    for text, divisor in divisors.items():
        if divisor:
            known.setdefault(divisor, text)
    for divisor, text in known.items():
        causes[f"{text} and not by {n:.6g}"] = n / divisor
    for divisor, text in known.items():
        both = f"{text} and by the vocabulary {evidence.vocabulary}, and not by {n:.6g}"
        causes[both] = n / divisor / evidence.vocabulary
    causes["divided by the vocabulary too"] = 1 / evidence.vocabulary
    fitting = [
        text
        for text, expected in causes.items()
        if expected and math.isclose(ratio, expected, rel_tol=5e-3)
    ]
    return f" ({' or: '.join(fitting[:2])})" if fitting else ""


def _rows(evidence: Evidence) -> Iterator[str]:
    if evidence.formula is None:
        return
    outside = int((evidence.used & (evidence.weights == 0)).sum())
    if outside:
        yield f"{outside:,} rows of weight zero have a gradient (padding or prompt is trained on)"
    silent = int((~evidence.used & (evidence.weights != 0)).sum())
    if silent:
        yield f"{silent:,} rows that the formula weighs have no gradient"
    weights = evidence.weights[evidence.fitted]
    kept = weights > 0
    for k, term in enumerate(evidence.terms):
        if not term.configured or term.share < max(10 * evidence.noise, 0.05):
            continue
        found = spread((evidence.fit.coefficients[:, k] / weights)[kept])
        if found > max(_SPREAD, 3 * evidence.noise):
            yield (
                f"{term.name}: rows do not weigh what the formula gives them; their ratios spread "
                f"over {100 * found:.2g}% of the median"
            )


def _outside(found: Outside) -> Iterator[str]:
    if found.share is None or not (found.parameters or found.share > found.noise):
        return
    reached = f"{len(found.parameters)} of the sampled parameters"
    if found.parameters:
        reached += f", {found.parameters[0]} among them"
    likely = f": {'; '.join(found.likely)}" if found.likely else ""
    yield (
        f"{100 * found.share:.2g}% of the parameters' gradient does not come by the logits "
        f"({reached}){likely}"
    )
