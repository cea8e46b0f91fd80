"""A checkpoint's tensors on their way into an engine, and what the engine has to build for them."""

from __future__ import annotations

import pytest
import torch
import transformers
from small_quantized import SCHEMES, rounded
from torch import Tensor, nn
from transformers import PretrainedConfig

from slmperf.check import InputError
from slmperf.models.engines.decoder import decoder_of
from slmperf.models.engines.facts import ENGINES
from slmperf.models.engines.flat import FlatConfig
from slmperf.models.engines.labels import NEVER, LabelHead
from slmperf.models.engines.layout import RankLayout, over_ranks, place
from slmperf.models.engines.support import check_served
from slmperf.models.engines.weights import placed, sources
from slmperf.models.layer_sizes import LayerSizes
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.ops.head_map import HeadMap
from slmperf.ops.weight_spec import Fp8

HEADS = HeadMap((3, 1, 1, 1, 1, 1, 1, 3))  # on 2 or 4 ranks moved, on 4 with heads of zeros
WIDTH, SIZE, NEURONS = 16, 8, 12  # D, C, F
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def linears() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    queries, keys = HEADS.query_heads * SIZE, HEADS.kv_heads * SIZE
    shapes = [(WIDTH, queries), (WIDTH, keys), (WIDTH, keys), (queries, WIDTH)]
    return {
        name: nn.Linear(*shape, bias=name != "o_proj")
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def as_placed(layers: dict[str, nn.Module], ranks: int) -> tuple[dict[str, Tensor], RankLayout]:
    """The layers' tensors as the engine's loader gets them, by "projection.kind"."""
    layout, prefix = over_ranks(HEADS, ranks), "model.layers.0.self_attn."
    stored = (
        (f"{prefix}{name}.{kind}", tensor)
        for name, layer in layers.items()
        for kind, tensor in layer.state_dict().items()
    )
    sizes = [LayerSizes(NEURONS, HEADS)]
    found = dict(placed(stored, sizes, [layout], hidden_size=WIDTH, head_size=SIZE))
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}, layout


def attended(query: Tensor, key: Tensor, value: Tensor, heads: HeadMap) -> Tensor:
    """(T, H, C), (T, G, C) twice -> (T, H, C), causal."""
    reads = torch.tensor(heads.reads)
    inputs = (x.movedim(1, 0) for x in (query, key[:, reads], value[:, reads]))
    return nn.functional.scaled_dot_product_attention(*inputs, is_causal=True).movedim(0, 1)


def by_heads(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.linear(hidden, weight, bias).unflatten(-1, (-1, SIZE))


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_together_compute_the_layer(ranks: int) -> None:
    """Each rank with its slice of neighbouring heads, its heads of zeros without an output."""
    layers, hidden = linears(), torch.randn(5, WIDTH)
    inputs = (by_heads(hidden, layers[n].weight, layers[n].bias) for n in NAMES[:3])
    wanted = layers["o_proj"](attended(*inputs, HEADS).flatten(1))

    tensors, layout = as_placed(layers, ranks)
    total = torch.zeros(5, WIDTH)
    for rank, heads in enumerate(layout.ranks):

        def share(name: str, rank: int = rank, dim: int = 0) -> Tensor:
            return tensors[name].chunk(ranks, dim)[rank]

        inputs = (by_heads(hidden, share(f"{n}.weight"), share(f"{n}.bias")) for n in NAMES[:3])
        output = attended(*inputs, heads)
        count = heads.query_heads
        own = layout.layout.query_heads[rank * count : (rank + 1) * count]
        output[:, [head is None for head in own]] = 0
        total += output.flatten(1) @ share("o_proj.weight", dim=1).T
    torch.testing.assert_close(total, wanted)


# Scales of groups of 8: a head's inputs are one.
@pytest.mark.parametrize(
    "scheme",
    ["w8a8", "fp8", "fp8-static", "w8a16", "w4a16", "w4a16-channel", "w4a16-asymmetric"],
)
def test_quantised_heads_are_moved_whole(scheme: str) -> None:
    plain = linears()
    layers = {name: rounded(layer, SCHEMES[scheme]) for name, layer in plain.items()}
    tensors, layout = as_placed(layers, 4)
    for name, layer in layers.items():
        kinds = {k: tensors[f"{name}.{k}"] for k in layer.state_dict()}
        heads = layout.layout[name in ("q_proj", "o_proj")]
        dim = int(name == "o_proj")
        shape = [*plain[name].weight.shape]
        shape[dim] = len(heads) * SIZE
        moved = QuantizedLinear.empty(
            *shape, layer.scheme, torch.float32, bias=layer.bias is not None
        )
        if "weight_shape" in kinds:
            kinds["weight_shape"] = torch.tensor(shape)
        moved.load_state_dict(kinds, assign=True)  # the shapes are those of such a layer
        wanted = place(layer.dequantized().movedim(dim, 0), heads, SIZE).movedim(0, dim)
        real = torch.tensor([h is not None for h in heads]).repeat_interleave(SIZE)
        index = real.nonzero()[:, 0]
        found = moved.dequantized()
        assert torch.equal(found.index_select(dim, index), wanted.index_select(dim, index))
        assert found.isfinite().all()


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    name, layouts = "model.layers.1.input_layernorm.weight", [over_ranks(HEADS, 1)]
    stored = [(name, torch.ones(WIDTH))]
    with pytest.raises(InputError, match=f"{name}: wanted layers 0 to 0"):
        list(
            placed(stored, [LayerSizes(NEURONS, HEADS)], layouts, hidden_size=WIDTH, head_size=SIZE)
        )


def test_scales_of_several_heads_are_refused() -> None:
    layers = {name: rounded(layer, SCHEMES["w8a8"]) for name, layer in linears().items()}
    blocks = Fp8(block=(2 * SIZE, WIDTH))  # two heads to a block
    layers["q_proj"] = rounded(linears()["q_proj"], LinearScheme(blocks))
    as_placed(layers, 1)  # nothing moves
    wanted = "q_proj.weight_scale has 6 rows for 12 heads, .* one by one; wanted .*slmperf export"
    with pytest.raises(InputError, match=wanted):
        as_placed(layers, 4)
    # Two heads of 2 bits in a word.
    layers = {name: rounded(layer, SCHEMES["w2a16"]) for name, layer in linears().items()}
    with pytest.raises(InputError, match="o_proj.weight_packed has 6 columns for 12 heads"):
        as_placed(layers, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_layer_is_refused(name: str) -> None:
    layers = linears()
    layers[name] = nn.Linear(24, 24)
    with pytest.raises(InputError, match=rf"0\.self_attn\.{name}\.weight is \(24, 24\), expected"):
        as_placed(layers, 1)


def test_what_a_checkpoint_must_have() -> None:
    block = "model.layers.3"
    assert sources(
        [
            f"{block}.self_attn.qkv_proj.weight_packed",
            f"{block}.mlp.gate_up_proj.bias",
            f"{block}.self_attn.attn.k_scale",
            "norm.weight",
        ]
    ) == {
        f"{block}.self_attn.q_proj.weight_packed",
        f"{block}.self_attn.k_proj.weight_packed",
        f"{block}.self_attn.v_proj.weight_packed",
        f"{block}.mlp.gate_proj.bias",
        f"{block}.mlp.up_proj.bias",
        "norm.weight",
    }


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOWS = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}


def flat(config: PretrainedConfig) -> FlatConfig:
    fields = config.to_dict()
    return FlatConfig.from_dict(fields | {"base_model_type": fields.pop("model_type")})


@pytest.mark.parametrize(
    "family,fields",
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 6}),
        ("Mistral", {"sliding_window": None, "attention_bias": True}),
        ("Qwen2", {}),
        ("Qwen2", WINDOWS),
        ("Qwen3", {"attention_bias": True} | WINDOWS),
        ("Qwen3", {}),
    ],
)
def test_a_decoder_has_what_transformers_builds(family: str, fields: dict) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES | fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for config in (model.config, flat(model.config)):
        found = decoder_of(config, 2)
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            assert found.qkv_bias == (attention.q_proj.bias is not None)
            assert found.output_bias == (attention.o_proj.bias is not None)
            assert found.mlp_bias == (layer.mlp.down_proj.bias is not None)
            assert found.normed == hasattr(attention, "q_norm")
            # Mistral's attention reads it where it is called.
            of_all = config.sliding_window if family == "Mistral" else None
            assert found.windows[index] == getattr(attention, "sliding_window", of_all)
            assert found.head_size == 8 and found.layouts[index].group == 2


@pytest.mark.parametrize(
    "changes,ranks,message",
    [
        ({"base_model_type": "mixtral"}, 1, "has no mixtures of experts"),
        ({"hidden_act": "gelu"}, 1, "hidden_act is 'gelu'"),
        ({"intermediate_size": 13}, 2, "13 neurons do not divide by 2 ranks"),
        ({"intermediate_size": 15}, 3, "4 query heads over 2 .* do not divide by 3 ranks"),
    ],
)
def test_the_rules_refuse_what_the_plugins_do_not_build(
    changes: dict, ranks: int, message: str
) -> None:
    """Of the configuration that the plug-ins have, by the check that they make."""
    fields = {"model_type": "slmperf_pruned", "base_model_type": "llama", "hidden_act": "silu"}
    config = FlatConfig.from_dict(SIZES | fields | changes)
    for engine in ENGINES:
        with pytest.raises(InputError, match=message):
            check_served("here", config.to_dict(), engine=engine, ranks=ranks, plugin=True)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_no_decoder_is_made_up_for_another_family(family: str) -> None:
    fields = {"model_type": "slmperf_pruned", "base_model_type": family, "hidden_act": "silu"}
    with pytest.raises(KeyError, match=family):
        decoder_of(FlatConfig.from_dict(SIZES | fields), 1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_label_head_is_rows_of_the_head(tied: bool) -> None:
    config = PretrainedConfig(
        vocab_size=9, hidden_size=4, tie_word_embeddings=tied, label_token_ids=[5, 2]
    )
    torch.manual_seed(0)
    head, embedding, hidden = torch.randn(9, 4), torch.randn(9, 4), torch.randn(3, 4)
    stored = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(4)}
    if not tied:
        stored["lm_head.weight"] = head
    made = LabelHead(config)
    # Embedding and norm go on; the head's rows come once.
    taken = list(made.of_checkpoint(stored.items()))
    assert sorted(name for name, _ in taken) == sorted({*stored, "lm_head.weight"})
    made.weight.data.copy_(dict(taken)["lm_head.weight"])
    logits = made(hidden.bfloat16())
    wanted = hidden.bfloat16().float() @ (embedding if tied else head)[[5, 2]].T
    torch.testing.assert_close(logits[:, [5, 2]], wanted)
    assert (logits[:, [0, 1, 3, 4, 6, 7, 8]] == NEVER).all() and logits.dtype == torch.float32
    torch.testing.assert_close(logits.softmax(-1)[:, [5, 2]], wanted.softmax(-1))
    with pytest.raises(InputError, match="lm_head.weight_packed: the head is quantised"):
        list(made.of_checkpoint([("lm_head.weight_packed", head)]))


@pytest.mark.parametrize("labels", [[], [9], [-1], [1, 1], [True], "12", [1.0]])
def test_labels_are_different_tokens(labels: object) -> None:
    config = PretrainedConfig(vocab_size=9, hidden_size=4, label_token_ids=labels)
    with pytest.raises(
        InputError, match="label_token_ids is .*, wanted a list of different tokens"
    ):
        LabelHead(config)
