"""Weights of linear: the packed layout, codes and scales there and back, slices, refusals."""

import pytest
import torch
from small_linear import made, quantised

from slmperf.check import InputError
from slmperf.ops import Fp8Weight, Int4Weight, Int8Weight, stack_experts
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.linear.int4_layout import pack_int4, packed_shape, slice_inputs, unpack_int4
from slmperf.ops.weight_spec import Scales, WeightSpec
from slmperf.testing.linear_cases import SCHEMES


def random_codes(*shape):
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


# --- the packed layout ---


@pytest.mark.parametrize("shape", [(16, 64), (1, 1), (48, 80), (33, 100), (160, 128), (3, 48, 80)])
def test_packing_loses_nothing(shape):
    codes = random_codes(*shape)
    packed = pack_int4(codes)
    assert packed.shape[-4:] == packed_shape(*shape[-2:]) and packed.is_contiguous()
    assert torch.equal(unpack_int4(packed, *shape[-2:]), codes)


def test_words_are_fragments_of_mma_m16n8k16():
    """Every nibble by the PTX ISA's table: a0..a7 of lane 4 g + t are at these rows and columns."""
    codes = random_codes(32, 128)
    packed = pack_int4(codes)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for word in range(4):
            bits = int(packed[1, 1, lane, word]) & 0xFFFFFFFF
            for i in range(8):  # the i-th value of the fragment, a pair in each register
                row = g + 8 * (i // 2 % 2)
                column = 2 * t + i % 2 + 8 * (i // 4)
                nibble = i // 2 + 4 * (i % 2)
                wanted = int(codes[16 + row, 64 + 16 * word + column]) + 8
                assert bits >> (4 * nibble) & 15 == wanted


def test_padding_is_zeros():
    packed = pack_int4(random_codes(17, 65))
    whole = unpack_int4(packed, 32, 128)
    assert not whole[17:].any() and not whole[:, 65:].any()


@pytest.mark.parametrize("begin,end", [(0, 64), (64, 208), (16, 208), (48, 112), (80, 96)])
def test_input_slices_of_the_layout(begin, end):
    codes = random_codes(48, 208)
    packed = pack_int4(codes)
    cut = slice_inputs(packed, begin, end)
    assert torch.equal(unpack_int4(cut, 48, end - begin), codes[:, begin:end])
    shared = cut.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert shared == (begin % 64 == 0)
    # what stands behind the slice does not count: kernels may read the whole last tile
    assert cut.shape[-3] == -(-(end - begin) // 64)


# --- codes and scales ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_come_back(name, dtype):
    weight, codes, scales = made(name, 272, 384, dtype)
    back = weight.scales
    assert torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(back.scale, scales.scale) and back.scale.dtype == dtype
    assert (back.zero_point is None) == (scales.zero_point is None)
    if scales.zero_point is not None:
        assert torch.equal(back.zero_point, scales.zero_point)
    spec = SCHEMES[name].spec
    assert weight.spec == spec or (weight.spec.group_size, spec.group_size) == (-1, -1)
    assert torch.equal(weight.dequantized(), spec.decode(codes, scales))
    again = type(weight)(**vars(weight))
    assert torch.equal(again.codes.view(torch.uint8), codes.view(torch.uint8))


def test_int4_takes_half_a_byte():
    weight, codes, _ = made("int4-128", 256, 1024)
    assert weight.packed.nbytes == codes.numel() // 2


@pytest.mark.parametrize("name", SCHEMES)
def test_slices_are_those_of_the_dequantised_weight(name):
    weight, _, _ = made(name, 272, 384)
    whole = weight.dequantized()
    rows = weight.slice_outputs(128, 272)
    assert torch.equal(rows.dequantized(), whole[128:])
    columns = weight.slice_inputs(128, 256)
    assert torch.equal(columns.dequantized(), whole[:, 128:256])
    both = rows.slice_inputs(256, 384)
    assert torch.equal(both.dequantized(), whole[128:, 256:])
    held = "packed" if isinstance(weight, Int4Weight) else "data"
    storage = getattr(weight, held).untyped_storage().data_ptr()
    assert getattr(both, held).untyped_storage().data_ptr() == storage, "it was copied"


def test_slices_between_tiles_move_words():
    weight, _, _ = made("int4-32", 64, 320)
    cut = weight.slice_inputs(32, 224)
    assert torch.equal(cut.dequantized(), weight.dequantized()[:, 32:224])


def test_slices_that_would_cut_are_refused():
    weight, _, _ = made("int4-128", 64, 384)
    with pytest.raises(InputError, match="outputs 8 to 64 of 64, wanted multiples of 16"):
        weight.slice_outputs(8, 64)
    with pytest.raises(InputError, match="inputs 64 to 384 of 384, wanted multiples of 128"):
        weight.slice_inputs(64, 384)
    blocks, _, _ = made("fp8-block", 272, 384)
    with pytest.raises(InputError, match="wanted multiples of 128"):
        blocks.slice_outputs(0, 64)
    for begin, end in ((-16, 16), (32, 32), (0, 400)):
        with pytest.raises(InputError, match="inputs"):
            weight.slice_inputs(begin, end)


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_are_stacked(name):
    weight, _, _ = made(name, 80, 256)
    both = stack_experts([weight, weight])
    assert both.dequantized().shape == (2, 80, 256)
    assert torch.equal(both.dequantized()[1], weight.dequantized())
    assert both.outputs == 80 and both.inputs == 256


def test_experts_that_differ_are_refused():
    one, other = made("int8-token", 80, 256)[0], made("int8-token", 64, 256)[0]
    with pytest.raises(InputError, match="weight 1 is another than the first"):
        stack_experts([one, other])
    static = ActivationSpec("int", "tensor")
    codes, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1)
    several = [Int8Weight.from_codes(codes, scale, static, torch.tensor(x)) for x in (1.0, 2.0)]
    with pytest.raises(InputError, match="one static input scale for all, found several"):
        stack_experts(several)


# --- what does not fit ---


def test_int4_refusals():
    codes, scales = quantised(WeightSpec("int", 4, True, 64), 32, 128)
    for group, message in (
        (48, "group_size is 48, wanted 32, 64, 128 or -1"),
        (128, r"scale is torch.bfloat16 \(32, 2\), wanted .* \(32, 1\)"),
    ):
        with pytest.raises(InputError, match=message):
            Int4Weight.from_codes(codes, scales, group)
    with pytest.raises(InputError, match="group_size 64 does not divide 96 inputs"):
        Int4Weight.from_codes(codes[:, :96].contiguous(), scales, 64)
    with pytest.raises(InputError, match="from -8 to 9 .32, 128., wanted -8 to 7"):
        Int4Weight.from_codes(torch.where(codes == 7, 9, codes), scales, 64)
    with pytest.raises(InputError, match="torch.int32 from -8 to 7 .32, 128., wanted torch.int8"):
        Int4Weight.from_codes(codes.int(), scales, 64)
    weight = Int4Weight.from_codes(codes, scales, 64)
    with pytest.raises(InputError, match=r"packed is torch.int32 \(2, 2, 32, 4\), wanted"):
        Int4Weight(weight.packed, weight.scale, None, 48, 128, 64)
    with pytest.raises(InputError, match="zero_point is torch.int32"):
        Int4Weight(weight.packed, weight.scale, torch.zeros(2, 32, dtype=torch.int32), 32, 128, 64)
    with pytest.raises(InputError, match=r"zero_point is \(32, 1\), wanted \(32, 2\)"):
        zero = torch.zeros(32, 1, dtype=torch.int8)
        Int4Weight.from_codes(codes, Scales(scales.scale, zero), 64)


@pytest.mark.parametrize("value", [300, 8, -9])
def test_zero_points_are_codes(value):
    """Outside of them the sums that make a weight exact would round."""
    codes, scales = quantised(WeightSpec("int", 4, False, 64), 32, 128)
    zeros = torch.full((32, 2), value, dtype=torch.int16)
    with pytest.raises(InputError, match=f"zero points are torch.int16 from {value} to {value}"):
        Int4Weight.from_codes(codes, Scales(scales.scale, zeros), 64)
    if -128 <= value < 128:
        with pytest.raises(InputError, match="wanted -8 to 7"):
            Int4Weight.from_codes(codes, Scales(scales.scale, zeros.to(torch.int8)), 64)


def test_refusals_of_all_weights():
    codes, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1)
    for make in (
        lambda codes, scale: Int4Weight.from_codes(codes, Scales(scale, None), -1),
        lambda codes, scale: Int8Weight.from_codes(codes, scale, None),
    ):
        with pytest.raises(InputError, match="scale is torch.float64 .*, wanted bfloat16"):
            make(codes, scale.double())
        with pytest.raises(InputError, match="scale is on meta, wanted the codes' cpu"):
            make(codes, scale.to("meta"))
        with pytest.raises(InputError, match=r"codes are torch.int8 \(16, 0\)"):
            make(codes[:, :0], scale)
    static = ActivationSpec("int", "tensor")
    with pytest.raises(InputError, match=r"input_scale: found \(3,\)"):
        Int8Weight.from_codes(codes, scale, static, torch.ones(3))
    with pytest.raises(InputError, match="at least one weight"):
        stack_experts([])


def test_eight_bit_refusals():
    codes, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1)
    with pytest.raises(InputError, match="torch.int16 from 300 to 300 .16, 64., wanted torch.int8"):
        Int8Weight.from_codes(codes.short() + 300, scale, None)
    with pytest.raises(InputError, match=r"scale is torch.float32 \(64, 1\), wanted .* \(16, 1\)"):
        Int8Weight.from_codes(codes, torch.ones(64, 1), None)
    with pytest.raises(InputError, match="wanted 'token' or 'tensor', found 'group'"):
        Int8Weight.from_codes(codes, scale, ActivationSpec("int", "group"))
    with pytest.raises(InputError, match="wanted kind 'int', found 'float'"):
        Int8Weight.from_codes(codes, scale, ActivationSpec("float"))
    with pytest.raises(InputError, match="input_scale: found none"):
        Int8Weight.from_codes(codes, scale, ActivationSpec("int", "tensor"))
    with pytest.raises(InputError, match="input_scale: found"):
        Int8Weight.from_codes(codes, scale, ActivationSpec("int"), torch.tensor(1.0))
    eights = codes.to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"wanted one of \(1, 1\), \(16, 1\), \(1, 1\)"):
        Fp8Weight.from_codes(eights, torch.ones(2, 1), None)
    with pytest.raises(InputError, match="groups of 128 do not divide 64 inputs"):
        Fp8Weight.from_codes(eights, scale, ActivationSpec("float", "group"))
    with pytest.raises(InputError, match="codes are torch.int8"):
        Fp8Weight.from_codes(codes, scale, None)
    with pytest.raises(InputError, match="inputs side by side"):
        Int8Weight(codes.T.contiguous().T, scale, None, None, torch.float32)
