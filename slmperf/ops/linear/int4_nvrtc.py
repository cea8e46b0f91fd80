"""linear_int4.cuda where slmperf was built without nvcc: NVRTC compiles the sources at first use.

CuPy (the extra `nvrtc`) finds NVRTC and launches; what is compiled are the files of
csrc/cuda/kernels, which a wheel carries. A kernel takes about two seconds once; it is kept in the
cache folder (`arch.cache_folder`), under its architecture and a hash of all that made it. Calls
before a CUDA graph is captured compile and load, so that those inside only launch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from slmperf import arch
from slmperf.ops.linear.int4_cuda import Plan, Problem

# In the repository, or in an installed package.
_FOLDERS = (
    Path(__file__).resolve().parents[3] / "csrc" / "cuda" / "kernels",
    Path(__file__).resolve().parents[2] / "cuda_kernels",
)
_SOURCES = ("device.cuh", "linear_int4.cuh")
# extern "C": a name that can be asked for. The size of a cluster stands in the kernel.
_ENTRY = """
extern "C" __global__ void __launch_bounds__({threads}, 1) {cluster}
    linear_int4(const __grid_constant__ slmperf::LinearInt4 p) {{
  slmperf::multiply<slmperf::{type}, {tiles}, {across}, {deep}>(p);
}}
"""


def source(plan: Plan) -> str:
    """One translation unit for the kernels of a plan, which includes nothing."""
    folder = next(one for one in _FOLDERS if one.is_dir())
    lines = [
        line
        for name in _SOURCES
        for line in (folder / name).read_text().splitlines()
        if not line.startswith(("#pragma once", '#include "'))
    ]
    return "\n".join(lines) + _ENTRY.format(
        threads=plan.threads,
        cluster=f"__cluster_dims__(1, {plan.cluster}, 1)" if plan.cluster > 1 else "",
        type="Half" if plan.fp16 else "Bf16",
        tiles=plan.tiles,
        across=plan.across,
        deep=plan.deep,
    )


@cache
def found() -> bool:
    """Whether CuPy finds an NVRTC, so that `auto` may go on to another kernel where it does not."""
    try:
        from cupy_backends.cuda.libs import nvrtc  # type: ignore[import-not-found]

        nvrtc.getVersion()
    except Exception:  # CuPy's loader raises several kinds
        return False
    return True


def compiled(text: str, architecture: str) -> Path:
    """The machine code (cubin) of a source, from the cache or compiled into it.

    Raises NotImplementedError where NVRTC is not there, RuntimeError with its log where it fails.
    """
    from cupy_backends.cuda.libs import nvrtc

    try:
        version = nvrtc.getVersion()
    except Exception as error:  # CuPy's loader raises several kinds
        raise NotImplementedError(
            f"linear_int4: impl='cuda' finds no NVRTC (pip install nvidia-cuda-nvrtc): {error}"
        ) from error
    options = ("-std=c++20", f"-arch={architecture}")
    key = hashlib.sha256(repr((text, options, version)).encode()).hexdigest()[:32]
    path = arch.cache_folder() / "nvrtc" / f"linear_int4-{architecture}-{key}.cubin"
    if path.exists():
        return path
    program = nvrtc.createProgram(text, "linear_int4.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy leaves out the last byte, as of a text; it is the 0 that ends the ELF headers.
        code = nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        raise RuntimeError(
            f"linear_int4: NVRTC {version} for {architecture}: {nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(code)
    os.replace(aside, path)  # in one step: another process reads all of it or nothing
    return path


_loaded: dict[tuple[object, ...], tuple[Any, Any]] = {}


def _kernels(plan: Plan, architecture: str, device: int) -> tuple[Any, Any]:
    """The loaded kernel of a plan, and the one that joins its parts, on the current device."""
    import cupy  # type: ignore[import-not-found]

    key = plan.fp16, plan.tiles, plan.cluster, architecture, device  # all that `source` reads
    if key not in _loaded:
        module = cupy.RawModule(path=str(compiled(source(plan), architecture)))
        kernel = module.get_function("linear_int4")
        kernel.max_dynamic_shared_size_bytes = plan.bytes
        _loaded[key] = kernel, module.get_function("linear_int4_join")
    return _loaded[key]


def launch(problem: Problem, plan: Plan, architecture: str, device: int) -> None:
    """Launch on torch's current stream of the device, which is the current one."""
    import cupy
    import numpy as np
    import torch

    # One element of so many bytes: what CuPy hands to a kernel by value.
    by_value = np.frombuffer(bytes(problem), dtype=np.dtype((np.void, ctypes.sizeof(problem))))
    with cupy.cuda.Device(device):
        kernel, join = _kernels(plan, architecture, device)
        with cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
            grid = (plan.blocks, plan.parts, plan.experts)
            kernel(grid, (plan.threads,), (by_value,), shared_mem=plan.bytes)
            if plan.join_blocks:
                join((plan.join_blocks,), (256,), (by_value, np.int32(plan.parts)))
