"""paper: the published validation losses that stand beside ours, and the groups of the table.

Figures only, from Table 5 of slmperf.recipe.paper.SOURCE: a student of 1.5B parameters, teachers of
3B, 7B and 14B, on reasoning data. Their data, models and lengths of training are others than ours:
what can be compared is the order and the sign, not the size. Where a row names no teacher it is the
one of 7B. For FKL -> oFKL without a number of tokens the paper gives none.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of the paper's table. loss: None where the paper tells no figure."""

    method: str
    loss: float | None


# group of the table -> role of a row -> the paper's row.
VALIDATION_LOSSES: dict[str, dict[str, Figure]] = {
    "baseline": {
        "sft": Figure("SFT, 1.5B", 0.2236),
        "small_teacher": Figure("3B, SFT", 0.2081),
        "teacher": Figure("7B, SFT", 0.1941),
        "large_teacher": Figure("14B, SFT", 0.1771),
    },
    "single_stage": {
        "fkl": Figure("FKL", 0.2045),
        "fkl_small_teacher": Figure("FKL, 3B teacher", 0.2015),
        "fkl_large_teacher": Figure("FKL, 14B teacher", None),
        "jsd": Figure("JSD, beta 0.5", 0.2143),
        "rkl": Figure("RKL", 0.2333),
        "ofkl": Figure("oFKL", 0.2107),
    },
    "two_stages": {
        "sft_sft": Figure("SFT -> SFT", 0.2295),
        "fkl_fkl": Figure("FKL -> FKL", None),
        "sft_ofkl": Figure("SFT -> oFKL", 0.1982),
        "fkl_ofkl": Figure("FKL -> oFKL", 0.1939),
    },
    "teachers": {
        "small_small": Figure("3B, 3B", 0.1954),
        "small_medium": Figure("3B, 7B", 0.1918),
        "medium_medium": Figure("7B, 7B", 0.1894),
        "large_large": Figure("14B, 14B", 0.1863),
    },
    "on_policy": {
        "tokens_200": Figure("200 tokens", 0.191),
        "tokens_300": Figure("300 tokens", 0.1894),
        "tokens_400": Figure("400 tokens", 0.191),
        "tokens_300_half": Figure("300 tokens, fraction 0.5", 0.1917),
        "temperature_low": Figure("temperature below the best", None),
        "temperature_best": Figure("temperature 0.8 to 0.9, the best", None),
        "temperature_high": Figure("temperature above the best", None),
    },
}

TITLES = {
    "baseline": "Baseline: cross entropy alone",
    "single_stage": "Single stage",
    "two_stages": "Two stages",
    "teachers": "Teachers of stage one and stage two",
    "on_policy": "Settings of the student's own text, stage two",
}
# What every row is held against, seed by seed: single-stage forward KL.
REFERENCE = ("single_stage", "fkl")
