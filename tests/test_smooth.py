"""Smoothing: what a model computes stays, what quantisation does to it shrinks."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import mixtral
from small_pruning import logits, random_batches, state_of, unchanged
from small_quantized import SCHEMES, rounded
from small_smoothing import MODELS, stream_of, with_outliers
from torch import Tensor, nn
from transformers import PreTrainedModel

from slmperf.calibrate import BlockStream
from slmperf.check import InputError
from slmperf.models import load, save
from slmperf.models.quantized import LinearScheme, QuantizedLinear
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Int8, WeightSpec
from slmperf.quant import quantize_model, smooth, smoothing
from slmperf.quant.folds import folded, folds_of
from slmperf.quant.plan import LINEARS
from slmperf.quant.smoothing import check_smoothing, is_smoothed, smooth_block
from slmperf.quant.statistics import static_input_scales

W8A8 = SCHEMES["w8a8"]


def scales_of(block: nn.Module, index: int = 0) -> dict[str, Tensor]:
    """Uneven scales for every fold of a block."""
    make = torch.Generator().manual_seed(5)
    found = {}
    for fold in folds_of(block, index):
        size = block.get_submodule(fold.producer).weight.shape[0]
        found[fold.producer] = torch.exp(torch.randn(size, generator=make))
    return found


@torch.no_grad()
def quantized_error(
    block: nn.Module, stream: BlockStream, index: int, scheme=W8A8, wanted: nn.Module | None = None
) -> float:
    """The relative error of a block's outputs when all its layers are replaced, in fp32."""
    replaced = copy.deepcopy(block)
    scales = static_input_scales(stream, index, LINEARS) if scheme.activations.static else {}
    for name in LINEARS:
        layer = rounded(replaced.get_submodule(name), scheme)
        if name in scales:
            layer.input_scale.copy_(scales[name].scale * 448 / 127.5)  # int8, not fp8
        replaced.set_submodule(name, layer)
    wrong = energy = 0.0
    pairs = zip(
        stream.outputs(index, wanted or block), stream.outputs(index, replaced), strict=True
    )
    for (want, tokens), (found, _) in pairs:
        want, found = (tokens.select(rows.flatten(0, 1)) for rows in (want, found))
        wrong += float((found - want).double().square().sum())
        energy += float(want.double().square().sum())
    return wrong / energy


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name):
    model = MODELS[name]()
    before = [logits(model, batch) for batch in random_batches()]
    report = smooth(model, random_batches(), alphas=[0.4, 0.8])
    for block in report.blocks:
        assert block.relative_error <= block.relative_error_unsmoothed
    assert any(alpha for block in report.blocks for alpha in block.alphas.values())
    for wanted, batch in zip(before, random_batches(), strict=True):
        assert float((logits(model, batch) - wanted).abs().max()) <= 1e-5 * float(
            wanted.abs().max()
        )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_fold_is_exact(name):
    model = MODELS[name]().double()
    ids = random_batches()[0]["input_ids"]
    before = model(ids).logits
    for index, block in enumerate(model.model.layers):
        folds, scales = folds_of(block, index), scales_of(block, index)
        for fold in folds:
            changed = folded(block, folds, {fold.producer: scales[fold.producer]})
            assert changed.keys() >= {f"{name}.weight" for name in (fold.producer, *fold.consumers)}
        for name, value in folded(block, folds, scales).items():
            assert not torch.equal(block.get_parameter(name), value)
            block.get_parameter(name).data = value
    # The scales themselves are fp32.
    torch.testing.assert_close(
        model(ids).logits, before, rtol=0, atol=2e-6 * float(before.abs().max())
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "pruned"])
def test_outliers_are_smoothed_away(name):
    model = with_outliers(MODELS[name]())
    originals = copy.deepcopy(model.model.layers)
    report = smooth(model, random_batches())
    assert is_smoothed(model.config) and report.calibration["tokens"] > 0
    stream = stream_of(model)
    for index, block in enumerate(report.blocks):
        # The report says what a replaced block does, before and after.
        unsmoothed = quantized_error(originals[index], stream, index)
        smoothed = quantized_error(
            model.model.layers[index], stream, index, wanted=originals[index]
        )
        assert block.relative_error_unsmoothed == pytest.approx(unsmoothed, rel=0.02)
        assert block.relative_error == pytest.approx(smoothed, rel=0.02)
        assert smoothed < unsmoothed / 2
        stream.advance(index)


def test_static_inputs_are_part_of_the_search():
    model = with_outliers(MODELS["llama"]())
    original = copy.deepcopy(model.model.layers[0])
    stream = stream_of(model)
    scheme = LinearScheme(Int8(), ActivationSpec("int", "tensor"))
    before = quantized_error(original, stream, 0, scheme)
    block = smooth_block(stream, 0, scheme, [0.5, 0.7])
    assert block.relative_error_unsmoothed == pytest.approx(before, rel=0.02)
    after = quantized_error(model.model.layers[0], stream, 0, scheme, wanted=original)
    assert block.relative_error == pytest.approx(after, rel=0.02)
    assert after < before


def test_never_worse_on_real_weights(shared_data):
    from stories3m import TOKENS, load_stories3m
    from stories260k import batches, story_tokens

    model = load_stories3m(shared_data)
    originals = copy.deepcopy(model.model.layers)
    text = batches(story_tokens(shared_data, "calib", 2, TOKENS))
    report = smooth(model, text, alphas=[0.5, 0.7, 0.9])
    stream = stream_of(model, text)
    gains = []
    for index, block in enumerate(report.blocks):
        unsmoothed = quantized_error(originals[index], stream, index)
        smoothed = quantized_error(
            model.model.layers[index], stream, index, wanted=originals[index]
        )
        assert smoothed <= unsmoothed * 1.0001
        assert block.relative_error <= block.relative_error_unsmoothed
        gains.append(unsmoothed / smoothed)
        stream.advance(index)
    assert min(gains) > 1.05 and max(gains) > 1.7, gains


def test_no_smoothing_is_among_the_choices():
    model = MODELS["llama"]()
    before = state_of(model)
    report = smooth_block(stream_of(model), 0, W8A8, [1.0])  # all weight columns alike: bad here
    assert None in report.alphas.values()
    for producer, alpha in report.alphas.items():
        if alpha is None and "norm" in producer:
            name = f"model.layers.0.{producer}.weight"
            assert torch.equal(model.state_dict()[name], before[name])


def test_only_layers_with_a_scheme_count():
    model = with_outliers(MODELS["llama"]())
    before = state_of(model)
    report = smooth_block(stream_of(model), 0, {"mlp.down_proj": W8A8}, [0.5])
    assert report.alphas == {"mlp.up_proj": 0.5}
    assert report.relative_error < report.relative_error_unsmoothed / 2
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_half_precision_loses_no_more_than_its_weights(name):
    """Norms' rounding is made good in the weights that follow; near w = -1 it costs percents."""
    model = MODELS[name]().bfloat16()
    block, index = model.model.layers[0], 0
    if name == "gemma":
        block.input_layernorm.weight.data.uniform_(-0.2, 0.2)
    folds = folds_of(block, index)[:1]
    scales = {folds[0].producer: torch.linspace(0.2, 30.0, 32)}
    hidden = torch.randn(1, 40, 32)
    norm, query = (
        copy.deepcopy(part).float() for part in (block.input_layernorm, block.self_attn.q_proj)
    )
    wanted = query(norm(hidden))
    changed = folded(block, folds, scales)
    assert all(value.dtype == torch.bfloat16 for value in changed.values())
    norm.weight.data = changed["input_layernorm.weight"].float()
    query.weight.data = changed["self_attn.q_proj.weight"].float()
    error = (query(norm(hidden)) - wanted).norm() / wanted.norm()
    assert error.item() < 2**-9  # what rounding weights to bf16 costs
    report = smooth(model, random_batches(), alphas=[0.6])
    assert all(one.relative_error <= one.relative_error_unsmoothed for one in report.blocks)
    assert model.dtype == torch.bfloat16


def test_dead_channels_stay():
    model = MODELS["llama"]()
    block = model.model.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0.0  # nothing comes
        block.mlp.down_proj.weight[:, 5] = 0.0  # nothing is read
    with_outliers(model)
    query, up = block.self_attn.q_proj.weight.clone(), block.mlp.up_proj.weight.clone()
    schemes = {"self_attn.q_proj": W8A8, "mlp.down_proj": W8A8}
    report = smooth_block(stream_of(model), 0, schemes, [0.5])
    assert report.alphas == {"input_layernorm": 0.5, "mlp.up_proj": 0.5}
    assert block.input_layernorm.weight[3] == 0
    assert torch.equal(block.self_attn.q_proj.weight[:, 3], query[:, 3])
    assert torch.equal(block.mlp.up_proj.weight[5], up[5])
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_the_search_finds_the_best_of_the_grid():
    model = with_outliers(MODELS["llama"]())
    found = {}
    for alphas in [(alpha,) for alpha in smoothing.ALPHAS] + [smoothing.ALPHAS]:
        report = smooth_block(stream_of(copy.deepcopy(model)), 0, {"mlp.down_proj": W8A8}, alphas)
        found[alphas] = report.relative_error, report.alphas["mlp.up_proj"]
    assert smoothing.ALPHAS[0] == 0.3 and smoothing.ALPHAS[-1] == 0.95 and len(found) == 15
    assert found.pop(smoothing.ALPHAS) == min(found.values())


@torch.no_grad()
def test_scales_stay_in_range():
    model = with_outliers(MODELS["llama"]())
    block = model.model.layers[0]
    block.mlp.up_proj.weight[7] *= 1e-20
    before = state_of(block)
    assert smooth_block(stream_of(model), 0, W8A8, [0.5]).alphas["mlp.up_proj"]
    ratio = (block.mlp.up_proj.weight / before["mlp.up_proj.weight"])[:, 0].sort().values
    assert 1e-3 < ratio[0] and ratio[-1] < 1e3
    norm = block.input_layernorm.weight / before["input_layernorm.weight"]
    assert (norm.max() * norm.min()).item() == pytest.approx(1.0, rel=1e-4)


@torch.no_grad()
def test_half_precision_that_would_overflow_is_not_chosen():
    model = MODELS["llama"]().half()
    down = model.model.layers[0].mlp.down_proj.weight
    down.copy_(down.float() * 6e4 / down.float().abs().amax(0))  # columns as large as can be
    before = down.clone()
    report = smooth_block(stream_of(model), 0, {"mlp.down_proj": W8A8}, [0.5, 1.0])
    assert report.alphas == {"mlp.up_proj": None}
    assert torch.equal(down, before)


def test_twice_is_refused_also_after_save_and_load(tmp_path):
    model = MODELS["pruned"]()
    smooth(model, random_batches(), alphas=[0.5])
    save(model, None, tmp_path / "smoothed")
    for again in (model, load(tmp_path / "smoothed")):
        before = state_of(again)
        with pytest.raises(InputError, match="not smoothed before"):
            smooth(again, random_batches(), alphas=[0.5])
        assert unchanged(again, before)


def _other_norm(model: PreTrainedModel) -> None:
    class ScaleNorm(nn.Module):
        weight = None

    model.model.layers[1].post_attention_layernorm = ScaleNorm()


def _tied_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm


def _another_reader(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.gate = nn.Linear(32, 8)


def _subclass(model: PreTrainedModel) -> None:
    class Adapted(nn.Linear):
        pass

    model.model.layers[2].mlp.up_proj = Adapted(32, 64)


def _quantized_layer(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn
    layer.o_proj = rounded(layer.o_proj, W8A8)
    assert isinstance(layer.o_proj, QuantizedLinear)


def _norm_without_weight(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm = nn.LayerNorm(32, elementwise_affine=False)


def _not_finite(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.inf


def _quantized_model(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "compressed-tensors"}


def _other_block(model: PreTrainedModel) -> None:
    class ParallelLayer(type(model.model.layers[0])):
        pass

    model.model.layers[1].__class__ = ParallelLayer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_norm, r"layers\.1\.post_attention_layernorm: wanted one of .*, found ScaleNorm"),
        (_tied_norm, r"layers\.0\.input_layernorm\.weight in one place, found it as .*layers\.1"),
        (_another_reader, r"layers\.1\.self_attn\.gate: wanted only layers known"),
        (_subclass, r"layers\.2\.mlp\.up_proj: wanted nn\.Linear, found Adapted"),
        (_quantized_layer, r"layer 0: wanted nn\.Linear self_attn\.o_proj, found QuantizedLinear"),
        (_norm_without_weight, r"layers\.0\.input_layernorm: wanted a norm with a weight"),
        (_not_finite, r"layers\.2\.mlp\.up_proj\.weight holds values that are not finite"),
        (_quantized_model, r"found a quantised one"),
        (_other_block, r"layers\.1: wanted one of .*, found ParallelLayer"),
    ],
)
def test_what_is_not_known_is_refused_by_name(spoil, message):
    model = MODELS["llama"]()
    spoil(model)
    before = state_of(model)
    with pytest.raises(InputError, match=message):
        smooth(model, random_batches())
    assert unchanged(model, before) and not is_smoothed(model.config)


def test_mixtures_padding_and_alphas_are_refused():
    with pytest.raises(InputError, match=r"layers\.0\.mlp: .* found a mixture of experts"):
        check_smoothing(mixtral())
    model = MODELS["llama"]()
    before = state_of(model)
    with pytest.raises(InputError, match=r"alphas: wanted numbers in 0\.\.1, found 1\.5"):
        smooth(model, random_batches(), alphas=[0.5, 1.5])
    with pytest.raises(InputError, match="alphas: .* found none"):
        smooth(model, random_batches(), alphas=[])
    with pytest.raises(InputError, match="at least one calibration batch"):
        smooth(model, [])
    padding = [
        batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}
        for batch in random_batches()
    ]
    with pytest.raises(InputError, match="at least one calibration token"):
        smooth(model, padding)
    assert unchanged(model, before) and not is_smoothed(model.config)


def test_a_block_that_is_not_what_it_says_is_refused():
    class RMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.weight) / self.weight

    model = MODELS["llama"]()
    norm = RMSNorm(32)
    norm.weight.data.uniform_(0.5, 1.5)
    model.model.layers[0].post_attention_layernorm = norm
    before = state_of(model)
    with pytest.raises(InputError, match=r"layers\.0: wanted the same outputs"):
        smooth(model, random_batches())
    assert unchanged(model, before) and not is_smoothed(model.config)


def test_the_search_takes_some_batches_the_peaks_all(monkeypatch):
    monkeypatch.setattr(smoothing, "SEARCH_TOKENS", 60)
    model = MODELS["llama"]()
    batches = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in random_batches()
        for row in range(4)
    ]
    stream = stream_of(model, batches)
    assert smooth_block(stream, 0, W8A8, [0.5]).tokens in range(1, 61)
    assert sum(stream.token_counts) > 150


@torch.no_grad()
def test_inputs_that_are_not_finite_stay_and_the_others_are_smoothed():
    model = with_outliers(MODELS["llama"]())
    block = model.model.layers[0]
    for name in ("gate_proj", "up_proj"):
        block.mlp.get_submodule(name).weight[5] *= 1e3
    block.mlp.down_proj.weight[:, 5] /= 1e6
    model.half()  # in which the product of gate and up overflows
    before = state_of(model)
    report = smooth_block(stream_of(model), 0, W8A8, [0.5])
    assert list(report.notes) == ["mlp.up_proj"] and report.alphas["mlp.up_proj"] is None
    assert "layers.0.mlp.down_proj: inputs: wanted finite" in report.notes["mlp.up_proj"]
    assert torch.equal(block.mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"])
    assert report.alphas["input_layernorm"] == 0.5
    assert report.relative_error < report.relative_error_unsmoothed


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: group_size 48 does not"):
        scheme = LinearScheme(WeightSpec(bits=8, group_size=48), W8A8.activations)
        smooth_block(stream_of(MODELS["llama"]()), 0, {"mlp.down_proj": scheme}, [0.5])


@torch.no_grad()
def test_an_alpha_whose_scales_overflow_is_not_chosen(monkeypatch):
    model = with_outliers(MODELS["llama"]())
    tops: list[float] = []  # of the weight unsmoothed, by alpha 0.4, by alpha 0.7
    own = Int8.scales

    def scales(self, weight, *rest):
        top = float(weight.abs().max())
        if len(tops) == 3 and top == tops[1]:
            raise InputError("scale: wanted less")
        tops[:] = tops if len(tops) == 3 else [*tops, top]
        return own(self, weight, *rest)

    monkeypatch.setattr(Int8, "scales", scales)
    found = []
    for _ in range(2):
        stream = stream_of(copy.deepcopy(model))
        found.append(smooth_block(stream, 0, {"mlp.down_proj": W8A8}, [0.4, 0.7]).alphas)
    assert found == [{"mlp.up_proj": 0.4}, {"mlp.up_proj": 0.7}]


def test_a_model_that_nothing_was_chosen_for_is_not_marked():
    model = MODELS["llama"]()
    for block in model.model.layers:
        for name in LINEARS:  # zeros lose nothing: no choice is better
            block.get_submodule(name).weight.data.zero_()
    report = smooth(model, random_batches(), alphas=[0.5])
    assert {alpha for one in report.blocks for alpha in one.alphas.values()} == {None}
    assert not is_smoothed(model.config)
    quantize_model(model, "w8a8", random_batches())
    assert not is_smoothed(model.config)
