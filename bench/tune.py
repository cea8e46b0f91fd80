"""Find the tiles of linear's Triton kernels on the GPU at hand, and write its table.

    python bench/tune.py                    all ops; on an H100 it writes
                                            slmperf/ops/linear/tables/sm_90.toml
    python bench/tune.py --op linear_fp8    one op's rows; the others stay as they are
    python bench/tune.py --dry-run          what would be tried, each compiled for --arch, without a
                                            GPU; exit code 1 if one does not fit

For each class of weights and each of `ROWS` every tile of `candidates` is timed, and every other
implementation: replays of a CUDA graph over weights that the second-level cache does not hold
(slmperf/testing/timing.py). What counts is the geometric mean over `SHAPES`, (N, K) of the paper's
models whole and in quarters. The fastest comes first among the rows; where that is not a Triton
kernel, the fastest tile follows, for calls and machines that cannot have the first.
"""

import argparse
import datetime
import statistics
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from slmperf import arch
from slmperf.models.files import write_atomically
from slmperf.ops.linear import table
from slmperf.testing.linear_cases import linear_case
from slmperf.testing.offline import SHARED_LIMIT, compile_launch, launches
from slmperf.testing.timing import median_us, rotations

SHAPES = ((14336, 4096), (4096, 14336), (5120, 3072), (3072, 5120), (3072, 1536), (1664, 4096))
ROWS = (16, 64, 256, 1024, 8192)  # what is measured; the last stands for any more
# Blocks of sm_86, sm_89 and sm_120, which take sm_80's table, have 99 KiB.
SHARED = SHARED_LIMIT | {80: 99 * 1024}
REGISTERS = 128  # a thread's sums, at most: half of its registers
WORSE = 0.03  # a rival has to be faster by this, to take the place of a kernel of ours


@dataclass(frozen=True)
class Weights:
    """A class of weights: the scheme that is measured for it, what its rows say, bytes of a number
    in shared memory (half of one: int4's) and of an input."""

    op: str
    scheme: str
    says: dict = field(hash=False)
    weight_bytes: float = 1
    input_bytes: int = 2


CLASSES = (
    Weights("linear_int4", "int4-128", {}, 0.5),
    Weights("linear_int8", "int8-token", {"rounded": True}, 1, 1),
    Weights("linear_int8", "int8-weight", {"rounded": False}),
    Weights("linear_fp8", "fp8-token", {"rounded": True, "blocks": False}, 1, 1),
    Weights("linear_fp8", "fp8-block", {"rounded": True, "blocks": True}, 1, 1),
    Weights("linear_fp8", "fp8-weight", {"rounded": False}),
)
FIRST_WITH_FP8 = 89
RIVALS = {"linear_int4": ("cuda", "torch"), "linear_int8": ("torch",), "linear_fp8": ("torch",)}
# Rows that no measurement makes: fp32 inputs are multiplied with one tile, see linear_tiles.py.
FIXED = {
    "linear_int4": (
        {"op": "linear_int4", "impl": "triton", "rows": 32, "dtype": "float32"},
        {"op": "linear_int4", "impl": "torch", "grouped": False, "dtype": "float32"},
    )
}
# What calls a provider takes: no experts without a copy of `starts` to the host, no odd sizes.
PROVIDED = {
    ("linear_int4", "torch"): {"grouped": False},
    ("linear_int8", "torch"): {"grouped": False, "multiple": 8},
    ("linear_fp8", "torch"): {"grouped": False, "multiple": 16},
}


def classes(capability, op=None):
    """The classes of weights that a GPU of this capability multiplies with."""
    kept = [one for one in CLASSES if op in (None, one.op)]
    if capability < FIRST_WITH_FP8:
        kept = [one for one in kept if not (one.op == "linear_fp8" and one.says["rounded"])]
    return kept


def candidates(weights, rows, capability):
    """Tiles worth a try for M up to `rows`, as rows of a table spell them."""
    if rows <= 16:
        sizes = product((16,), (64, 128), (64, 128, 256), (4,), (3, 4, 6), (4,))
    elif rows <= 64:
        sizes = product((32, 64), (64, 128), (64, 128), (4, 8), (3, 4), (2,))
    else:
        sizes = product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4), (1,))
    found = []
    for m, n, k, warps, stages, programs in sizes:
        block = k * (m * weights.input_bytes + n * weights.weight_bytes)
        sums = m * n / (32 * warps)
        fits = stages * block <= SHARED[capability] / programs and sums <= REGISTERS
        # Each warp has 16 outputs of its own; where rows are many, sums enough for the loads.
        if fits and n >= 16 * warps and (rows <= 64 or sums >= REGISTERS / 2):
            found.append(dict(m=m, n=n, k=k, warps=warps, stages=stages, programs=programs))
    return found


def with_tile(tile):
    """Inside, the kernels take this tile whatever the table says."""
    return mock.patch.object(table, "tile", lambda call, capability: tile)


def dry_run(capability, op, limit):
    """Compile every candidate (`limit`: so many of each class and M); how many do not fit."""
    wrong = tried = 0
    seen = set()
    for weights in classes(capability, op):
        for rows in ROWS:
            for tile in candidates(weights, rows, capability)[:limit]:
                case = linear_case(weights.scheme, min(rows, 512), (768, 1024), forward_only=True)
                with with_tile(tile):
                    found = launches(case, capability)
                (launch,) = (one for one in found if one.kernel.__name__ == "_product")
                if launch in seen:
                    continue
                seen.add(launch)
                tried += 1
                line = f"{weights.op} {weights.scheme} M<={rows} {tile}"
                try:
                    code = compile_launch(launch, capability).code
                except Exception as error:  # triton and ptxas raise whatever they like
                    wrong += 1
                    print(f"FAIL: {line}: {str(error).strip().splitlines()[0]}")
                    continue
                shared = code.shared_bytes
                fits = shared <= SHARED[capability]
                wrong += not fits
                spills = f", spills {code.spilled_bytes} bytes" if code.spilled_bytes else ""
                print(f"{'' if fits else 'FAIL: '}{line}: {code.registers} registers, "
                      f"{shared} bytes shared{spills}", flush=True)  # fmt: skip
    print(f"{tried} tiles for sm_{capability}, {wrong} do not fit")
    return wrong


def measured(weights, rows, shape, tiles, rivals, seconds):
    """Microseconds of each tile and rival that runs: {tile as a tuple, or name: us}."""
    case = linear_case(weights.scheme, rows, shape, forward_only=True)
    tensors = case.tensors("cuda")
    held = sum(one.nbytes for one in tensors.values())
    sets = [tensors] + [
        {name: one.clone() for name, one in tensors.items()}
        for _ in range(rotations(held, "cuda") - 1)
    ]
    wanted = case.run(tensors, "torch").float()
    found = {}

    def timed(label, impl):
        try:
            y = case.run(tensors, impl).float()
            error = (y - wanted).norm() / wanted.norm()
            if not error < 0.02:
                raise ArithmeticError(f"is {float(error):.3g} of the result away from torch's")
            calls = {label: [lambda given=given: case.run(given, impl) for given in sets]}
            found[label] = median_us(calls, "cuda", seconds)[label]
        except Exception as error:  # a tile that does not fit, a provider that refuses
            print(f"{case} {label}: {str(error).splitlines()[0]}", file=sys.stderr)

    for rival in rivals:
        timed(rival, rival)
    for tile in tiles:
        with with_tile(tile):
            timed(tuple(tile.values()), "triton")
    return found


def means(by_shape):
    """{label: geometric mean of microseconds} of what ran on all shapes."""
    common = set.intersection(*(set(found) for found in by_shape))
    return {
        label: statistics.geometric_mean(found[label] for found in by_shape) for label in common
    }


def rows_of(weights, by_rows):
    """The table's rows of one class: by_rows {M: {label: us}}, M of `ROWS` in order."""
    rows = []
    for most, times in by_rows.items():
        bound = {} if most == ROWS[-1] else {"rows": most}
        tiles = {label: us for label, us in times.items() if isinstance(label, tuple)}
        tile = min(tiles, key=tiles.get)
        rivals = {label: us for label, us in times.items() if not isinstance(label, tuple)}
        best = min(rivals, key=rivals.get, default=None)
        if best is not None and rivals[best] < (1 - WORSE) * tiles[tile]:
            more = PROVIDED.get((weights.op, best), {})
            rows.append({"op": weights.op, "impl": best, **bound, **more, **weights.says})
        names = ("m", "n", "k", "warps", "stages", "programs")
        config = dict(zip(names, tile, strict=True))
        rows.append({"op": weights.op, "impl": "triton", **bound, **weights.says, "config": config})
    return rows


def rendered(rows, comment):
    """A table file: comment lines, a line per row."""

    def text(value):
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{name} = {text(one)}" for name, one in value.items()) + " }"
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else (
            f'"{value}"' if isinstance(value, str) else str(value)
        )  # fmt: skip

    head = "\n".join(f"# {line}" for line in comment)
    return f"{head}\nrow = [\n" + "".join(f"  {text(row)},\n" for row in rows) + "]\n"


def comment_of(name):
    """The comment of the table of the GPU at hand: what it is, where its rows come from."""
    date = datetime.datetime.now(datetime.UTC).date()
    return [
        f"Which implementation linear takes on {name}, and the tiles of its Triton kernels: see",
        "slmperf/ops/linear/table.py. m, n, k are rows, outputs and inputs of a tile.",
        f"Measured by bench/tune.py on {arch.cuda_name()}, {date}, torch {torch.__version__}.",
    ]


def kept_rows(name, done):
    """Rows of the table that hold for classes which were not measured, fp8 inputs on an A100 say;
    the nearest table's where it has none."""
    capability = int(name[3:])
    fields = [vars(row) for row in table.read(table.device_class(capability))]
    defaults = vars(table.Row("", ""))
    left = [weights for weights in CLASSES if weights not in done]

    def holds(row, weights):
        said = all(row[key] in (None, value) for key, value in weights.says.items())
        return row["op"] == weights.op and said

    return [
        {key: value for key, value in row.items() if value != defaults[key]}
        for row in fields if any(holds(row, weights) for weights in left)
    ]  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", choices=sorted(RIVALS), help="this op's rows alone")
    parser.add_argument("--dry-run", action="store_true", help="compile every candidate, no GPU")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED), help="of --dry-run: 80 or 90")
    parser.add_argument("--limit", type=int, help="so many candidates of each class and M")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each measurement")
    parser.add_argument("--out", type=Path, help="instead of the table itself")
    given = parser.parse_args(arguments)
    if given.dry_run:
        wanted = (given.arch,) if given.arch else sorted(SHARED)
        return 1 if sum(dry_run(one, given.op, given.limit) for one in wanted) else 0
    found = arch.cuda_capability()
    if found is None:
        print("tune: torch sees no CUDA device; --dry-run compiles what would be tried")
        return 2
    capability = 10 * found[0] + found[1]
    name, known = f"sm_{capability}", 90 if 90 <= capability < 120 else 80
    rows, done = [], []
    for weights in classes(capability, given.op):
        by_rows = {}
        for most in ROWS:
            tiles = candidates(weights, most, known)[: given.limit]
            by_shape = [
                measured(weights, most, shape, tiles, RIVALS[weights.op], given.seconds)
                for shape in SHAPES
            ]
            by_rows[most] = means(by_shape)
            best = sorted(by_rows[most].items(), key=lambda pair: pair[1])[:3]
            print(f"{weights.op} {weights.scheme} M={most}: {best}", flush=True)
        if all(any(isinstance(label, tuple) for label in times) for times in by_rows.values()):
            rows += rows_of(weights, by_rows)
            done.append(weights)
        else:
            print(f"{weights.op} {weights.scheme}: not every M has a tile, the old rows stay")
    fixed = [row for op in sorted({weights.op for weights in done}) for row in FIXED.get(op, ())]
    # Kept rows stand behind the measured ones: some hold for classes of both sorts.
    rows = fixed + rows + kept_rows(name, done)
    path = given.out or table.FOLDER / f"{name}.toml"
    write_atomically(path, rendered(rows, comment_of(name)))
    print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
