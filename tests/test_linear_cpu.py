"""The C++ kernels of linear: instruction sets, threads, experts, memory around views, quotients."""

import os
import subprocess
import sys

import pytest
import torch
from small_linear import made

from slmperf.ops import linear, quantize_input, stack_experts
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.int4 import dequantize_int4
from slmperf.ops.routing import MISSING
from slmperf.testing.budget import check_error
from slmperf.testing.linear_cases import SCHEMES

if MISSING["native"]:
    pytest.skip(MISSING["native"], allow_module_level=True)

WEIGHT_ONLY = [name for name, scheme in SCHEMES.items() if scheme.activations is None]
SHAPES = [(48, 256), (72, 640), (40, 1408)]  # outputs, inputs; the last is more than a chunk of K


def gold(x, weight):
    """fp64 of what is multiplied: x or its codes, and the numbers that readers have."""
    dense = weight.dequantized()
    if weight.activations is None:
        return x.double() @ dense.to(x.dtype).double().T
    given = quantize_input(x, weight.activations, weight.input_scale, impl="reference")
    scale = given.scale.double().view(-1, 1) if given.scale.dim() == 1 else given.scale.double()
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(128, dim=1)
    scales = weight.spec.spread(weight.scale.double(), dense.shape)
    return (given.codes.double() * scale) @ (weight.codes.double() * scales).T


def check_products():
    """Every scheme, dtype and number of rows here; run once for each instruction set."""
    for name in SCHEMES:
        for number, (outputs, inputs) in enumerate(SHAPES):
            weight, _, _ = made(name, outputs, inputs)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for rows in (1, 2, 5, 37)[number:]:
                    x = torch.randn(rows, inputs).to(dtype)
                    wanted = gold(x, weight)
                    y = linear(x, weight, impl="cpu")
                    check_error(
                        f"{name} {outputs}x{inputs} {dtype} {rows}", y, wanted.to(dtype), wanted,
                        inputs,
                    )  # fmt: skip
    for name in WEIGHT_ONLY:
        weight, _, _ = made(name, 72, 640)
        dense = weight.dequantized()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            unit = torch.eye(640, dtype=dtype)[[0, 1, 31, 32, 63, 64, 127, 128, 500, 639]]
            for x in (unit, unit[3:4], unit[8:9]):
                y = linear(x, weight, out_dtype=torch.float32, impl="cpu")
                assert torch.equal(y, x.float() @ dense.to(dtype).float().T), (name, dtype)
        if name.startswith("int4"):
            given = (weight.packed, weight.scale, weight.zero_point, 72, 640, weight.group_size)
            assert torch.equal(dequantize_int4(*given), dense), name
    spec = ActivationSpec("float", "group")
    x = torch.randn(9, 384, dtype=torch.bfloat16)
    x[1], x[2, 5], x[3, 7], x[4, ::3] = 0, torch.nan, torch.inf, -0.0
    found, wanted = (quantize_input(x, spec, impl=impl) for impl in ("cpu", "reference"))
    assert torch.equal(found.scale.nan_to_num(-1), wanted.scale.nan_to_num(-1))
    assert torch.equal(found.codes.float().nan_to_num(-1), wanted.codes.float().nan_to_num(-1))


def test_products():
    torch.manual_seed(0)
    check_products()


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "scalar"])
def test_products_of_narrower_instruction_sets(isa):
    """In a process of its own: the set is chosen once."""
    code = (
        "import torch; torch.manual_seed(0); from test_linear_cpu import check_products as c; c()"
    )
    folder = os.path.dirname(__file__)
    more = {"SLMPERF_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCHEMES)
def test_no_bit_depends_on_the_number_of_threads(name):
    weight, _, _ = made(name, 1200, 512)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 3, 70):
            x = torch.randn(rows, 512, dtype=torch.bfloat16)
            found = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                found.append(linear(x, weight, impl="cpu"))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_are_products_of_their_own(name):
    weights = [made(name, 40, 256)[0] for _ in range(4)]
    bias, residual = torch.randn(4, 40), torch.randn(60, 40, dtype=torch.float16)
    x = torch.randn(60, 256, dtype=torch.bfloat16)
    edges = [0, 1, 1, 23, 60]  # one row, none, some, many
    y = linear(
        x, stack_experts(weights), bias, residual=residual, impl="cpu",
        starts=torch.tensor(edges, dtype=torch.int32), out_dtype=torch.float32,
    )  # fmt: skip
    for e, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        part = linear(
            x[begin:end], weights[e], bias[e], residual=residual[begin:end], impl="cpu",
            out_dtype=torch.float32,
        )  # fmt: skip
        assert torch.equal(y[begin:end], part)


@pytest.mark.parametrize("name", ["int4-32", "int8-token", "int8-weight", "fp8-token", "fp8-block"])
def test_nothing_is_read_beyond_a_view(name):
    """What lies around x, the added tensors and a slice of a weight are NaN, or codes far off."""
    whole, _, _ = made(name, 304, 768)
    weight = whole.slice_outputs(128, 256).slice_inputs(128, 640)
    for rows in (1, 20):
        around = torch.full((rows + 2, 700), torch.nan, dtype=torch.bfloat16)
        x = around[1:-1, 30 : 30 + 512]
        x.copy_(torch.randn(rows, 512))
        bias = torch.full((140,), torch.nan)[5:133].copy_(torch.randn(128))
        residual = torch.full((rows + 2, 160), torch.nan)[1:-1, 7:135]
        residual.copy_(torch.randn(rows, 128))
        y = linear(x, weight, bias, residual=residual, impl="cpu", out_dtype=torch.float32)
        wanted = gold(x.contiguous(), weight) + bias.double() + residual.double()
        check_error(name, y, wanted.float(), wanted, 512)


def test_quotients_are_those_of_a_division():
    """All mantissas of bf16 by all scales': the kernel multiplies by a reciprocal and mends it."""
    mantissas = 1 + torch.arange(128) / 128
    x = torch.cat([sign * mantissas * 2.0**power for sign in (1, -1) for power in range(-12, 7)])
    tops = (mantissas * 127.5).to(torch.bfloat16)  # a row's largest, which makes its scale
    rows = torch.cat([x.expand(128, -1).to(torch.bfloat16), tops[:, None]], dim=1)
    for kind in ("int", "float"):
        for factor in (1.0, 2.0**-20):
            spec, inputs = ActivationSpec(kind), rows * factor
            found, wanted = (
                quantize_input(inputs, spec, impl=impl) for impl in ("cpu", "reference")
            )
            assert torch.equal(found.scale, wanted.scale)
            assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))


def test_refusals():
    """Of the operators themselves, for callers who come straight to them."""
    ops = torch.ops.slmperf
    weight, _, _ = made("int4-64-zeros", 48, 256)
    x = torch.randn(3, 256)

    def int4(x=x, packed=weight.packed, scale=weight.scale, starts=None, group=64):
        zeros = weight.zero_point
        return ops.linear_int4.cpu(
            x, packed, scale, zeros, None, None, starts, 48, group, torch.float32
        )

    with pytest.raises(RuntimeError, match=r"packed is \(3, 4, 32, 4\), expected"):
        int4(x=x[:, :192])
    with pytest.raises(RuntimeError, match=r"scale is \(3, 48\), expected"):
        int4(scale=weight.scale[1:])
    with pytest.raises(RuntimeError, match="group_size is 48, expected 32, 64, 128 or -1"):
        int4(group=48)
    with pytest.raises(RuntimeError, match="packed has gaps within a row of tiles"):
        int4(packed=weight.packed.movedim(0, 1).contiguous().movedim(0, 1))
    with pytest.raises(RuntimeError, match="starts: found some, expected a stacked weight"):
        int4(starts=torch.tensor([0, 3], dtype=torch.int32))
    two = stack_experts([made("int8-token", 32, 64)[0]] * 2)
    for edges in ([0, 2, 1], [1, 2, 3], [0, 4, 4]):
        with pytest.raises(RuntimeError, match="starts do not go up from 0 to 3"):
            linear(
                torch.randn(3, 64), two, starts=torch.tensor(edges, dtype=torch.int32), impl="cpu"
            )
    codes = torch.zeros(3, 64, dtype=torch.int8)
    one = made("int8-token", 32, 64)[0]
    with pytest.raises(RuntimeError, match="found no x_scale, expected one of codes"):
        ops.linear_int8.cpu(codes, None, one.data, one.scale, None, None, None, 1, torch.float32)
    with pytest.raises(RuntimeError, match=r"scale is \(32, 2\), expected \(1, 1\) or \(N, 1\)"):
        scale = one.scale.expand(32, 2).contiguous()
        ops.linear_int8.cpu(x[:, :64], None, one.data, scale, None, None, None, 1, torch.float32)
