"""How the inputs of a quantised product are rounded: to int8 or to fp8 (e4m3), what shares a scale.

    dynamic    scale = max |x| / 127.5 (int8) or / 448 (fp8), of a token or of a group of a token
    static     one scale for all inputs, found by calibration and stored with the weight

The arithmetic is step by step that of compressed-tensors, in the dtype of x, so that a model with
rounded inputs computes what Transformers computes after reloading its checkpoint
(https://github.com/vllm-project/compressed-tensors, quantization/lifecycle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slmperf.check import InputError

GROUP = 128  # inputs that share a scale where the strategy is "group"

_FP8_HIGHEST = 448.0
_CODES = {"int": torch.int8, "float": torch.float8_e4m3fn}


@dataclass(frozen=True)
class ActivationSpec:
    """Eight-bit inputs, symmetric.

    kind      "int", or "float": fp8 e4m3
    strategy  "token": one scale per token, "group": one per 128 inputs of a token, both found as
              the model runs; "tensor": one for all, which is stored
    """

    kind: Literal["int", "float"] = "int"
    strategy: Literal["token", "tensor", "group"] = "token"

    def __post_init__(self) -> None:
        """Raises InputError for a kind or a strategy that does not exist."""
        if self.kind not in ("int", "float"):
            raise InputError(f"kind: wanted 'int' or 'float', found {self.kind!r}")
        if self.strategy not in ("token", "tensor", "group"):
            raise InputError(
                f"strategy: wanted 'token', 'tensor' or 'group', found {self.strategy!r}"
            )

    @property
    def static(self) -> bool:
        """Whether the scale is stored, not found as the model runs."""
        return self.strategy == "tensor"

    @property
    def lowest(self) -> float:
        """The smallest code."""
        return -128.0 if self.kind == "int" else -_FP8_HIGHEST

    @property
    def highest(self) -> float:
        """The largest code."""
        return 127.0 if self.kind == "int" else _FP8_HIGHEST

    def fake_quantized(self, x: Tensor, input_scale: Tensor | None = None) -> Tensor:
        """x (..., D), floating, rounded to the grid, in its own shape and dtype; larger values than
        the grid has become its largest.

        input_scale  one number, floating: for "tensor", and only for it
        Raises InputError where "group" does not divide D.
        """
        parts = self._parts(x)
        scale = self._scale(parts, input_scale)
        return (self._codes(parts, scale).to(x.dtype) * scale).view(x.shape)

    def encode(self, x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes (..., D), int8 or float8_e4m3fn, and their scales in x's dtype: (..., 1) of a
        token, (..., D / 128) of groups, the given one otherwise; as `fake_quantized`."""
        parts = self._parts(x)
        scale = self._scale(parts, input_scale)
        codes = self._codes(parts, scale).to(_CODES[self.kind]).view(x.shape)
        return codes, scale.flatten(-2) if self.strategy == "group" else scale

    def _parts(self, x: Tensor) -> Tensor:
        """x, its last dimension cut into what shares a scale."""
        if self.strategy != "group":
            return x
        if x.shape[-1] % GROUP:
            raise InputError(f"activations: groups of {GROUP} do not divide {x.shape[-1]} inputs")
        return x.unflatten(-1, (-1, GROUP))

    def _scale(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        """(..., 1) for x (..., D): the scale that reaches the largest value; 0 becomes epsilon."""
        if self.static:
            if input_scale is None:
                raise InputError("input_scale: wanted one for strategy 'tensor', found none")
            return input_scale.to(x.dtype)
        # A tensor, because a GPU multiplies by the reciprocal of a Python number instead.
        top = torch.full((), (self.highest - self.lowest) / 2, dtype=x.dtype, device=x.device)
        scale = x.abs().amax(-1, keepdim=True) / top
        return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = (x / scale).clamp(self.lowest, self.highest)
        return codes.round() if self.kind == "int" else codes.to(torch.float8_e4m3fn)
