"""slmperf.ops.rms_norm: Transformers' bits, codes to the bit, rows on their own, bad arguments.

How near the kernels come to fp64, with gradients, is the battery's question (test_ops.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.quantize_input import quantize_input
from slmperf.ops.linear.weights import QuantizedInput
from slmperf.ops.rms_norm import RMSNorm, rms_norm
from slmperf.testing.battery import run_case
from slmperf.testing.case import BF16, FP16, FP32
from slmperf.testing.glue_cases import EPS, ROUNDED, RMSNormCase
from slmperf.testing.interpreter import cure

GPU = torch.cuda.is_available()
if not GPU:
    cure()

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if GPU else "cpu"
IMPLS = ["triton", "cpu"]


def device_of(impl: str) -> str:
    return DEVICE if impl == "triton" else "cpu"


def call(case: RMSNormCase, tensors: dict[str, torch.Tensor], impl: str, **more: Any) -> RMSNorm:
    return rms_norm(**tensors, eps=EPS, offset=case.offset, impl=impl, **more)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_reference_has_the_bits_of_transformers(dtype: torch.dtype, offset: float) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    case = RMSNormCase(dtype, 33, 192, "outliers", residual=True, offset=offset)
    tensors = case.tensors()
    norm = (Gemma3RMSNorm if offset else LlamaRMSNorm)(192, eps=EPS)
    norm.weight = torch.nn.Parameter(tensors["weight"])
    found = call(case, tensors, "reference")
    h = tensors["x"] + tensors["residual"]
    assert torch.equal(found.residual, h)
    assert torch.equal(found.output, norm(h))
    alone = rms_norm(tensors["x"], tensors["weight"], eps=EPS, offset=offset, impl="reference")
    assert alone.residual is None and torch.equal(alone.output, norm(tensors["x"]))


def check_codes(case: RMSNormCase, impl: str) -> None:
    """Codes and scales are those of the output, rounded in a step of its own."""
    tensors = case.tensors(device_of(impl))
    plain = call(case, tensors, impl)
    for name, spec in ROUNDED.items():
        if spec.strategy == "group" and case.width % 128:
            continue
        scale = torch.tensor([0.0234], device=device_of(impl)) if spec.static else None
        found = call(case, tensors, impl, activations=spec, input_scale=scale)
        wanted = quantize_input(plain.output, spec, scale, impl="reference")
        assert isinstance(found.output, QuantizedInput)
        assert found.output.codes.dtype == wanted.codes.dtype
        for one, other in zip(found.output, wanted, strict=True):
            assert one.shape == other.shape, name
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (name, str(case))
        if case.residual:
            assert torch.equal(found.residual, plain.residual)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_codes_are_those_of_the_output(impl: str, dtype: torch.dtype) -> None:
    check_codes(RMSNormCase(dtype, 9, 256, "outliers", residual=True), impl)
    check_codes(RMSNormCase(dtype, 5, 131, offset=1.0), impl)


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_codes_on_narrower_processors(isa: str) -> None:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.test_rms_norm import check_codes\n"
        "from slmperf.testing.glue_cases import RMSNormCase\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    check_codes(RMSNormCase(dtype, 9, 256, 'outliers', residual=True), 'cpu')\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"SLMPERF_CPU_ISA": isa, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_nan_and_infinity_stay_to_themselves(impl: str) -> None:
    case = RMSNormCase(BF16, 9, 384, residual=True)
    tensors = case.tensors(device_of(impl))
    spoilt = {name: one.clone() for name, one in tensors.items()}
    spoilt["x"][1], spoilt["residual"][1] = 0.0, 0.0
    spoilt["x"][4, 17] = torch.nan
    spoilt["residual"][6, 380] = torch.inf
    good = [0, 2, 3, 5, 7, 8]
    for name in (None, "int8-token", "fp8-group"):
        spec = ROUNDED[name] if name else None
        wanted = call(case, tensors, impl, activations=spec)
        found = call(case, spoilt, impl, activations=spec)
        pairs = [(found.residual, wanted.residual)]
        pairs += (
            [(found.output, wanted.output)] if spec is None
            else list(zip(found.output, wanted.output, strict=True))
        )  # fmt: skip
        for one, other in pairs:
            assert torch.equal(one[good].view(torch.uint8), other[good].view(torch.uint8))
        if spec is None:
            assert not found.output[1].any() and found.output[4].isnan().all()
        else:
            codes, scale = found.output
            assert not codes[1].float().any() and (scale[1] == torch.finfo(BF16).eps).all()
            assert scale[4].isnan().any() and scale[6].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_through_the_residual_alone(impl: str) -> None:
    case = RMSNormCase(FP32, 5, 64, residual=True)
    tensors = {k: x.requires_grad_() for k, x in case.tensors(device_of(impl)).items()}
    found = call(case, tensors, impl)
    assert found.residual is not None
    (3 * found.residual).sum().backward()
    for name in ("x", "residual"):
        assert torch.equal(tensors[name].grad, torch.full_like(tensors[name], 3.0))
    assert tensors["weight"].grad is None or not tensors["weight"].grad.any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    case = RMSNormCase(BF16, 700, 512, residual=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors = {k: x.requires_grad_() for k, x in case.tensors().items()}
        made = call(case, tensors, "cpu")
        gradients = torch.autograd.grad(made.output.float().pow(2).sum(), list(tensors.values()))
        codes = call(case, case.tensors(), "cpu", activations=ActivationSpec("int")).output
        found.append([made.output, *gradients, *codes])
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_shapes_of_more_dimensions_and_none() -> None:
    x = torch.randn(2, 3, 5, 48, dtype=BF16)
    weight = torch.randn(48, dtype=BF16)
    wanted = rms_norm(x.reshape(-1, 48), weight, eps=EPS).output
    found = rms_norm(x.transpose(1, 2), weight, eps=EPS, residual=torch.zeros_like(x.mT.mT.mT.mT)
                     .transpose(1, 2))  # fmt: skip
    assert found.output.shape == found.residual.shape == (2, 5, 3, 48)
    assert torch.equal(found.output.transpose(1, 2).reshape(-1, 48), wanted)
    codes = rms_norm(x, weight, eps=EPS, activations=ActivationSpec("float")).output
    assert codes.codes.shape == x.shape and codes.scale.shape == (2, 3, 5, 1)
    for impl in ("cpu", "triton", "reference"):
        none = rms_norm(x[:0], weight, eps=EPS, activations=ActivationSpec("int"), impl=impl)
        assert none.output.codes.shape == (0, 3, 5, 48) and none.output.scale.shape == (0, 3, 5, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_in_a_compiled_graph(impl: str) -> None:
    torch.compiler.reset()
    case = RMSNormCase(BF16, 6, 256, residual=True)
    tensors = case.tensors(device_of(impl))

    def run(given: dict[str, torch.Tensor]) -> RMSNorm:
        return call(case, given, impl, activations=ROUNDED["int8-group"])

    wanted = run(tensors)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors)
    assert torch.equal(found.output.codes, wanted.output.codes)
    assert torch.equal(found.output.scale, wanted.output.scale)
    assert torch.equal(found.residual, wanted.residual)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(4, 96), torch.randn(96)
    with pytest.raises(InputError, match=r"rms_norm: weight is \(95,\), expected \(96,\)"):
        rms_norm(x, weight[:95], eps=EPS)
    with pytest.raises(InputError, match=r"residual is \(3, 96\), wanted x's \(4, 96\)"):
        rms_norm(x, weight, eps=EPS, residual=x[:3])
    with pytest.raises(InputError, match="weight is torch.bfloat16 on cpu, wanted x's"):
        rms_norm(x, weight.to(BF16), eps=EPS)
    with pytest.raises(InputError, match="eps is nan"):
        rms_norm(x, weight, eps=float("nan"))
    with pytest.raises(InputError, match=r"x is \(4, 0\)"):
        rms_norm(x[:, :0], weight[:0], eps=EPS)
    with pytest.raises(InputError, match="groups of 128 do not divide 96 columns"):
        rms_norm(x, weight, eps=EPS, activations=ActivationSpec("int", "group"))
    with pytest.raises(InputError, match="input_scale: found none with ActivationSpec"):
        rms_norm(x, weight, eps=EPS, activations=ActivationSpec("int", "tensor"))
    with pytest.raises(InputError, match="input_scale: found one with None"):
        rms_norm(x, weight, eps=EPS, input_scale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="float64"):
        rms_norm(x.double(), weight.double(), eps=EPS)
    with pytest.raises(NotImplementedError, match="weight wants a gradient"):
        rms_norm(x, weight.clone().requires_grad_(), eps=EPS, activations=ActivationSpec("int"))
    with pytest.raises(NotImplementedError, match="rows of 32768 at most"):
        wide = torch.randn(1, 32769)
        rms_norm(wide, wide[0], eps=EPS, impl="triton")
    twice = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(
        rms_norm(twice, weight, eps=EPS).output.sum(), twice, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        once.sum().backward()


@pytest.mark.parametrize("change", [{"offset": 0.5}, {"eps": 1e-2}])
def test_the_judge_can_fail(monkeypatch: pytest.MonkeyPatch, change: dict[str, float]) -> None:
    from slmperf.testing import glue_cases

    def wrong(*given: Any, **settings: Any) -> RMSNorm:
        return rms_norm(*given, **settings | (change if settings["impl"] == "cpu" else {}))

    monkeypatch.setattr(glue_cases, "rms_norm", wrong)
    with pytest.raises(AssertionError, match="over"):
        run_case(RMSNormCase(BF16, 9, 64, "small"), "cpu")


@pytest.mark.gpu
def test_on_a_device() -> None:
    """Nothing waits for the device, and a CUDA graph holds the call."""
    case = RMSNormCase(BF16, 3000, 4096, "outliers", residual=True)
    check_codes(case, "triton")
    tensors = case.tensors("cuda")
    wanted = call(case, tensors, "auto", activations=ActivationSpec("float"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(case, tensors, "auto", activations=ActivationSpec("float"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for one, other in zip(found.output, wanted.output, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
