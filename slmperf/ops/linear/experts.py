"""Experts' weights of one shape and scheme as one object, for `starts` of `linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.linear.weights import Fp8Weight, Int4Weight, Int8Weight

_W = TypeVar("_W", Int4Weight, Int8Weight, Fp8Weight)


def stack_experts(weights: Sequence[_W]) -> _W:
    """Experts' weights of one shape and scheme as one object, for `starts` of `linear`.

    Raises InputError where they are not alike.
    """
    if not weights:
        raise InputError("stack_experts: wanted at least one weight, found none")
    first = weights[0]
    parts = [dict(vars(one)) for one in weights]
    for index, one in enumerate(parts):
        static = one.get("input_scale")
        if static is not None and not torch.equal(static, parts[0]["input_scale"]):
            raise InputError("stack_experts: wanted one static input scale for all, found several")
        if type(weights[index]) is not type(first) or _outline(one) != _outline(parts[0]):
            raise InputError(
                f"stack_experts: weight {index} is another than the first in shape or scheme"
            )
    joined = {
        name: torch.stack([one[name] for one in parts])
        for name, value in parts[0].items()
        if isinstance(value, Tensor) and name != "input_scale"
    }
    return replace(first, **joined)


def _outline(fields: dict[str, Any]) -> dict[str, Any]:
    """What must be the same of weights that are stacked."""
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else value
        for name, value in fields.items()
    }
