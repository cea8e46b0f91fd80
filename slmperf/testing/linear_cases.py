"""linear's families: one a scheme's op; inputs that can fail, bytes and flops, what is run where.

The weight's tensors are among a case's tensors, as fixed ones, so that a bench rotates them, too.
Gold is the product with the dequantised weight in fp64; of rounded inputs with the codes that the
tested dtype gives, whose gradient passes straight through the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    linear,
    quantize_input,
    stack_experts,
)
from slmperf.ops.linear.weights import BLOCK, Weight
from slmperf.ops.weight_spec import WeightSpec
from slmperf.testing.case import BF16, FP16, FP32, Case, Family, called


@dataclass(frozen=True)
class Scheme:
    """A weight's grid and its inputs' rounding."""

    spec: WeightSpec
    activations: ActivationSpec | None = None


def _int4(group_size: int, symmetric: bool = True) -> Scheme:
    return Scheme(WeightSpec("int", 4, symmetric, group_size))


_BLOCKS = WeightSpec("float", 8, block=(BLOCK, BLOCK))
_CHANNELS = WeightSpec("float", 8)
_WHOLE = WeightSpec("float", 8, group_size=None)
SCHEMES: dict[str, Scheme] = {
    "int4-32": _int4(32),
    "int4-64-zeros": _int4(64, symmetric=False),
    "int4-128": _int4(128),
    "int4-128-zeros": _int4(128, symmetric=False),
    "int4-all": _int4(-1),
    "int8-token": Scheme(WeightSpec(), ActivationSpec("int")),
    "int8-static": Scheme(WeightSpec(), ActivationSpec("int", "tensor")),
    "int8-weight": Scheme(WeightSpec()),
    "fp8-token": Scheme(_CHANNELS, ActivationSpec("float")),
    "fp8-static": Scheme(_WHOLE, ActivationSpec("float", "tensor")),
    "fp8-block": Scheme(_BLOCKS, ActivationSpec("float", "group")),
    "fp8-weight": Scheme(_CHANNELS),
    "fp8-block-weight": Scheme(_BLOCKS),
}


def has_units(kind: str, device: torch.device) -> bool:
    """Whether a device multiplies codes of a kind: sm_80 has no fp8 units, and leaves inputs."""
    if kind != "float" or device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class LinearCase(Case):
    """linear of x (M, K) with a quantised weight (N, K).

    scheme   a name of SCHEMES; added: "", "bias", "residual" or "both"; out: dtype of the result
    maker    of x and W: "plain", normal numbers; "outliers": some inputs 30 times as large;
             "alike": rows with one large component in common; "zeros": some rows are zeros
    experts  0: one weight; else as many, without gradients
    """

    op: ClassVar[str]
    row_axis: ClassVar[dict[str, int]] = {"x": 0, "residual": 0}
    fixed: ClassVar[tuple[str, ...]] = (
        "packed", "data", "scale", "zero_point", "input_scale", "starts",
    )  # fmt: skip

    scheme: str
    rows: int
    outputs: int
    inputs: int
    added: str = ""
    out: torch.dtype | None = None
    maker: str = "plain"
    experts: int = 0
    forward_only: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.rows, self.outputs, self.inputs

    @property
    def setting(self) -> str:
        """Scheme, and experts where there are some."""
        return self.scheme + (f" of {self.experts}" if self.experts else "")

    @property
    def differentiable(self) -> tuple[str, ...]:
        """x and what is added."""
        if self.experts or self.forward_only:
            return ()
        return ("x", *(name for name in ("bias", "residual") if self.added in (name, "both")))

    def given(self, tensors: dict[str, Tensor]) -> Weight:
        """The weight object of a case's tensors."""
        scheme, scale = SCHEMES[self.scheme], tensors["scale"]
        if scheme.spec.bits == 4:
            return Int4Weight(
                tensors["packed"], scale, tensors.get("zero_point"), self.outputs, self.inputs,
                scheme.spec.group_size or -1,
            )  # fmt: skip
        kind = Int8Weight if scheme.spec.kind == "int" else Fp8Weight
        return kind(
            tensors["data"], scale, scheme.activations, tensors.get("input_scale"), self.dtype
        )

    def _weight(self) -> Weight:
        made = [
            random_weight(self.scheme, self.outputs, self.inputs, self.dtype, self.maker, seed)
            for seed in range(max(1, self.experts))
        ]
        return stack_experts(made) if self.experts else made[0]  # type: ignore[type-var]

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """x, what is added, and the weight's tensors."""
        random = self.generator()
        x = torch.randn(self.rows, self.inputs, generator=random)
        if self.maker == "outliers":
            x[:, ::13] *= 30
        elif self.maker == "alike":
            x = 0.3 * x + 3 * torch.randn(1, self.inputs, generator=random)
        elif self.maker == "zeros":
            x[::3] = 0
        lead = (self.experts,) if self.experts else ()
        made = {"x": x.to(self.dtype)}
        if self.added in ("bias", "both"):
            made["bias"] = torch.randn(*lead, self.outputs, generator=random).to(self.dtype)
        if self.added in ("residual", "both"):
            residual = torch.randn(self.rows, self.outputs, generator=random)
            made["residual"] = residual.to(self.dtype)
        if self.experts:  # uneven, and one expert without rows
            edges = torch.randint(0, self.rows + 1, (self.experts - 1,), generator=random).sort()
            starts = [0, *edges.values.tolist(), self.rows]
            if self.experts > 2:
                starts[1] = starts[2]
            made["starts"] = torch.tensor(starts, dtype=torch.int32)
        weight = {name: value for name, value in vars(self._weight()).items()
                  if isinstance(value, Tensor)}  # fmt: skip
        return {name: value.to(device) for name, value in (made | weight).items()}

    def rivals(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """torch's product with the same weight in the dtype of x: what quantisation is to beat."""
        if self.experts:
            return {}
        made: dict[int, Tensor] = {}  # one for each set of tensors, so that they rotate alike

        def plain(tensors: dict[str, Tensor]) -> Tensor:
            x, key = tensors["x"], tensors["scale"].data_ptr()
            if key not in made:
                made[key] = self.given(tensors).dequantized().to(x.dtype)
            y = torch.nn.functional.linear(x, made[key], tensors.get("bias"))
            y = y if "residual" not in tensors else y + tensors["residual"]
            return y if self.out is None else y.to(self.out)

        return {"unquantised": plain}

    def _arguments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | torch.dtype | None]:
        named: dict[str, Tensor | torch.dtype | None] = {
            name: tensors.get(name) for name in ("bias", "residual", "starts")
        }
        return named | {"out_dtype": self.out}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.linear."""
        arguments = self._arguments(tensors)
        return linear(tensors["x"], self.given(tensors), impl=impl, **arguments)

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """The reference implementation; of fp64 the product itself."""
        x, weight = tensors["x"], self.given(tensors)
        if x.dtype != torch.float64:
            return self.run(tensors, "reference")
        if weight.activations is None or not has_units(weight.spec.kind, x.device):
            wide = weight.dequantized().to(self.dtype).double()
        else:
            wide = _wide(weight)
            rounded = quantize_input(
                x.detach().to(self.dtype), weight.activations, weight.input_scale, impl="reference"
            )
            scale = rounded.scale.double()
            if scale.dim() == 2 and scale.shape[1] > 1:
                scale = scale.repeat_interleave(BLOCK, dim=1)
            x = x + (rounded.codes.double() * scale - x).detach()
        bias, residual, starts = (tensors.get(name) for name in ("bias", "residual", "starts"))
        if starts is None:
            y = torch.nn.functional.linear(x, wide, bias)
        else:
            of_row = torch.repeat_interleave(torch.arange(self.experts), starts.diff().long().cpu())
            y = torch.einsum("mk,mnk->mn", x, wide[of_row])
            y = y if bias is None else y + bias[of_row]
        return y if residual is None else y + residual

    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.<op>.<impl>."""
        return called(lambda: self.run(tensors, impl), self.op)

    @property
    def product_dtype(self) -> torch.dtype:
        """Codes where inputs are rounded."""
        scheme = SCHEMES[self.scheme]
        return self.dtype if scheme.activations is None else scheme.spec.code_dtype

    @property
    def reduction(self) -> int:
        """K."""
        return self.inputs

    @property
    def bytes(self) -> int:
        """x, the weight and what is added are read once, y is written once; forward alone."""
        made = self.tensors()
        out = self.out or self.dtype
        return sum(one.nbytes for one in made.values()) + self.rows * self.outputs * out.itemsize

    @property
    def flops(self) -> int:
        """Of the forward product."""
        return 2 * self.rows * self.outputs * self.inputs


class LinearInt4Case(LinearCase):
    """A case of linear_int4."""

    op: ClassVar[str] = "linear_int4"


class LinearInt8Case(LinearCase):
    """A case of linear_int8."""

    op: ClassVar[str] = "linear_int8"


class LinearFp8Case(LinearCase):
    """A case of linear_fp8."""

    op: ClassVar[str] = "linear_fp8"


_CLASSES = {"int4": LinearInt4Case, "int8": LinearInt8Case, "fp8": LinearFp8Case}


def linear_case(
    scheme: str,
    rows: int,
    width: tuple[int, int],
    dtype: torch.dtype = BF16,
    added: str = "",
    out: torch.dtype | None = None,
    maker: str = "plain",
    experts: int = 0,
    forward_only: bool = False,
) -> LinearCase:
    """The case; where a group does not divide the inputs, with as many more as it wants."""
    outputs, inputs = width
    spec, activations = SCHEMES[scheme].spec, SCHEMES[scheme].activations
    unit = spec.group_size if spec.group_size not in (None, -1) else 1
    if activations is not None and activations.strategy == "group":
        unit = BLOCK
    inputs = -(-inputs // unit) * unit
    kind = scheme.split("-")[0]
    return _CLASSES[kind](
        dtype, scheme, rows, outputs, inputs, added, out, maker, experts, forward_only
    )


# Less than a tile, a tile, multiples of 16 that are none of 64, an odd one.
WIDTHS = ((16, 16), (64, 64), (80, 208), (33, 100), (272, 336))
# Quarters of pruned MLPs and heads.
PRUNED = ((1280, 3072), (3072, 1280), (1664, 3072), (640, 3072), (3072, 384))
ROWS = (0, 1, 3, 16, 17, 64, 257, 2048)


def _schemes(kind: str) -> tuple[str, ...]:
    return tuple(name for name in SCHEMES if name.startswith(kind))


def _bench(kind: str, scheme: str) -> dict[str, tuple[Case, ...]]:
    """On a GPU the paper's shapes, (N, K) of whole models; on a CPU one size at four M."""
    shapes = ((14336, 4096), (4096, 14336), (5120, 3072), (3072, 5120))
    few, many = (1, 4, 16, 64), (2048, 8192)
    rows = (*few, *many) if kind == "int4" else (16, *many)
    return {
        "cuda": tuple(
            linear_case(scheme, m, shape, forward_only=True) for shape in shapes for m in rows
        ),
        "cpu": tuple(
            linear_case(scheme, m, (2048, 2048), forward_only=True) for m in (1, 16, 128, 1024)
        ),
    }


def _compiled(kind: str) -> tuple[Case, ...]:
    """Every tile of the tables; splits, inputs that end inside a tile, experts, other dtypes."""

    def case(scheme: str, rows: int, width: tuple[int, int] = (768, 1024), **other: Any) -> Case:
        return linear_case(scheme, rows, width, forward_only=True, **other)

    first, *rest = {
        "int4": ("int4-128", "int4-32", "int4-128-zeros"),
        "int8": ("int8-token", "int8-weight"),
        "fp8": ("fp8-token", "fp8-block", "fp8-weight", "fp8-block-weight"),
    }[kind]
    return (
        *(case(first, rows, added="both") for rows in (16, 64, 200, 1000, 4096)),
        *(case(scheme, rows) for scheme in rest for rows in (16, 4096)),
        *(case(one, 64) for one in rest if one in ("int8-weight", "fp8-weight")),  # own tiles
        case(first, 4096, (768, 1040), dtype=FP16, out=FP32),
        case(first, 100, dtype=FP32),
        *(case(scheme, 300, experts=3, added="bias") for scheme in (first, rest[-1])),
    )


def _family(kind: str, benched: str) -> Family:
    schemes = _schemes(kind)
    first, last = schemes[0], schemes[-1]
    return Family(
        make=linear_case,
        axes={
            "scheme": schemes,
            "rows": ROWS,
            "width": WIDTHS,
            "dtype": (BF16, FP32, FP16),
            "added": ("", "bias", "residual", "both"),
            "out": (None, FP32, BF16),
            "maker": ("plain", "outliers", "alike", "zeros"),
            "experts": (0, 0, 3),
        },
        small={
            "rows": (0, 1, 3, 16, 17, 40),
            "width": ((16, 16), (33, 100), (80, 208)),
        },
        checked=(
            linear_case(first, 5, (48, 160), BF16, "both"),
            linear_case(last, 17, (33, 96), FP32, "bias", maker="outliers"),
        ),
        compiled=_compiled(kind),
        bench=_bench(kind, benched),
        large=tuple(
            linear_case(scheme, m, width, BF16, "bias")
            for scheme in schemes for width in PRUNED for m in (1, 17, 257)
        ),
        crossed=("scheme", "rows", "width"),
    )  # fmt: skip


LINEAR = {
    "linear_int4": _family("int4", "int4-128"),
    "linear_int8": _family("int8", "int8-token"),
    "linear_fp8": _family("fp8", "fp8-token"),
}


@lru_cache(maxsize=4)
def random_weight(
    name: str, outputs: int, inputs: int, dtype: torch.dtype, maker: str, seed: int
) -> Int4Weight | Int8Weight | Fp8Weight:
    """Normal numbers with a variance of 1 / K, rounded to the grid of a scheme."""
    scheme, random = SCHEMES[name], torch.Generator().manual_seed(seed)
    spec, activations = scheme.spec, scheme.activations
    weight = torch.randn(outputs, inputs, generator=random) / inputs**0.5
    if maker == "outliers":
        weight[:, ::17] *= 8
    weight = weight.to(dtype)
    scales = spec.scales(weight)
    codes = spec.encode(weight, scales)
    if spec.bits == 4:
        return Int4Weight.from_codes(codes, scales, spec.group_size or -1)
    static = activations is not None and activations.static
    kind = Int8Weight if spec.kind == "int" else Fp8Weight
    input_scale = torch.tensor([0.027]) if static else None
    return kind.from_codes(codes, scales.scale, activations, input_scale)


def _wide(weight: Int8Weight | Fp8Weight) -> Tensor:
    """Codes times scales in fp64, not rounded: what an epilogue means."""
    codes, scale = weight.codes.double(), weight.scale.double()
    if isinstance(weight, Fp8Weight) and weight.blocks:
        scale = scale.repeat_interleave(BLOCK, dim=-1)[..., : weight.inputs]
        scale = scale.repeat_interleave(BLOCK, dim=-2)[..., : weight.outputs, :]
    return codes * scale
