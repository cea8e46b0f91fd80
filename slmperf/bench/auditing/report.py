"""What an audit is told and what it says: the formula that a trainer means, and the report."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from slmperf.bench.auditing.cost import PartTime
from slmperf.bench.auditing.terms import (
    CROSS_ENTROPY,
    UNIFORM,
    Kind,
    Term,
    divergence_term,
)
from slmperf.bench.results import machine, write_results
from slmperf.bench.roof import roof
from slmperf.check import InputError
from slmperf.ops import JSD, ForwardKL, ReverseKL

if TYPE_CHECKING:
    from slmperf.distill import DistillationConfig

_KINDS: Mapping[str, Kind] = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


@dataclass(frozen=True)
class Formula:
    """What a loss is meant to be: 1/N sum_t w_t (kd_weight D_t + ce_weight CE_t).

    D is slmperf.ops' divergence of softmax(logits / temperature), times temperature^2 where
    `temperature_squared`; CE is taken at temperature 1, with label smoothing where there is some.
    N is sum_t w_t for "mean", the batch size for "batchmean", 1 for "sum", or a number.
    """

    divergence: Kind | None = None
    kd_weight: float = 1.0  # without a divergence unused
    ce_weight: float = 0.0
    temperature: float = 1.0
    temperature_squared: bool = False
    label_smoothing: float = 0.0
    reduction: Literal["mean", "batchmean", "sum"] | float = "mean"

    def __post_init__(self) -> None:
        if self.divergence is None and not self.ce_weight:
            raise InputError("Formula: has neither a divergence nor a ce_weight, expected one")
        if not self.temperature > 0:
            raise InputError(f"Formula: temperature is {self.temperature}, expected more than 0")
        if not isinstance(self.divergence, Kind | None):
            raise InputError(
                f"Formula: divergence is {self.divergence!r}, expected ForwardKL(), ReverseKL() or "
                "JSD(beta), the terms that an audit knows"
            )
        if isinstance(self.reduction, str) and self.reduction not in ("mean", "batchmean", "sum"):
            raise InputError(
                f"Formula: reduction is {self.reduction!r}, expected mean, batchmean, sum or a "
                "number"
            )

    @classmethod
    def of(cls, config: DistillationConfig, teacher: bool = True) -> Formula:
        """The loss of slmperf.distill, whose token weights hold what it divides by."""
        if not teacher:
            return cls(ce_weight=1.0, reduction=1.0)
        kind: Any = config.kind if config.kd_weight else None
        return cls(kind, config.kd_weight, config.ce_weight, config.temperature, reduction=1.0)

    @classmethod
    def parse(cls, text: str) -> Formula:
        """From "divergence=jsd, beta=0.5, kd_weight=0.9, ce_weight=0.1, temperature=2"."""
        names = [field.name for field in fields(cls)]
        given: dict[str, Any] = {}
        for part in re.split(r"[,\s]+", text.strip()):
            name, _, value = part.partition("=")
            if name not in (*names, "beta") or not value:
                raise InputError(
                    f"formula: {part!r} is not NAME=VALUE with a name of {', '.join(names)}, beta"
                )
            given[name] = value if name == "divergence" else _value(name, value)
        kind, beta = given.pop("divergence", None), given.pop("beta", None)
        if kind == "jsd":
            given["divergence"] = JSD(0.5 if beta is None else beta)
        elif kind is not None and kind not in _KINDS or beta is not None:
            raise InputError(
                f"formula: divergence is {kind!r}"
                + ("" if beta is None else f" with beta={beta}")
                + ", expected forward_kl, reverse_kl or jsd, the last alone with a beta"
            )
        elif kind is not None:
            given["divergence"] = _KINDS[kind]
        return cls(**given)

    def terms(self) -> list[tuple[Term, float]]:
        """Terms and what they weigh."""
        found = []
        if self.divergence is not None and self.kd_weight:
            weight = self.kd_weight * (self.temperature**2 if self.temperature_squared else 1.0)
            found.append((divergence_term(self.divergence, self.temperature), weight))
        if self.ce_weight:
            found.append((CROSS_ENTROPY, self.ce_weight * (1 - self.label_smoothing)))
            if self.label_smoothing:
                found.append((UNIFORM, self.ce_weight * self.label_smoothing))
        return found

    def normaliser(self, weights: Tensor, batch_size: int) -> float:
        """N."""
        if not isinstance(self.reduction, str):
            return float(self.reduction)
        return {"mean": float(weights.sum()), "batchmean": float(batch_size), "sum": 1.0}[
            self.reduction
        ]


def _value(name: str, text: str) -> Any:
    if name == "reduction" and text in ("mean", "batchmean", "sum"):
        return text
    if name == "temperature_squared" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"formula: {name} is {text!r}, expected a number") from None


class GradientError(NamedTuple):
    """How far a gradient is from the exact one, relative."""

    norm: float  # norm of the difference by the norm of the exact one
    largest: float  # largest difference by the largest exact entry
    cosine: float


class FoundTerm(NamedTuple):
    """One term of the loss."""

    name: str
    configured: float | None  # None without a formula; 0 where the formula does not have it
    found: float  # its weight before the division by N
    share: float  # norm of its gradient by the norm of the loss's


class Waste(NamedTuple):
    """Work on rows whose gradient is exactly zero, and on padding."""

    rows: int  # of student logits that were computed
    used: int  # that have a gradient
    teacher_rows: int
    head_tflop: float  # spent on the others: forward, both halves of backward, the teacher's head
    head_mib: float  # their logits, both models', and their gradient
    padding: int | None  # positions of the network; None where nothing says
    positions: int | None


class Cost(NamedTuple):
    """Memory of the step, and time of head and loss against the roof of this machine."""

    peak_mib: float
    logits_mib: float  # student's and teacher's used logits, and their gradient, once each
    least_tflop: float  # head products of the used rows
    roof_us: float  # least time of these, one beside the other
    roof_share: float | None  # of the time measured; None where head and loss were not timed


@dataclass(frozen=True)
class AuditReport:
    """What one training step showed."""

    device: str
    vocabulary: int
    reference: str  # what the exact gradient is
    loss: float
    formula_loss: float | None
    errors: Mapping[str, GradientError]
    terms: tuple[FoundTerm, ...]
    residue: float  # share of the loss's gradient by the logits that no term explains
    outside: float | None  # share of the parameters' gradient that does not come by the logits
    waste: Waste
    cost: Cost
    parts: tuple[PartTime, ...]
    findings: tuple[str, ...]  # what differs from the formula, or is lost, in sentences
    judged: bool  # whether there was a formula to differ from

    @property
    def clean(self) -> bool:
        """No finding."""
        return not self.findings

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Lines of the table: section, what, found, configured or remark."""
        table = [
            ("loss", "value", f"{self.loss:.6g}", _number(self.formula_loss)),
        ]
        for name, error in self.errors.items():
            found = f"{_percent(error.norm)} norm, {_percent(error.largest)} max"
            table.append(("gradient error", name, found, f"cosine {error.cosine:.6f}"))
        for term in self.terms:
            share = f"{_percent(term.share)} of the gradient"
            remark = share if term.configured is None else f"{term.configured:.4g}; {share}"
            table.append(("terms", term.name, f"{term.found:.4g}", remark))
        table.append(("terms", "no known term", _percent(self.residue), "of the gradient"))
        outside = "not measured" if self.outside is None else _percent(self.outside)
        table.append(("terms", "not by the logits", outside, "of sampled parameters' gradient"))
        waste, cost = self.waste, self.cost
        unused = waste.rows - waste.used
        table += [
            ("rows", "without a gradient", f"{unused:,}", f"of {waste.rows:,} logit rows"),
            ("rows", "head's work on them", f"{waste.head_tflop * 1e3:.3g} GFLOP",
             f"and {waste.head_mib:.4g} MiB"),
        ]  # fmt: skip
        if waste.padding is not None:
            table.append(
                ("rows", "padding", f"{waste.padding:,}", f"of {waste.positions:,} tokens")
            )
        for part in self.parts:
            spread = f"{part.low_us / 1e3:.3f} to {part.high_us / 1e3:.3f}"
            table.append(("time", part.name, f"{part.time_us / 1e3:.3f} ms", spread))
        share = "-" if cost.roof_share is None else f"{100 * cost.roof_share:.0f}% of the roof"
        roof = f"{cost.roof_us / 1e3:.3f} ms"
        table += [
            ("time", "head and loss at the roof", roof, share),
            ("memory", "peak of the step", f"{cost.peak_mib:.1f} MiB", ""),
            ("memory", "logits and gradient, once", f"{cost.logits_mib:.1f} MiB", "used rows"),
        ]
        return table

    def __str__(self) -> str:
        """The table, then one line for every finding."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title="slmperf audit", title_justify="left", caption_justify="left")
        table.caption = f"exact gradient: {self.reference}"
        for column in ("", "what", "found", "meant, or remark"):
            table.add_column(column, overflow="fold")
        last = ""
        for section, *cells in self.rows():
            if section != last:
                table.add_section()
            table.add_row(section if section != last else "", *cells)
            last = section
        # A pipe has no width; 120 columns keep a line of the table a line of the log.
        console = Console(width=None if sys.stdout.isatty() else 120)
        with console.capture() as text:
            console.print(table)
        return text.get() + "\n".join(self.verdict())

    def verdict(self) -> list[str]:
        """The findings, or that there are none."""
        lines = [f"found: {finding}" for finding in self.findings]
        if not self.judged:
            return [*lines, "no formula is known: the terms are compared with nothing"]
        return lines or ["clean: the loss is the configured formula"]

    def as_json(self) -> dict[str, Any]:
        """Everything but the parts' times, which are the rows of a result file."""
        content = asdict(self)
        content.pop("parts")
        for name in ("waste", "cost"):
            content[name] = content[name]._asdict()
        content["errors"] = {name: error._asdict() for name, error in self.errors.items()}
        content["terms"] = [term._asdict() for term in self.terms]
        return content


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g} by the formula"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def write_report(path: Path, report: AuditReport) -> None:
    """A result file of kind "audit": a row for each part of the step, the rest under "audit"."""
    write_results(
        path,
        "audit",
        [part._asdict() for part in report.parts],
        machine=machine(report.device),
        roof=roof(report.device).as_json(),
        audit=report.as_json(),
    )
