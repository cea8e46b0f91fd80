"""linear_int4.cuda: W4A16 for few rows, in CUDA C++ (csrc/cuda/kernels/linear_int4.cuh).

Here the tensors are checked and the launch is planned, once for all three that carry it out: the
kernels built into _ops.so, the same sources compiled at first use (int4_nvrtc.py), and the
emulation that tests run without a GPU (csrc/cuda/emulate_linear_int4.cpp).

x and the scales are of one dtype, bf16 or fp16. Any number of rows is right; 64 at a time share one
reading of the weight, so it is meant for up to 64.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from slmperf import arch
from slmperf.check import InputError
from slmperf.ops.linear.int4_layout import INPUTS
from slmperf.ops.routing import CUDA_KERNELS

ARCHITECTURES = {(8, 0): "sm_80", (9, 0): "sm_90a"}  # what kernels are compiled for
# Tiles of 8 rows -> warps over outputs and over inputs of a block. Those over outputs share what is
# read of x, which grows with the rows; those over inputs leave less to add up between blocks.
_WARPS = {1: (1, 4), 2: (2, 4), 4: (4, 2), 8: (4, 2)}
_STAGES, _WARP_OUTPUTS = 4, 64
_MOST_PARTS = 8  # the largest cluster that every sm_90 takes
_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Problem(ctypes.Structure):
    """`LinearInt4` of linear_int4.cuh: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("x", "packed", "scale", "zero_point", "bias", "residual", "starts", "y", "partial")),
        *((name, ctypes.c_int64) for name in
          ("x_row", "packed_expert", "packed_row", "scale_expert", "scale_group", "zero_expert",
           "zero_group", "bias_expert", "residual_row")),
        *((name, ctypes.c_int32) for name in
          ("rows", "outputs", "inputs", "group_shift", "x_aligned", "bias_type", "residual_type",
           "y_type")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A launch."""

    fp16: bool
    tiles: int  # of 8 rows
    across: int  # warps of a block that lie over its outputs
    deep: int  # and over its inputs
    blocks: int  # of outputs
    parts: int  # that the inputs are cut into
    experts: int
    join_blocks: int  # that add the parts up; 0: they are a cluster, or one

    @property
    def cluster(self) -> int:
        """Blocks that join by themselves."""
        return 1 if self.join_blocks else self.parts

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.across * self.deep

    @property
    def bytes(self) -> int:
        """Of shared memory of a block: `Shape` of linear_int4.cuh."""
        outputs, rows = _WARP_OUTPUTS * self.across, 8 * self.tiles
        weight_and_scales = outputs * (INPUTS // 2 + 2 * 2 + 2)
        stage = self.deep * (weight_and_scales + rows * 2 * (INPUTS + 8))
        return max(_STAGES * stage, self.deep * rows * (outputs + 4) * 4)


def plan(
    x: Tensor, outputs: int, experts: int, capability: tuple[int, int], processors: int
) -> Plan:
    """The launch for x (M, K) and N outputs; experts 0: one weight.

    Outputs alone make few blocks, so inputs are cut until a few blocks lie on every multiprocessor.
    """
    rows, inputs = x.shape
    tiles = next((one for one in _WARPS if 8 * one >= rows), 8)
    across, deep = _WARPS[tiles]
    blocks = -(-outputs // (_WARP_OUTPUTS * across))
    steps = -(-inputs // (INPUTS * deep))
    resident = 3 if tiles == 1 else 2 if tiles == 2 and capability >= (9, 0) else 1
    parts = 1
    while (
        not experts
        and parts < _MOST_PARTS
        and 2 * parts * blocks <= processors * resident
        and steps >= 4 * parts  # two for each
    ):
        parts *= 2
    join_blocks = -(-rows * outputs // 256) if parts > 1 and capability < (9, 0) else 0
    fp16 = x.dtype == torch.float16
    return Plan(fp16, tiles, across, deep, blocks, parts, experts or 1, join_blocks)


def aligned(values: Tensor) -> Tensor:
    """Itself where all but its last dimension begin at multiples of 16 bytes, else a copy."""
    bytes_apart = [stride * values.element_size() for stride in values.stride()[:-1]]
    if any(one % 16 for one in (values.data_ptr(), *bytes_apart)) or values.stride(-1) != 1:
        return values.clone(memory_format=torch.contiguous_format)
    return values


def fits(x: Tensor, scale: Tensor) -> bool:
    """Whether this implementation takes such a product, on x's device."""
    if scale.dtype != x.dtype or arch.cuda_capability(x.device.index or 0) not in ARCHITECTURES:
        return False
    if CUDA_KERNELS == "NVRTC":
        from slmperf.ops.linear.int4_nvrtc import found

        return found()
    return True


def problem(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, y: Tensor, partial: Tensor | None,
    group_size: int,
) -> tuple[Problem, list[Tensor]]:  # fmt: skip
    """The kernel's argument, and the tensors that it points into.

    InputError for tensors that linear's own checks do not let through, NotImplementedError for
    dtypes that the kernel does not take.
    """
    if scale.dtype != x.dtype:
        raise NotImplementedError(
            f"linear_int4: impl='cuda' wants x and scale of one dtype, found {x.dtype} and "
            f"{scale.dtype}"
        )
    for name, one in (("bias", bias), ("residual", residual), ("out_dtype", y)):
        if one is not None and one.dtype not in _TYPES:
            raise NotImplementedError(
                f"linear_int4: impl='cuda' wants {name} of float32, bfloat16 or float16, found "
                f"{one.dtype}"
            )
    if packed.stride()[-3:] != (128, 4, 1) and packed.shape[-3] > 1 or packed.data_ptr() % 16:
        raise InputError(
            f"linear_int4: packed has strides {packed.stride()}, wanted (..., 128, 4, 1) and an "
            "address that 16 divides"
        )
    scale = aligned(scale)
    zero_point = None if zero_point is None else aligned(zero_point)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    rows, inputs = x.shape
    stacked = starts is not None

    def at(one: Tensor | None) -> int | None:
        return None if one is None else one.data_ptr()

    def of_expert(one: Tensor | None) -> int:
        return one.stride(0) if stacked and one is not None else 0

    return Problem(
        x=x.data_ptr(), packed=packed.data_ptr(), scale=scale.data_ptr(),
        zero_point=at(zero_point), bias=at(bias), residual=at(residual), starts=at(starts),
        y=y.data_ptr(), partial=at(partial),
        x_row=x.stride(0), packed_expert=of_expert(packed), packed_row=packed.stride(-4),
        scale_expert=of_expert(scale), scale_group=scale.stride(-2),
        zero_expert=of_expert(zero_point),
        zero_group=0 if zero_point is None else zero_point.stride(-2),
        bias_expert=of_expert(bias),
        residual_row=0 if residual is None else residual.stride(0),
        rows=rows, outputs=y.shape[1], inputs=inputs,
        group_shift=31 if group_size == -1 else group_size.bit_length() - 1,
        x_aligned=x.data_ptr() % 16 == 0 and (rows == 1 or x.stride(0) % 8 == 0),
        bias_type=_TYPES[bias.dtype if bias is not None else None],
        residual_type=_TYPES[residual.dtype if residual is not None else None],
        y_type=_TYPES[y.dtype],
    ), [one for one in (x, packed, scale, zero_point, bias, residual, starts, y, partial)
        if one is not None]  # fmt: skip


def partial_sums(y: Tensor, chosen: Plan) -> Tensor | None:
    """Where blocks leave their parts, uninitialised; None where they do not."""
    if not chosen.join_blocks:
        return None
    return y.new_empty((chosen.parts, *y.shape), dtype=torch.float32)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def linear_int4(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, starts: Tensor | None, outputs: int, group_size: int,
    out_dtype: torch.dtype, kernels: str = CUDA_KERNELS,
) -> Tensor:  # fmt: skip
    """The op's arguments, as linear_int4 of int4.py takes them; kernels: "built in" or "NVRTC".

    NotImplementedError on a device of another architecture than `ARCHITECTURES` name.
    """
    device = x.device.index or 0
    capability = arch.cuda_capability(device)
    if capability not in ARCHITECTURES:
        found = "none" if capability is None else "sm_{}{}".format(*capability)
        raise NotImplementedError(
            f"linear_int4: impl='cuda' wants sm_80 or sm_90, the device is {found}"
        )
    y = x.new_empty((x.shape[0], outputs), dtype=out_dtype)
    experts = 0 if starts is None else packed.shape[0]
    chosen = plan(x, outputs, experts, capability, _processors(device))
    partial = partial_sums(y, chosen)
    given, kept = problem(
        x, packed, scale, zero_point, bias, residual, starts, y, partial, group_size
    )
    if y.numel() == 0:
        return y
    with torch.cuda.device(device):
        if kernels == "NVRTC":
            from slmperf.ops.linear.int4_nvrtc import launch

            launch(given, chosen, ARCHITECTURES[capability], device)
        else:
            torch.ops.slmperf.linear_int4_launch(
                ctypes.addressof(given), chosen.fp16, chosen.tiles, chosen.blocks, chosen.parts,
                chosen.experts, chosen.threads, chosen.bytes, chosen.join_blocks, device,
            )  # fmt: skip
    del kept  # until the launch is enqueued; torch's allocator keeps the memory for this stream
    return y
