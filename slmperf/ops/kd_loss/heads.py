"""heads: what distillation losses take of the two models, instead of logits that nobody can hold.

    StudentHead     hidden states and the vocabulary head that is trained
    TeacherHead     the same of a teacher: fused with its own head, at its own hidden size
    TeacherLogits   logits that exist already
    TeacherTopK     the k likeliest tokens and their log-probabilities, as servers and files give

A head's logits are softcap(scale (hidden weight' + bias)), softcap(z) = cap tanh(z / cap): bias for
those that have one, `scale` for Cohere and Granite (there 1 / logits_scaling), `softcap` for Gemma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from slmperf.check import InputError, Shaped, check_shapes

TAILS = ("renormalise", "zero", "bucket")


@dataclass(frozen=True, eq=False)
class _Head:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        named = {"hidden": (self.hidden, "T D"), "weight": (_whole(self.weight), "V D")}
        if self.bias is not None:
            named["bias"] = (_whole(self.bias), "V")
        check_shapes(name, **named)
        if self.weight.device != self.hidden.device:
            raise InputError(
                f"{name}: weight is on {self.weight.device}, expected hidden's {self.hidden.device}"
            )
        if self.hidden.dtype != self.weight.dtype and not _autocast(self.hidden):
            raise InputError(
                f"{name}: weight is {self.weight.dtype}, expected hidden's {self.hidden.dtype}"
            )
        for what in ("softcap", "scale"):
            value = getattr(self, what)
            if value is not None and not 0.0 < value < math.inf:
                raise InputError(f"{name}: {what} is {value}, expected a finite number > 0 or None")

    @property
    def vocabulary(self) -> int:
        """V."""
        return _whole(self.weight).shape[0]


class StudentHead(_Head):
    """Hidden states (T, D) of the model that learns, after its last norm, and its head.

    hidden   (T, D) float32, bfloat16 or float16; receives a gradient
    weight   (V, D) of the same dtype; receives a gradient unless it is frozen
    bias     (V,) or None; receives a gradient
    softcap  cap > 0 or None
    scale    > 0 or None, multiplies hidden weight' + bias
    """


class TeacherHead(_Head):
    """Hidden states (T, D) of the teacher and its head; D and dtype are its own. No gradient.

    Fields as of StudentHead.
    """


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Logits (T, V) of the teacher, any of the three dtypes, any row stride. No gradient."""

    logits: Tensor

    def __post_init__(self) -> None:
        check_shapes("TeacherLogits", logits=(self.logits, "T V"))

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits.shape[1]


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The teacher's k likeliest tokens of every position. No gradient.

    indices    (T, K) int64 token ids, each at most once in a row
    log_probs  (T, K) their log-probabilities; -inf fills a row that has fewer
    tail       what stands for the other tokens:
               "renormalise"  the k probabilities are scaled to sum to 1, the others are 0
               "zero"         the k are taken as they are, the others are 0: forward KL alone, since
                              what then remains is no distribution
               "bucket"       all others are one token, with what the k leave of 1 in the teacher
                              and in the student
    """

    indices: Tensor
    log_probs: Tensor
    tail: str = "renormalise"

    def __post_init__(self) -> None:
        check_shapes(
            "TeacherTopK", indices=(self.indices, "T K"), log_probs=(self.log_probs, "T K")
        )
        if self.indices.dtype != torch.int64:
            raise InputError(f"TeacherTopK: indices is {self.indices.dtype}, expected torch.int64")
        if self.indices.shape[1] == 0:
            raise InputError("TeacherTopK: K is 0, expected at least one token per row")
        if self.tail not in TAILS:
            raise InputError(f"TeacherTopK: tail is {self.tail!r}, expected {' or '.join(TAILS)}")


Teacher = TeacherHead | TeacherLogits | TeacherTopK


def scaled(raw: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """softcap(scale raw), in raw's dtype and with its rounding after each step."""
    z = raw if scale is None else raw * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _whole(parameter: Tensor) -> Shaped:
    """Something with the shape of the whole: between its uses ZeRO-3 keeps a parameter empty."""
    shape = getattr(parameter, "ds_shape", None)
    return parameter if shape is None else SimpleNamespace(shape=tuple(shape))


def _autocast(tensor: Tensor) -> bool:
    """Whether matrix products of such a tensor are cast here, so that dtypes may differ."""
    return torch.is_autocast_enabled(tensor.device.type)
