"""What `linear` multiplies with: a weight (N, K) in the layout that kernels read.

    Int4Weight   codes of 4 bits in tiles (int4_layout.py); a scale for each group of inputs
    Int8Weight   int8 codes as they are; a scale for each output
    Fp8Weight    fp8 e4m3 codes as they are; one scale, one for each output or each block

Made from a quantiser's codes and scales by `from_codes`, and back by `codes` and `scales`, to the
bit. The numbers meant are `WeightSpec.decode`'s: (code - zero point) * scale, rounded to the dtype
of the scale. `stack_experts` (experts.py) makes one object of several experts' weights.

Which inputs they take is part of a weight: with `activations` None x stays as it is (weight-only),
otherwise x is rounded as `ActivationSpec` says, in x's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.checks import check_codes, check_devices, check_scale, check_slice
from slmperf.ops.linear.int4_layout import (
    OUTPUTS,
    STEP,
    pack_int4,
    packed_shape,
    slice_inputs,
    unpack_int4,
)
from slmperf.ops.routing import HALF_AND_FLOAT
from slmperf.ops.weight_spec import Scales, WeightSpec

BLOCK = 128  # outputs and inputs of an fp8 block
GROUPS = (32, 64, 128)  # inputs that share a scale of an int4 weight, where not all do


def has_blocks(scale: Tensor, outputs: int) -> bool:
    """Whether an fp8 weight's scales are of blocks, not one for all or one for each output."""
    return scale.shape[-1] > 1 or scale.shape[-2] not in (1, outputs)


class QuantizedInput(NamedTuple):
    """Inputs that were rounded before: what rms_norm, silu_mul and quantize_input give."""

    codes: Tensor  # (..., K) int8 or float8_e4m3fn
    scale: Tensor  # fp32: (..., 1) a token, (..., K / 128) a group of it, (1,) one for all


@dataclass(frozen=True)
class Int4Weight:
    """W4A16.

    packed      see int4_layout.py; experts (E, ...) before it
    scale       (groups, 16 ceil(N / 16)) bf16, fp16 or fp32; rows behind N are 0
    zero_point  the same shape, int8 from -8 to 7; None: 0
    outputs, inputs   N and K
    group_size  inputs that share a scale: 32, 64, 128, or -1, all
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    outputs: int
    inputs: int
    group_size: int

    activations: ClassVar[None] = None
    op: ClassVar[str] = "linear_int4"

    def __post_init__(self) -> None:
        """Raises InputError for tensors of other shapes or dtypes."""
        shape = packed_shape(self.outputs, self.inputs)
        lead = tuple(self.packed.shape[:-4])
        if tuple(self.packed.shape[-4:]) != shape or self.packed.dtype != torch.int32:
            raise InputError(
                f"Int4Weight: packed is {self.packed.dtype} {tuple(self.packed.shape)}, wanted "
                f"torch.int32 {shape} for a weight {(self.outputs, self.inputs)}"
            )
        wanted = (*lead, _int4_groups(self.inputs, self.group_size), OUTPUTS * shape[0])
        check_scale("Int4Weight", self.scale, wanted)
        check_devices("Int4Weight", self.packed, scale=self.scale, zero_point=self.zero_point)
        if self.zero_point is not None and (
            tuple(self.zero_point.shape) != wanted or self.zero_point.dtype != torch.int8
        ):
            raise InputError(
                f"Int4Weight: zero_point is {self.zero_point.dtype} "
                f"{tuple(self.zero_point.shape)}, wanted torch.int8 {wanted}"
            )

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Scales, group_size: int) -> Int4Weight:
        """codes (N, K) int8 from -8 to 7; scale and zero point (N, groups), as `WeightSpec` gives
        them. Raises InputError for other codes, and a group that does not divide K."""
        check_codes("Int4Weight", codes, torch.int8, 4)
        outputs, inputs = codes.shape
        wanted = outputs, _int4_groups(inputs, group_size)
        check_scale("Int4Weight", scales.scale, wanted)

        def beside(values: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(values.detach().T, (0, -outputs % OUTPUTS))
            return padded.contiguous()

        zero_point = scales.zero_point
        if zero_point is not None:
            if tuple(zero_point.shape) != wanted:
                raise InputError(
                    f"Int4Weight: zero_point is {tuple(zero_point.shape)}, wanted {wanted}"
                )
            check_codes("Int4Weight", zero_point, torch.int8, 4, "zero points")
            zero_point = beside(zero_point)
        return cls(pack_int4(codes), beside(scales.scale), zero_point, outputs, inputs, group_size)

    @property
    def spec(self) -> WeightSpec:
        """The grid."""
        return WeightSpec("int", 4, self.zero_point is None, self.group_size)

    @property
    def codes(self) -> Tensor:
        """(..., N, K) int8, unpacked."""
        return unpack_int4(self.packed, self.outputs, self.inputs)

    @property
    def scales(self) -> Scales:
        """Scales and zero points (..., N, groups), as they were given."""
        scale, zero_point = self.scale.mT[..., : self.outputs, :], self.zero_point
        if zero_point is not None:
            zero_point = zero_point.mT[..., : self.outputs, :].contiguous()
        return Scales(scale.contiguous(), zero_point)

    def dequantized(self) -> Tensor:
        """(..., N, K) in the scale's dtype."""
        return _decoded(self)

    def slice_outputs(self, begin: int, end: int) -> Int4Weight:
        """Outputs begin to end, a view; InputError unless begin is a multiple of 16, and end is or
        is N."""
        check_slice("Int4Weight", "outputs", begin, end, self.outputs, OUTPUTS)
        rows = slice(begin // OUTPUTS, -(-end // OUTPUTS))
        beside = slice(begin, rows.stop * OUTPUTS)
        zero_point = None if self.zero_point is None else self.zero_point[..., beside]
        return Int4Weight(
            self.packed[..., rows, :, :, :], self.scale[..., beside], zero_point,
            end - begin, self.inputs, self.group_size,
        )  # fmt: skip

    def slice_inputs(self, begin: int, end: int) -> Int4Weight:
        """Inputs begin to end, without unpacking: a view where begin is a multiple of 64.

        InputError unless begin is a multiple of 16 and of the group, and end is or is K.
        """
        single = self.group_size == -1
        unit = STEP if single else max(STEP, self.group_size)
        check_slice("Int4Weight", "inputs", begin, end, self.inputs, unit)
        groups = slice(0, 1) if single else slice(begin // unit, -(-end // unit))
        zero_point = None if self.zero_point is None else self.zero_point[..., groups, :]
        return Int4Weight(
            slice_inputs(self.packed, begin, end), self.scale[..., groups, :], zero_point,
            self.outputs, end - begin, self.group_size,
        )  # fmt: skip


@dataclass(frozen=True)
class EightBitWeight(ABC):
    """What Int8Weight and Fp8Weight have in common: codes as they are.

    data         (N, K) of the class's dtype, inputs side by side; experts (E, ...) before it
    scale        see the class: fp32 where inputs are rounded, else as it was given
    activations  how inputs are rounded; None: they are multiplied as they are
    input_scale  (1,) fp32, the one for all inputs where they are static
    scale_dtype  what the scale was given in
    """

    data: Tensor
    scale: Tensor
    activations: ActivationSpec | None
    input_scale: Tensor | None
    scale_dtype: torch.dtype

    op: ClassVar[str]
    code_dtype: ClassVar[torch.dtype]
    kind: ClassVar[str]  # of the activations

    def __post_init__(self) -> None:
        """Raises InputError for tensors of other shapes or dtypes."""
        name, data, activations = type(self).__name__, self.data, self.activations
        apart = data.shape[-1] > 1 and data.stride(-1) != 1
        if data.dtype != self.code_dtype or data.dim() not in (2, 3) or apart:
            raise InputError(
                f"{name}: data is {data.dtype} {tuple(data.shape)} with strides {data.stride()}, "
                f"wanted {self.code_dtype} (N, K), inputs side by side"
            )
        check_devices(name, data, scale=self.scale, input_scale=self.input_scale)
        if activations is not None and activations.kind != self.kind:
            raise InputError(
                f"{name}: activations: wanted kind {self.kind!r}, found {activations.kind!r}"
            )
        static = activations is not None and activations.static
        if static != (self.input_scale is not None and self.input_scale.numel() == 1):
            found = "none" if self.input_scale is None else str(tuple(self.input_scale.shape))
            raise InputError(
                f"{name}: input_scale: found {found} with {activations}, wanted one number where "
                "the inputs have a static scale"
            )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        activations: ActivationSpec | None,
        input_scale: Tensor | None = None,
    ) -> Self:
        """codes (N, K) with their scale as the quantiser gives them; input_scale: one number, of
        static inputs. Raises InputError for other shapes, dtypes and activations."""
        check_codes(cls.__name__, codes, cls.code_dtype, 8)
        held = scale.detach().contiguous()
        if activations is not None and scale.dtype in HALF_AND_FLOAT:  # an epilogue's is fp32
            held = held.float()
        if input_scale is not None and input_scale.numel() == 1:
            input_scale = input_scale.detach().float().reshape(1)
        return cls(codes.contiguous(), held, activations, input_scale, scale.dtype)

    @property
    def outputs(self) -> int:
        """N."""
        return self.data.shape[-2]

    @property
    def inputs(self) -> int:
        """K."""
        return self.data.shape[-1]

    @property
    def codes(self) -> Tensor:
        """(..., N, K) of the class's dtype."""
        return self.data

    @property
    def scales(self) -> Scales:
        """Scales, as they were given."""
        return Scales(self.scale.to(self.scale_dtype), None)

    @property
    @abstractmethod
    def spec(self) -> WeightSpec:
        """The grid."""

    def dequantized(self) -> Tensor:
        """(..., N, K) in the dtype that the scale was given in."""
        return _decoded(self)

    def _sliced(self, dim: int, begin: int, end: int, unit: int) -> Self:
        """Entries begin to end of one of the last two dimensions, `unit` of which share a scale."""
        what = {-2: "outputs", -1: "inputs"}[dim]
        check_slice(type(self).__name__, what, begin, end, self.data.shape[dim], unit)
        scale = self.scale
        if scale.shape[dim] > 1:
            first, last = begin // unit, -(-end // unit)
            scale = scale.narrow(dim, first, last - first)
        return replace(self, data=self.data.narrow(dim, begin, end - begin), scale=scale)


@dataclass(frozen=True)
class Int8Weight(EightBitWeight):
    """W8A8, or W8A16 where `activations` is None: int8 codes, scale (N, 1).

    Inputs are rounded to int8 with a scale per token or one for all.
    """

    op: ClassVar[str] = "linear_int8"
    code_dtype: ClassVar[torch.dtype] = torch.int8
    kind: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        """Raises InputError for tensors of other shapes or dtypes."""
        super().__post_init__()
        check_scale("Int8Weight", self.scale, (*self.data.shape[:-1], 1))
        if self.activations is not None and self.activations.strategy == "group":
            raise InputError("Int8Weight: activations: wanted 'token' or 'tensor', found 'group'")

    @property
    def spec(self) -> WeightSpec:
        """The grid."""
        return WeightSpec("int", 8)

    def slice_outputs(self, begin: int, end: int) -> Int8Weight:
        """Outputs begin to end, a view."""
        return self._sliced(-2, begin, end, 1)

    def slice_inputs(self, begin: int, end: int) -> Int8Weight:
        """Inputs begin to end, a view."""
        return self._sliced(-1, begin, end, 1)


@dataclass(frozen=True)
class Fp8Weight(EightBitWeight):
    """FP8 (e4m3) codes, scale (1, 1), (N, 1) or (ceil(N / 128), ceil(K / 128)).

    Inputs are rounded to fp8 with one scale for all, one per token, or one per 128 inputs of a
    token. GPUs without fp8 units (sm_80) multiply them as they are, whatever `activations` says.
    """

    op: ClassVar[str] = "linear_fp8"
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    kind: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        """Raises InputError for tensors of other shapes or dtypes."""
        super().__post_init__()
        *lead, outputs, inputs = self.data.shape
        blocks = -(-outputs // BLOCK), -(-inputs // BLOCK)
        shapes = [(*lead, *one) for one in ((1, 1), (outputs, 1), blocks)]
        if tuple(self.scale.shape) not in shapes:
            raise InputError(
                f"Fp8Weight: scale is {tuple(self.scale.shape)}, wanted one of "
                f"{', '.join(map(str, shapes))} for a weight {(outputs, inputs)}"
            )
        check_scale("Fp8Weight", self.scale, tuple(self.scale.shape))
        strategy = None if self.activations is None else self.activations.strategy
        if strategy == "group" and inputs % BLOCK:
            raise InputError(f"Fp8Weight: groups of {BLOCK} do not divide {inputs} inputs")

    @property
    def blocks(self) -> bool:
        """Whether blocks of 128 x 128 share a scale."""
        return has_blocks(self.scale, self.outputs)

    @property
    def spec(self) -> WeightSpec:
        """The grid."""
        if self.blocks:
            return WeightSpec("float", 8, block=(BLOCK, BLOCK))
        whole = self.scale.shape[-2] == 1 and self.outputs > 1
        return WeightSpec("float", 8, group_size=None if whole else -1)

    def slice_outputs(self, begin: int, end: int) -> Fp8Weight:
        """Outputs begin to end, a view; of blocks InputError unless begin is a multiple of 128."""
        return self._sliced(-2, begin, end, BLOCK if self.blocks else 1)

    def slice_inputs(self, begin: int, end: int) -> Fp8Weight:
        """Inputs begin to end, a view; of blocks InputError unless begin is a multiple of 128."""
        return self._sliced(-1, begin, end, BLOCK if self.blocks else 1)


Weight = Int4Weight | Int8Weight | Fp8Weight


def _decoded(weight: Int4Weight | EightBitWeight) -> Tensor:
    """`WeightSpec.decode`, expert by expert."""
    codes, scales, spec = weight.codes, weight.scales, weight.spec
    if codes.dim() == 2:
        return spec.decode(codes, scales)
    zeros = scales.zero_point
    return torch.stack([
        spec.decode(codes[e], Scales(scales.scale[e], None if zeros is None else zeros[e]))
        for e in range(len(codes))
    ])  # fmt: skip


def _int4_groups(inputs: int, group_size: int) -> int:
    """Groups of an int4 weight; InputError for sizes that there is no kernel for."""
    if group_size == -1:
        return 1
    if group_size not in GROUPS:
        raise InputError(f"Int4Weight: group_size is {group_size}, wanted 32, 64, 128 or -1")
    if inputs % group_size:
        raise InputError(f"Int4Weight: group_size {group_size} does not divide {inputs} inputs")
    return inputs // group_size
