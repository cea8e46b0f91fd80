"""What a load showed: times to the first token of cold, hot and all prompts; table, rows, plot.

Percentiles interpolate linearly between the two nearest samples (numpy.percentile's default): P50
of 100 and 110 ms is 105 ms. Warm-up members and failed requests are left out of all times.
Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmperf.bench.serving import load
from slmperf.bench.serving.workloads import Kind, Workload, releases
from slmperf.check import InputError

if TYPE_CHECKING:
    from rich.table import Table

# Prompts of a load, apart and together; and members: from the release of their siblings (with the
# first prompt or after it) until the last of these has a token.
GROUPS = ("cold", "hot", "all", "member")
# A generator that is later than this for one release in ten did not make the planned load.
LATE_MS = 5.0
# Members answered a second, as a share of those released, below which a queue grows.
KEEPS_UP = 0.95


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float | None:
    """The `share` (0 to 100) percentile, by linear interpolation; None of nothing."""
    return float(np.percentile(values, share)) if len(values) else None


@dataclass(frozen=True)
class Group:
    """The answered requests of one group; times in milliseconds, in order of release."""

    ttft_ms: list[float]
    tpot_ms: list[float]  # of requests with two output tokens or more
    input_tokens: float | None  # mean per request, as counted, cached ones included
    input_tokens_per_s: float | None  # of members that had all their answers
    cached_tokens: float | None  # mean per request, None where the server does not tell
    failed: int


@dataclass(frozen=True)
class Report:
    """One load of one kind of prompts. Rates are members a second between the first and the last
    event of their kind (None below two members): `offered` as planned, `released` by the
    generator, `answered` with all their prompts.
    """

    work: Workload
    kind: Kind
    together: bool
    groups: Mapping[str, Group]  # those of GROUPS that have requests
    spacing_error_ms: list[float]
    offered: float | None
    released: float | None
    answered: float | None
    first_error: str | None
    ideal_us: float | None = None  # least time of a cold prompt on this machine, where it is known

    @property
    def roof_share(self) -> float | None:
        """Share of the roof that the P50 of cold prompts reaches, waiting in the queue included."""
        middle = percentile(self.groups["cold"].ttft_ms, 50) if "cold" in self.groups else None
        return self.ideal_us / (1e3 * middle) if self.ideal_us and middle else None

    @property
    def lines(self) -> list[str]:
        """What stands below the table: rates, the generator's own error, and warnings."""
        every = self.groups["all"]
        total = len(every.ttft_ms) + every.failed
        low, high = (percentile(self.spacing_error_ms, share) for share in (50, 90))
        found = [
            f"{self.kind}: members/s offered {_text(self.offered, 2)}, released "
            f"{_text(self.released, 2)}, answered {_text(self.answered, 2)}; spacing error P50 "
            f"{_text(low, 2)} ms, P90 {_text(high, 2)} ms; {every.failed} of {total} failed"
        ]
        if self.ideal_us and self.roof_share:
            found.append(
                f"{self.kind}: cold P50 at {100 * self.roof_share:.0f}% of the roof, which would "
                f"take {self.ideal_us / 1e3:.3g} ms; waiting in the queue included"
            )
        if self.first_error:
            found.append(f"{self.kind}: first failure: {self.first_error}")
        if high is not None and high > LATE_MS:
            found.append(
                f"{self.kind}: the generator was late by more than {LATE_MS:g} ms for a tenth of "
                "the prompts: not the planned load"
            )
        if self.answered and self.released and self.answered < KEEPS_UP * self.released:
            found.append(
                f"{self.kind}: overloaded: a queue grew, and all times grow with the number of "
                "members"
            )
        cached = self.groups["cold"].cached_tokens if "cold" in self.groups else None
        # A few tokens are shared by chance or by a template; half a prefix is not.
        if cached is not None and cached > self.work.prefix / 2:
            found.append(
                f"{self.kind}: cold prompts had {cached:.0f} cached tokens: the server has seen "
                "this seed; empty its cache or change the seed"
            )
        return found


def measure(
    work: Workload,
    kind: Kind,
    endpoint: load.Endpoint,
    *,
    vocabulary: int = 32000,
    clock: load.Clock | None = None,
) -> Report:
    """Run the load on the endpoint (in real time, if no clock is given).

    Raises InputError where the endpoint does not answer at the start, or never.
    """
    samples = load.run(releases(work, kind, vocabulary), endpoint, clock or load.RealClock())
    return summary(work, kind, samples, together=endpoint.together)


def summary(
    work: Workload, kind: Kind, samples: Sequence[load.Sample], *, together: bool = False
) -> Report:
    """Samples -> report. InputError where every request failed."""
    measured = [one for one in samples if one.member >= work.warmup]
    errors = [one.error for one in measured if one.error]
    if len(errors) == len(measured):
        raise InputError(f"serve: all {len(errors)} requests failed, the first with: {errors[0]}")
    members: dict[int, list[load.Sample]] = defaultdict(list)
    for one in measured:
        members[one.member].append(one)
    whole = {
        member: given for member, given in members.items() if not any(one.error for one in given)
    }
    answered = _rate([max(one.last_ns for one in given) for given in whole.values()])
    complete = set(whole)
    groups = {
        "cold": [one for one in measured if one.cold],
        "hot": [one for one in measured if not one.cold],
        "all": measured,
    }
    if work.k > 1 and not together:
        groups["member"] = [_last(given) for given in members.values()]
    return Report(
        work=work,
        kind=kind,
        together=together,
        groups={name: _group(given, answered, complete) for name, given in groups.items() if given},
        spacing_error_ms=[one.spacing_error_ms for one in measured],
        offered=_rate([given[0].planned_ns for given in members.values()]),
        released=_rate([given[0].released_ns for given in members.values()]),
        answered=answered,
        first_error=errors[0] if errors else None,
    )


def _last(member: Sequence[load.Sample]) -> load.Sample:
    """What a member released last, as one request."""
    last_ns = max(one.planned_ns for one in member)
    prompts = [one for one in member if one.planned_ns == last_ns]
    failed = [one for one in prompts if one.error]
    if failed:
        return failed[0]
    return replace(
        max(prompts, key=lambda one: one.first_ns),
        released_ns=prompts[0].released_ns,
        input_tokens=sum(one.input_tokens for one in prompts),
        output_tokens=0,
        cached_tokens=None,
    )


def _group(samples: Sequence[load.Sample], rate: float | None, whole: set[int]) -> Group:
    """`whole`: members that had all their answers, `rate` of them a second."""
    answered = [one for one in samples if not one.error]
    cached = [one.cached_tokens for one in answered if one.cached_tokens is not None]
    tokens = sum(one.input_tokens for one in answered)
    # What others had answered in part is in no rate.
    counted = sum(one.input_tokens for one in answered if one.member in whole)
    return Group(
        ttft_ms=[one.ttft_ms for one in answered],
        tpot_ms=[one.tpot_ms for one in answered if one.tpot_ms is not None],
        input_tokens=tokens / len(answered) if answered else None,
        input_tokens_per_s=counted / len(whole) * rate if rate and whole else None,
        cached_tokens=sum(cached) / len(cached) if cached else None,
        failed=len(samples) - len(answered),
    )


def _rate(times_ns: Sequence[int]) -> float | None:
    """Events a second between the first and the last."""
    span_ns = max(times_ns) - min(times_ns) if times_ns else 0
    return (len(times_ns) - 1) * 1e9 / span_ns if span_ns else None


def rows(reports: Sequence[Report], **given: Any) -> list[dict[str, Any]]:
    """Rows of a result file of kind "serve": one per kind of prompts and group with an answer.

    given   what ran: shape (a name or a mapping of sizes), tensor_parallel, scheme, hardware,
            endpoint; of a server what the user says, null where he does not

    `items`, `item_tokens` and `hot` say which prediction of a latency model the row compares with:
    prompts of `item_tokens` behind a prefix that is cached (hot true) or not (false), until the
    last has a token. They are null where none does: siblings released together with a cold prompt
    wait for it, and the paper's percentiles over all prompts mix the two.
    """
    found = []
    for report in reports:
        work = report.work
        for name, group in report.groups.items():
            if not group.ttft_ms:
                continue
            items, hot = _prediction(report, name)
            p50, p90, p99 = (percentile(group.ttft_ms, share) for share in (50, 90, 99))
            low, high = (percentile(group.ttft_ms, share) for share in (25, 75))
            assert p50 is not None and low is not None and high is not None  # there are samples
            found.append(
                {
                    "name": f"{work.name} {report.kind} {name}",
                    "time_us": p50 * 1e3,
                    "low_us": low * 1e3,
                    "high_us": high * 1e3,
                    "samples": len(group.ttft_ms),
                    "workload": work.name,
                    "prompts": report.kind,
                    "group": name,
                    "ttft_p50_ms": p50,
                    "ttft_p90_ms": p90,
                    "ttft_p99_ms": p99,
                    "tpot_p50_ms": percentile(group.tpot_ms, 50),
                    "tpot_p90_ms": percentile(group.tpot_ms, 90),
                    "tpot_p99_ms": percentile(group.tpot_ms, 99),
                    "input_tokens": group.input_tokens,
                    "input_tokens_per_s": group.input_tokens_per_s,
                    "roof_share": report.roof_share if name == "cold" else None,
                    "cached_tokens": group.cached_tokens,
                    "failed": group.failed,
                    "rate": work.rate,
                    "spacing": work.spacing,
                    "k": work.k,
                    "context": work.context,
                    "items": items,
                    "item_tokens": work.suffix,
                    "hot": hot,
                    "hot_after_s": work.hot_after_s,
                    "output_tokens": work.output_tokens,
                    "seed": work.seed,
                    "offered_rate": report.offered,
                    "released_rate": report.released,
                    "answered_rate": report.answered,
                    "spacing_error_p50_ms": percentile(report.spacing_error_ms, 50),
                    "spacing_error_p90_ms": percentile(report.spacing_error_ms, 90),
                    **given,
                }
            )
    return found


def _prediction(report: Report, group: str) -> tuple[int | None, bool | None]:
    """(items, hot) of the prediction that a group's times compare with, (None, None) without."""
    k = report.work.k
    compared: dict[str, tuple[int, bool]]
    if k == 1:
        compared = {"cold": (1, False)}
    elif report.work.hot_after_s > 0:
        compared = {"cold": (1, False), "hot" if report.together else "member": (k - 1, True)}
    else:
        compared = {"cold" if report.together else "member": (k, False)}
    return compared.get(group, (None, None))


def table(reports: Sequence[Report]) -> Table:
    """One column per kind of prompts and group, one line per figure."""
    from rich.table import Table

    shown = Table()
    shown.add_column("")
    columns: list[tuple[Report, Group]] = []
    for report in reports:
        for name, group in report.groups.items():
            # Where every prompt is cold, the two columns would be one.
            if name == "all" and "hot" not in report.groups:
                continue
            columns.append((report, group))
            shown.add_column(f"{report.kind}\n{name}", justify="right")
    groups = [group for _, group in columns]
    shown.add_row("requests", *(str(len(one.ttft_ms) + one.failed) for one in groups))
    shown.add_row("failed", *(str(one.failed) for one in groups))
    for share in (50, 90, 99):
        shown.add_row(
            f"TTFT P{share}, ms", *(_text(percentile(one.ttft_ms, share), 1) for one in groups)
        )
    if any(one.tpot_ms for one in groups):
        for share in (50, 90, 99):
            shown.add_row(
                f"TPOT P{share}, ms", *(_text(percentile(one.tpot_ms, share), 2) for one in groups)
            )
    shown.add_row("input tokens/s", *(_text(one.input_tokens_per_s, 0) for one in groups))
    shown.add_row("cached tokens/request", *(_text(one.cached_tokens, 0) for one in groups))
    return shown


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


# Paul Tol's bright scheme: told apart by the colour-blind; cold and hot differ in the line too.
COLOURS = {"ids": "#4477aa", "text": "#ee6677"}
LINES = {"cold": "-", "hot": "--"}


def plot(reports: Sequence[Report], path: str | Path) -> None:
    """Which share of the cold and of the hot prompts had their first token within a time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    seen: list[float] = []
    for report in reports:
        for name in ("cold", "hot"):
            times = sorted(report.groups[name].ttft_ms) if name in report.groups else []
            if not times:
                continue
            seen += times
            shares = np.arange(1, len(times) + 1) / len(times)
            axes.step(
                [times[0], *times],
                [0.0, *shares],
                where="post",
                color=COLOURS[report.kind],
                linestyle=LINES[name],
                linewidth=1.8,
                label=f"{report.kind}, {name}: P50 {_text(percentile(times, 50), 1)} ms, "
                f"P99 {_text(percentile(times, 99), 1)} ms",
            )
    if max(seen) > 10 * min(seen):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel("time to first token, ms")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.02)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=2)
    name, _, size = str(reports[0].work).partition(": ")
    axes.set_title(f"{name}\n{size}", fontsize=10, loc="left")
    figure.savefig(path, dpi=150)
