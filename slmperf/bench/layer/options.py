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
# on two cores.
GPU_CONTEXTS = (4096, 16384, 32768)
CPU_CONTEXTS: Mapping[str, tuple[int, ...]] = {
    "bf16": (256, 1024),
    "w8a8": (256, 1024),
    "w4a16": (256, 1024),
    "fp8": (256, 1024),
    "fp32": (64, 256),
}
MEMORY_SHARE = 0.85  # of what is free: a machine that swaps or kills measures nothing


def parse_contexts(text: str) -> tuple[int, ...]:
    """ "4k,16k" -> (4096, 16384); k is 1024. InputError for anything that is no count of tokens."""
    return tuple(dict.fromkeys(parse_tokens(one.strip()) for one in text.split(",")))


def parse_decode(text: str) -> tuple[int, ...]:
    """ "1,16" -> (1, 16): sequences of the decode steps. InputError for anything else."""
    found = [one.strip() for one in text.split(",")]
    if not all(one.isdecimal() and int(one) > 0 for one in found):
        raise InputError(f"decode is {text!r}, expected numbers of sequences such as 1,16")
    return tuple(dict.fromkeys(map(int, found)))


def default_contexts(device: str, schemes: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """Those that are measured if none are asked for: the smallest of the schemes'."""
    if device == "cuda":
        return GPU_CONTEXTS
    return min(CPU_CONTEXTS[scheme] for scheme, _ in schemes)


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


def choose_schemes(scheme: str | None, dtype: str | None, device: str) -> list[tuple[str, str]]:
    """ "bf16,w4a16" -> the schemes, each with the dtype of its activations, as `choose_scheme` does
    it; the first is what the others are compared with. InputError for one named twice, too."""
    names = [None] if scheme is None else [one.strip() for one in scheme.split(",")]
    found = [choose_scheme(name, dtype, device) for name in names]
    if len(set(found)) < len(found):
        raise InputError(f"scheme is {scheme!r}, expected each once")
    return found


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
    schemes: Sequence[tuple[str, str]],
    device: str,
    decode: int = 0,
) -> list[Shape]:
    """One rank's share of each shape; InputError where they could not be timed here together, in
    all schemes: sizes that do not divide, no product, not enough memory.

    schemes  of `choose_schemes`; decode: sequences of a decode step, 0 for a prefill
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise InputError(f"layer: context is {context!r}, expected a whole number of tokens >= 1")
    ranks = [shape.rank(tensor_parallel) for shape in shapes]
    for scheme, _ in schemes:
        if refusal := _refusal(scheme, device):
            there = ", ".join(name for name in SCHEMES if not _refusal(name, device))
            raise InputError(f"scheme {scheme} on {device}: {refusal}; there is: {there}")
    needed = sum(
        memory_bytes(rank, context, scheme, dtype, device, decode)
        for rank in ranks
        for scheme, dtype in schemes
    )
    free = free_bytes(device)
    if needed > MEMORY_SHARE * free:
        names = ", ".join(scheme for scheme, _ in schemes)
        raise InputError(
            f"layers of {', '.join(map(str, shapes))}: {context} tokens at tp {tensor_parallel} "
            f"in {names} need about {needed / 2**30:.1f} GiB, expected at most {MEMORY_SHARE:.0%} "
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


def memory_bytes(
    rank: Shape, context: int, scheme: str, dtype: str, device: str, decode: int = 0
) -> int:
    """About what measuring a rank's share holds at most.

    Two sets of weights, the dense ones that they are made from and the passes that make them; the
    tensors between the steps, a copy of them and of a decode step's cache to rotate to, and the
    passes in fp32. On a GPU every
    part and the block keep in their graphs what they give and pass through.
    """
    matrices = matrix_sizes(rank)
    sizes = matrices.values()
    wide, weights = DTYPES[dtype].itemsize, sum(rows * columns for rows, columns in sizes)
    stored = {"fp32": 4.0, "bf16": 2.0, "w4a16": 0.53}.get(scheme, 1.0)
    packing = 0 if scheme in DTYPES else 24 * max(rows * columns for rows, columns in sizes)
    # What the products take and give, the residuals, and q and k before and behind rope.
    between = sum(rows + columns for rows, columns in sizes)
    between += 4 * rank.hidden + 2 * matrices["qkv"][0]
    passes = 12 * max(rows for rows, _ in sizes)
    if SCHEMES[scheme].activations is not None:
        passes += 8 * sum(rows + columns for rows, columns in sizes)
    sets, rows = 4 if device == "cuda" else 2, decode or context
    cache = sets * 2 * decode * context * rank.kv_heads * rank.head_size * wide
    between = rows * (sets * between * wide + passes)
    return int(weights * 2 * (stored + wide) + packing + between + cache)


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
