"""Triton kernels compiled for GPUs that are not here, and machine code read back.

`launches` runs an op's own launcher on CPU tensors, as if they lay on a device of the given
capability, and writes down what it would launch; `compile_launch` compiles that with triton, so
every config is compiled exactly as it would run. Needs triton not to be interpreting.
`read_cubin` asks cuobjdump, which comes inside the triton package, what any cubin holds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from slmperf.ops import routing
from slmperf.testing.attention_cases import PagedAttentionCase
from slmperf.testing.battery import with_gradients
from slmperf.testing.cases import Case
from slmperf.testing.rounding_cases import RoundColumnsCase

# Multiprocessors, and shared memory that one block may take (CUDA programming guide, table of
# technical specifications per compute capability), in bytes.
PROCESSORS = {80: 108, 90: 132}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and options of one call."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments that triton may take for multiples of 16
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """`_scale(*fp32:16 i32; BLOCK=64, num_warps=4)`; `:16` marks the divisible arguments."""
        types = " ".join(
            f"{kind}:16" if name in self.divisible else kind
            for name, kind in self.signature
            if kind != "constexpr"
        )
        settings = ", ".join(f"{k}={v}" for k, v in (*self.constants, *self.options))
        return f"{self.kernel.__name__}({types}; {settings})"


@dataclass(frozen=True)
class Code:
    """What one kernel in a cubin needs, and which matrix instructions it holds."""

    function: str  # mangled where it comes from C++
    threads: int  # a block's, 0 where the code does not bound them
    registers: int  # a thread's
    spilled_bytes: int  # local memory of a thread
    spill_instructions: int  # loads and stores of local memory
    shared_bytes: int  # a block's, beyond what the system reserves
    matrix: dict[str, int]  # HMMA, IMMA, DMMA; HGMMA, QGMMA, IGMMA (warpgroups): how many


@dataclass(frozen=True)
class Usage:
    """A compiled launch."""

    code: Code
    dot: bool  # whether the kernel asks for matrix products


def _describe(kernel: Any, args: tuple, kwargs: dict[str, Any], capability: int) -> Launch:
    """What triton makes of these arguments, by its own rules: None and 1 are constants, ..."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, options = bind(*args, **kwargs)
    signature, constants, divisible = [], [], []
    for name, (kind, more) in zip(bound, specialised, strict=True):
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, more))
        elif more and "D" in more:
            divisible.append(name)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible),
                  tuple(sorted(options.items())))  # fmt: skip


@contextmanager
def _as_if_on(capability: int) -> Iterator[list[Launch]]:
    """Inside, launchers see a device of this capability and their launches are written down."""
    from triton.runtime.jit import JITFunction

    from slmperf.triton_kernels import common

    seen: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append(_describe(kernel, args, kwargs, capability))

    # By its name: slmperf.ops.kd_loss is the function.
    chunks = import_module("slmperf.ops.kd_loss.chunks")
    device = common.Machine(capability, PROCESSORS[capability])
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(common, "machine", lambda tensor: device),
        mock.patch.object(routing, "interpreted", lambda: True),
        mock.patch.object(chunks, "has_bf16_units", lambda device: True),
    ):
        yield seen


def launches(case: Case | RoundColumnsCase | PagedAttentionCase, capability: int) -> list[Launch]:
    """The kernels of a case's forward and, where it has one, backward, each once."""
    with _as_if_on(capability) as seen:
        if isinstance(case, RoundColumnsCase | PagedAttentionCase):
            case.run(case.tensors(), "triton")
        else:
            value = case.run(with_gradients(case, case.tensors()), "triton")
            if case.differentiable:
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
        (code,) = read_cubin(Path(cubin.name), compiled.metadata.shared)
    return Usage(code, re.search(r"\btt\.dot(_scaled)?\b", compiled.asm["ttir"]) is not None)


# Bytes of shared memory that the system takes for itself in every block, from Hopper on.
_RESERVED = {80: 0, 90: 1024}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
_MATRIX = re.compile(r"[A-Z]+MMA$")


def cuobjdump() -> Path | None:
    """The disassembler inside the triton package; None where triton is not installed."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def read_cubin(path: Path, dynamic_shared: int = 0) -> list[Code]:
    """Every kernel of a cubin, by name. `dynamic_shared`: bytes that a launch adds, not in it."""
    command = [str(cuobjdump()), "-res-usage", "-sass", "-elf", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needs = {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        for name, line in re.findall(r"^ Function (\S+):\n(.*REG:.*)$", text, re.MULTILINE)
    }
    # A block's bound stands among the attributes of the section .nv.info.<name>.
    bounds = {}
    for section in re.split(r"^(?=\.(?:section \.)?nv\.)", text, flags=re.MULTILINE):
        named = re.match(r"\.(?:section \.)?nv\.info\.(\S+)", section)
        value = re.search(
            r"EIATTR_(?:REQNTID|MAX_THREADS)\s+Format:.*\s+Value:((?: *\t?0x[0-9a-f]+)+)", section
        )
        if named and value:
            x, y, z = (int(size, 16) for size in value[1].split())
            bounds[named[1]] = x * y * z
    found = []
    for body in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:]:
        name = body.split(maxsplit=1)[0]
        counts = Counter(_INSTRUCTION.findall(body))
        reserved = _RESERVED[int(re.search(r"code for sm_(\d+)", text)[1])]  # type: ignore[index]
        need = needs[name]
        found.append(Code(
            function=name,
            threads=bounds.get(name, 0),
            registers=need["REG"],
            spilled_bytes=need["STACK"] + need["LOCAL"],
            spill_instructions=counts["LDL"] + counts["STL"],
            shared_bytes=max(0, need["SHARED"] - reserved) + dynamic_shared,
            matrix={key: n for key, n in sorted(counts.items()) if _MATRIX.match(key)},
        ))  # fmt: skip
    return sorted(found, key=lambda code: code.function)
