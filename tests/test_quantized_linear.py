"""QuantizedLinear and what it is made of: packed codes, rounded inputs, rounded keys and values."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import IDS
from small_quantized import SCHEMES, by_reference, quantized, rounded
from test_engine import ANSWERS, make_model, make_prompt, one_by_one
from torch import nn

from slmperf.check import InputError
from slmperf.engine import Engine
from slmperf.models import QuantizedLinear, parameters, weight_bytes
from slmperf.models.formats.packing import pack, unpack
from slmperf.models.kv_scales import CACHE, has_kv_scales, set_kv_scales
from slmperf.models.quantized import LinearScheme, held_weights
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import BITS, Fp8, Int4, Int8, WeightSpec

W8A8 = SCHEMES["w8a8"]


@torch.no_grad()
def logits(model: nn.Module, **arguments: object) -> torch.Tensor:
    return model(input_ids=IDS, **arguments).logits


# ---- packing


def codes_of(rows: int, count: int, bits: int, seed: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, count), generator=make, dtype=torch.int8)


def test_known_words() -> None:
    packed = pack(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8), 4)
    assert packed.dtype == torch.int32 and packed[0].tolist() == [0xFEA98710 - 2**32]
    # Codes 0, 1, ..., 7, 0, 1, 2 less 4 in three bits: the eleventh begins at bit 30.
    packed = pack((torch.arange(11, dtype=torch.int8) % 8 - 4)[None], 3)
    stream = sum((code % 8) << (3 * code) for code in range(11))
    assert [word % 2**32 for word in packed[0].tolist()] == [stream % 2**32, stream >> 32]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 4),
    count=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
def test_packing_is_compressed_tensors_own(bits: int, rows: int, count: int, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(rows, count, bits, seed)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, count), codes)
    across = helpers.pack_to_int32(codes, bits, packed_dim=0)
    assert torch.equal(pack(codes.T, bits).T, across)


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_back(bits: int) -> None:
    for rows, count in ((1, 1), (5, 33), (3, 64), (0, 8)):
        codes = codes_of(rows, count, bits, count)
        packed = pack(codes, bits)
        assert packed.shape == (rows, -(-count * bits // 32))
        assert torch.equal(unpack(packed, bits, count), codes)


def test_an_axis_of_one_word_may_have_any_stride() -> None:
    codes = codes_of(8, 5, 4, 0)  # zero points of 8 outputs and 5 groups, packed along outputs
    stored = pack(codes.T, 4).T
    assert stored.shape == (1, 5)
    assert torch.equal(unpack(stored.T, 4, 8).T, codes)


# ---- inputs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["int", "float"]),
    strategy=st.sampled_from(["token", "tensor", "group"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-6, 3),
    seed=st.integers(0, 10**6),
)
def test_inputs_are_rounded_as_compressed_tensors_does_it(
    kind: Any, strategy: Any, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    spec = ActivationSpec(kind, strategy)
    make = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 3, 256, generator=make) * 10.0**exponent).to(dtype)
    x[0, 1] = 0.0
    x[1, 2, 5] *= 30
    arguments = {"num_bits": 8, "type": kind, "strategy": strategy, "dynamic": not spec.static}
    if strategy == "group":
        arguments["group_size"] = 128
    wanted = QuantizationArgs(**arguments)
    scale, zero_point = torch.tensor([0.03], dtype=dtype), None
    if not spec.static:
        scale, zero_point = compute_dynamic_scales_and_zp(x, wanted, nn.Module())
    theirs = fake_quantize(x, scale, zero_point, wanted)
    ours = spec.fake_quantized(x, scale if spec.static else None)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_large_inputs_saturate() -> None:
    x, scale = torch.tensor([[1e4, -1e4, 0.26]]), torch.tensor([0.5])
    assert ActivationSpec("float", "tensor").fake_quantized(x, scale).tolist() == [
        [224, -224, 0.25]
    ]
    assert ActivationSpec("int", "tensor").fake_quantized(x, scale).tolist() == [[63.5, -64, 0.5]]


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="kind: wanted 'int' or 'float', found 'bf16'"):
        ActivationSpec("bf16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="strategy: wanted 'token'.* found 'channel'"):
        ActivationSpec("int", "channel")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input_scale: wanted one"):
        CACHE.fake_quantized(torch.ones(2))
    with pytest.raises(InputError, match="groups of 128 do not divide 100 inputs"):
        ActivationSpec("float", "group").fake_quantized(torch.ones(2, 100))


# ---- the layer


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_are_kept_as_they_were_given(name: str) -> None:
    scheme = SCHEMES[name]
    torch.manual_seed(0)
    dense = nn.Linear(128, 37)
    spec = scheme.weights
    scales = spec.scales(dense.weight)
    codes = spec.encode(dense.weight, scales)
    layer = rounded(dense, scheme)
    assert torch.equal(layer.codes.float(), codes.float()) and layer.codes.dtype == codes.dtype
    assert torch.equal(layer.scales.scale, scales.scale)
    assert (layer.scales.zero_point is None) == spec.symmetric
    if not spec.symmetric:
        assert torch.equal(layer.scales.zero_point, scales.zero_point)
    assert torch.equal(layer.dequantized(), spec.decode(codes, scales))
    assert torch.equal(layer.bias, dense.bias) and not layer.bias.requires_grad
    x = torch.randn(2, 5, 128)
    inputs = x
    if scheme.activations is not None:
        inputs = scheme.activations.fake_quantized(x, layer.input_scale)
    wanted = nn.functional.linear(inputs, layer.dequantized(), dense.bias)
    with by_reference():
        assert torch.equal(layer(x), wanted)
    # Kernels add up in another order.
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    # Of those without one the weight is put together once where it is held.
    with held_weights(layer):
        assert (layer._held is None) == (layer.kernel_weight is not None)
        if layer.kernel_weight is None:
            layer.weight_scale *= 2
            assert torch.equal(layer(x), wanted)
    if layer.kernel_weight is None:
        assert not torch.equal(layer(x), wanted)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_moves_and_changes_dtype_without_its_codes(name: str) -> None:
    torch.manual_seed(0)
    layer = rounded(nn.Linear(128, 24), SCHEMES[name])
    before = {key: value.clone() for key, value in layer.named_buffers()}
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.bias.dtype == torch.bfloat16
    assert half(torch.randn(2, 3, 128).bfloat16()).dtype == torch.bfloat16
    for key, value in half.named_buffers():
        assert value.dtype == before[key].dtype
        assert torch.equal(value.float(), before[key].float())
    empty = QuantizedLinear.empty(24, 128, layer.scheme, torch.float32, bias=True)
    moved = copy.deepcopy(layer).half().to("meta")
    for other in (empty, moved):
        assert all(value.is_meta for value in other.state_dict().values())
        shapes = {key: (value.shape, value.dtype) for key, value in other.named_buffers()}
        assert shapes == {key: (value.shape, value.dtype) for key, value in before.items()}
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 3, 128)
    assert torch.equal(empty(x), layer(x))


def test_it_owns_its_tensors() -> None:
    codes, scale = torch.ones(6, 8, dtype=torch.int8), torch.ones(1, 1)
    scheme = LinearScheme(WeightSpec(group_size=None), ActivationSpec("int", "tensor"))
    first, second = (
        QuantizedLinear(part, scale, scheme=scheme, input_scale=scale) for part in codes.chunk(2)
    )
    both = [*first.buffers(), *second.buffers()]
    assert len({buffer.untyped_storage().data_ptr() for buffer in both}) == len(both) == 6
    assert all(buffer.untyped_storage().nbytes() == buffer.nbytes for buffer in both)


def test_memory_is_that_of_the_file() -> None:
    model = small_models.llama(hidden_size=128, intermediate_size=256)
    dense, count = weight_bytes(model), parameters(model)
    linear = sum(
        layer.weight.nbytes for layer in model.model.layers.modules() if hasattr(layer, "bias")
    )
    quantized(model, LinearScheme(Int4(group_size=32)))
    # Four bits and a scale for every 32 weights, in place of 32 bits; and 16 bytes of shape.
    wanted = dense - linear + linear * (4 + 32 / 32) / 32 + 14 * 16
    assert weight_bytes(model) == wanted and parameters(model) == count


def test_wrong_tensors_are_refused() -> None:
    codes, scale = torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1)
    layer = QuantizedLinear(codes, scale, bias=torch.ones(3), scheme=LinearScheme(Int8()))
    assert torch.equal(layer(torch.ones(2, 4)), torch.full((2, 3), 5.0))

    def refused(message: str, *tensors: Any, scheme: Any = W8A8, **others: Any) -> None:
        with pytest.raises(InputError, match=message):
            QuantizedLinear(*tensors, scheme=scheme, **others)

    refused(r"codes are torch.int32 \(3, 4\), expected torch.int8 \(out, in\)", codes.int(), scale)
    refused(r"expected torch.float8_e4m3fn", codes, scale, scheme=LinearScheme(Fp8()))
    refused(r"scale is torch.float32 \(3,\), expected floating \(3, 1\)", codes, scale[:, 0])
    refused("zero_point: found some", codes, scale, codes[:, :1])
    asymmetric = LinearScheme(WeightSpec(symmetric=False))
    refused("zero_point: found none", codes, scale, scheme=asymmetric)
    refused(r"zero_point is torch.float32 \(3, 1\)", codes, scale, scale, scheme=asymmetric)
    refused("group_size 3 does not divide 4", codes, scale, scheme=LinearScheme(Int4(group_size=3)))
    refused("input_scale: found", codes, scale, input_scale=torch.ones(1))
    static = LinearScheme(Int8(), ActivationSpec("int", "tensor"))
    refused("input_scale: found none", codes, scale, scheme=static)
    refused(r"input_scale: found \(2,\)", codes, scale, scheme=static, input_scale=torch.ones(2))
    groups = LinearScheme(Int8(), ActivationSpec("int", "group"))
    refused("groups of 128 do not divide 4 inputs", codes, scale, scheme=groups)


# ---- keys and values


def test_keys_and_values_are_rounded_on_their_way_into_the_cache() -> None:
    model = quantized(small_models.llama(), W8A8)
    plain = logits(model)
    assert not any(map(has_kv_scales, model.modules()))
    for block in model.model.layers:
        set_kv_scales(block.self_attn, torch.tensor(0.01), torch.tensor([0.02]))
        set_kv_scales(block.self_attn, torch.tensor(0.02), torch.tensor([0.03]))  # the last counts
    whole = logits(model)
    assert 0 < (whole - plain).abs().max() < 0.2 * plain.abs().max()
    assert torch.equal(logits(model, use_cache=False), whole)
    first = model(input_ids=IDS[:, :7], use_cache=True)
    keys = first.past_key_values.layers[0].keys
    assert torch.equal(keys, CACHE.fake_quantized(keys, torch.tensor([0.02])))
    rest = model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    assert state["model.layers.1.self_attn.v_scale"].tolist() == [pytest.approx(0.03)]


def test_the_engine_keeps_rounded_keys_and_values() -> None:
    model = quantized(make_model("llama"), W8A8, kv_cache=True)
    prompt = make_prompt(np.random.default_rng(0), 20, [3, 4, 5])
    engine = Engine(model, ANSWERS)
    scores = engine.score(engine.open(prompt.prefix), prompt.candidates)
    np.testing.assert_allclose(scores, one_by_one(model, prompt), atol=1e-5)


def test_wrong_scales_of_the_cache_are_refused() -> None:
    attention = small_models.llama().model.layers[0].self_attn
    one = torch.ones(1)
    with pytest.raises(InputError, match=r"k_scale is torch.float32 \(2,\), expected one"):
        set_kv_scales(attention, torch.ones(2), one)
    with pytest.raises(InputError, match="wanted a v_scale above 0, found nan"):
        set_kv_scales(attention, one, one * float("nan"))
    assert not has_kv_scales(attention)
