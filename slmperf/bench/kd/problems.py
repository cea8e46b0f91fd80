"""problems: what is measured. Plain values alone, so that another process can be told of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops import JSD, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, TotalVariation
from slmperf.ops.divergence import Kind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A student close to its teacher: logits around an offset, which differ by a small gap.
CLOSE_SPREAD, CLOSE_OFFSET, CLOSE_GAP = 3.0, 20.0, 0.01

_KINDS: dict[str, Callable[..., Kind]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
}


def parse_divergence(text: str) -> Kind:
    """ "forward_kl" or "jsd:0.3" -> the dataclass of slmperf.ops; InputError for anything else."""
    name, colon, number = text.partition(":")
    if name not in _KINDS:
        raise InputError(f"divergence is {text!r}, expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[name](*([float(number)] if colon else []))
    except InputError:
        raise
    except (TypeError, ValueError):
        raise InputError(
            f"divergence is {text!r}, expected {name} or, as of jsd, jsd:0.3"
        ) from None


@dataclass(frozen=True)
class Problem:
    """Distillation from one head to another: (tokens, student) and (tokens, teacher) hidden states.

    answers     so many tokens, evenly spread, have a weight; None: all of them
    divergence  as `parse_divergence` takes it
    """

    tokens: int
    vocabulary: int
    student: int
    teacher: int
    dtype: str
    device: str
    divergence: str = "forward_kl"
    answers: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "vocabulary", "student", "teacher"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}, expected {' or '.join(DTYPES)}")
        parse_divergence(self.divergence)

    @property
    def heads(self) -> str:
        """The two heads, without the number of tokens: what a family of rows shares."""
        return f"kd {self.student}<-{self.teacher} x {self.vocabulary}"

    def __str__(self) -> str:
        kind = "" if self.divergence == "forward_kl" else f", {self.divergence}"
        answers = "" if self.answers is None else f", {self.answers} of them answers"
        return f"{self.heads}, {self.tokens} tokens{answers}, {self.dtype}{kind}"

    @property
    def kind(self) -> Kind:
        """The divergence."""
        return parse_divergence(self.divergence)

    @property
    def flops(self) -> int:
        """Of the matrix products of the tokens that count: two forward, two backward."""
        rows = self.tokens if self.answers is None else self.answers
        return 2 * rows * self.vocabulary * (3 * self.student + self.teacher)

    @property
    def gradient_bytes(self) -> int:
        """Of what a step leaves behind: the gradients of hidden states and head."""
        size = self.tokens * self.student + self.vocabulary * self.student
        return size * DTYPES[self.dtype].itemsize

    def of_tokens(self, tokens: int) -> Problem:
        """The same with at most so many tokens."""
        return replace(self, tokens=min(self.tokens, tokens))

    def inputs(self, close: bool = False) -> dict[str, Tensor]:
        """hidden, weight (both leaves), teacher_hidden, teacher_weight, and which tokens count.

        The latter as `token_weight`, or on a GPU as `rows`, both on the device. Apart: random
        hidden states and heads / sqrt(D), so logits of deviation 1. `close`: see CLOSE_SPREAD.
        """
        generator = torch.Generator(self.device).manual_seed(self.tokens)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=self.device)

        hidden, teacher_hidden = (normal(self.tokens, d) for d in (self.student, self.teacher))
        weight, teacher_weight = (normal(self.vocabulary, d) for d in (self.student, self.teacher))
        if close:
            # Columns that both share make the logits, the others of each the gap between them.
            shared = max(1, min(self.student, self.teacher) * 3 // 4)
            teacher_hidden[:, :shared], teacher_weight[:, :shared] = (
                hidden[:, :shared], weight[:, :shared],
            )  # fmt: skip
            for states, head in ((hidden, weight), (teacher_hidden, teacher_weight)):
                head[:, :shared] *= CLOSE_SPREAD * shared**-0.5
                head[:, shared:] *= CLOSE_GAP * (2 * max(1, head.shape[1] - shared)) ** -0.5
                states[:, 0], head[:, 0] = 1.0, CLOSE_OFFSET
        else:
            weight, teacher_weight = (w * w.shape[1] ** -0.5 for w in (weight, teacher_weight))
        named = {
            "hidden": hidden,
            "weight": weight,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
        }
        found = {name: one.to(DTYPES[self.dtype]) for name, one in named.items()}
        found["hidden"].requires_grad_()
        found["weight"].requires_grad_()
        if self.answers is not None:
            rows = torch.arange(self.answers, device=self.device) * (self.tokens // self.answers)
            if self.device == "cuda":
                found["rows"] = rows
            else:
                weights = torch.zeros(self.tokens)
                found["token_weight"] = weights.index_fill_(0, rows, 1.0)
        return found


@dataclass(frozen=True)
class Step:
    """The head and loss of one training step of a student: examples/recipes/quickstart.yaml.

    Sizes of the student and the teacher of that recipe, the median number of tokens that count in a
    batch of its 3,072 and of history rows that they answer; weights and shares of its loss.
    """

    tokens: int = 815
    examples: int = 250
    vocabulary: int = 2048
    student: int = 48
    teacher: int = 64
    device: str = "cpu"
    kd_weight: float = 0.9
    ce_weight: float = 0.1

    def __str__(self) -> str:
        return "kd step of the quickstart"

    def inputs(self) -> dict[str, Tensor]:
        """hidden, weight (both leaves), those of the teacher, labels, token_weight, examples ()."""
        plain = Problem(
            self.tokens, self.vocabulary, self.student, self.teacher, "fp32", self.device
        )
        found = plain.inputs()
        generator = torch.Generator(self.device).manual_seed(1)
        place = {"generator": generator, "device": self.device}
        found["labels"] = torch.randint(self.vocabulary, (self.tokens,), **place)
        found["token_weight"] = torch.rand(self.tokens, **place)
        found["examples"] = torch.tensor(float(self.examples), device=self.device)
        return found
