"""Families of what stands between a block's products: rms_norm, silu_mul, rope_write.

A case that is differentiable is judged with its gradients; of results that are rounded to codes,
and of what serving runs, there is only the forward. Codes have tests of their own, for two right
implementations may round a number that lies between two codes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.rms_norm import rms_norm
from slmperf.ops.silu_mul import silu_mul
from slmperf.testing.budget import EPS_FP32
from slmperf.testing.case import BF16, FP16, FP32, Case, Family, called
from slmperf.testing.rope_cases import ROPE_WRITE

EPS = 1e-5
ROUNDED = {
    "int8-token": ActivationSpec("int"),
    "int8-static": ActivationSpec("int", "tensor"),
    "int8-group": ActivationSpec("int", "group"),
    "fp8-token": ActivationSpec("float"),
    "fp8-static": ActivationSpec("float", "tensor"),
    "fp8-group": ActivationSpec("float", "group"),
}
MAKERS = ("plain", "outliers", "alike", "small")


def random_rows(maker: str, rows: int, width: int, random: torch.Generator) -> Tensor:
    """(rows, width) in fp32 that a wrong sum or row does not survive.

    outliers  some columns 50 times as large
    alike     rows with one large component in common: a mistaken row shows less than usual
    small     numbers of 1e-3, where eps counts
    """
    x = torch.randn(rows, width, generator=random)
    if maker == "outliers":
        x[:, ::13] *= 50
    elif maker == "alike":
        x = 0.3 * x + 3 * torch.randn(1, width, generator=random)
    return 1e-3 * x if maker == "small" else x


def codes_of(found: Tensor | QuantizedInput) -> Tensor:
    """The result, or its codes."""
    return found.codes if isinstance(found, QuantizedInput) else found


@dataclass(frozen=True)
class _RoundedCase(Case):
    """What the two share whose results may be rounded.

    activations   a name of ROUNDED; "": the result stays as it is
    forward_only  as in serving
    """

    rows: int
    width: int
    maker: str = "plain"
    activations: str = ""
    forward_only: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D) or (T, F)."""
        return self.rows, self.width

    @property
    def only_forward(self) -> bool:
        """Whether nothing receives a gradient."""
        return self.forward_only or bool(self.activations)

    def rounding(self, device: torch.device) -> dict[str, ActivationSpec | Tensor | None]:
        """The public functions' arguments."""
        spec = ROUNDED.get(self.activations)
        static = spec is not None and spec.static
        scale = torch.tensor([0.03], device=device) if static else None
        return {"activations": spec, "input_scale": scale}

    @property
    def result_bytes(self) -> int:
        """Of the result as it is written, with the scales of a token or group."""
        if not self.activations:
            return self.rows * self.width * self.dtype.itemsize
        scales = {"token": 1, "tensor": 0, "group": self.width // 128}
        found = scales[ROUNDED[self.activations].strategy]
        return self.rows * (self.width + 4 * found)

    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.<op>.<impl>, as the public function calls it."""
        return called(lambda: self.run(tensors, impl), self.op)


@dataclass(frozen=True)
class RMSNormCase(_RoundedCase):
    """rms_norm; the value of a differentiable case with a residual is output and h side by side."""

    op: ClassVar[str] = "rms_norm"
    row_axis: ClassVar[dict[str, int]] = {"x": 0, "residual": 0}

    residual: bool = False
    offset: float = 0.0

    @property
    def setting(self) -> str:
        """What is added, the offset, the rounding."""
        words = ["residual"] * self.residual + ["offset"] * bool(self.offset)
        words += [self.activations] * bool(self.activations)
        return "+".join(words) or "plain"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """x, weight and residual."""
        if self.only_forward:
            return ()
        return ("x", "weight", *(["residual"] if self.residual else []))

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, weight, residual."""
        random = self.generator()
        made = {
            "x": random_rows(self.maker, self.rows, self.width, random),
            "weight": 1 + 0.3 * torch.randn(self.width, generator=random),
        }
        if self.residual:
            made["residual"] = random_rows(self.maker, self.rows, self.width, random)
        return {name: one.to(self.dtype).to(device) for name, one in made.items()}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.rms_norm."""
        found = rms_norm(
            **tensors, eps=EPS, offset=self.offset, impl=impl,
            **self.rounding(tensors["x"].device),
        )  # fmt: skip
        output = codes_of(found.output)
        if self.only_forward or found.residual is None:
            return output
        return torch.cat([output, found.residual], dim=1)

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """Its reference."""
        return self.run(tensors, "reference")

    def rivals(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """torch's own norm, which adds no residual and rounds once."""
        if self.activations or self.offset:
            return {}

        def fused(tensors: dict[str, Tensor]) -> Tensor:
            x = tensors["x"] if not self.residual else tensors["x"] + tensors["residual"]
            y = torch.nn.functional.rms_norm(x, (self.width,), tensors["weight"], EPS)
            return torch.cat([y, x], dim=1) if self.residual and not self.only_forward else y

        return {"F.rms_norm": fused}

    @property
    def reduction(self) -> int:
        """D, or T in the gradient of the weight."""
        return max(self.rows, self.width)

    @property
    def cancellation(self) -> float:
        """A row of one number: its gradient is what is left of two terms that are alike."""
        return 8 * EPS_FP32 if self.width == 1 else super().cancellation

    @property
    def bytes(self) -> int:
        """Forward reads x and residual and writes h and the result; backward reads the gradients
        of both and h and writes h's."""
        one = self.rows * self.width * self.dtype.itemsize
        forward = one * (3 if self.residual else 1) + self.result_bytes
        return forward if self.only_forward else forward + one * (4 if self.residual else 3)


@dataclass(frozen=True)
class SiluMulCase(_RoundedCase):
    """silu_mul; fused: both inputs in one tensor."""

    op: ClassVar[str] = "silu_mul"
    row_axis: ClassVar[dict[str, int]] = {"gate": 0, "up": 0}

    fused: bool = False

    @property
    def setting(self) -> str:
        """One tensor or two, the rounding."""
        words = ["fused" if self.fused else "two"]
        return "+".join([*words, *([self.activations] if self.activations else [])])

    @property
    def differentiable(self) -> tuple[str, ...]:
        """gate and up."""
        return () if self.only_forward else ("gate",) if self.fused else ("gate", "up")

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """gate and up."""
        random = self.generator()
        gate, up = (random_rows(self.maker, self.rows, self.width, random) for _ in range(2))
        made = {"gate": torch.cat([gate, up], dim=1)} if self.fused else {"gate": gate, "up": up}
        return {name: one.to(self.dtype).to(device) for name, one in made.items()}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.silu_mul."""
        rounding = self.rounding(tensors["gate"].device)
        return codes_of(silu_mul(**tensors, impl=impl, **rounding))

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """Its reference."""
        return self.run(tensors, "reference")

    @property
    def reduction(self) -> int:
        """Nothing is added up."""
        return 1

    @property
    def bytes(self) -> int:
        """Forward reads both and writes the result; backward reads three and writes two."""
        one = self.rows * self.width * self.dtype.itemsize
        forward = 2 * one + self.result_bytes
        return forward if self.only_forward else forward + 5 * one


def _norm(
    dtype: torch.dtype, shape: tuple[int, int], residual: bool, offset: float, maker: str
) -> RMSNormCase:
    return RMSNormCase(dtype, *shape, maker, residual=residual, offset=offset)


def _silu(dtype: torch.dtype, shape: tuple[int, int], fused: bool, maker: str) -> SiluMulCase:
    return SiluMulCase(dtype, *shape, maker, fused=fused)


def _served_norm(shape: tuple[int, int], activations: str) -> RMSNormCase:
    return RMSNormCase(
        BF16, *shape, activations=activations, forward_only=True, residual=True, offset=0.0
    )


def _served_silu(shape: tuple[int, int], activations: str) -> SiluMulCase:
    return SiluMulCase(BF16, *shape, activations=activations, forward_only=True, fused=True)


# One number, less than a vector, one exactly, several and a part; rows that are shared out.
SHAPES = ((1, 1), (5, 3), (40, 64), (16, 384), (9, 1025), (70, 100))
SMALL = ((1, 1), (6, 5), (5, 64), (3, 200))
PARTS = ("", "int8-token", "fp8-token", "fp8-static", "fp8-group")

GLUE = {
    "rms_norm": Family(
        make=_norm,
        axes={
            "dtype": (FP32, BF16, FP16),
            "shape": SHAPES,
            "residual": (False, True),
            "offset": (0.0, 1.0),
            "maker": MAKERS,
        },
        small={"shape": SMALL},
        checked=(
            _norm(BF16, (7, 131), True, 0.0, "outliers"),
            _norm(FP16, (7, 131), False, 1.0, "alike"),
        ),
        compiled=(
            *(_served_norm((64, 4096), part) for part in PARTS),
            *(_served_norm((64, 128), part) for part in PARTS[-2:]),  # rows that share a tile
            RMSNormCase(BF16, 64, 4096, activations="fp8-token"),
            *(_norm(dtype, (64, 4096), True, 1.0, "plain") for dtype in (FP32, BF16, FP16)),
            *(_norm(BF16, (64, width), True, 0.0, "plain") for width in (3075, 16384)),
            _served_norm((64, 32768), "fp8-token"),
        ),
        bench={
            "cuda": (
                _norm(BF16, (8192, 4096), False, 0.0, "plain"),
                *(_served_norm((8192, 4096), part) for part in PARTS[:3]),
                _served_norm((8192, 3072), "fp8-token"),
                _served_norm((64, 4096), "fp8-token"),
            ),
            "cpu": (
                _norm(FP32, (1024, 2048), False, 0.0, "plain"),
                _served_norm((1024, 2048), ""),
                _served_norm((1024, 2048), "int8-token"),
            ),
        },
    ),
    "silu_mul": Family(
        make=_silu,
        axes={
            "dtype": (FP32, BF16, FP16),
            "shape": SHAPES,
            "fused": (False, True),
            "maker": MAKERS,
        },
        small={"shape": SMALL},
        checked=(
            _silu(BF16, (7, 131), True, "outliers"),
            _silu(FP32, (7, 131), False, "plain"),
        ),
        compiled=(
            *(_served_silu((64, 14336), part) for part in PARTS),
            *(_served_silu((64, 256), part) for part in PARTS[-2:]),  # rows that share a tile
            *(_silu(dtype, (64, 14336), False, "plain") for dtype in (FP32, BF16, FP16)),
            _silu(BF16, (64, 3075), True, "plain"),
            SiluMulCase(BF16, 64, 32768, activations="fp8-token"),
        ),
        bench={
            "cuda": (
                _silu(BF16, (8192, 14336), True, "plain"),
                *(_served_silu((8192, 14336), part) for part in PARTS[:3]),
                _served_silu((8192, 5120), "fp8-token"),
            ),
            "cpu": (
                _silu(FP32, (512, 5632), True, "plain"),
                _served_silu((512, 5632), ""),
                _served_silu((512, 5632), "int8-token"),
            ),
        },
    ),
    "rope_write": ROPE_WRITE,
}
