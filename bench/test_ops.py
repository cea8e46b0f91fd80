"""The cases of `slmperf bench ops` as pytest-benchmark records:

    python -m pytest bench --benchmark-only --benchmark-json=ops.json

A record is one round: every set of inputs once, on a GPU as one replay of a graph with the wait for
it. extra_info says how many calls that is, what was run, and how much memory a call holds at most.
"""

import functools

import pytest
import torch

from slmperf.bench.ops import calls_of, cases_of, input_sets, variants
from slmperf.testing.timing import peak_mib, replayed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {f"{case.op}-{case}": case for case in cases_of(None, DEVICE)}
ROUNDS = 3 if DEVICE == "cpu" else 20


@functools.lru_cache(maxsize=1)  # one case's tensors at a time
def material(name):
    """Variants and input sets of a case, which its records share."""
    torch.compiler.reset()  # a limit on recompilations would silently run a later case uncompiled
    return variants(CASES[name], DEVICE), input_sets(CASES[name], DEVICE)


def round_of(calls, graph):
    """A function that runs every call once and returns when they are done."""
    if DEVICE == "cpu" or not graph:

        def enqueue():
            for call in calls:
                call()
    else:
        enqueue = replayed(calls)

    def run():
        enqueue()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(
    "name,impl",
    [(name, impl) for name, case in CASES.items() for impl in variants(case, DEVICE)],
)
def test_op(benchmark, name, impl):
    case = CASES[name]
    ways, sets = material(name)
    way = ways[impl]
    calls = calls_of(case, way, sets)
    benchmark.group = name
    benchmark.extra_info.update(
        op=case.op, case=str(case), impl=impl, role=way.role, baseline="reference",
        calls_per_round=len(calls), bytes_per_call=case.bytes, device=DEVICE,
    )  # fmt: skip
    try:
        run = round_of(calls, way.graph)
        run()  # compiles
    except (NotImplementedError, ImportError) as error:
        pytest.skip(str(error))
    benchmark.extra_info["peak_mib"] = round(peak_mib(calls[0], DEVICE), 2)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=0, iterations=1)
