"""The block that slmperf bench layer times: a Llama layer, its ranks' shares, its schemes."""

from dataclasses import replace

import pytest
import torch

from slmperf.bench.layer import measure_layer, measure_layers
from slmperf.bench.layer import options as layer_options
from slmperf.bench.layer import report as layer_report
from slmperf.bench.layer.block import DTYPES, SCHEMES, Block, Weights, matrix_sizes, random_weights
from slmperf.models.shapes import Shape

# Half the channels in heads, as where heads were pruned; widths that every scheme takes.
SMALL = Shape(1, 384, 6, 2, 32, 320, 100, name="small")
TOKENS = 48


def block_of(
    shape=SMALL,
    scheme="fp32",
    dtype="fp32",
    weights=None,
    tokens=TOKENS,
    device="cpu",
    decode=0,
):
    generator = torch.Generator(device).manual_seed(0)
    if weights is None:
        weights = random_weights(shape, DTYPES[dtype], device, generator)
        weights.attention_norm.uniform_(0.5, 1.5, generator=generator)
        weights.mlp_norm.uniform_(0.5, 1.5, generator=generator)
    return Block(shape, weights, tokens, SCHEMES[scheme], decode), weights


def run(block, inputs):
    with torch.inference_mode():
        residual, delta = block.run(inputs)
    return residual + delta


def random_inputs(block):
    device = block.tensors["cos"].device
    return block.inputs(torch.Generator(device).manual_seed(1))


def llama_layer(shape, weights):
    """Transformers' decoder layer with the same weights: (T, D) -> (T, D)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(config, 0).to(weights.qkv.dtype)
    channels, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    q, k, v = weights.qkv.split((channels, kv, kv))
    gate, up = weights.gate_up.chunk(2)
    names = {
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": weights.o,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": weights.down,
        "input_layernorm": weights.attention_norm,
        "post_attention_layernorm": weights.mlp_norm,
    }
    layer.load_state_dict({f"{name}.weight": tensor for name, tensor in names.items()})
    rotary = LlamaRotaryEmbedding(config)

    def call(x):
        tokens = x.shape[0]
        places = rotary(x[None], torch.arange(tokens)[None])
        mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)
        with torch.inference_mode():
            return layer(x[None], attention_mask=mask[None, None], position_embeddings=places)[0]

    return call


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-5), ("bf16", 0.03)])
def test_the_block_is_a_llama_layer(dtype, limit):
    block, weights = block_of(scheme=dtype, dtype=dtype)
    inputs = random_inputs(block)
    x = inputs["residual"] + inputs["delta"]
    wanted = llama_layer(SMALL, weights)(x)
    error = (run(block, inputs) - wanted).norm() / (wanted - x).norm()
    assert error < limit
    # The parts one by one, on the tensors that timing gives them, make the same block.
    tensors = block.trace(inputs)
    for step in block.steps:
        for name, again in step(tensors).items():
            torch.testing.assert_close(again, tensors[name], rtol=0, atol=0)
    end = tensors["mlp_residual"] + tensors["mlp_delta"]
    torch.testing.assert_close(end, run(block, inputs), rtol=0, atol=0)


def test_a_decode_step_is_the_last_token_of_a_prefill():
    """Of several sequences, with the keys and values that the prefill has made of the others."""
    block, weights = block_of()
    step, _ = block_of(weights=weights, decode=3)
    given, wanted = step.inputs(torch.Generator().manual_seed(2)), []
    for sequence in range(3):
        inputs = block.inputs(torch.Generator().manual_seed(sequence))
        whole = block.trace(inputs)
        for name in ("residual", "delta"):
            given[name][sequence] = inputs[name][-1]
        keys, values = whole["qk"][:, SMALL.heads :], whole["v"]  # (T, G, C)
        for name, one in (("keys", keys), ("values", values)):
            given[name][sequence, :, :-1] = one[:-1].transpose(0, 1)
        wanted.append(run(block, inputs)[-1])
    torch.testing.assert_close(run(step, given), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_every_weight_matters():
    """The comparison with Transformers would see a block that leaves out or swaps a matrix."""
    block, weights = block_of()
    inputs = random_inputs(block)
    truth = run(block, inputs)
    for place, name in enumerate(Weights._fields):
        other = list(weights)
        other[place] = weights[place].roll(1, 0)
        changed, _ = block_of(weights=Weights(*other))
        found = run(changed, {**inputs, **changed.tensors})
        assert (found - truth).norm() / truth.norm() > 1e-3, name


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_sum_to_the_whole(ranks):
    """Each half of the block: what the ranks' deltas add up to is the unsharded delta; with four
    ranks on two KV heads, each head is held twice.
    """
    shape = replace(SMALL, heads=8)
    block, weights = block_of(shape)
    inputs = random_inputs(block)
    whole = block.trace(inputs)
    rank_shape = shape.rank(ranks)
    q, k, v = heads(weights.qkv, shape)
    gate, up = weights.gate_up.chunk(2)
    sums = {"attention_delta": 0.0, "mlp_delta": 0.0}
    for rank in range(ranks):
        own = slice(rank * rank_shape.heads, (rank + 1) * rank_shape.heads)
        first = rank * shape.kv_heads // ranks
        kv = slice(first, first + rank_shape.kv_heads)
        neurons = slice(rank * rank_shape.intermediate, (rank + 1) * rank_shape.intermediate)
        channels = slice(own.start * shape.head_size, own.stop * shape.head_size)
        share = Weights(
            qkv=torch.cat((q[own], k[kv], v[kv])).flatten(0, 1),
            o=weights.o[:, channels],
            gate_up=torch.cat((gate[neurons], up[neurons])),
            down=weights.down[:, neurons],
            attention_norm=weights.attention_norm,
            mlp_norm=weights.mlp_norm,
        )
        sizes = {name: tuple(getattr(share, name).shape) for name in matrix_sizes(rank_shape)}
        assert sizes == matrix_sizes(rank_shape)
        part, _ = block_of(rank_shape, weights=share)
        found = part.trace({**part.tensors, "residual": whole["residual"], "delta": whole["delta"]})
        sums["attention_delta"] += found["attention_delta"]
        # The MLP of a rank sees what the all-reduce has summed, not its own share.
        known = {**part.tensors, "mlp_in": whole["mlp_in"]}
        for step in part.steps[-3:]:
            known.update(step(known))
        sums["mlp_delta"] += known["mlp_delta"]
    for name, total in sums.items():
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-5)


def heads(qkv, shape):
    """Rows of a fused matrix -> q, k and v, each (heads, C, D)."""
    rows = qkv.view(-1, shape.head_size, shape.hidden)
    return rows.split((shape.heads, shape.kv_heads, shape.kv_heads))


@pytest.mark.parametrize(
    "scheme, dtype, least, most",
    [
        ("bf16", "bf16", 0.002, 0.01),
        ("fp8", "bf16", 0.02, 0.08),
        ("w8a8", "bf16", 0.005, 0.03),
        ("w8a8", "fp32", 0.005, 0.03),
        ("w4a16", "bf16", 0.05, 0.25),
    ],
)
def test_rounded_blocks_are_near(scheme, dtype, least, most):
    """What attention and MLP add: off by what the format rounds, and not by less."""
    exact, weights = block_of()
    wanted = exact.trace(random_inputs(exact))
    block, _ = block_of(scheme=scheme, weights=Weights(*(one.to(DTYPES[dtype]) for one in weights)))
    inputs = {name: wanted[name].to(DTYPES[dtype]) for name in ("residual", "delta")}
    found = block.trace({**block.tensors, **inputs})
    for name in ("attention_delta", "mlp_delta"):
        error = (found[name].float() - wanted[name]).norm() / wanted[name].norm()
        assert least < error < most, name


def test_quantised_weights_take_their_bytes():
    shape, dense = SMALL, SMALL.layer_matrix_parameters
    for scheme, least in (("fp8", 1.0), ("w8a8", 1.0), ("w4a16", 0.5)):
        block, _ = block_of(shape, scheme, SCHEMES[scheme].dtypes[0])
        stored = sum(one.nbytes for name, one in block.tensors.items() if " weight " in name)
        assert least * dense < stored < 1.15 * least * dense, scheme


def test_the_estimate_of_memory_covers_what_is_held():
    """Every tensor of the block, its copies and weights, for whatever scheme."""
    for scheme, decode in [*((scheme, 0) for scheme in SCHEMES), ("w4a16", 16)]:
        dtype = SCHEMES[scheme].dtypes[0]
        block, weights = block_of(SMALL, scheme, dtype, tokens=512, decode=decode)
        tensors = block.trace(random_inputs(block))
        held = 2 * sum(one.nbytes for one in tensors.values())
        held += sum(one.nbytes for one in weights)
        estimate = layer_options.memory_bytes(SMALL, 512, scheme, dtype, "cpu", decode)
        assert held < estimate < 6 * held, scheme


def test_a_decode_step_reads_weights_and_caches():
    found = measure_layer(SMALL, TOKENS, decode=3, scheme="w4a16", device="cpu", seconds=0)
    d, hc = SMALL.hidden, SMALL.heads * SMALL.head_size
    cache = 2 * 3 * SMALL.kv_heads * TOKENS * SMALL.head_size * 2
    by_name = {part.part: part for part in found.parts}
    one = 2 * 3 * (SMALL.heads + SMALL.kv_heads) * SMALL.head_size
    v = 2 * 3 * SMALL.kv_heads * SMALL.head_size
    assert by_name["attention"].bytes == cache + one + v + 2 * 3 * hc
    assert by_name["attention"].flops == 4 * 3 * TOKENS * hc
    # Codes of o in tiles of 64 inputs, a scale for 64 of them.
    assert by_name["o"].bytes == d * hc // 2 + 2 * d * hc // 64 + 2 * 3 * (hc + d)
    assert found.name == "small-48-tp1-w4a16-decode3" and "quantise" not in by_name
    assert found.work == "decode of 3 at 48 tokens"


def test_schemes_are_measured_beside_the_first():
    layers = measure_layers(
        [SMALL, replace(SMALL, intermediate=160, name="smaller")],
        TOKENS,
        scheme="bf16,w8a8",
        device="cpu",
        seconds=0,
    )
    assert [(str(one.shape), one.scheme) for one in layers] == [
        ("small", "bf16"),
        ("small", "w8a8"),
        ("smaller", "bf16"),
        ("smaller", "w8a8"),
    ]
    for first, other in (layers[:2], layers[2:]):
        assert first.beside is None and first.speed is None and other.beside is first
        assert other.speed == pytest.approx(first.layer_us / other.layer_us)
        told = {row["part"]: row.get("times_bf16") for row in other.rows()}
        assert told["block"] == other.speed and told["attention"] is None
    pairs = layer_report.lines(layers)
    assert [one.split(":")[0] for one in pairs[:4]] == [
        "small -> smaller in bf16, 48 tokens",
        "small -> smaller in w8a8, 48 tokens",
        "small, 48 tokens",
        "smaller, 48 tokens",
    ]
    assert f"w8a8 is {layers[1].speed:.2f} times as fast as bf16" in pairs[2]
    titles = [table.title for table in layer_report.tables(layers)]
    assert titles[0].startswith("48 tokens, tp 1: milliseconds")
    titles = [table.title for table in layer_report.tables(layers[:2])]
    assert titles[0].startswith("48 tokens, tp 1, small: milliseconds")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "w8a8", "w4a16"])
def test_on_a_gpu(scheme):
    """The block on the device is the block of the CPU."""
    refusal = layer_options._refusal(scheme, "cuda")
    if refusal:
        pytest.skip(f"{scheme}: {refusal}")
    exact, weights = block_of()
    wanted = exact.trace(random_inputs(exact))
    block, _ = block_of(scheme=scheme, weights=Weights(*(w.cuda().bfloat16() for w in weights)))
    inputs = {name: wanted[name].cuda().bfloat16() for name in ("residual", "delta")}
    found = block.trace({**block.tensors, **inputs})
    for name in ("attention_delta", "mlp_delta"):
        error = (found[name].float().cpu() - wanted[name]).norm() / wanted[name].norm()
        assert error < {"bf16": 0.01, "w4a16": 0.25}.get(scheme, 0.1), name
