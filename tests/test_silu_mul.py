"""slmperf.ops.silu_mul: Transformers' bits, codes to the bit, one tensor or two, bad arguments.

How near the kernels come to fp64, with gradients, is the battery's question (test_ops.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.quantize_input import quantize_input
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.silu_mul import silu_mul
from slmperf.testing.battery import run_case
from slmperf.testing.case import BF16, FP16, FP32
from slmperf.testing.glue_cases import ROUNDED, SiluMulCase
from slmperf.testing.interpreter import cure

GPU = torch.cuda.is_available()
if not GPU:
    cure()

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if GPU else "cpu"
IMPLS = ["triton", "cpu"]


def device_of(impl: str) -> str:
    return DEVICE if impl == "triton" else "cpu"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_reference_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    from transformers.activations import ACT2FN

    tensors = SiluMulCase(dtype, 17, 200, "outliers").tensors()
    wanted = ACT2FN["silu"](tensors["gate"]) * tensors["up"]
    assert torch.equal(silu_mul(**tensors, impl="reference"), wanted)
    both = torch.cat([tensors["gate"], tensors["up"]], dim=1)
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(silu_mul(both, impl="reference"), ACT2FN["silu"](gate) * up)


def check_codes(case: SiluMulCase, impl: str) -> None:
    """Codes and scales are those of the output, rounded in a step of its own."""
    tensors = case.tensors(device_of(impl))
    plain = silu_mul(**tensors, impl=impl)
    for name, spec in ROUNDED.items():
        if spec.strategy == "group" and case.width % 128:
            continue
        scale = torch.tensor([0.0234], device=device_of(impl)) if spec.static else None
        found = silu_mul(**tensors, activations=spec, input_scale=scale, impl=impl)
        wanted = quantize_input(plain, spec, scale, impl="reference")
        assert isinstance(found, QuantizedInput) and found.codes.dtype == wanted.codes.dtype
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape, name
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (name, str(case))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_codes_are_those_of_the_output(impl: str, dtype: torch.dtype) -> None:
    check_codes(SiluMulCase(dtype, 5, 384, "outliers", fused=True), impl)
    check_codes(SiluMulCase(dtype, 9, 77), impl)


def test_rows_too_wide_for_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from slmperf.triton_kernels import silu_mul as kernels

    monkeypatch.setattr(kernels, "MOST_COLUMNS", 300)
    check_codes(SiluMulCase(BF16, 4, 384, fused=True), "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_tensor_is_as_good_as_two(impl: str) -> None:
    """To the bit, with gradients; the two halves of a wider matrix, too."""
    tensors = SiluMulCase(BF16, 6, 100).tensors(device_of(impl))
    both = torch.cat([tensors["gate"], tensors["up"]], dim=1).requires_grad_()
    two = {name: one.requires_grad_() for name, one in tensors.items()}
    upstream = torch.randn(6, 100, device=both.device).to(BF16)
    wanted = silu_mul(**two, impl=impl)
    found = silu_mul(both, impl=impl)
    assert torch.equal(found, wanted)
    of_two = torch.cat(torch.autograd.grad(wanted, list(two.values()), upstream), dim=1)
    (of_both,) = torch.autograd.grad(found, both, upstream)
    assert torch.equal(of_both, of_two)
    wide = torch.full((6, 260), torch.nan, dtype=BF16, device=both.device)
    wide[:, 31:231] = both.detach()
    assert torch.equal(silu_mul(wide[:, 31:231], impl=impl), wanted)
    shaped = silu_mul(both.view(2, 3, 200), impl=impl)
    assert torch.equal(shaped, wanted.view(2, 3, 100))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_gates_and_nan_stay_to_themselves(impl: str) -> None:
    gate = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 200.0]] * 3, device=device_of(impl))
    up = torch.full_like(gate, 2.0)
    found = silu_mul(gate, up, impl=impl)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-6, atol=1e-30)
    spoilt = gate.clone()
    spoilt[1, 2] = torch.nan
    made = silu_mul(spoilt, up, impl=impl)
    assert made[1, 2].isnan() and made.isnan().sum() == 1
    codes, scale = silu_mul(spoilt, up, activations=ActivationSpec("int"), impl=impl)
    wanted = silu_mul(gate, up, activations=ActivationSpec("int"), impl=impl)
    assert torch.equal(codes[[0, 2]], wanted.codes[[0, 2]]) and scale[1].isnan().all()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    tensors = SiluMulCase(BF16, 700, 512, fused=True).tensors()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(silu_mul(**tensors, activations=ActivationSpec("float", "group")))
    torch.set_num_threads(1)
    for codes, scale in found[1:]:
        assert torch.equal(codes.view(torch.uint8), found[0].codes.view(torch.uint8))
        assert torch.equal(scale, found[0].scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_in_a_compiled_graph(impl: str) -> None:
    torch.compiler.reset()
    tensors = SiluMulCase(BF16, 6, 128, fused=True).tensors(device_of(impl))

    def run(given: dict[str, torch.Tensor]) -> Any:
        return silu_mul(**given, activations=ROUNDED["fp8-token"], impl=impl)

    wanted = run(tensors)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(found.scale, wanted.scale)


def test_what_does_not_fit_is_refused() -> None:
    gate = torch.randn(4, 96)
    with pytest.raises(InputError, match=r"up is \(4, 95\), wanted gate's \(4, 96\)"):
        silu_mul(gate, gate[:, :95])
    with pytest.raises(InputError, match=r"gate is \(4, 95\), wanted \(..., 2 F\)"):
        silu_mul(gate[:, :95])
    with pytest.raises(InputError, match=r"gate is \(4, 0\), wanted F of 1 or more"):
        silu_mul(gate[:, :0])
    with pytest.raises(InputError, match="up is torch.bfloat16 on cpu, wanted gate's"):
        silu_mul(gate, gate.to(BF16))
    with pytest.raises(InputError, match="groups of 128 do not divide 48 columns"):
        silu_mul(gate, activations=ActivationSpec("float", "group"))
    with pytest.raises(InputError, match=r"input_scale is \(2,\) on cpu, wanted one number"):
        silu_mul(gate, activations=ActivationSpec("int", "tensor"), input_scale=torch.ones(2))
    with pytest.raises(NotImplementedError, match="float64"):
        silu_mul(gate.double())
    with pytest.raises(NotImplementedError, match="gate wants a gradient"):
        silu_mul(gate.clone().requires_grad_(), activations=ActivationSpec("int"))


def test_the_judge_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from slmperf.testing import glue_cases

    def wrong(gate: torch.Tensor, up: torch.Tensor, *, impl: str, **more: Any) -> torch.Tensor:
        if impl == "cpu":
            gate = 1.01 * gate
        return silu_mul(gate, up, impl=impl)

    monkeypatch.setattr(glue_cases, "silu_mul", wrong)
    with pytest.raises(AssertionError, match="over"):
        run_case(SiluMulCase(FP32, 9, 64), "cpu")


@pytest.mark.gpu
def test_on_a_device() -> None:
    """Nothing waits for the device, and a CUDA graph holds the call."""
    case = SiluMulCase(BF16, 3000, 14336, "outliers", fused=True)
    check_codes(case, "triton")
    tensors = case.tensors("cuda")
    wanted = silu_mul(**tensors, activations=ActivationSpec("float"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = silu_mul(**tensors, activations=ActivationSpec("float"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
