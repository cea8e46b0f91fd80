"""Serving loads: which prompts are released when.

A member comes with a prefix of its own (profile, history, task), which no other member shares, and
k suffixes (candidates). So a member's first prompt is cold, and its siblings can reuse the prefix:
they are hot. Every prompt is prefix + suffix, `context` tokens in all.

Four loads are those of arXiv 2502.14305 (`table7`, `table9`, `table10`, `table11`); their notes say
what was chosen where the paper is silent. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from slmperf.check import InputError

Kind = Literal["ids", "text"]
KINDS: tuple[Kind, ...] = ("ids", "text")
SPACINGS = ("constant", "poisson")

# Text is made of these, one word in place of one id: short and common, so that most tokenizers
# take each for one token. What a server counted is reported beside it.
WORDS = tuple(
    """
    able about above after again air all also always and animal answer any area ask away back ball
    bank base bed been before begin best big bird black blue boat body book both box boy bring build
    but call came car care carry case change child city class clear close cold come cost could
    country course cross cut dark day deep did do dog door down draw drive dry each early earth east
    eat end enough even ever every eye face fact fall family far farm fast father feel few field
    find fire first fish five fly follow food foot for form four free from front full game gave girl
    give go gold good got great green ground group grow had half hand hard has have head hear heat
    help here high hold home hot hour house how idea inch island just keep kind king know land large
    last late learn leave left less let letter life light like line list little live long look love
    """.split()
)


@dataclass(frozen=True)
class Workload:
    """m members a second, k prompts each, released together.

    rate            members a second
    k               prompts per member
    context         tokens of a prompt: prefix and suffix
    suffix          tokens of a prompt that its siblings do not share
    output_tokens   tokens asked for at most; a server may stop earlier
    members         measured members; `warmup` more come before them and are left out
    spacing         "constant", or "poisson": exponential gaps, seeded
    hot_after_s     seconds from a member's first prompt to its siblings. 0 releases them together,
                    so that a sibling's time holds what is left of the prefix's prefill; longer
                    than that prefill, it shows what a prompt costs once its prefix is cached.
    seed            of prompts and gaps. A server that keeps prefixes must not see a seed twice.

    Raises InputError for sizes that make no load.
    """

    name: str
    rate: float = 1.0
    k: int = 1
    context: int = 16384
    suffix: int = 128
    output_tokens: int = 1
    members: int = 240
    warmup: int = 10
    spacing: str = "constant"
    hot_after_s: float = 0.0
    seed: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("k", 1),
            ("context", 2),
            ("suffix", 1),
            ("output_tokens", 1),
            ("members", 1),
            ("warmup", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"workload: {name} is {value!r}, expected an integer >= {least}")
        if self.suffix >= self.context:
            raise InputError(
                f"workload: suffix is {self.suffix}, expected 1 to {self.context - 1} "
                f"(below the context of {self.context})"
            )
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InputError(
                f"workload: rate is {self.rate}, expected more than 0 members a second"
            )
        if not (math.isfinite(self.hot_after_s) and self.hot_after_s >= 0):
            raise InputError(f"workload: hot_after_s is {self.hot_after_s}, expected 0 or more")
        if self.spacing not in SPACINGS:
            raise InputError(
                f"workload: spacing is {self.spacing!r}, expected {' or '.join(SPACINGS)}"
            )

    @property
    def prefix(self) -> int:
        """Tokens that a member's prompts share."""
        return self.context - self.suffix

    @property
    def seconds(self) -> float:
        """From the first release to the last, at the nominal rate."""
        return (self.members + self.warmup - 1) / self.rate + self.hot_after_s * (self.k > 1)

    def __str__(self) -> str:
        when = f"{self.k - 1} of them {self.hot_after_s:g} s after the first"
        together = f", {when}," if self.hot_after_s else " together"
        return (
            f"{self.name}: {self.members} members, {self.rate:g} a second ({self.spacing}), "
            f"{self.k} prompt{'s' * (self.k > 1)} each{together if self.k > 1 else ''}, "
            f"{self.prefix} + {self.suffix} tokens in, {self.output_tokens} out"
        )


_SILENT = (
    "Fixed lengths and constant spacing: the published P99 exceeds P50 by a few percent only, "
    "which random arrivals or lengths would not give. The published tokens per second mean 86 to "
    "88% of the nominal context per request; the nominal context is taken (context=14121 or 28427 "
    "is the other reading). The suffix is not published: 128 tokens, a candidate's description. "
    "240 members, as an overloaded row of the paper implies."
)

WORKLOADS: Mapping[str, Workload] = {
    one.name: one
    for one in (
        Workload(
            "small",
            rate=2.0,
            k=4,
            context=512,
            suffix=32,
            members=20,
            warmup=4,
            note="No table of the paper: what two cores without a GPU finish in half a minute.",
        ),
        Workload(
            "table7",
            context=3800,
            output_tokens=2048,
            note="arXiv 2502.14305, Table 7: one GPU, a mean of 3.8k tokens in, at most 2k out, "
            "one request a second; TTFT and TPOT. Silent on the lengths' spread, the spacing and "
            "where answers end: fixed length, constant spacing, 2048 tokens at most and the "
            "model's own end of text honoured. Nothing is shared between its prompts.",
        ),
        Workload(
            "table9",
            context=16384,
            note="arXiv 2502.14305, Table 9: m=1, k=1, 16k tokens, one token out. " + _SILENT,
        ),
        Workload(
            "table10",
            context=32768,
            note="arXiv 2502.14305, Table 10: m=1, k=1, 32k tokens, one token out. " + _SILENT,
        ),
        Workload(
            "table11",
            k=4,
            context=32768,
            note="arXiv 2502.14305, Table 11: m=1, k=4, 32k tokens, one token out; a member's four "
            "prompts are released together. " + _SILENT,
        ),
    )
}


def workload(name: str, **changes: Any) -> Workload:
    """A named workload with some fields replaced; those given as None stay.

    Raises InputError for an unknown name and for sizes that make no load.
    """
    if name not in WORKLOADS:
        raise InputError(f"workload is {name!r}, expected one of {', '.join(WORKLOADS)}")
    known = {field.name for field in fields(Workload)}
    assert set(changes) <= known, set(changes) - known
    return replace(
        WORKLOADS[name], **{key: value for key, value in changes.items() if value is not None}
    )


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt: token ids (int64 arrays) or text, in two parts. The same `prefix` object serves
    all prompts of a member.
    """

    member: int
    place: int  # within its member; 0 is the cold one
    prefix: np.ndarray | str
    suffix: np.ndarray | str
    tokens: int  # of both parts, as ids or words
    output_tokens: int


class Release(NamedTuple):
    """Prompts of one member that are due together; nanoseconds after the load begins."""

    planned_ns: int
    prompts: tuple[Prompt, ...]


def arrivals_ns(work: Workload) -> list[int]:
    """When each member is due, warm-up first: nanoseconds after the load begins."""
    count = work.members + work.warmup
    if work.spacing == "constant":
        # Each from the beginning, so that rounding does not add up.
        return [round(member * 1e9 / work.rate) for member in range(count)]
    gaps = np.random.default_rng([work.seed, 1]).exponential(1e9 / work.rate, count - 1)
    return [0, *np.cumsum(gaps).round().astype(np.int64).tolist()]


def check_vocabulary(vocabulary: int) -> None:
    """InputError where a model knows too few ids to draw prompts from."""
    if vocabulary < 16:
        raise InputError(f"vocabulary is {vocabulary}, expected at least 16")


def releases(work: Workload, kind: Kind, vocabulary: int) -> list[Release]:
    """The whole load in the order of release, warm-up members (numbers below `warmup`) included.

    Ids are uniform over the upper 15/16 of the vocabulary, because control tokens mostly stand at
    its beginning. Text replaces every id by a word.
    """
    check_vocabulary(vocabulary)
    if kind not in KINDS:
        raise InputError(f"prompts are {kind!r}, expected {' or '.join(KINDS)}")
    found = []
    for member, planned_ns in enumerate(arrivals_ns(work)):
        prompts = _prompts(work, kind, vocabulary, member)
        if work.hot_after_s and work.k > 1:
            later = planned_ns + round(work.hot_after_s * 1e9)
            found += [Release(planned_ns, prompts[:1]), Release(later, prompts[1:])]
        else:
            found.append(Release(planned_ns, prompts))
    return sorted(found, key=lambda release: release.planned_ns)


def _prompts(work: Workload, kind: Kind, vocabulary: int, member: int) -> tuple[Prompt, ...]:
    generator = np.random.default_rng([work.seed, 0, member])
    low = vocabulary // 16
    prefix = generator.integers(low, vocabulary, work.prefix)
    suffixes = generator.integers(low, vocabulary, (work.k, work.suffix))
    shared = _text(prefix) if kind == "text" else prefix
    return tuple(
        Prompt(
            member,
            place,
            shared,
            _text(suffix) if kind == "text" else suffix,
            work.context,
            work.output_tokens,
        )
        for place, suffix in enumerate(suffixes)
    )


def _text(ids: Sequence[int] | np.ndarray) -> str:
    """Words, each with a space before it: so a suffix may follow a prefix as it is."""
    return "".join(f" {WORDS[one % len(WORDS)]}" for one in np.asarray(ids).tolist())
