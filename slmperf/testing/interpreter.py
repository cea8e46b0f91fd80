"""Triton kernels on CPU tensors, with what the interpreter gets wrong put right.

TRITON_INTERPRET=1 runs a kernel in numpy. As it comes (triton 3.6 to 3.9), fp32 -> bf16 truncates
and -> fp8 loses carries, and arithmetic and `tl.dot` take bf16 operands for integers; all of it
silently. `cure()` replaces the casts by torch's and widens the operands of sums, differences,
products and dots. Other arithmetic on bf16 stays wrong: a kernel casts to fp32 after a load, as
ours do.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch


@cache
def cure() -> None:
    """Interpret every Triton kernel that is defined from now on, correctly. Once per process.

    Call it before the first import from slmperf.triton_kernels: triton looks at the environment
    where a kernel is defined.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    bits = {8: (torch.int64, np.uint64), 4: (torch.int32, np.uint32),
            2: (torch.int16, np.uint16), 1: (torch.uint8, np.uint8)}  # fmt: skip
    convert_float = interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot
    binary_op = interpreter.InterpreterBuilder.binary_op
    execute = interpreter.GridExecutor.__call__

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in dtypes or target not in dtypes:  # formats of other makers' chips
            return convert_float(data, source, target, rounding)
        start, end = dtypes[source], dtypes[target]
        signed = np.dtype(f"i{start.itemsize}") if start.itemsize > 1 else np.dtype("u1")
        found = torch.from_numpy(np.ascontiguousarray(data).view(signed).copy()).view(start).to(end)
        as_integer, as_bits = bits[end.itemsize]
        return found.view(as_integer).numpy().view(as_bits).reshape(data.shape)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def binary(builder: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or op not in (np.add, np.subtract, np.multiply):
            return binary_op(builder, a, b, op)
        wide = op(widened(a).data, widened(b).data)
        found = convert(wide, tl.float32, tl.bfloat16, None)
        return interpreter.TensorHandle(found, tl.bfloat16)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(builder, widened(a), widened(b), *rest)

    def quietly(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):  # a GPU does not warn of infinities either
            return execute(executor, *args, **kwargs)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.binary_op = binary
    interpreter.GridExecutor.__call__ = quietly
