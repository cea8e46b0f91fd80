"""targets: what a pruned model is to meet, read from text such as "2.4B", "56 KiB" or "170 ms"."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal, NamedTuple

from slmperf.check import InputError

Kind = Literal["parameters", "KV bytes per token", "milliseconds"]

# A lone "B" is billions, as in the names of models; bytes are spelled out or have a prefix.
_UNITS: dict[str, tuple[Kind, float]] = {
    "": ("parameters", 1),
    "K": ("parameters", 1e3),
    "M": ("parameters", 1e6),
    "B": ("parameters", 1e9),
    "bytes": ("KV bytes per token", 1),
    "kB": ("KV bytes per token", 1000),
    "KB": ("KV bytes per token", 1000),
    "KiB": ("KV bytes per token", 1024),
    "MB": ("KV bytes per token", 1e6),
    "MiB": ("KV bytes per token", 2**20),
    "ms": ("milliseconds", 1),
    "s": ("milliseconds", 1000),
}


class Target(NamedTuple):
    """A number of parameters to come near to, or of bytes or milliseconds not to exceed."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        return self.like(self.value)

    def like(self, value: float) -> str:
        """Another value in the same words."""
        if self.kind == "milliseconds":
            return f"{value:.4g} ms"
        return f"{value:,.0f} {self.kind}"


def parse_target(text: str | int) -> Target:
    """ "2.4B", "900M", 2420026368: parameters; "56 KiB", "57344 bytes"; "170 ms", "0.17 s".

    Raises InputError for anything else, naming the units.
    """
    found = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(found[2], _UNITS.get(found[2].upper())) if found else None
    if found is None or unit is None:
        raise InputError(
            f"target: wanted a number with one of {', '.join(filter(None, _UNITS))}, "
            f"such as 2.4B, 56 KiB or 170 ms, found {text!r}"
        )
    kind, factor = unit
    value = float(Decimal(re.sub("[_,]", "", found[1])) * Decimal(factor))
    if value <= 0:
        raise InputError(f"target: wanted a number > 0, found {text!r}")
    return Target(kind, value)
