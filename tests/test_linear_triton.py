"""linear's Triton kernels: their tiles, splits, experts, memory, and the table that chooses."""

import json
import re

import pytest
import torch
from small_linear import made

from slmperf import arch
from slmperf.ops import linear, quantize_input
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear import table
from slmperf.ops.linear.table import Call, Row
from slmperf.testing.budget import check_error
from slmperf.testing.interpreter import cure
from slmperf.testing.linear_cases import SCHEMES, linear_case

GPU = torch.cuda.is_available()
if not GPU:
    cure()
DEVICE = "cuda" if GPU else "cpu"

from slmperf.triton_kernels import common, linear_tiles  # noqa: E402
from slmperf.triton_kernels import quantize_input as quantize_input_kernel  # noqa: E402
from slmperf.triton_kernels.linear_tiles import Tile  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCHEME_OF = {
    ("linear_int4", False): "int4-64-zeros", ("linear_int8", True): "int8-token",
    ("linear_int8", False): "int8-weight", ("linear_fp8", True): "fp8-block",
    ("linear_fp8", False): "fp8-block-weight",
}  # fmt: skip


def tiles():
    """(scheme, tile) of every row of the GPUs' tables that has one, each once."""
    found = {}
    for capability in (80, 90):
        for row in table.read(f"sm_{capability}"):
            if row.config:
                rounded = row.op != "linear_int4" and row.rounded is not False
                scheme = SCHEME_OF[row.op, rounded]
                if row.blocks is False:
                    scheme = "fp8-token"
                found[scheme, Tile(**row.config)] = None
    return list(found)


@pytest.fixture
def chosen(monkeypatch):
    """Makes the kernels take a tile."""

    def choose(tile):
        monkeypatch.setattr(table, "tile", lambda call, capability: tile._asdict())

    return choose


def checked(case, impl="triton"):
    """The result of a case, held against fp64."""
    tensors = case.tensors(DEVICE)
    wide = {
        name: value if name in case.fixed else value.double() for name, value in tensors.items()
    }
    found = case.run(tensors, impl)
    check_error(str(case), found, case.run(tensors, "reference"), case.reference(wide), case.inputs)
    return found


@pytest.mark.parametrize("scheme,tile", tiles(), ids=lambda x: "-".join(map(str, x)) if isinstance(x, Tile) else x)  # fmt: skip  # noqa: E501
def test_every_tile_of_the_tables(scheme, tile, chosen):
    """Rows, outputs and inputs that end inside a tile, more tiles than one."""
    chosen(tile)
    checked(linear_case(scheme, tile.m + 3, (tile.n + 5, 200), added="both"))


@pytest.mark.parametrize("scheme", ["int4-32", "int8-token", "fp8-block", "fp8-weight"])
def test_splits_add_up_in_order(scheme, chosen, monkeypatch):
    """As many splits as there are programs for; the same bits again, for int8 as without splits."""
    case = linear_case(scheme, 3, (40, 1100), added="both", out=FP32)
    tensors = case.tensors(DEVICE)
    chosen(Tile(16, 32, 64, 1, 1))
    splits = {}
    for processors in (1, 8):
        monkeypatch.setattr(common, "machine", lambda x, n=processors: common.Machine(0, n))
        splits[processors] = checked(case)
        assert torch.equal(case.run(tensors, "triton"), splits[processors])
    plan = linear_tiles.plan(Tile(16, 32, 64, 1, 1), tensors["x"], 40, 0, FP32)
    assert plan.splits > 3 and plan.sums.shape == (plan.splits, 3, 40)
    if scheme == "int8-token":
        assert torch.equal(splits[1], splits[8])


@pytest.mark.parametrize("scheme", ["int4-128", "int8-static", "fp8-token", "fp8-block"])
def test_experts_take_their_own_rows(scheme, chosen):
    """Experts without rows, with one, with more than a tile; more tiles than programs."""
    chosen(Tile(16, 64, 64, 1, 1))
    case = linear_case(scheme, 40, (72, 256), added="bias", experts=5)
    tensors = case.tensors(DEVICE)
    edges = [0, 0, 1, 35, 35, 40]
    tensors["starts"] = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
    y, weight = case.run(tensors, "triton"), case.given(tensors)
    for expert in range(5):
        rows = slice(edges[expert], edges[expert + 1])
        single = made_of(weight, expert)
        alone = linear(tensors["x"][rows], single, tensors["bias"][expert], impl="triton")
        assert torch.equal(y[rows], alone)


def made_of(stacked, expert):
    """One expert's weight out of a stacked one."""
    own = {name: value[expert] for name, value in vars(stacked).items()
           if isinstance(value, torch.Tensor) and name != "input_scale"}  # fmt: skip
    return type(stacked)(**vars(stacked) | own)


@pytest.mark.parametrize("scheme", ["int4-32", "int8-token", "int8-weight", "fp8-block"])
def test_nothing_is_read_or_written_outside(scheme, monkeypatch):
    """Buffers of the launcher lie between sentinels; x and the weight lie between NaN and others'
    codes, which would show in the result."""
    case = linear_case(scheme, 19, (52, 384), added="both")
    tensors = case.tensors(DEVICE)
    wanted = case.run(tensors, "triton")
    x = tensors["x"].new_full((23, 391), torch.nan)
    x[2:21, 3:387] = tensors["x"]
    buffers = []
    new_empty = torch.Tensor.new_empty

    def guarded(self, *size, **kwargs):
        size = torch.Size(size if isinstance(size[0], int) else size[0])
        count = size.numel()
        whole = new_empty(self, (count + 64,), **kwargs)
        whole.view(torch.uint8).fill_(0x5A)
        buffers.append((whole, count))
        return whole[32 : 32 + count].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    y = case.run(tensors | {"x": x[2:21, 3:387]}, "triton")
    weight = case.given(tensors)
    begin, end = 128, 384
    name = "packed" if scheme.startswith("int4") else "data"
    other = vars(weight)[name].clone()
    if name == "data":
        other[:, :begin] = 1  # a slice of inputs must not see it
    sliced = type(weight)(**vars(weight) | {name: other}).slice_inputs(begin, end)
    part = linear(tensors["x"][:, begin:end], sliced, impl="triton")
    monkeypatch.undo()
    assert torch.equal(y, wanted)
    dense = linear(tensors["x"][:, begin:end].contiguous(), weight.slice_inputs(begin, end), impl="triton")  # fmt: skip  # noqa: E501
    assert torch.equal(part, dense)
    assert len(buffers) >= 2
    for whole, count in buffers:
        edges = torch.cat([whole[:32], whole[32 + count :]])
        assert (edges.view(torch.uint8) == 0x5A).all()


@pytest.mark.skipif(GPU, reason="an A100 as the interpreter has it")
def test_without_fp8_units_inputs_stay_as_they_are(monkeypatch):
    weight, _, _ = made("fp8-token", 48, 256)
    x = torch.randn(5, 256, dtype=BF16)
    given = quantize_input(x, weight.activations)
    monkeypatch.setattr(common, "machine", lambda x: common.Machine(80, 2))
    unit = torch.eye(256, dtype=FP16)
    dense = weight.codes.float() * weight.scale
    assert torch.equal(linear(unit, weight, impl="triton").T, dense.to(FP16))
    y = linear(x, weight, out_dtype=FP32, impl="triton")
    wide = x.double() @ dense.to(BF16).double().T
    check_error("bf16 x", y, wide.float(), wide, 256)
    with pytest.raises(NotImplementedError, match="fp8 inputs on a GPU without fp8 units"):
        linear(given, weight, out_dtype=FP32, impl="triton")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rounded_inputs_to_the_bit(dtype, monkeypatch):
    """Rows that registers hold and rows that they do not, of very large and very small numbers."""
    monkeypatch.setattr(quantize_input_kernel, "NUMBERS", 256)
    for width in (384, 200, 1):
        x = torch.randn(6, width + 3, device=DEVICE).to(dtype)[:, :width]
        x[1], x[2, -1], x[3] = 0, 60000.0, x[3] * 1e-7
        for kind in ("int", "float"):
            for strategy in ("token", "tensor", "group") if width == 384 else ("token", "tensor"):
                spec = ActivationSpec(kind, strategy)
                scale = torch.tensor(0.0431, device=DEVICE) if spec.static else None
                found = quantize_input(x, spec, scale, impl="triton")
                wanted = quantize_input(x, spec, scale, impl="reference")
                assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
                assert torch.equal(found.scale, wanted.scale), (spec, width)
    x[0] = torch.nan  # a token that cannot be told stays so
    assert quantize_input(x, ActivationSpec(), impl="triton").scale[0].isnan().all()


@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("int4")])
def test_dequantised_to_the_bit(name):
    for experts in (0, 2):
        case = linear_case(name, 1, (72, 208), experts=experts)
        weight = case.given(case.tensors(DEVICE))
        found = torch.ops.slmperf.dequantize_int4.triton(
            weight.packed, weight.scale, weight.zero_point, 72, weight.inputs, weight.group_size
        )
        assert torch.equal(found, weight.dequantized())


@pytest.mark.parametrize("scheme", ["fp8-token", "fp8-static", "fp8-block"])
@pytest.mark.parametrize("out", [None, FP32])
def test_torchs_own_fp8_product(scheme, out, monkeypatch):
    """`torch._scaled_mm` where it takes the call: one scale or one for each row and output."""
    calls = []
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(a) or product(*a, **k))
    if GPU and arch.cuda_capability() < (8, 9):
        pytest.skip("no fp8 units")
    for added in ("", "both"):
        checked(linear_case(scheme, 21, (48, 256), added=added, out=out), "torch")
    assert len(calls) == (0 if scheme == "fp8-block" else 2)
    checked(linear_case(scheme, 21, (50, 256), out=out), "torch")  # an odd size
    assert len(calls) == (0 if scheme == "fp8-block" else 2)


# --- the table ----------------------------------------------------------------------------------


def test_a_row_holds_for_what_it_says():
    call = Call("linear_fp8", 96, 512, 1024, BF16, rounded=True, experts=4)
    holds = [
        (Row("linear_fp8", "triton"), True),
        (Row("linear_int8", "triton"), False),
        (Row("linear_fp8", "triton", rows=24), True),  # 24 for each expert
        (Row("linear_fp8", "triton", rows=23), False),
        (Row("linear_fp8", "triton", weights=2**19), True),
        (Row("linear_fp8", "triton", weights=2**19 - 1), False),
        (Row("linear_fp8", "triton", multiple=512), True),
        (Row("linear_fp8", "triton", multiple=1024), False),
        (Row("linear_fp8", "triton", rounded=False), False),
        (Row("linear_fp8", "triton", blocks=False), True),
        (Row("linear_fp8", "triton", blocks=True), False),
        (Row("linear_fp8", "torch", grouped=False), False),
        (Row("linear_fp8", "triton", dtype="bfloat16"), True),
        (Row("linear_fp8", "triton", dtype="float32"), False),
    ]
    for row, wanted in holds:
        assert row.holds(call) == wanted, row


def calls():
    """Calls of every kind that a table tells apart."""
    for (op, rounded), scheme in SCHEME_OF.items():
        for rows in (1, 16, 64, 100, 700, 5000):
            for experts in (0, 8):
                for blocks in {False, scheme.startswith("fp8")}:
                    for dtype in (BF16, FP16, FP32):
                        yield Call(op, rows, 1664, 1040, dtype, rounded, blocks, experts)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_gpus_table_has_a_tile_for_every_call(capability):
    for call in calls():
        rows = table.on_gpu(call, capability)
        tile = next(row.config for row in rows if row.impl == "triton")
        assert call.dtype == FP32 or Tile(**tile).warps in (4, 8), call
        if call.experts:  # torch would copy `starts` to the host
            assert all(row.impl != "torch" for row in rows), call


def test_cpus_table_has_a_row_for_every_call():
    for isa in ("amx", "avx512", "avx2", "scalar", "none"):
        rows = [row for row in table.read("cpu") if row.isa == isa]
        for call in calls():
            first = next(row for row in rows if row.holds(call))
            assert first.impl in ("cpu", "torch", "reference") and not first.config


def test_an_unknown_gpu_takes_the_nearest_table(monkeypatch):
    nearest = {70: 80, 80: 80, 86: 80, 89: 80, 90: 90, 100: 90, 103: 90, 120: 80, 121: 80}
    assert {n: int(table.device_class(n)[3:]) for n in nearest} == nearest
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: (10, 0))
    assert table.described() == (
        "sm_90.toml, the nearest: there is none for sm_100; bench/tune.py makes one"
    )
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: (8, 0))
    assert table.described() == "sm_80.toml"
    monkeypatch.setattr(arch, "cuda_capability", lambda device=0: None)
    assert table.described() == f"cpu.toml, rows of {table.cpu_class()}"


# --- what they compile to -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(root):
    """The products' rows of bench/kernels.json; test_kernels_compile.py holds them to the code."""
    rows = json.loads((root / "bench" / "kernels.json").read_text())["rows"]
    return [row for row in rows if row["kernel"] == "_product" and "linear_" in row["source"]]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_tile_of_a_table_is_compiled(capability, recorded):
    """None spills; sm_80's take no more than a block of sm_89 has."""
    compiled = set()
    for row in recorded:
        if row["sm"] == f"sm_{capability}":
            assert row["spilled_bytes"] == 0, row["launch"]
            assert capability == 90 or row["shared_bytes"] <= 99 * 1024, row["launch"]
            numbers = dict(re.findall(r"(BLOCK_[MNK]|num_\w+)=(\d+)", row["launch"]))
            op = row["source"].removesuffix(".py")[-4:]
            compiled.add((op == "int4", *map(int, numbers.values())))
    for row in table.read(f"sm_{capability}"):
        if not row.config or (capability == 80 and row.op == "linear_fp8" and row.rounded):
            continue  # for sm_89, whose table this is, too
        tile = Tile(**row.config)
        wanted = (row.op == "linear_int4", tile.m, tile.n, tile.k, tile.stages, tile.warps)
        assert wanted in compiled, row


def test_products_reach_the_matrix_units(recorded):
    """QGMMA of fp8 codes, IGMMA and IMMA of int8's, HGMMA and HMMA where weights become bf16."""
    wanted = {
        ("sm_90", "fp8e4nv"): "QGMMA", ("sm_90", "i8"): "IGMMA", ("sm_80", "i8"): "IMMA",
        ("sm_90", "bf16"): "HGMMA", ("sm_80", "bf16"): "HMMA", ("sm_90", "fp16"): "HGMMA",
        ("sm_80", "fp16"): "HMMA",
    }  # fmt: skip
    seen = set()
    for row in recorded:
        kind = row["sm"], re.match(r"_product\(\*(\w+)", row["launch"])[1]
        if kind[1] != "fp32":
            assert wanted[kind] in row["matrix"], row
            seen.add(kind)
    assert seen == set(wanted)
