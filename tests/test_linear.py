"""linear: exactness, gradients, experts, rounded inputs and refusals, for every implementation."""

import pytest
import torch
from small_linear import made

from slmperf.check import InputError
from slmperf.ops import (
    Fp8Weight,
    Int8Weight,
    QuantizedInput,
    linear,
    quantize_input,
    stack_experts,
)
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.routing import interpreted, table
from slmperf.testing.budget import check_error
from slmperf.testing.interpreter import cure
from slmperf.testing.linear_cases import SCHEMES, has_units, linear_case

GPU = torch.cuda.is_available()
if not GPU:
    cure()
DEVICE = "cuda" if GPU else "cpu"
WEIGHT_ONLY = [name for name, scheme in SCHEMES.items() if scheme.activations is None]
ROUNDED = [name for name in SCHEMES if name not in WEIGHT_ONLY]


def implementations(name):
    """Those of a scheme's op that can run here, and the choice by table."""
    entries = table(f"linear_{name.split('-')[0]}").implementations
    return [
        impl
        for impl, entry in entries.items()
        if not entry.devices or DEVICE in entry.devices
        if impl != "triton" or GPU or interpreted()
    ] + ["auto"]


def each(schemes):
    pairs = [(name, impl) for name in schemes for impl in implementations(name)]
    return pytest.mark.parametrize("name,impl", pairs, ids=["-".join(pair) for pair in pairs])


@each(WEIGHT_ONLY)
def test_unit_vectors_give_the_dequantised_weight_to_the_bit(name, impl):
    """x a unit matrix: what is multiplied are the numbers that readers of the checkpoint have."""
    for dtype in (torch.bfloat16, torch.float16):
        weight, _, _ = made(name, 48, 256, dtype)
        unit = torch.eye(256, dtype=dtype)
        rows = torch.cat([unit[:5], unit[96:101], unit[-3:]])  # few rows, and many
        for x in (rows, unit[:70]):
            y = linear(x, weight, out_dtype=torch.float32, impl=impl)
            wanted = x.float() @ weight.dequantized().float().T
            assert torch.equal(y, wanted)


@each(ROUNDED)
def test_rounding_before_gives_the_same_bits(name, impl):
    if not has_units(SCHEMES[name].spec.kind, torch.device(DEVICE)):
        pytest.skip("no fp8 units: codes are refused")
    weight, _, _ = made(name, 80, 256)
    for rows in (3, 40):
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        x[1] *= 40
        given = quantize_input(x, weight.activations, weight.input_scale)
        y = linear(x, weight, impl=impl)
        assert torch.equal(linear(given, weight, out_dtype=torch.bfloat16, impl=impl), y)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    given = quantize_input(x, weight.activations, weight.input_scale)
    assert given.codes.shape == x.shape
    assert linear(given, weight, out_dtype=torch.float32, impl=impl).shape == (2, 3, 80)


@each(SCHEMES)
def test_a_row_of_nan_stays_alone(name, impl):
    weight, _, _ = made(name, 48, 256)
    for rows in (4, 24):
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        clean = linear(x, weight, impl=impl)
        x[2] = torch.nan
        y = linear(x, weight, impl=impl)
        others = [row for row in range(rows) if row != 2]
        assert torch.equal(y[others], clean[others])
        if name in WEIGHT_ONLY:
            assert y[2].isnan().all()


@each(["int4-32", "int4-128-zeros", "int8-token", "fp8-token", "fp8-block"])
def test_slices_multiply_as_they_are(name, impl):
    """A tensor-parallel rank's share of outputs or inputs, a view of the whole weight."""
    weight, _, _ = made(name, 272, 512, torch.float32)
    x, whole = torch.randn(5, 512), weight.dequantized().float()

    def check(part, of_weight, dense):
        rounded = part if weight.activations is None else weight.activations.fake_quantized(part)
        wanted = torch.nn.functional.linear(rounded.double(), dense.double())
        y = linear(part, of_weight, impl=impl)
        check_error(name, y, wanted.float(), wanted, dense.shape[1])

    check(x, weight.slice_outputs(128, 256), whole[128:256])
    check(x[:, 128:384], weight.slice_inputs(128, 384), whole[:, 128:384])


def test_odd_rows_apart_are_not_read_beyond():
    """What lies behind rows of a view is NaN; more rows than a tile."""
    weight, _, _ = made("int4-all", 48, 257)
    x = torch.full((72, 264), torch.nan, dtype=torch.bfloat16)[1:71, :257].normal_()
    wanted = linear(x.clone(), weight, impl="reference")
    for impl in implementations("int4-all"):
        y = linear(x, weight, impl=impl)
        check_error(impl, y, wanted, wanted.double(), 257)


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_pass_through(name):
    """x receives grad W, through rounding as if there were none; bias and residual theirs."""
    weight, _, _ = made(name, 48, 256, torch.float32)
    x, residual = (torch.randn(2, 3, n, requires_grad=True) for n in (256, 48))
    bias = torch.randn(48, requires_grad=True)
    y = linear(x, weight, bias, residual=residual)
    grad = torch.randn(2, 3, 48)
    found = torch.autograd.grad(y, (x, bias, residual), grad)
    torch.testing.assert_close(found[0], grad @ weight.dequantized().float())
    torch.testing.assert_close(found[1], grad.sum((0, 1)))
    assert torch.equal(found[2], grad)


@pytest.mark.parametrize("name", ["int4-64-zeros", "int8-token", "fp8-block"])
def test_one_graph_for_any_number_of_rows(name):
    weight, _, _ = made(name, 48, 256)
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(
        lambda x: linear(x, weight), fullgraph=True, dynamic=True, backend=counting
    )
    for rows in (5, 20, 300):  # torch takes sizes that are equal by chance for one
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), linear(x, weight))
    assert graphs == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_inputs_are_those_of_the_spec(dtype):
    x = torch.randn(37, 384).to(dtype)
    x[3], x[5, 7] = 0, torch.finfo(torch.float16).max
    for kind in ("int", "float"):
        for strategy in ("token", "tensor") if kind == "int" else ("token", "tensor", "group"):
            spec = ActivationSpec(kind, strategy)
            scale = torch.tensor(0.0431) if strategy == "tensor" else None
            codes, scales = spec.encode(x, scale)
            found = quantize_input(x, spec, scale)
            assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8)), spec
            if scale is None:
                assert torch.equal(found.scale, scales.float())
            view = torch.full((37, 400), torch.nan, dtype=dtype)[:, 3:387].copy_(x)
            again = quantize_input(view, spec, scale)
            assert torch.equal(again.codes.view(torch.uint8), codes.view(torch.uint8))


@each(["int8-static", "fp8-static"])
def test_a_static_scale_is_one_number(name, impl):
    """Inputs are divided and products multiplied by the same, also where x cannot hold it."""
    codes, scales = made(name, 48, 256, torch.float32)[1:]
    kind = Int8Weight if name.startswith("int8") else Fp8Weight
    activations, given = SCHEMES[name].activations, torch.tensor(0.0301234)
    weight = kind.from_codes(codes, scales.scale, activations, given)
    x = torch.randn(5, 256).bfloat16()
    y = linear(x, weight, out_dtype=torch.float32, impl=impl)
    wide = weight.dequantized().double()
    wanted = activations.fake_quantized(x, given).double() @ wide.T
    # What is left is how the spec rounds code times scale to bf16.
    assert (y - wanted).abs().max() < 3e-3 * wanted.abs().max()
    bias = ((y / wanted).median() - 1).abs()
    assert bias < 1e-3, f"all results are off by {bias:.2g}"
    codes, scale = quantize_input(x, activations, given)
    assert torch.equal(scale, given.bfloat16().float().view(1))


def test_the_backward_keeps_nothing_but_the_weight():
    weight, _, _ = made("int4-32", 48, 256)
    kept = []
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(64, 48, dtype=torch.bfloat16)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks:
        linear(x, weight, residual=residual)
    shapes = {tuple(one.shape) for one in kept}
    assert shapes == {tuple(weight.packed.shape), tuple(weight.scale.shape)}


def test_experts_have_no_gradient():
    case = linear_case("int4-32", 6, (48, 128), experts=2)
    tensors = case.tensors()
    tensors["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient where rows go with experts"):
        case.run(tensors, "auto").sum().backward()


def test_traced_with_any_number_of_rows():
    """A tracer that is no compiler: the graph keeps the choice by table."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weight, _, _ = made("int4-32", 48, 256)
    x = torch.randn(5, 256)
    trace = make_fx(
        lambda x: linear(x, weight), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )
    graph = trace(x)
    assert "linear_int4.auto" in graph.code
    more = torch.randn(70, 256)
    assert torch.equal(graph(more), linear(more, weight))


def test_rows_of_experts_that_are_none():
    case = linear_case("int4-32", 6, (48, 128), experts=2)
    for starts in ([0, 2, 5], [1, 2, 6], [0, 7, 6]):
        tensors = case.tensors() | {"starts": torch.tensor(starts, dtype=torch.int32)}
        for impl in ("reference", "torch", "cpu"):
            with pytest.raises((InputError, RuntimeError), match="starts"):
                case.run(tensors, impl)


def test_plain_weights():
    x, weight, bias = torch.randn(4, 3, 32), torch.randn(16, 32), torch.randn(16)
    wanted = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), wanted)
    assert torch.equal(linear(x, weight, bias, residual=wanted), 2 * wanted)
    assert linear(x, weight, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    halves = x.bfloat16(), weight.bfloat16()
    exact = torch.nn.functional.linear(halves[0].float(), halves[1].float())
    assert torch.equal(linear(*halves, out_dtype=torch.float32), exact)
    with pytest.raises(InputError, match=r"residual is \(16,\), wanted \(4, 3, 16\)"):
        linear(x, weight, residual=bias)
    with pytest.raises(NotImplementedError, match="there is: torch"):
        linear(x, weight, impl="cpu")
    with pytest.raises(InputError, match=r"weight is torch.float32 \(16, 32\), wanted"):
        linear(x[..., 1:], weight)
    with pytest.raises(InputError, match="wanted floating inputs of a plain weight"):
        linear(QuantizedInput(x, x), weight)


def test_refusals():
    int4, int8 = made("int4-32", 48, 128)[0], made("int8-token", 48, 128)[0]
    x = torch.randn(3, 128)
    for weight in (int4, int8):
        with pytest.raises(InputError, match=r"x is \(3, 127\), wanted \(..., 128\) for a weight"):
            linear(x[:, 1:], weight)
        with pytest.raises(InputError, match=r"bias is torch.float32 \(47,\), wanted .* \(48,\)"):
            linear(x, weight, torch.zeros(47))
        with pytest.raises(InputError, match=r"residual is torch.float32 \(3, 47\)"):
            linear(x, weight, residual=torch.zeros(3, 47))
        with pytest.raises(InputError, match="x is torch.int32, wanted floating"):
            linear(x.int(), weight)
        with pytest.raises(InputError, match="out_dtype is torch.int32, wanted bfloat16"):
            linear(x, weight, out_dtype=torch.int32)
        with pytest.raises(InputError, match="bias is torch.float64"):
            linear(x, weight, torch.zeros(48, dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="impl='fastest'"):
            linear(x, weight, impl="fastest")
        with pytest.raises(InputError, match="starts: found some"):
            linear(x, weight, starts=torch.tensor([0, 3], dtype=torch.int32))
        with pytest.raises(InputError, match="starts: found none"):
            linear(x, stack_experts([weight, weight]))
        for starts in (torch.tensor([0, 1, 3]), torch.tensor([0, 3], dtype=torch.int32)):
            with pytest.raises(InputError, match="starts is torch.int"):
                linear(x, stack_experts([weight, weight]), starts=starts)
        if not GPU:
            with pytest.raises(InputError, match="bias is on meta, wanted x's cpu"):
                linear(x, weight, torch.zeros(48, device="meta"))
    given = quantize_input(x, int8.activations)
    with pytest.raises(InputError, match="wanted floating inputs of a weight-only scheme"):
        linear(given, int4, out_dtype=torch.float32)
    with pytest.raises(InputError, match="out_dtype: wanted one"):
        linear(given, int8)
    with pytest.raises(InputError, match=r"x's scale is torch.float32 \(3,\), wanted .* \(3, 1\)"):
        linear(QuantizedInput(given.codes, given.scale[:, 0]), int8, out_dtype=torch.float32)
    fp8 = quantize_input(x, ActivationSpec("float"))
    with pytest.raises(InputError, match="x is torch.float8_e4m3fn, wanted torch.int8"):
        linear(fp8, int8, out_dtype=torch.float32)
    with pytest.raises(InputError, match="input_scale: found none"):
        quantize_input(x, ActivationSpec("int", "tensor"))
    with pytest.raises(InputError, match="groups of 128 do not divide 100 columns"):
        quantize_input(x[:, :100], ActivationSpec("float", "group"))
    with pytest.raises(NotImplementedError, match="x wants a gradient"):
        quantize_input(x.requires_grad_(), ActivationSpec())


def test_overflow_of_sums_is_far():
    """int32 holds the largest sum of products for any K that a model has."""
    inputs = 2**17 - 8
    weight = Int8Weight.from_codes(
        torch.full((1, inputs), -128, dtype=torch.int8), torch.ones(1, 1), ActivationSpec()
    )
    codes = torch.full((1, inputs), -128, dtype=torch.int8)
    for impl in implementations("int8-token"):
        if impl in ("triton", "reference"):  # fp32 products, and thousands of tiles
            continue
        y = linear(
            QuantizedInput(codes, torch.ones(1, 1)), weight, out_dtype=torch.float32, impl=impl
        )
        assert y.item() == inputs * 2**14


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [0, 3])
@each(SCHEMES)
def test_in_a_cuda_graph(name, impl, experts):
    """Captured once and replayed on other inputs; where experts begin stays on the device."""
    if impl in ("reference", "torch") and experts:
        pytest.skip("plain torch asks the host where experts begin")
    case = linear_case(name, 40, (80, 256), added="both", experts=experts, forward_only=True)
    tensors = case.tensors("cuda")
    case.run(tensors, impl)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run(tensors, impl)
    tensors["x"].normal_()
    graph.replay()
    assert torch.equal(y, case.run(tensors, impl))
