"""Layers over tensor-parallel ranks, flat configurations, and quantised layers as engines load
them: what both plug-ins stand on, without an engine."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slmperf.check import InputError
from slmperf.models.engines import flat, linear
from slmperf.models.engines.layout import over_ranks, place, possible_ranks, queries_of, spread
from slmperf.models.formats.compressed_tensors import StoredLinear, quantization_config
from slmperf.models.layer_sizes import FORMAT_VERSION, layer_sizes
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.head_map import HeadMap
from slmperf.ops.weight_spec import Fp8, Int4, Int8, WeightSpec

COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=12).map(lambda x: HeadMap(tuple(x)))


@settings(deadline=None, max_examples=200)
@given(COUNTS, st.integers(1, 16))
def test_every_rank_has_whole_groups_and_as_many_queries(heads: HeadMap, ranks: int) -> None:
    if ranks not in possible_ranks(heads):
        with pytest.raises(InputError, match=f"by {ranks} tensor-parallel ranks, wanted "):
            over_ranks(heads, ranks)
        return
    layout, maps = found = over_ranks(heads, ranks)
    assert len(maps) == ranks and len({one.query_heads for one in maps}) == 1
    assert found.group == max(max(one.counts) for one in maps)
    real = [head for head in layout.query_heads if head is not None]
    assert sorted(real) == list(range(heads.query_heads))
    assert sorted(layout.kv_heads) == list(range(heads.kv_heads))
    if heads.kv_heads % ranks:  # each head is repeated for several ranks
        assert layout.keeps(heads)
        return
    # Read back what each rank computes: every query stands in the group of its own key/value head.
    reads, queries, kv_heads = heads.reads, iter(layout.query_heads), iter(layout.kv_heads)
    for one in maps:
        for kv, count in zip(itertools.islice(kv_heads, one.kv_heads), one.counts, strict=True):
            for query in itertools.islice(queries, count):
                assert query is None or reads[query] == kv
    if heads.uniform:
        assert layout.keeps(heads)


@settings(deadline=None)
@given(COUNTS, st.integers(0, 3), st.integers(0, 3))
def test_spread_queries_stand_in_even_groups(heads: HeadMap, wider: int, more: int) -> None:
    group, kv_heads = max(heads.counts) + wider, heads.kv_heads + more
    taken, kept = spread(heads, group, kv_heads)
    assert len(taken) == group * kv_heads and len(kept) == heads.query_heads
    for query, place_ in enumerate(kept):
        assert taken[place_] == query and place_ // group == heads.reads[query]
    if heads.uniform and not wider and not more:
        assert taken == list(range(heads.query_heads))


def test_twelve_over_eight_on_four_ranks() -> None:
    heads = HeadMap((3, 1, 1, 1, 1, 1, 1, 3))
    found = over_ranks(heads, 4)
    assert [one.query_heads for one in found.ranks] == [4] * 4  # the best that whole groups allow
    assert found.layout.query_heads.count(None) == 4
    assert possible_ranks(heads) == [1, 2, 4, 8]
    with pytest.raises(InputError, match="wanted 1, 2, 4 or 8$"):
        over_ranks(heads, 3)
    assert possible_ranks(HeadMap((3, 3))) == [1, 2, 6]
    with pytest.raises(InputError, match="ranks is 0, wanted at least 1"):
        over_ranks(heads, 0)


@settings(deadline=None)
@given(COUNTS, st.integers(1, 8), st.integers(0, 3))
def test_ranks_together_have_all_heads(heads: HeadMap, ranks: int, more: int) -> None:
    if heads.kv_heads % ranks:
        return
    found = over_ranks(heads, ranks)
    layout, _ = found
    each = [found.of_rank(rank, heads.kv_heads // ranks + more) for rank in range(ranks)]
    queries = [query for one in each for query in one.real]
    assert queries == [query is not None for query in layout.query_heads]
    for one in each:
        assert len(one.taken) == found.group * (heads.kv_heads // ranks + more)
        assert [one.taken[place_] for place_ in one.kept] == list(range(one.heads.query_heads))


def test_placing_moves_whole_heads() -> None:
    heads = HeadMap((2, 1))
    weight = torch.arange(6.0)[:, None].expand(6, 3)  # heads of two rows
    moved = place(weight, [2, None, 0], 2)
    assert moved[:, 0].tolist() == [4, 5, 0, 0, 0, 1]
    assert [queries_of(heads, kv) for kv in (0, 1)] == [[0, 1], [2]]


FIELDS = {
    "model_type": "slmperf_pruned",
    "base_model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "head_dim": 16,
    "vocab_size": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "per_layer_config": {
        "0": {"head_map": [2, 2, 1, 1]},
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32},
        "2": {"head_map": [1, 1, 1, 3]},
    },
}


def test_flat_configuration_holds_every_layer() -> None:
    config = flat.FlatConfig.from_dict(FIELDS)
    assert (config.num_key_value_heads, config.num_attention_heads) == (4, 12)
    implied = flat.FlatConfig.from_dict({k: v for k, v in FIELDS.items() if k != "head_dim"})
    assert implied.head_dim == 64 // 6  # of the model's own heads, not of the 12
    assert config.num_attention_heads_per_layer == [8, 8, 12]
    assert config.intermediate_size == 48
    found = flat.flat_layer_sizes(config)
    assert found == layer_sizes(FIELDS)
    assert [one.heads.counts for one in found] == [(2, 2, 1, 1), (2, 2), (1, 1, 1, 3)]
    again = flat.FlatConfig.from_dict(config.to_dict())  # as another process gets it
    assert flat.flat_layer_sizes(again) == found


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format_version": FORMAT_VERSION + 1}, "format_version is 2, this slmperf reads 1"),
        ({"per_layer_config": {"3": {}}}, r"has layers \[3\], wanted some of 0 to 2"),
        ({"per_layer_config": None}, "layer 0: 6 query heads over 4 key/value heads, wanted"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', wanted a whole number"),
    ],
)
def test_wrong_configurations_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        layer_sizes(FIELDS | changes)
    assert "\n" not in str(caught.value)


class Parameter(nn.Parameter):
    """Stands for an engine's parameter: the data, and what it was told about its axes."""

    def __new__(cls, data: torch.Tensor, weight_loader: object, **places: int) -> "Parameter":
        made = super().__new__(cls, data, requires_grad=False)
        made.places = places
        return made


class Method(linear.QuantizedMethod):
    classes = SimpleNamespace(
        **{
            name: Parameter
            for name in (
                "PackedvLLMParameter",
                "PackedColumnParameter",
                "BasevLLMParameter",
                "ModelWeightParameter",
                "PerTensorScaleParameter",
                "BlockQuantScaleParameter",
                "ChannelQuantScaleParameter",
                "GroupQuantScaleParameter",
            )
        }
    )


SCHEMES = {
    "w4a16": LinearScheme(WeightSpec("int", 4, True, 32)),
    "w4a16-channel": LinearScheme(Int4(group_size=-1)),
    "w4a16-zeros": LinearScheme(WeightSpec("int", 4, False, 32)),
    "w4a16-channel-zeros": LinearScheme(Int4(group_size=-1, symmetric=False)),
    "w4a16-tensor": LinearScheme(Int4(group_size=None)),
    "w4a16-tensor-zeros": LinearScheme(Int4(group_size=None, symmetric=False)),
    "w8a16": LinearScheme(Int8()),
    "w8a8": LinearScheme(WeightSpec("int", 8, True, -1), ActivationSpec("int", "token")),
    "w8a8-zeros": LinearScheme(Int8(symmetric=False), ActivationSpec("int", "token")),
    "w4a8": LinearScheme(WeightSpec("int", 4, True, 32), ActivationSpec("int", "token")),
    "fp8": LinearScheme(Fp8(), ActivationSpec("float", "token")),
    "fp8-static": LinearScheme(Fp8(), ActivationSpec("float", "tensor")),
    "fp8-block": LinearScheme(Fp8(block=(16, 16)), ActivationSpec("float", "group")),
    "fp8-tensor": LinearScheme(Fp8(group_size=None), ActivationSpec("float", "token")),
}


def method(scheme: LinearScheme, packed: bool | None = None) -> Method:
    return Method(StoredLinear(scheme, scheme.packed if packed is None else packed), "here")


@pytest.mark.parametrize("name", [*SCHEMES, "w8a16 in bytes"])
def test_loaded_layers_compute_what_the_checkpoint_says(name: str) -> None:
    name, _, in_bytes = name.partition(" ")
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(0)
    parts, inputs = [48, 32, 16], 128

    def quantized(outputs: int) -> QuantizedLinear:
        weight = torch.randn(outputs, inputs, generator=generator)
        scales = scheme.weights.scales(weight)
        codes = scheme.weights.encode(weight, scales)
        static = scheme.activations is not None and scheme.activations.static
        input_scale = torch.tensor(0.01) if static else None
        return QuantizedLinear(
            codes, scales.scale, scales.zero_point, scheme=scheme, input_scale=input_scale
        )

    sources = [quantized(part) for part in parts]
    layer, own = nn.Module(), method(scheme, scheme.packed and not in_bytes)
    own.create_weights(layer, inputs, parts, inputs, sum(parts), torch.float32)
    assert layer.weight_block_size == scheme.weights.block  # for vLLM's loader
    for key, parameter in dict(layer.named_parameters()).items():
        tensors = ({"weight": source.codes} | source.state_dict() for source in sources)
        stored = [one[key] for one in tensors]
        if key == "weight_shape":
            assert parameter.shape == stored[0].shape
            continue
        # Whatever has an axis of outputs lies one after the other along it.
        joined = torch.cat(stored)
        assert parameter.shape == joined.shape and parameter.dtype == joined.dtype, key
        parameter.data.copy_(joined)
    own.process_weights_after_loading(layer)
    assert not dict(layer.named_parameters()), "the engine's tensors are still held"
    x, bias = torch.randn(5, inputs, generator=generator), torch.randn(sum(parts))
    wanted = torch.cat([source(x) for source in sources], dim=-1) + bias
    torch.testing.assert_close(own.apply(layer, x, bias), wanted)


@pytest.mark.parametrize(
    "scheme,inputs,outputs,message",
    [
        (SCHEMES["w4a16"], 48, [8], "48 inputs per rank, wanted whole groups of 32"),
        (SCHEMES["w4a16"], 64, [8, 6], None),
        (SCHEMES["w4a16-zeros"], 64, [8, 6], "wanted whole words of 8 zero points"),
        (SCHEMES["w4a16-channel"], 44, [8], "44 inputs per rank, wanted whole words of 8 codes"),
        (LinearScheme(WeightSpec("int", 3, True, 32)), 64, [8], "codes of 3 bits, wanted 2, 4"),
        (SCHEMES["fp8-block"], 120, [16], "120 inputs per rank, wanted whole groups of 16"),
        (SCHEMES["fp8-block"], 64, [16], "64 inputs per rank, of which 128 share a scale"),
        (SCHEMES["fp8-block"], 128, [16, 8], "8 outputs per rank, wanted whole blocks of 16"),
    ],
)
def test_what_the_product_refuses_the_rules_refuse(
    scheme: LinearScheme, inputs: int, outputs: list[int], message: str | None
) -> None:
    sizes = inputs, outputs, inputs, sum(outputs)
    if message is None:
        method(scheme).create_weights(nn.Module(), *sizes, torch.float32)
        return
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        method(scheme).create_weights(nn.Module(), *sizes, torch.float32)


def test_fused_layers_have_the_scheme_of_their_parts() -> None:
    names = [f"model.layers.0.self_attn.{one}_proj" for one in "qkvo"]
    fields = quantization_config(
        dict.fromkeys(names[:3], SCHEMES["w4a16"]) | {names[3]: SCHEMES["w8a8"]},
        linears=[*names, "lm_head"],
        kv_cache=False,
    )
    attention = "model.layers.0.self_attn"
    found = {
        one: linear.stored_linear(fields, f"{attention}.{one}") for one in ("qkv_proj", "o_proj")
    }
    assert found["qkv_proj"] == StoredLinear(SCHEMES["w4a16"], packed=True)
    assert found["o_proj"] == StoredLinear(SCHEMES["w8a8"], packed=False)
    assert linear.stored_linear(fields, "lm_head") is None
    fields["ignore"].append(names[1])
    with pytest.raises(InputError, match="qkv_proj: its parts are quantised in different ways"):
        linear.stored_linear(fields, f"{attention}.qkv_proj")
