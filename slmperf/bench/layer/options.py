"""options: what `slmperf bench layer` may be asked for, and what can be measured here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from slmperf import arch
from slmperf.bench.layer.block import DTYPES, SCHEMES, Block, matrix_sizes, random_weights
from slmperf.check import InputError, parse_tokens
from slmperf.models.shapes import Shape, shape_of

# Contexts if none are asked for. A CPU's are those with which three shapes end within two minutes
# on two cores; there torch emulates fp8 products, number by number.
GPU_CONTEXTS = (4096, 16384, 32768)
CPU_CONTEXTS: Mapping[str, tuple[int, ...]] = {
    "bf16": (256, 1024),
    "w8a8": (256, 1024),
    "fp32": (64, 256),
    "w4a16": (64, 256),
    "fp8": (16, 32),
}
MEMORY_SHARE = 0.85  # of what is free: a machine that swaps or kills measures nothing


def parse_contexts(text: str) -> tuple[int, ...]:
    """ "4k,16k" -> (4096, 16384); k is 1024. InputError for anything that is no count of tokens."""
    return tuple(dict.fromkeys(parse_tokens(one.strip()) for one in text.split(",")))


def default_contexts(device: str, scheme: str) -> tuple[int, ...]:
    """Those that are measured if none are asked for."""
    return GPU_CONTEXTS if device == "cuda" else CPU_CONTEXTS[scheme]


def parse_shapes(text: str) -> list[Shape]:
    """ "3b,runs/student" -> shapes; a folder's goes by its path where its own name is taken.

    InputError for what is no shape, and for one that is named twice.
    """
    found: dict[str, Shape] = {}
    for one in map(str.strip, text.split(",")):
        shape = shape_of(one)
        if str(shape) in found:
            shape = replace(shape, name=one)
        if str(shape) in found:
            raise InputError(f"shape {one} is named twice, expected each once")
        found[str(shape)] = shape
    return list(found.values())


def choose_scheme(scheme: str | None, dtype: str | None, device: str) -> tuple[str, str]:
    """The scheme and the dtype of the activations, where one or both are left open.

    Dense matrices in the device's faster dtype if nothing is said: bf16 on a GPU and on a CPU that
    has instructions for it, else fp32. InputError for names and pairs that are not there.
    """
    if scheme not in (None, *SCHEMES):
        raise InputError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    fast = device == "cuda" or "avx512_bf16" in arch.cpu_isas()
    default = dtype or ("bf16" if fast else "fp32")
    scheme = scheme or default
    known = SCHEMES[scheme].dtypes
    if dtype not in (None, *known):
        raise InputError(f"scheme {scheme}: dtype is {dtype}, expected {' or '.join(known)}")
    return scheme, default if default in known else known[0]


def check_layers(
    shapes: Sequence[Shape],
    context: int,
    tensor_parallel: int,
    scheme: str,
    dtype: str,
    device: str,
) -> list[Shape]:
    """One rank's share of each shape; InputError where they could not be timed here together:
    sizes that do not divide or do not suit the scheme, no product for it, not enough memory.
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise InputError(f"layer: context is {context!r}, expected a whole number of tokens >= 1")
    ranks = [shape.rank(tensor_parallel) for shape in shapes]
    multiple = SCHEMES[scheme].multiple
    for rank in ranks:
        for matrix, (rows, columns) in matrix_sizes(rank).items():
            if rows % multiple or columns % multiple:
                raise InputError(
                    f"scheme {scheme}: {matrix} of {rank} at tp {tensor_parallel} is "
                    f"{rows} x {columns}, expected multiples of {multiple}"
                )
    refusal = _refusal(scheme, device)
    if refusal:
        there = ", ".join(name for name in SCHEMES if not _refusal(name, device))
        raise InputError(f"scheme {scheme} on {device}: {refusal}; there is: {there}")
    if (device, scheme) == ("cuda", "w8a8") and context <= 16:
        raise InputError(f"scheme w8a8 on cuda: context is {context}, expected more than 16 tokens")
    needed = sum(memory_bytes(rank, context, scheme, dtype, device) for rank in ranks)
    free = free_bytes(device)
    if needed > MEMORY_SHARE * free:
        raise InputError(
            f"layers of {', '.join(map(str, shapes))}: {context} tokens at tp {tensor_parallel} "
            f"in {scheme} need about {needed / 2**30:.1f} GiB, expected at most {MEMORY_SHARE:.0%} "
            f"of the {free / 2**30:.1f} GiB free on {device}"
        )
    return ranks


@cache
def _refusal(scheme: str, device: str) -> str:
    """Why a small block of this scheme does not run here, an empty string if it does."""
    if (device, scheme) == ("cuda", "fp32"):
        return "no fused attention for groups of heads in fp32"
    small = Shape(1, 256, 2, 1, 128, 256, 1)
    dtype = DTYPES[SCHEMES[scheme].dtypes[0]]
    generator = torch.Generator(device).manual_seed(0)
    try:
        weights = random_weights(small, dtype, device, generator)
        block = Block(small, weights, 32, SCHEMES[scheme])
        block.run(block.inputs(generator))
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        return " ".join(str(error).split())[:120]
    return ""


def memory_bytes(rank: Shape, context: int, scheme: str, dtype: str, device: str) -> int:
    """About what measuring a rank's share holds at most.

    Two sets of weights, the dense ones that they are made from and the passes that make them; the
    tensors between the steps, a copy of them to rotate to, and the passes in fp32. On a GPU every
    part and the block keep in their graphs what they give and pass through.
    """
    matrices = matrix_sizes(rank)
    sizes = matrices.values()
    wide, weights = DTYPES[dtype].itemsize, sum(rows * columns for rows, columns in sizes)
    stored = {"fp32": 4.0, "bf16": 2.0, "w4a16": 0.53}.get(scheme, 1.0)
    packing = 0 if scheme in DTYPES else 16 * max(rows * columns for rows, columns in sizes)
    # What the products take and give, the residuals, and q and k before and behind rope.
    between = sum(rows + columns for rows, columns in sizes)
    between += 4 * rank.hidden + 2 * matrices["qkv"][0]
    passes = 12 * max(rows for rows, _ in sizes)
    if SCHEMES[scheme].quantise is not None:
        passes += 8 * sum(rows + columns for rows, columns in sizes)
    sets = 4 if device == "cuda" else 2
    return int(weights * 2 * (stored + wide) + packing + context * (sets * between * wide + passes))


def free_bytes(device: str) -> int:
    """Memory of the device that nobody holds."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return arch.memory_mib() * 2**20
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else arch.memory_mib() * 2**20
