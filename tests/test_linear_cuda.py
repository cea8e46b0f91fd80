"""linear_int4 in CUDA C++: in emulation here, compiled by NVRTC where CuPy is, on a GPU at last."""

import re
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import emulated_linear_int4 as emulated
import pytest
import torch
from small_linear import made

from slmperf import arch
from slmperf.ops import linear, routing, stack_experts
from slmperf.ops.linear import int4_cuda, int4_nvrtc
from slmperf.ops.linear.table import read
from slmperf.ops.routing import CUDA_KERNELS
from slmperf.testing.budget import check_error
from slmperf.testing.linear_cases import SCHEMES
from slmperf.testing.offline import PROCESSORS, SHARED_LIMIT, cuobjdump, read_cubin

ROOT = Path(__file__).resolve().parents[1]
INT4 = [name for name in SCHEMES if name.startswith("int4")]
DTYPES = (torch.bfloat16, torch.float16)
SM_80, SM_90 = (8, 0), (9, 0)


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    return emulated.library(tmp_path_factory.mktemp("emulation"))


def gold(x, weight, bias=None, residual=None):
    """In fp64, of the numbers that the dequantised weight has."""
    y = torch.nn.functional.linear(x.double(), weight.dequantized().to(x.dtype).double())
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def hold(what, y, x, weight, bias=None, residual=None):
    wanted = gold(x, weight, bias, residual)
    check_error(what, y, wanted.to(y.dtype), wanted, x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INT4)
def test_unit_vectors_give_the_dequantised_weight_to_the_bit(emulate, name, dtype):
    weight, _, _ = made(name, 37, 128, dtype)
    x = torch.eye(128, dtype=dtype)
    for capability, rows in ((SM_80, x), (SM_90, x[5:9])):
        y = emulated.linear_int4(emulate, rows, weight, capability=capability)
        assert torch.equal(y, rows @ weight.dequantized().T)


@pytest.mark.parametrize(
    "name,rows,outputs,inputs,capability,processors,dtype,out_dtype,more",
    [
        ("int4-128", 1, 64, 4096, SM_90, 132, 0, 0, ""),  # eight parts
        ("int4-128-zeros", 1, 70, 2048, SM_80, 108, 1, 1, "bias"),
        ("int4-32", 3, 80, 3104, SM_90, 1, 0, None, "bias residual strided"),  # many steps
        ("int4-64-zeros", 8, 100, 640, SM_80, 8, 1, 0, "residual shifted"),
        ("int4-all", 9, 48, 1008, SM_90, 6, 0, 1, "bias shifted"),
        ("int4-32", 16, 144, 1024, SM_90, 8, 1, None, "bias residual strided"),
        ("int4-64-zeros", 17, 272, 576, SM_80, 108, 0, 0, "bias strided"),
        ("int4-128", 31, 16, 1152, SM_90, 132, 1, 1, "residual shifted"),
        ("int4-all", 33, 300, 200, SM_90, 1, 0, 0, "bias residual"),
        ("int4-128-zeros", 64, 64, 1152, SM_80, 108, 1, None, "bias strided"),
        ("int4-32", 64, 260, 544, SM_90, 8, 0, 0, "residual"),
        ("int4-128", 70, 24, 1024, SM_90, 132, 0, 0, "bias"),  # more than are taken at a time
        ("int4-128", 0, 24, 128, SM_80, 108, 0, 0, ""),
    ],
)
def test_products(
    emulate, name, rows, outputs, inputs, capability, processors, dtype, out_dtype, more
):
    """Every size of tile, with and without parts, odd sizes, and x at any address and stride."""
    dtype = DTYPES[dtype]
    out_dtype = torch.float32 if out_dtype is None else DTYPES[out_dtype]
    weight, _, _ = made(name, outputs, inputs, dtype)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs + 24, generator=generator).to(dtype)
    x[:, ::7] *= 20
    x = x[:, 8 if "strided" in more else 3 : inputs + (8 if "strided" in more else 3)]
    if not ("strided" in more or "shifted" in more):
        x = x.contiguous()
    bias = torch.randn(outputs, generator=generator).half() if "bias" in more else None
    residual = None
    if "residual" in more:
        residual = torch.randn(rows, outputs + 5, generator=generator)[:, :outputs]
    orders = [
        emulated.linear_int4(
            emulate, x, weight, bias, residual=residual, out_dtype=out_dtype,
            capability=capability, processors=processors, seed=seed,
        )
        for seed in (range(3) if rows <= 9 else (1, 2))
    ]  # fmt: skip
    hold(name, orders[0], x, weight, bias, residual)
    assert all(torch.equal(one, orders[0]) for one in orders)


@pytest.mark.parametrize("name,dtype", [("int4-64-zeros", 0), ("int4-all", 1), ("int4-32", 1)])
def test_slices_are_read_where_they_lie(emulate, name, dtype):
    """Shares of outputs and of inputs; the emulation sees to it that nothing beside them is."""
    dtype = DTYPES[dtype]
    weight, _, _ = made(name, 272, 512, dtype)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
    for part in (weight.slice_outputs(16, 160), weight.slice_outputs(256, 272)):
        hold(name, emulated.linear_int4(emulate, x, part), x, part)
    for begin, end in ((128, 384), (64, 512)):
        part, of_x = weight.slice_inputs(begin, end), x[:, begin:end]
        hold(name, emulated.linear_int4(emulate, of_x, part, capability=SM_80), of_x, part)


@pytest.mark.parametrize("capability", [SM_80, SM_90])
def test_experts(emulate, capability):
    """Rows of several experts, of none, and of more than are taken at a time."""
    singles = []
    for seed in range(4):
        torch.manual_seed(seed)
        weight, _, _ = made("int4-64-zeros", 40, 192)
        singles.append(weight.slice_outputs(0, 40))
    stacked = stack_experts(singles)
    edges = [0, 3, 3, 12, 17]
    starts = torch.tensor(edges, dtype=torch.int32)
    x, bias = torch.randn(17, 192).bfloat16(), torch.randn(4, 40)
    y = emulated.linear_int4(emulate, x, stacked, bias, starts=starts, capability=capability)
    for expert, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if begin < end:
            rows = slice(begin, end)
            hold(f"expert {expert}", y[rows], x[rows], singles[expert], bias[expert])


def test_a_row_of_nan_stays_alone(emulate):
    weight, _, _ = made("int4-128", 48, 256)
    x = torch.randn(12, 256).bfloat16()
    clean = emulated.linear_int4(emulate, x, weight)
    x[2] = torch.nan
    y = emulated.linear_int4(emulate, x, weight)
    assert y[2].isnan().all()
    others = [row for row in range(12) if row != 2]
    assert torch.equal(y[others], clean[others])


# What the emulation says of the kernels of faulty_kernels.cpp; a race is found in some way.
RACE = "without a barrier after another thread|never written"
FAULTS = {
    "right": "^nothing$",
    "copy_not_waited_for": "read before its cp.async was waited for",
    "copy_never_waited_for": "ends with a cp.async that nobody waited for",
    "copy_without_a_barrier": RACE,
    "copy_into_what_is_read": RACE,
    "copy_misaligned": "cp.async from a misaligned address",
    "copy_too_far": "reads 16 bytes of global memory that are not the operation's",
    "read_without_a_barrier": RACE,
    "write_without_a_barrier": RACE,
    "two_writers": RACE,
    "never_written": "never written",
    "out_of_bounds": "of 1024 bytes",
    "read_beside": "reads 4 bytes of global memory that are not the operation's",
    "write_where_only_read": "writes 4 bytes of global memory that are not the operation's",
    "different_instructions": "lanes of a warp are at different instructions",
    "half_a_warp": "waits for threads that never come",
    "not_at_the_barrier": "waits for threads that never come",
    "peer_without_a_barrier": RACE,
    "peer_has_ended": "may have ended while its cluster still reads",
}


def test_the_emulation_finds_faults(tmp_path):
    """Faults that a lucky run on a GPU might not show, in two orders of the threads."""
    program = tmp_path / "faulty"
    emulated.build(ROOT / "tests" / "faulty_kernels.cpp", program)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = [line.split(": ", 1) for line in lines.splitlines()]
    assert [name for name, _ in found] == [name for name in FAULTS for _ in range(2)]
    for name, what in found:
        assert re.search(FAULTS[name], what), f"{name}: {what}"


def test_plans_fit_the_devices():
    """Shared memory and a cluster's size, for every number of rows; parts take all inputs."""
    for capability in int4_cuda.ARCHITECTURES:
        number = 10 * capability[0] + capability[1]
        for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 4096):
            for outputs, inputs in ((16, 16), (3072, 5120), (14336, 4096), (100, 28672)):
                x = torch.empty(rows, inputs, dtype=torch.float16, device="meta")
                plan = int4_cuda.plan(x, outputs, 0, capability, PROCESSORS[number])
                assert plan.bytes <= SHARED_LIMIT[number] and plan.threads <= 1024
                assert 64 * plan.across * plan.blocks >= outputs
                assert 8 * plan.tiles >= min(rows, 64) and plan.parts <= 8
                assert (plan.join_blocks > 0) == (plan.parts > 1 and number == 80)
                assert int4_cuda.plan(x, outputs, 4, capability, 132).parts == 1


def test_without_kernels_the_table_goes_on(monkeypatch):
    """For few rows CUDA C++, where it is and where it takes the dtypes; else the next row."""
    rows = [row for row in read("sm_90") if row.op == "linear_int4" and row.dtype != "float32"]
    assert [(row.impl, row.rows) for row in rows[:2]] == [("cuda", 64), ("triton", 16)]
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    monkeypatch.setattr(arch, "cuda_capability", lambda index: SM_90)
    takes, half = routing.table("linear_int4").takes, SimpleNamespace(dtype=torch.float16)
    monkeypatch.setitem(routing.MISSING, "cuda", "")
    assert takes("cuda", x) and int4_cuda.fits(x, x) and not int4_cuda.fits(x, half)
    monkeypatch.setitem(routing.MISSING, "cuda", "built without nvcc")
    assert not takes("cuda", x) and takes("triton", x)
    monkeypatch.setattr(arch, "cuda_capability", lambda index: (10, 0))
    assert not int4_cuda.fits(x, x)


@pytest.mark.parametrize("kernels", ["built in", "NVRTC"])
def test_doctor_says_how_the_kernels_come(monkeypatch, kernels):
    monkeypatch.setitem(routing.MISSING, "cuda", "")
    monkeypatch.setattr(routing, "CUDA_KERNELS", kernels)
    assert f"kernels {kernels}" in routing.implementations()["linear_int4"]["cuda"]


def test_what_the_kernel_does_not_take():
    weight, _, _ = made("int4-128", 48, 256, torch.float16)
    x = torch.randn(2, 256).bfloat16()
    with pytest.raises(NotImplementedError, match="x and scale of one dtype, found torch.bfloat16"):
        emulated.linear_int4(None, x, weight)
    with pytest.raises(NotImplementedError, match="wants bias of float32, bfloat16 or float16"):
        emulated.linear_int4(None, x.half(), weight, torch.randn(48).double())
    with pytest.raises(NotImplementedError, match="linear_int4: impl='cuda' on cpu tensors"):
        linear(x.half(), weight, impl="cuda")


def test_one_source_without_includes(monkeypatch):
    """What NVRTC gets: no header, and the cluster's size as a part of the kernel."""
    x = torch.empty(1, 4096, dtype=torch.float16, device="meta")
    text = int4_nvrtc.source(int4_cuda.plan(x, 64, 0, SM_90, 132))
    assert "__cluster_dims__(1, 8, 1)" in text and "multiply<slmperf::Half, 1, 1, 4>" in text
    assert re.findall("#include.*", text) == ["#include <cstdint>"]  # which NVRTC skips
    text = int4_nvrtc.source(int4_cuda.plan(x.bfloat16(), 64, 0, SM_80, 132))
    assert "__cluster_dims__" not in text and "multiply<slmperf::Bf16, 1, 1, 4>" in text


@pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.parametrize("capability", int4_cuda.ARCHITECTURES)
def test_nvrtc_compiles_once(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("SLMPERF_CACHE", str(tmp_path))
    x = torch.empty(9, 4096, dtype=torch.bfloat16, device="meta")
    plan = int4_cuda.plan(x, 64, 0, capability, 132)
    architecture = int4_cuda.ARCHITECTURES[capability]
    path = int4_nvrtc.compiled(int4_nvrtc.source(plan), architecture)
    assert path.parent.parent == tmp_path and architecture in path.name
    if cuobjdump():
        codes = {code.function: code for code in read_cubin(path)}
        assert set(codes) == {"linear_int4", "linear_int4_join"}
        assert codes["linear_int4"].matrix["HMMA"] and codes["linear_int4"].spilled_bytes == 0
    written = path.stat().st_mtime_ns
    assert int4_nvrtc.compiled(int4_nvrtc.source(plan), architecture) == path
    assert path.stat().st_mtime_ns == written


def test_nvrtc_launches(monkeypatch):
    """What CuPy is given; compiled once for all shapes that take the same kernel."""
    calls, modules = [], []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __call__(self, grid, block, arguments, shared_mem=0):
            calls.append((self.name, grid, block, shared_mem, arguments))

    def module(path):
        modules.append(path)
        return SimpleNamespace(get_function=Kernel)

    cuda = SimpleNamespace(Device=nullcontext, ExternalStream=nullcontext)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=module, cuda=cuda))
    monkeypatch.setattr(int4_nvrtc, "compiled", lambda text, architecture: Path(architecture))
    monkeypatch.setattr(int4_nvrtc, "_loaded", {})
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for outputs in (128, 192):
        weight, _, _ = made("int4-128", outputs, 4096)
        x = torch.ones(1, 4096).bfloat16()
        plan = int4_cuda.plan(x, outputs, 0, SM_80, 16)
        y = torch.empty(1, outputs)
        partial = int4_cuda.partial_sums(y, plan)
        given, _ = int4_cuda.problem(
            x, weight.packed, weight.scale, None, None, None, None, y, partial, 128
        )
        int4_nvrtc.launch(given, plan, "sm_80", 0)
        (name, grid, block, shared, (by_value,)), (join, blocks, *_, more) = calls[-2:]
        assert (name, grid, block) == ("linear_int4", (outputs // 64, plan.parts, 1), (128,))
        assert shared == plan.bytes and by_value.size == 1 and by_value.tobytes() == bytes(given)
        assert (join, blocks) == ("linear_int4_join", (1,)) and more[1] == plan.parts > 1
    assert modules == ["sm_80"]


SANITIZER = """#!/bin/sh
[ "$2" = memcheck ] || { echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 1; }
echo "========= ERROR SUMMARY: 0 errors"; echo "6 passed in 1.00s"
"""


def test_the_part_of_the_gpu_check_that_sanitizes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpu_plans import BENCHES, SANITIZED, Failed

    for test in SANITIZED:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text()
    assert BENCHES["sanitize"]("cpu") == {}
    plan = BENCHES["sanitize"]("cuda")
    assert list(plan) == ["sanitize memcheck", "sanitize racecheck", "sanitize synccheck"]
    part, facts = SimpleNamespace(deadline=time.time() + 60), {}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "")
    with pytest.raises(Failed, match="compute-sanitizer is neither on PATH"):
        list(plan["sanitize memcheck"](part, facts))
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(SANITIZER)
    stub.chmod(0o755)
    (row,) = plan["sanitize memcheck"](part, facts)
    assert row["name"] == "sanitize memcheck" and row["errors"] == 0
    assert facts == {"summary": ["ERROR SUMMARY: 0 errors"]}
    with pytest.raises(Failed, match="1 hazard displayed"):
        list(plan["sanitize racecheck"](part, facts))


def on_gpu(name, rows, outputs, inputs, dtype):
    weight, _, _ = made(name, outputs, inputs, dtype)
    moved = [None if one is None else one.cuda()
             for one in (weight.packed, weight.scale, weight.zero_point)]  # fmt: skip
    weight = type(weight)(*moved, weight.outputs, weight.inputs, weight.group_size)
    x = torch.randn(rows, inputs, device="cuda").to(dtype)
    return x, weight, torch.randn(outputs, device="cuda"), torch.randn(rows, outputs, device="cuda")


GPU_CASES = [
    ("int4-128", 1, 4096, 4096, 0), ("int4-32", 5, 1000, 1056, 1), ("int4-all", 16, 640, 2000, 0),
    ("int4-64-zeros", 29, 3072, 5120, 1), ("int4-128-zeros", 64, 1280, 3072, 0),
    ("int4-128", 70, 48, 512, 1),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name,rows,outputs,inputs,dtype", GPU_CASES)
def test_on_a_gpu(name, rows, outputs, inputs, dtype):
    """Right, and the same bits again and in a CUDA graph."""
    x, weight, bias, residual = on_gpu(name, rows, outputs, inputs, DTYPES[dtype])

    def run():
        return linear(x, weight, bias, residual=residual, impl="cuda")

    y = run()
    hold(name, y, x, weight, bias, residual)
    assert torch.equal(run(), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, y)


@pytest.mark.gpu
@pytest.mark.parametrize("name,rows,outputs,inputs,dtype", GPU_CASES)
def test_both_ways_to_the_same_bits(name, rows, outputs, inputs, dtype):
    """The kernels of _ops.so, and the same sources compiled by NVRTC."""
    if CUDA_KERNELS != "built in" or find_spec("cupy") is None:
        pytest.skip("wants kernels that are built in, and CuPy")
    x, weight, bias, residual = on_gpu(name, rows, outputs, inputs, DTYPES[dtype])
    found = [
        int4_cuda.linear_int4(
            x, weight.packed, weight.scale, weight.zero_point, bias, residual, None,
            outputs, weight.group_size, torch.float32, kernels,
        )
        for kernels in ("built in", "NVRTC")
    ]  # fmt: skip
    assert torch.equal(*found)
