"""The battery over every op and implementation, and what is special to each op.

A pairwise sample of the cases, always the same one, so that a failure is of what was changed; the
full cross is marked slow and runs whole on a GPU. Triton kernels run on CPU tensors under the
interpreter (small shapes), or on a device.
"""

import math
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from slmperf import arch
from slmperf.check import InputError, check_shapes
from slmperf.ops import divergence, divergence_reference
from slmperf.ops.routing import cpu_isa, interpreted, table
from slmperf.testing.battery import CHECKS, run_case
from slmperf.testing.budget import check_error
from slmperf.testing.cases import FAMILIES
from slmperf.testing.interpreter import cure
from slmperf.testing.pairwise import cross, pairwise
from slmperf.testing.timing import forward_backward

SEED = 0
GPU = torch.cuda.is_available()
if not GPU:
    cure()


def kernels(device):
    """(op, implementation) of every kernel that takes tensors of this device here."""
    return [
        (op, impl)
        for op in FAMILIES
        for impl, entry in table(op).implementations.items()
        if device in entry.devices
        and not (impl == "triton" and device == "cpu" and not interpreted())
    ]


def each_kernel(device):
    """Parameters of a test that runs once per kernel."""
    pairs = [pytest.param(*pair, id="-".join(pair)) for pair in kernels(device)]
    return pytest.mark.parametrize("op,impl", pairs)


SAMPLE = [
    pytest.param(impl, case, id=f"{op}-{impl}-{case}")
    for op, impl in kernels("cpu")
    for case in FAMILIES[op].sample(SEED, small=impl == "triton")
]


@pytest.fixture(scope="module", autouse=True)
def print_seed(request):
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"seed of the sample: {SEED}")


def failures(impl, cases, device="cpu"):
    """Messages of all cases that miss their budget."""
    found = []
    for case in cases:
        try:
            run_case(case, impl, device)
        except AssertionError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("impl,case", SAMPLE)
def test_sample(impl, case):
    run_case(case, impl)


@pytest.mark.parametrize("check", CHECKS)
@each_kernel("cpu")
def test_check(op, impl, check):
    for case in FAMILIES[op].checked:
        CHECKS[check](case, impl, "cpu")


@pytest.mark.slow
@each_kernel("cpu")
def test_full_cross(op, impl):
    assert not failures(impl, FAMILIES[op].every(small=impl == "triton"))


@pytest.mark.slow
def test_large():
    """What is too large to be crossed, and for the interpreter."""
    for op, impl in kernels("cpu"):
        if impl != "triton":
            assert not failures(impl, FAMILIES[op].large)


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_narrower_instruction_sets(isa):
    """What other processors would run, on a sample that does not change with the day."""
    if cpu_isa() == "scalar" or cpu_isa() == isa:
        pytest.skip(f"this processor has nothing wider than {isa}: the sample above ran it")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from slmperf.ops.routing import cpu_isa, table\n"
        "from slmperf.testing.battery import run_case\n"
        "from slmperf.testing.cases import FAMILIES\n"
        "print(cpu_isa())\n"
        "for op, family in FAMILIES.items():\n"
        "    if 'cpu' in table(op).implementations:\n"
        "        for case in family.sample(0): run_case(case, 'cpu')\n"
    )
    environment = os.environ | {"SLMPERF_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == isa


def test_wide_instructions_stay_in_their_namespaces():
    """One library runs on any x86-64: AVX code only in functions that are entered after a check.

    A function of the standard library compiled among them could be merged with everybody's.
    """
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs an x86-64 and objdump")
    command = ["objdump", "-dC", "--no-show-raw-insn", str(arch.OPS_LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    wide, function = set(), ""
    for line in lines:
        if line.endswith(">:"):
            function = line
        elif "\tv" in line:  # the prefix of every AVX mnemonic
            wide.add(function)
    assert any("slmperf::avx512::" in name for name in wide), "no symbols, or nothing compiled wide"
    assert [name for name in wide if "slmperf::avx" not in name] == []


# --- on a device ---


@pytest.mark.gpu
@each_kernel("cuda")
def test_full_cross_on_device(op, impl):
    assert not failures(impl, [*FAMILIES[op].every(), *FAMILIES[op].large], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
@each_kernel("cuda")
def test_check_on_device(op, impl, check):
    for case in FAMILIES[op].checked:
        CHECKS[check](case, impl, "cuda")


@pytest.mark.gpu
@each_kernel("cuda")
def test_no_host_synchronisation(op, impl):
    for case in FAMILIES[op].checked:
        tensors = {name: x.requires_grad_(name in case.differentiable)
                   for name, x in case.tensors("cuda").items()}  # fmt: skip
        leaves = [tensors[name] for name in case.differentiable]
        call = forward_backward(lambda given, case=case: case.run(given, impl), tensors, leaves)
        call()  # compiles before the watch begins
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_logits_than_32_bits_count():
    """Row offsets beyond 2^31 elements, forward and backward: the last rows must come out right."""
    rows, vocabulary = 2**31 // 128256 + 40, 128256
    student = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    student.requires_grad_()
    value = divergence(student, teacher)
    value.backward(torch.ones_like(value))
    last = student[-8:].detach().requires_grad_()
    twin = divergence_reference(last, teacher[-8:])
    twin.backward(torch.ones_like(twin))
    torch.testing.assert_close(value[-8:], twin)
    torch.testing.assert_close(student.grad[-8:], last.grad, rtol=1e-2, atol=1e-6)


# --- the battery itself can fail ---


@pytest.mark.parametrize(
    "case", [FAMILIES["divergence"].checked[2], FAMILIES["kd_loss"].checked[0]], ids=lambda c: c.op
)
def test_a_wrong_kernel_is_caught(monkeypatch, case):
    right, name = type(case).run, case.differentiable[0]
    for wrong in (
        lambda self, given, impl: right(self, given, impl) * (1 + 1e-5),
        lambda self, given, impl: right(self, given, impl).roll(1),
        lambda self, given, impl: right(self, given, impl) + 1e-5 * given[name].sum(dim=1),
    ):
        monkeypatch.setattr(type(case), "run", wrong)
        with pytest.raises(AssertionError, match="error .* over"):
            run_case(case, "reference")


def test_budget_of_one_number():
    """A twin whose errors cancel by luck does not ask the same luck of a kernel."""
    gold = torch.tensor(1.0, dtype=torch.float64)
    found = torch.tensor(1.0 + 1e-4)
    with pytest.raises(AssertionError, match="twin 0"):
        check_error("by luck", found, gold.float(), gold, 4)
    check_error("of its terms", found, gold.float(), gold, 4, least_twin_error=1e-4)
    with pytest.raises(AssertionError, match="error .* over"):
        check_error("of its terms", found, gold.float(), gold, 4, least_twin_error=1e-5)


def test_crossed_axes_meet_in_full():
    """A family with too many axes crosses those that it names, and no fewer."""
    family = FAMILIES["kd_loss"]
    met = {(case.kind, case.reduced) for case in family.every()}
    assert met == {(kind, reduced) for kind in family.axes["kind"]
                   for reduced in family.axes["reduced"]}  # fmt: skip
    sizes, makers = (
        {getattr(case, name) for case in family.every()} for name in ("sizes", "maker")
    )
    assert len(sizes) >= len(family.axes["sizes"]) and makers == set(family.axes["maker"])


def test_budget_looks_at_infinities():
    gold = torch.tensor([1.0, math.inf], dtype=torch.float64)
    check_error("fine", gold.float(), gold.float(), gold, 4)
    for spoilt in ([1.0, 5.0], [math.inf, math.inf], [1.0, math.nan], [1.1, math.inf]):
        with pytest.raises(AssertionError):
            check_error("spoilt", torch.tensor(spoilt), gold.float(), gold, 4)


def test_pairwise_meets_every_pair():
    axes = {"a": range(3), "b": range(4), "c": range(2), "d": range(5)}
    for seed in range(5):
        rows = pairwise(axes, seed)
        assert len(rows) < len(cross(axes)) / 3
        for one in axes:
            for two in axes:
                if one < two:
                    met = {(row[one], row[two]) for row in rows}
                    assert len(met) == len(axes[one]) * len(axes[two])


def test_cured_interpreter_rounds_as_torch():
    if not interpreted():
        pytest.skip("Triton kernels run on a device here")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32)
    x = bits.view(torch.float32)
    x = x[torch.isfinite(x)]
    for target, theirs in ((tl.bfloat16, torch.bfloat16), (tl.float16, torch.float16)):
        found = interpreter._convert_float(x.numpy(), tl.float32, target, None)
        wanted = x.to(theirs).view(torch.int16).numpy().view(np.uint16)
        assert (found == wanted).all()


def test_cured_interpreter_multiplies_bf16():
    if not interpreted():
        pytest.skip("Triton kernels run on a device here")
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        found = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
        tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty))

    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(32, 32, dtype=dtype)
        product[(1,)](a, b, out, N=32)
        torch.testing.assert_close(out, (a.float() @ b.float()).to(dtype))


def test_check_shapes_binds_letters():
    x = torch.empty(5, 131)
    assert check_shapes("op", a=(x, "T V"), b=(x[0], "V")) == {"T": 5, "V": 131}
    with pytest.raises(InputError, match=r"op: b is \(5, 131\), expected \(T, 5\)"):
        check_shapes("op", a=(x[:, 0], "T"), b=(x, "T 5"))
