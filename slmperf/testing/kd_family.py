"""kd_loss's family: which of its cases there are, where they run, what the benches time."""

from __future__ import annotations

from typing import Any

import torch

from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from slmperf.ops.divergence import Kind, code_of
from slmperf.testing.case import BF16, FP16, FP32, Family
from slmperf.testing.kd_cases import EXTRAS, KDLossCase

Precision = tuple[torch.dtype, str]  # of the tensors, and how logits are kept
Sizes = tuple[int, int, int, int]  # T, V, D, D of the teacher


def _make(
    precision: Precision,
    sizes: Sizes,
    kind: Kind,
    teacher: str,
    reduced: str,
    cross_entropy: float,
    temperature: float,
    extras: str,
    maker: str,
    chunk: int,
) -> KDLossCase:
    """The case; where kd_loss takes no such combination, its nearest neighbour that it takes."""
    dtype, logits = precision
    code, _ = code_of(kind)
    if logits == "difference" and (teacher != "head" or cross_entropy == 1.0):
        logits = "fp32"
    if logits == "difference" and sizes[1] < 16:  # so few that the twin's rounding is luck
        logits = "bf16"
    if code == "total_variation" and logits != "fp32":  # signs hang on how logits are rounded,
        maker, extras = {"close": "apart"}.get(maker, maker), "plain"  # and those here on one rule
    if maker == "tied" and teacher == "head":
        sizes = (*sizes[:3], sizes[2])
    elif maker == "tied":
        maker = "apart"
    if maker == "spread":  # at this temperature no rounding of a logit is small: neither a cap's
        temperature, logits = 0.05, "fp32"
        if code == "reverse_kl" and dtype == FP16:  # has no room for gradients of that size
            dtype = BF16
        extras = {"softcap": "plain", "all": "bias"}.get(extras, extras)
        if sizes[0] > 24:  # few rows have two tokens so near each other that rounding shows
            sizes = (4 * sizes[0], *sizes[1:])
    if maker == "padded":  # a softcap would make the infinities finite
        extras = "bias"
    if teacher.startswith("top_k") and code == "reverse_kl":
        teacher = "top_k:bucket"
    if teacher == "top_k:zero" and code != "forward_kl":
        teacher = "top_k:renormalise"
    if teacher in ("top_k:zero", "top_k:bucket"):
        temperature = 1.0
    return KDLossCase(
        dtype, logits, sizes, kind, teacher, reduced, cross_entropy, temperature, extras, maker,
        chunk,
    )  # fmt: skip


def _plain(
    precision: Precision,
    sizes: Sizes,
    kind: Kind = ForwardKL(),  # noqa: B008  (frozen)
    teacher: str = "head",
    **more: Any,
) -> KDLossCase:
    """A case with nothing special but what is named."""
    settings: dict[str, Any] = {"reduced": "mean", "cross_entropy": 0.0, "temperature": 1.0}
    settings |= {"extras": "plain", "maker": "apart", "chunk": 0} | more
    return _make(precision, sizes, kind, teacher, **settings)


PLAIN, WIDE, HALF = (FP32, "fp32"), (BF16, "fp32"), (BF16, "bf16")
DIFFERENCE, FP16_WIDE = (BF16, "difference"), (FP16, "fp32")
KINDS = (
    ForwardKL(), ReverseKL(), JSD(0.5), SkewForwardKL(0.1), SkewReverseKL(0.3), TotalVariation(),
)  # fmt: skip
TEACHERS = ("head", "logits", "top_k:renormalise", "top_k:zero", "top_k:bucket")


def _compiled() -> tuple[KDLossCase, ...]:
    """Logits in fp32, bf16 and as differences; rows that start on 16 bytes, and that do not."""
    even, odd = (3, 140000, 16, 16), (3, 140001, 16, 16)
    modes = (PLAIN, WIDE, HALF, DIFFERENCE)
    found = [_plain(DIFFERENCE, even, kind) for kind in KINDS]  # others: those of divergence
    for mode in modes:
        found += [
            _plain(mode, even, kind, cross_entropy=0.3, extras="all")
            for kind in (ForwardKL(), JSD(0.5))
        ]
        found += [_plain(mode, odd), _plain(mode, even, teacher="logits")]
    for mode in (PLAIN, HALF):
        found += [
            _plain(mode, even, kind, "top_k:bucket", cross_entropy=0.3)
            for kind in (ForwardKL(), JSD(0.5))
        ]
        found += [_plain(mode, even, cross_entropy=1.0)]
    return tuple(found)


def _large(vocabulary: int) -> tuple[KDLossCase, ...]:
    """A vocabulary as large as they come."""
    sizes = (9, vocabulary, 32, 48)
    return (
        _plain(PLAIN, sizes, cross_entropy=0.3, maker="offset"),
        _plain(PLAIN, sizes, JSD(0.5), reduced="none", cross_entropy=0.3, maker="close"),
        _plain(HALF, sizes, ReverseKL(), "logits", reduced="sum", cross_entropy=0.3),
        _plain(WIDE, sizes, TotalVariation(), maker="spread"),
        _plain(
            FP16_WIDE, sizes, SkewReverseKL(0.1), "top_k:bucket", reduced="none", maker="ragged"
        ),
    )


LLAMA = (128256, 4096, 4096)

FAMILY = Family(
    make=_make,
    axes={
        "precision": (PLAIN, WIDE, HALF, DIFFERENCE, FP16_WIDE),
        # no row, one of one token, less than a vector, odd, several blocks; rows enough that the
        # twin's largest error is no matter of luck
        "sizes": (
            (0, 33, 8, 8),
            (1, 1, 5, 3),
            (40, 3, 16, 8),
            (40, 64, 32, 24),
            (29, 777, 33, 40),
            (26, 1025, 64, 16),
            (70, 3001, 24, 48),
        ),
        "kind": (*KINDS, JSD(0.1, rescale=True), JSD(0.0), JSD(1.0)),
        "teacher": TEACHERS,
        "reduced": ("mean", "sum", "none", "normalizer"),
        "cross_entropy": (0.0, 0.3, 1.0),
        "temperature": (1.0, 0.35, 4.0),
        "extras": tuple(EXTRAS),
        "maker": (
            "apart", "close", "offset", "alike", "spread", "tied", "padded", "ragged", "ignored"
        ),
        "chunk": (0, 5),
    },  # fmt: skip
    small={
        "sizes": ((0, 33, 8, 8), (1, 1, 5, 3), (24, 3, 16, 8), (8, 64, 16, 24), (4, 257, 24, 16)),
        "temperature": (1.0, 0.35),
        "chunk": (0, 2),
    },
    crossed=("kind", "teacher", "reduced"),
    checked=(
        _plain(PLAIN, (3, 77, 24, 16), JSD(0.3), reduced="none", cross_entropy=0.3, temperature=2.0,
               extras="all", maker="alike"),
        _plain(WIDE, (4, 77, 16, 24), ReverseKL(), "logits", extras="bias", maker="ragged",
               chunk=2),
        _plain(FP16_WIDE, (3, 67, 16, 24), SkewForwardKL(0.2), "top_k:renormalise", reduced="sum",
               cross_entropy=0.3, temperature=0.7, extras="softcap"),
        _plain(HALF, (3, 77, 16, 16), reduced="normalizer", maker="tied"),
        _plain(DIFFERENCE, (4, 77, 16, 24), JSD(0.5), reduced="none", cross_entropy=0.3,
               extras="bias", maker="ragged", chunk=2),
    ),
    compiled=_compiled(),
    large=(*_large(50257), *_large(262144)),  # GPT-2's, which is odd, and Gemma's
    bench={
        "cuda": (
            # Sizes at which the plain reference, which holds logits 10 to 15 times over, needs less
            # than 24 GiB; longer ones are `slmperf bench kd`'s.
            _plain(DIFFERENCE, (1024, *LLAMA)),
            _plain(HALF, (1024, *LLAMA)),
            _plain(WIDE, (1024, *LLAMA)),
            _plain(DIFFERENCE, (1024, *LLAMA), JSD(0.5)),
            _plain(DIFFERENCE, (2048, *LLAMA)),
            _plain(DIFFERENCE, (2048, 128256, 2048, 4096)),
            _plain(DIFFERENCE, (2048, 152064, 896, 3584)),
            _plain(DIFFERENCE, (1024, 262144, 1152, 3840)),
        ),
        # few rows: the reference takes seconds for a thousand
        "cpu": (_plain(PLAIN, (128, 32000, 512, 768)), _plain(WIDE, (128, 32000, 512, 768))),
    },
)  # fmt: skip
