"""What kd_loss is run on: hidden states and heads whose logits a wrong loss does not survive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slmperf.ops import (
    KDLoss,
    StudentHead,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    TotalVariation,
    kd_loss,
    kd_loss_reference,
)
from slmperf.ops.divergence import Kind, code_of
from slmperf.ops.kd_loss.heads import Teacher
from slmperf.testing.budget import EPS_FP32
from slmperf.testing.case import Case, called, named

Tensors = dict[str, Tensor]

# name -> bias, softcap and scale of the student; the teacher has others of its own, but where it is
# close to the student.
# A scale of 3/8 rounds nothing that the product did not.
EXTRAS: dict[str, tuple[bool, float | None, float | None]] = {
    "plain": (False, None, None),
    "bias": (True, None, None),
    "softcap": (False, 20.0, None),
    "scale": (False, None, 0.375),
    "all": (True, 7.0, 0.375),
}
MASKING = ("ragged", "ignored")  # makers that say which rows count


def random_heads(
    maker: str, sizes: tuple[int, int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of student and teacher in fp32: (T, D), (V, D), (T, Dt), (V, Dt).

    apart    independent, logits of standard deviation 3
    close    logits 0.01 away from the teacher's: values near 0, differences of near-equal numbers
    offset   all logits around 20, and outliers 12 above the rest in some rows, at other tokens per
             model
    alike    rows that share one large component: a mistaken row index shows less than usual
    spread   logits from -200 to 200, of numbers so round that products add up exactly, in whatever
             order: at temperature 0.05 half a unit in the last place of a logit would be seen.
             Every other row sees half of the features, in which tokens come in pairs that rival
             each other; or no row would have two that count
    Others as apart; see KDLossCase.
    """
    tokens, vocabulary, hidden, teacher_hidden = sizes

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device)

    def head(width: int) -> tuple[Tensor, Tensor]:
        return normal(tokens, width), 3 * normal(vocabulary, width) / width**0.5

    def round_numbers(rows: int, width: int, most: int) -> Tensor:
        size = (rows, width)
        return torch.randint(-most, most + 1, size, generator=generator, device=generator.device)

    if maker == "spread":
        made: list[Tensor] = []
        for width in (hidden, teacher_hidden):
            states = round_numbers(tokens, width, 4)
            weight = round_numbers(vocabulary, width, 64)
            weight[1::2, ::2] = weight[: vocabulary // 2 * 2 : 2, ::2]
            weight[1::2, 0] += 1
            states[::2, 1::2] = 0
            made += [states.float(), weight / 2.0 ** round(math.log2(1.6 * width**0.5))]
        return made[0], made[1], made[2], made[3]
    student, teacher = head(hidden), head(teacher_hidden)
    if maker == "close":
        shared = min(hidden, teacher_hidden) - 1
        for mine, theirs in zip(student, teacher, strict=True):
            mine[:, :shared] = theirs[:, :shared]
        for _, weight in (student, teacher):
            weight[:, shared:] *= 0.01 / 3
    elif maker == "offset":
        rare = torch.rand(vocabulary, generator=generator, device=generator.device)
        for index, (states, weight) in enumerate((student, teacher)):
            states[:, 0], weight[:, 0] = 20.0, 1.0
            states[:, 1] = 12.0 * (torch.arange(tokens, device=states.device) % 3 == index)
            weight[:, 1] = ((rare + 0.5 * index) % 1 < 2 / vocabulary).float()
    elif maker == "alike":
        for states, _ in (student, teacher):
            states.mul_(0.3).add_(normal(1, states.shape[1]))
    return *student, *teacher


def head_logits(head: StudentHead | TeacherHead) -> Tensor:
    """softcap(scale (hidden weight' + bias)) of a head, (T, V)."""
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias) * (head.scale or 1.0)
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


@dataclass(frozen=True)
class KDLossCase(Case):
    """kd_loss of T tokens.

    maker    as of random_heads; and
             tied     the teacher uses the student's head
             padded   a quarter of the vocabulary has minus infinity for a bias, in both models
             ragged   float weights, zeros among them, and ignored labels; NaN in those rows
             ignored  no row counts
    teacher  head, logits, or top_k:<tail>
    reduced  mean, sum, none, or normalizer: the mean by a given number
    logits   fp32, bf16, or difference, which is Triton's alone: others take fp32 in its place
    chunk    rows per chunk of logits, 0: as it comes
    """

    op: ClassVar[str] = "kd_loss"
    ignore_index: ClassVar[int] = -100
    row_axis: ClassVar[dict[str, int]] = dict.fromkeys(
        ("hidden", "teacher_hidden", "teacher_logits", "indices", "log_probs", "labels",
         "token_weight"), 0,
    )  # fmt: skip

    logits: str
    sizes: tuple[int, int, int, int]  # T, V, D, D of the teacher
    kind: Kind
    teacher: str
    reduced: str
    cross_entropy: float
    temperature: float
    extras: str
    maker: str
    chunk: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, V, D, D of the teacher)."""
        return self.sizes

    @property
    def setting(self) -> str:
        """Kind, teacher, how logits are kept."""
        return f"{named(self.kind)} {self.teacher} {self.logits}"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Hidden states, head, and bias where there is one."""
        return ("hidden", "weight", "bias") if EXTRAS[self.extras][0] else ("hidden", "weight")

    # The tensors.

    def tensors(self, device: str = "cpu") -> Tensors:
        """Those that the case's teacher and settings ask for."""
        generator = self.generator(device)
        hidden, weight, teacher_hidden, teacher_weight = random_heads(
            self.maker, self.sizes, generator
        )
        found = {"hidden": hidden, "weight": weight}
        given = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        bias, _, _ = EXTRAS[self.extras]
        if bias:
            found["bias"], given["teacher_bias"] = self._bias(generator), self._bias(generator)
            if self.maker == "close":
                given["teacher_bias"] = found["bias"] + 0.01 * given["teacher_bias"]
        if self.maker == "tied":
            del given["teacher_weight"]
        found, given = ({k: v.to(self.dtype) for k, v in one.items()} for one in (found, given))
        found |= self._teacher_tensors({**found, **given}) if self.teacher != "head" else given
        if self.cross_entropy or self.maker in MASKING:
            found["labels"] = self._labels(generator)
        if self.maker in MASKING:
            self._mask(found, generator)
        if self.reduced == "normalizer":
            found["normalizer"] = torch.tensor(13.7, device=device)
        if self.kind == TotalVariation() and self.teacher in ("head", "logits"):
            ties = self._ties(found)
            one = torch.ones(self.sizes[0], device=device)
            found["token_weight"] = found.get("token_weight", one).masked_fill(ties, 0.0)
        return found

    def _ties(self, tensors: Tensors) -> Tensor:
        """Rows (T,) in which the sign of q - p, and so the gradient, is a matter of rounding."""
        wide = {name: x.double() for name, x in tensors.items() if x.is_floating_point()}
        student = head_logits(self._student_head(wide))
        given = wide.get("teacher_logits")
        teacher = head_logits(self._teacher_head(wide)) if given is None else given
        log_q, log_p = (torch.log_softmax(x / self.temperature, 1) for x in (student, teacher))
        near = ((log_q - log_p).abs() < 3e-6 / min(1.0, self.temperature)) & (log_q.exp() < 1.0)
        return (near & (log_q.exp() > 1e-9)).any(dim=1)

    @property
    def _allowed(self) -> int:
        """Tokens that the padding leaves: the first ones."""
        vocabulary = self.sizes[1]
        return vocabulary - (vocabulary // 4 if self.maker == "padded" else 0)

    def _bias(self, generator: torch.Generator) -> Tensor:
        bias = torch.randn(self.sizes[1], generator=generator, device=generator.device)
        if self.maker == "spread":
            bias = bias.round()
        bias[self._allowed :] = -torch.inf
        return bias

    def _teacher_tensors(self, tensors: Tensors) -> Tensors:
        """Logits, or the likeliest tokens, of the teacher whose head this is."""
        logits = head_logits(
            self._teacher_head({name: tensor.float() for name, tensor in tensors.items()})
        )
        if self.teacher == "logits":
            return {"teacher_logits": logits.to(self.dtype)}
        count = min(8, max(1, self.sizes[1] // 2))
        log_probs, indices = torch.log_softmax(logits, dim=-1).topk(count)
        if count < self.sizes[1] and code_of(self.kind)[0] == "reverse_kl":
            log_probs -= 0.01  # infinite where the tail rounds to nothing
        elif count > 1:
            log_probs[::5, -1] = -torch.inf  # rows that have one less
        return {"indices": indices, "log_probs": log_probs}

    def _labels(self, generator: torch.Generator) -> Tensor:
        size = (self.sizes[0],)
        return torch.randint(self._allowed, size, generator=generator, device=generator.device)

    def _mask(self, tensors: Tensors, generator: torch.Generator) -> None:
        """Which rows count; the others hold NaN, as may stand in rows that nobody has computed."""
        tokens, device = self.sizes[0], generator.device
        row = torch.arange(tokens, device=device)
        weight = 0.25 + torch.rand(tokens, generator=generator, device=device)
        if self.maker == "ignored":
            weight = weight.masked_fill(row % 2 == 0, 0.0)
            tensors["labels"][1::2] = self.ignore_index
        elif tokens > 1:
            weight = weight.masked_fill(row % 3 == 1, 0.0)
            tensors["labels"][::4] = self.ignore_index
        tensors["token_weight"] = weight
        gone = (weight == 0.0) | (tensors["labels"] == self.ignore_index)
        for name in ("hidden", "teacher_hidden", "teacher_logits", "log_probs"):
            if name in tensors:
                tensors[name] = tensors[name].masked_fill(gone[:, None], torch.nan)

    # The calls.

    def _student_head(self, tensors: Tensors) -> StudentHead:
        _, softcap, scale = EXTRAS[self.extras]
        return StudentHead(
            tensors["hidden"], tensors["weight"], tensors.get("bias"), softcap, scale
        )

    def _teacher_head(self, tensors: Tensors) -> TeacherHead:
        _, softcap, scale = EXTRAS[self.extras]
        if self.maker != "close":
            softcap, scale = softcap and softcap + 5.0, scale and 2.0 * scale
        weight = tensors.get("teacher_weight", tensors["weight"].detach())
        return TeacherHead(
            tensors["teacher_hidden"], weight, tensors.get("teacher_bias"), softcap, scale
        )

    def _teacher(self, tensors: Tensors) -> Teacher:
        if self.teacher == "head":
            return self._teacher_head(tensors)
        if self.teacher == "logits":
            return TeacherLogits(tensors["teacher_logits"])
        tail = self.teacher.removeprefix("top_k:")
        return TeacherTopK(tensors["indices"], tensors["log_probs"], tail)

    def _settings(self, tensors: Tensors) -> dict[str, Any]:
        """Keyword arguments that the function and its reference share."""
        return {
            "labels": tensors.get("labels"),
            "token_weight": tensors.get("token_weight"),
            "divergence": self.kind,
            "cross_entropy": self.cross_entropy,
            "temperature": self.temperature,
            "reduction": "mean" if self.reduced == "normalizer" else self.reduced,
            "normalizer": tensors.get("normalizer"),
            "ignore_index": self.ignore_index,
        }

    def results(self, tensors: Tensors, impl: str) -> KDLoss:
        """slmperf.ops.kd_loss, with the parts of the loss that are reports."""
        return kd_loss(
            self._student_head(tensors),
            self._teacher(tensors),
            **self._settings(tensors),
            logits="fp32" if impl != "triton" and self.logits == "difference" else self.logits,
            chunk_bytes=2 * 4 * self.sizes[1] * self.chunk or None,
            impl=impl,
        )

    def run(self, tensors: Tensors, impl: str) -> Tensor:
        """The loss of slmperf.ops.kd_loss."""
        return self.results(tensors, impl).loss

    def reference(self, tensors: Tensors) -> Tensor:
        """The loss of slmperf.ops.kd_loss_reference; of difference logits, that of bf16 ones."""
        return self._reference(tensors, **self._settings(tensors))

    def _reference(self, tensors: Tensors, **settings: Any) -> Tensor:
        logits = "fp32" if self.logits == "fp32" else "bf16"
        student, teacher = self._student_head(tensors), self._teacher(tensors)
        return kd_loss_reference(student, teacher, **settings, logits=logits).loss

    def terms(self, tensors: Tensors) -> Tensor | None:
        """The loss of every token, as it enters into the loss of all."""
        if self.reduced == "none":
            return None
        none = {"reduction": "none", "normalizer": None}
        rows = self._reference(tensors, **{**self._settings(tensors), **none})
        if self.reduced == "sum":
            return rows
        if self.reduced == "normalizer":
            return rows / tensors["normalizer"]
        weight = tensors.get("token_weight", torch.ones_like(rows))
        if "labels" in tensors:
            weight = weight.masked_fill(tensors["labels"] == self.ignore_index, 0.0)
        return rows / weight.sum().clamp(min=1e-30)

    def operator(self, tensors: Tensors, impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.kd_loss.<impl>, as the public function calls it."""
        return called(lambda: self.run(tensors, impl), self.op)

    # What it costs.

    @property
    def reduction(self) -> int:
        """D and D of the teacher, twice V, T: each result is a sum of sums of sums."""
        tokens, vocabulary, hidden, teacher_hidden = self.sizes
        return tokens + 2 * vocabulary + hidden + teacher_hidden

    @property
    def cancellation(self) -> float:
        """More where both models are sure, of different tokens: no gradient is left."""
        return EPS_FP32 / 100 if self.maker == "spread" else super().cancellation

    @property
    def bytes(self) -> int:
        """Forward reads both heads, backward the student's; their hidden states too; two gradients.

        Logits need not exist. Of other teachers, what is given of them is read once.
        """
        tokens, vocabulary, hidden, teacher_hidden = self.sizes
        given = {"head": (tokens + vocabulary) * teacher_hidden, "logits": tokens * vocabulary}
        return self.dtype.itemsize * (
            3 * (tokens + vocabulary) * hidden + given.get(self.teacher, 0)
        )

    @property
    def flops(self) -> int:
        """2 T V (3 D + D of the teacher): logits of both, two gradients of the student."""
        tokens, vocabulary, hidden, teacher_hidden = self.sizes
        teacher = teacher_hidden if self.teacher == "head" else 0
        return 2 * tokens * vocabulary * (3 * hidden + teacher)
