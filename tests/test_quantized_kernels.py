"""QuantizedLinear on the kernels' weights: what it holds, loads and saves, exports that compute
what the quantiser's model computes, adapters on a frozen base."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_models import IDS
from small_quantized import SCHEMES, assert_near, by_reference, quantized, rounded
from torch import Tensor, nn

from slmperf.models import QuantizedLinear, load, save
from slmperf.models.quantized import LinearScheme
from slmperf.models.stored import TensorFiles
from slmperf.ops import Fp8Weight, Int4Weight, Int8Weight
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Fp8, Int4, Int8, WeightSpec

KERNELS = {
    "fp8": Fp8Weight,
    "fp8-static": Fp8Weight,
    "fp8-block": Fp8Weight,
    "fp8-weights": Fp8Weight,
    "w8a8": Int8Weight,
    "w8a16": Int8Weight,
    "w4a16-32": Int4Weight,
    "w4a16-32-asymmetric": Int4Weight,
    "w4a16-channel": Int4Weight,
}
# Sizes that groups of 128 inputs divide, and outputs that blocks of 128 do not.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16, "num_key_value_heads": 2}


def layer_of(name: str, outputs: int = 37, inputs: int = 128) -> QuantizedLinear:
    torch.manual_seed(0)
    return rounded(nn.Linear(inputs, outputs), SCHEMES[name])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


# ---- what it holds


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_with_a_kernel_hold_its_weight(name: str) -> None:
    layer = layer_of(name)
    weight = layer.kernel_weight
    assert type(weight) is KERNELS.get(name, type(None))
    if weight is None:
        return
    # Nothing beside it: the buffers are its tensors.
    own = {id(one) for one in vars(weight).values() if isinstance(one, Tensor)}
    assert {id(one) for one in layer.buffers()} == own
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]
    if weight.activations is None:
        for dtype in (torch.float32, torch.bfloat16):
            unit = torch.eye(128, dtype=dtype)
            found = layer.multiply(unit, None).T
            assert torch.equal(found, layer.dequantized().to(dtype))


@pytest.mark.parametrize(
    "scheme",
    [
        LinearScheme(Int4(group_size=16)),
        LinearScheme(Int4(group_size=None)),
        LinearScheme(Int4(group_size=32), ActivationSpec("int")),
        LinearScheme(Int8(symmetric=False)),
        LinearScheme(Int8(group_size=32)),
        LinearScheme(Int8(group_size=None), ActivationSpec("int")),
        LinearScheme(Int8(), ActivationSpec("float")),
        LinearScheme(Fp8(block=(64, 64)), ActivationSpec("float")),
        LinearScheme(Fp8(group_size=64)),
        LinearScheme(WeightSpec(bits=3, group_size=32)),
    ],
)
def test_other_schemes_put_their_weight_together(scheme: LinearScheme) -> None:
    torch.manual_seed(0)
    layer = rounded(nn.Linear(128, 40), scheme)
    assert layer.kernel_weight is None
    x = random(3, 128)
    inputs = x if scheme.activations is None else scheme.activations.fake_quantized(x)
    wanted = nn.functional.linear(inputs, layer.dequantized(), layer.bias)
    assert torch.equal(layer(x), wanted)
    empty = QuantizedLinear.empty(40, 128, scheme, torch.float32, bias=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), wanted)


def test_a_group_of_all_inputs_is_a_channel() -> None:
    torch.manual_seed(0)
    layer = rounded(nn.Linear(48, 20), LinearScheme(Int4(group_size=48)))
    assert layer.kernel_weight is not None and layer.kernel_weight.group_size == -1
    assert layer.state_dict()["weight_scale"].shape == (20, 1)


def test_inputs_in_fp64_and_under_autocast() -> None:
    layer, x = layer_of("w4a16-32"), random(3, 128)
    wide = layer.double()
    wanted = nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias)
    assert torch.equal(wide(x.double()), wanted)
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16())) and layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["w4a16-32-asymmetric", "w8a8", "fp8-block"])
def test_one_graph(name: str) -> None:
    layer, x = layer_of(name), random(5, 128)
    found = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")(x)
    assert torch.equal(found, layer(x))


# ---- into a layer and out of it


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_go_in_and_out_without_loss(name: str) -> None:
    layer, other, x = layer_of(name), layer_of(name), random(4, 128)
    for buffer in other.buffers():
        buffer.zero_()
    stored = layer.state_dict()
    places = {id(buffer): buffer.data_ptr() for buffer in other.buffers()}
    other.load_state_dict(stored)  # in place: graphs hold the buffers
    assert places == {id(buffer): buffer.data_ptr() for buffer in other.buffers()}
    again = other.state_dict()
    assert stored.keys() == again.keys() >= {"bias", *layer.layout()}
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype and again[key].shape == tensor.shape
        assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8))
    for part, like in layer.layout().items():
        assert like.is_meta and (like.shape, like.dtype) == (stored[part].shape, stored[part].dtype)
    assert torch.equal(other(x), layer(x))
    # Of another dtype the scales become the layer's own, or the other way round.
    wide = {key: one.double() if key.endswith("_scale") else one for key, one in stored.items()}
    other.load_state_dict(wide)
    assert torch.equal(other(x), layer(x)) and other.scales.scale.dtype == torch.float32
    half = {key: one.half() if key.endswith("_scale") else one for key, one in stored.items()}
    other.load_state_dict(half, assign=True)
    assert other.scales.scale.dtype == torch.float16


def test_parts_of_a_layer() -> None:
    layer = layer_of("w4a16-32")
    before, codes = layer.scales.scale, layer.codes
    scale = {"weight_scale": 2 * before}
    with pytest.raises(RuntimeError, match='Missing key.*"bias", "weight_packed", "weight_shape"'):
        layer.load_state_dict(scale)
    layer.load_state_dict(scale, strict=False)
    assert torch.equal(layer.scales.scale, 2 * before) and torch.equal(layer.codes, codes)
    eight = layer_of("w8a16")  # whose codes may be stored as they are
    plain = {key: one for key, one in eight.state_dict().items() if "weight_" not in key}
    plain |= {"weight": eight.codes, "weight_scale": eight.scales.scale}
    other = QuantizedLinear.empty(37, 128, eight.scheme, torch.float32, bias=True)
    other.load_state_dict(plain, assign=True)
    assert torch.equal(other.codes, eight.codes)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_packed", torch.zeros(37, 15, dtype=torch.int32), r"\(37, 15\), .* \(37, 16\)"),
        ("weight_packed", torch.zeros(37, 16), r"torch.float32 \(37, 16\), wanted torch.int32"),
        ("weight_scale", torch.zeros(37, 4, dtype=torch.int8), "int8.*, wanted torch.float32"),
        ("weight_scale", torch.ones(37, 1), r"weight_scale is .* \(37, 1\), wanted .* \(37, 4\)"),
        ("qweight", torch.zeros(16, 37, dtype=torch.int32), 'Unexpected key.*"qweight"'),
    ],
)
def test_tensors_of_another_packing_are_refused(part: str, value: Tensor, message: str) -> None:
    layer = layer_of("w4a16-32")
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(layer.state_dict() | {part: value})
    assert torch.equal(layer.codes, before.codes)


# ---- checkpoints


class Fake(nn.Module):
    """What the quantiser measures: the rounded weight and rounded inputs, in plain torch."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.scheme.activations is not None:
            x = self.layer.scheme.activations.fake_quantized(x, self.layer.input_scale)
        return nn.functional.linear(x, self.weight.to(x.dtype), self.layer.bias)


@pytest.mark.parametrize("name", KERNELS)
def test_an_export_computes_what_the_quantiser_measured(name: str, tmp_path: Path) -> None:
    model = quantized(small_models.llama(attention_bias=True, **SIZES), SCHEMES[name])
    save(model, None, tmp_path / "q")
    back = load(tmp_path / "q")
    layers = [one for one in back.modules() if isinstance(one, QuantizedLinear)]
    assert len(layers) == 14 and all(type(one.kernel_weight) is KERNELS[name] for one in layers)
    for key, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(key, Fake(layer))
    wanted = logits(model)
    with by_reference():
        assert torch.equal(logits(back), wanted)
    assert_near(logits(back), wanted, 1e-3)
    for layer in layers:  # on the same inputs
        x = random(5, layer.in_features)
        torch.testing.assert_close(layer(x), Fake(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_loading_holds_one_copy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end the kernels' tensors alone, and on the way one layer more."""
    save(quantized(small_models.llama(**SIZES), SCHEMES[name]), None, tmp_path / "q")
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    get = TensorFiles.get

    def watched(files: TensorFiles, key: str) -> Tensor:
        tensor = get(files, key)
        if key.endswith("weight_packed"):
            alive.append(sum(one() is not None for one in read))
            read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFiles, "get", watched)
    back = load(tmp_path / "q")
    assert len(alive) == (14 if SCHEMES[name].packed else 0) and max(alive, default=0) <= 1
    assert not any(one() is not None for one in read)
    for layer in back.modules():
        if isinstance(layer, QuantizedLinear):
            weight = layer.kernel_weight
            assert weight is not None
            held = sum(one.untyped_storage().nbytes() for one in layer.buffers())
            own = sum(one.nbytes for one in vars(weight).values() if isinstance(one, Tensor))
            assert held == own


# ---- adapters


def adapted(model: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from slmperf.models.lora import on_quantized

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **settings)
    return peft.get_peft_model(model, on_quantized(config))


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("name", ["w4a16-32", "w8a8", "fp8", "w3a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_on_a_frozen_base(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = quantized(small_models.llama(**SIZES).to(dtype), SCHEMES[name])
    plain, before = logits(base), {key: one.clone() for key, one in base.state_dict().items()}
    model = adapted(base)
    assert torch.equal(logits(model), plain)  # adapters begin with zeros
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 2 * 2 * 2 and {one.dtype for one in trained} == {torch.float32}
    steps = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    after = {
        key.replace(".base_layer", ""): one
        for key, one in model.get_base_model().state_dict().items()
        if "lora" not in key
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(one.float(), before[key].float()) for key, one in after.items())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_reaches_the_inputs(name: str) -> None:
    """Of rounded inputs as if they were not: the product's own."""
    layer, x = layer_of(name), random(3, 128).requires_grad_()
    seed = random(3, 37)
    (layer(x) * seed).sum().backward()
    torch.testing.assert_close(x.grad, seed @ layer.dequantized(), rtol=1e-5, atol=1e-5)


def test_adapters_are_read_back(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from slmperf.models.lora import on_quantized

    base = quantized(small_models.llama(**SIZES), SCHEMES["w4a16-32"])
    model = adapted(base, init_lora_weights=False)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    base = quantized(small_models.llama(**SIZES), SCHEMES["w4a16-32"])
    config = on_quantized(peft.LoraConfig.from_pretrained(tmp_path))
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(base, tmp_path, config=config)), wanted
    )


def test_adapters_that_need_the_weight_are_refused() -> None:
    base = quantized(small_models.llama(**SIZES), SCHEMES["w8a8"])
    with pytest.raises(
        NotImplementedError, match="wanted a dense base to merge into, found Quanti"
    ):
        adapted(copy.deepcopy(base)).merge_and_unload()
    with pytest.raises(NotImplementedError, match="init_lora_weights is 'pissa', wanted True"):
        adapted(copy.deepcopy(base), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora"):
        adapted(copy.deepcopy(base), use_dora=True)


def test_the_trainer_trains_adapters_on_a_quantised_student(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from small_training import make_labelled, make_model, settings

    from slmperf.distill import DistillationTrainer

    student = quantized(make_model(), SCHEMES["w8a8"])
    plain = {key: one.clone() for key, one in student.state_dict().items()}
    trainer = DistillationTrainer(
        student,
        settings(tmp_path, max_steps=6, save_strategy="steps", save_steps=6),
        make_labelled(16),
        teacher=make_model(seed=1),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )
    trainer.train()
    assert trainer.losses[-1] < trainer.losses[0]
    inner = trainer.model.get_base_model().state_dict()
    for key, one in plain.items():
        found = inner.get(key, inner.get(key.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(found.float(), one.float()), key
