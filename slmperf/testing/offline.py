"""Triton kernels compiled for GPUs that are not here.

`launches` runs an op's own launcher on CPU tensors, as if they lay on a device of the given
capability, and writes down what it would launch; `compile_launch` compiles that with triton and
asks cuobjdump what it needs. So every config is compiled exactly as it would run. Needs triton
not to be interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from slmperf.ops import routing
from slmperf.testing.battery import with_gradients
from slmperf.testing.cases import Case

# Multiprocessors, and shared memory that one block may take (CUDA programming guide, table of
# technical specifications per compute capability), in bytes.
PROCESSORS = {80: 108, 90: 132}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and options of one call."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments that triton may take for multiples of 16
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        types = " ".join(kind for _, kind in self.signature if kind != "constexpr")
        settings = ", ".join(f"{k}={v}" for k, v in (*self.constants, *self.options))
        return f"{self.kernel.__name__}({types}; {settings})"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs per block or thread."""

    shared_bytes: int
    registers: int
    spilled_bytes: int


def _describe(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """What triton would make of these arguments: the rules of its own specialisation."""
    names = kernel.arg_names
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
    given = dict(zip(names, args, strict=False)) | kwargs
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            divisible += [name] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, int):
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            divisible += [name] if value % 16 == 0 else []
        else:
            signature.append((name, "fp32"))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible),
                  tuple(sorted(options.items())))  # fmt: skip


@contextmanager
def _as_if_on(capability: int) -> Iterator[list[Launch]]:
    """Inside, launchers see a device of this capability and their launches are written down."""
    from triton.runtime.jit import JITFunction

    from slmperf.triton_kernels import common

    seen: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append(_describe(kernel, args, kwargs))

    device = common.Machine(capability, PROCESSORS[capability])
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(common, "machine", lambda tensor: device),
        mock.patch.object(routing, "interpreted", lambda: True),
    ):
        yield seen


def launches(case: Case, capability: int) -> list[Launch]:
    """The kernels of a case's forward and backward, each once."""
    with _as_if_on(capability) as seen:
        value = case.run(with_gradients(case, case.tensors()), "triton")
        value.backward(torch.ones_like(value))
    return list(dict.fromkeys(seen))


def compile_launch(launch: Launch, capability: int) -> Usage:
    """Compile for `sm_<capability>`, without a device; raises what triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    return Usage(compiled.metadata.shared, found["REG"], found["STACK"] + found["LOCAL"])
