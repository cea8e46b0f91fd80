"""Measurements: one line per shape and implementation, against a roof of the same run.

roof      what the machine does at best: copy, matrix products, launch
ops       every op against plain torch, torch.compile and installed rivals
kd        the distillation loss on whole heads, beside its products, plain torch and Liger
train     one optimizer step of distillation: our loss and trainer, plain torch, Liger
layer     one Transformer block part by part, pruned beside unpruned
serving   what a load of members and their prompts gives, on an engine or a server
evaluation  `slmperf eval`: a pruned or quantised model beside the one it was made from
compare   two result files row by row
auditing  one training step looked at from outside: gradient error, terms, rows, time for nothing
commands  `slmperf bench ...`: roof, ops, kd, train, layer, serve, compare
results   the files that all of them write
plots     the roofline of ops
rivals    other projects' packages, where they are installed

Names are loaded on first use, so that `slmperf --help` costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmperf.bench.auditing.report import AuditReport as AuditReport
    from slmperf.bench.auditing.report import Formula as Formula
    from slmperf.bench.auditing.step import audit as audit

__all__ = ["AuditReport", "Formula", "audit"]

_HOMES = {
    "AuditReport": "auditing.report",
    "Formula": "auditing.report",
    "audit": "auditing.step",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
