"""linear_int4's CUDA C++ kernel on this processor: the emulation, built once and called."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from slmperf.ops.linear import int4_cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "emulate_linear_int4.cpp"


class Fault(Exception):
    """What the emulation found wrong."""


def build(source, target, *options):
    """Compile a file with the emulation in place of CUDA."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    command = [compiler, "-std=c++20", "-DSLMPERF_EMULATE", f"-I{ROOT / 'csrc'}", *options]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)


def library(folder):
    """The emulation, compiled into a folder."""
    built = folder / "emulated.so"
    build(SOURCE, built, "-O1", "-shared", "-fPIC")
    function = ctypes.CDLL(str(built)).emulate_linear_int4
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 8, ctypes.c_void_p, ctypes.c_int64,
                         ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int64]  # fmt: skip
    return function


def ranges(tensors, written):
    """[begin, end, may be written] of every stretch of memory that lies in the tensors."""
    found = set()
    for one in tensors:
        size, writable = one.element_size(), any(one is other for other in written)
        solid = one.dim()  # of its last dimensions, which lie side by side
        length = 1
        while solid and (one.shape[solid - 1] == 1 or one.stride(solid - 1) == length):
            solid -= 1
            length *= one.shape[solid]
        outer = one
        for _ in range(one.dim() - solid):
            outer = outer.select(-1, 0) if outer.numel() else outer
        offsets = torch.zeros((), dtype=torch.int64)
        for extent, stride in zip(one.shape[:solid], one.stride()[:solid], strict=True):
            offsets = offsets[..., None] + torch.arange(extent) * stride
        for offset in offsets.flatten().tolist():
            begin = one.data_ptr() + offset * size
            found.add((begin, begin + length * size, int(writable)))
    return np.array(sorted(found), dtype=np.uint64)


def linear_int4(
    emulate, x, weight, bias=None, *, residual=None, starts=None, out_dtype=None,
    capability=(9, 0), processors=132, seed=2,
):  # fmt: skip
    """What `linear(..., impl="cuda")` gives on a device of such a capability."""
    y = torch.full((len(x), weight.outputs), torch.nan, dtype=out_dtype or x.dtype)
    experts = 0 if starts is None else len(weight.packed)
    plan = int4_cuda.plan(x, weight.outputs, experts, capability, processors)
    partial = int4_cuda.partial_sums(y, plan)
    given, tensors = int4_cuda.problem(
        x, weight.packed, weight.scale, weight.zero_point, bias, residual, starts, y, partial,
        weight.group_size,
    )  # fmt: skip
    allowed = ranges(tensors, [y, partial])
    message = ctypes.create_string_buffer(400)
    failed = emulate(
        ctypes.addressof(given), plan.fp16, plan.tiles, plan.blocks, plan.parts, plan.experts,
        plan.threads, plan.bytes, plan.join_blocks, allowed.ctypes.data, len(allowed), seed,
        message, len(message),
    )  # fmt: skip
    if failed:
        raise Fault(message.value.decode())
    return y
