"""From a quantised checkpoint to a model with QuantizedLinear layers.

The model is made without weights and gets the checkpoint's tensors, floating ones in the dtype that
is asked for, layer by layer: no weight is put together, and beside the model there is at most one
layer in the form of the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from slmperf.check import InputError, one_line
from slmperf.models.formats import compressed_tensors, gptq
from slmperf.models.kv_scales import attention_modules, set_kv_scales
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.stored import TensorFiles, empty_model, refuse_incomplete

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Read(NamedTuple):
    """What the reader of a format makes of a checkpoint."""

    layers: dict[str, QuantizedLinear]
    empty: dict[str, dict[str, Tensor]]  # of layers still without a weight: names, shapes, dtypes
    used: set[str]  # stored tensors that the other layers were made of
    kv_cache: bool  # whether keys and values have scales


def load_quantized(
    folder: Path, config: PretrainedConfig, stored: Mapping[str, Path], dtype: torch.dtype
) -> PreTrainedModel:
    """The model in `folder`, in evaluation mode, with the `quantization_config` that it is saved
    with.

    config  what `read_config` read there
    stored  tensor name -> file, from `stored_tensors`
    dtype   of its floating tensors, scales among them; fp8 codes keep theirs
    Raises InputError, in one line, for what is not read, missing, or contradicts the configuration.
    """
    quantization = config.quantization_config
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in list(_READERS):  # which need not be a name
        raise InputError(
            f"{folder / 'config.json'}: quantization_config has quant_method {method!r}, "
            f"wanted {' or '.join(map(repr, _READERS))}"
        )
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts")):
        raise InputError(f"{folder}: a quantised mixture of experts is not read, only dense models")
    del config.quantization_config
    model = empty_model(config, dtype)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    with TensorFiles(folder, stored) as files:
        layers, empty, used, kv_cache = _READERS[method](files, quantization, linears, dtype)
        if kv_cache:
            for _, attention in attention_modules(model):
                set_kv_scales(attention, *torch.empty(2, dtype=dtype, device="meta"))
        quantized = {f"{name}.weight" for name in layers}
        wanted = {name: one for name, one in model.state_dict().items() if name not in quantized}
        wanted |= {
            f"{name}.{part}": one for name, own in empty.items() for part, one in own.items()
        }
        for name, layer in layers.items():
            if f"{name}.weight" in tied:
                raise InputError(f"{folder}: {name} is quantised, but tied to the embeddings")
            model.set_submodule(name, layer)
        # Frequencies, which older checkpoints hold, are computed.
        have = {name for name in stored if not name.endswith("rotary_emb.inv_freq")} - used
        filled = {name for name, tensor in wanted.items() if not tensor.is_meta}
        refuse_incomplete(folder, set(wanted) - have - tied - filled, have - set(wanted))

        def read(name: str) -> Tensor:
            tensor = _fitting(files, name, wanted[name])
            if name.endswith("_scale"):
                _check_finite(folder, name, tensor)
            return tensor

        for name, own in sorted(empty.items()):
            parts = {part: read(f"{name}.{part}") for part in own}
            if "weight_shape" in parts:
                _check_shape(folder, f"{name}.weight_shape", parts["weight_shape"], layers[name])
            layers[name].load_state_dict(parts, strict=False, assign=True)
            have -= {f"{name}.{part}" for part in own}
        tensors = {name: read(name) for name in sorted(have)}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    _read_generation_config(folder, model)
    compressed_tensors.write_config(model)
    return model.eval()


def _read_compressed_tensors(
    files: TensorFiles,
    quantization: dict[str, Any],
    linears: Mapping[str, nn.Linear],
    dtype: torch.dtype,
) -> _Read:
    config = files.folder / "config.json"
    with _told_of(f"{config}: quantization_config"):
        schemes, kv_cache = compressed_tensors.read_schemes(quantization, linears)
    read = _Read({}, {}, set(), kv_cache)
    for name, (scheme, packed) in schemes.items():
        linear = linears[name]
        outputs, inputs, bias = linear.out_features, linear.in_features, linear.bias is not None
        with _told_of(f"{config}: {name}"):
            layer = QuantizedLinear.empty(outputs, inputs, scheme, dtype, bias=bias)
        read.layers[name] = layer
        read.empty[name] = layer.layout(packed=packed)
    return read


def _read_gptq(
    files: TensorFiles,
    quantization: dict[str, Any],
    linears: Mapping[str, nn.Linear],
    dtype: torch.dtype,
) -> _Read:
    with _told_of(f"{files.folder / 'config.json'}: quantization_config"):
        settings = gptq.read_settings(quantization)
    read = _Read({}, {}, set(), kv_cache=False)
    for name, linear in linears.items():
        if f"{name}.qweight" not in files.stored:
            continue
        needed = [part for part in gptq.PARTS if part != "g_idx" or f"{name}.g_idx" in files.stored]
        parts = {part: files.get(f"{name}.{part}") for part in needed}
        bias = None if linear.bias is None else linear.bias.to(dtype)  # on the meta device
        shape = (linear.out_features, linear.in_features)
        with _told_of(str(files.folder)):
            read.layers[name] = gptq.read_linear(name, shape, parts, bias, settings, dtype)
        _check_finite(files.folder, f"{name}.scales", parts["scales"].to(dtype))
        read.used.update(f"{name}.{part}" for part in needed)
        # Of layers without a bias, too, some writers store one: zeros.
        if bias is None and f"{name}.bias" in files.stored and not files.get(f"{name}.bias").any():
            read.used.add(f"{name}.bias")
    return read


_Reader: TypeAlias = Callable[
    [TensorFiles, dict[str, Any], Mapping[str, nn.Linear], torch.dtype], _Read
]
_READERS: dict[str, _Reader] = {
    compressed_tensors.METHOD: _read_compressed_tensors,
    gptq.METHOD: _read_gptq,
}


@contextlib.contextmanager
def _told_of(what: str) -> Iterator[None]:
    """An InputError inside the `with` block says of what it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _fitting(files: TensorFiles, name: str, like: Tensor) -> Tensor:
    """The stored tensor `name` in the dtype of `like`; InputError where it is of another shape or
    kind."""
    value, where = files.get(name), files.stored.get(name)
    if value.numel() == like.numel() == 1:  # single scales are stored with and without a dimension
        value = value.reshape(like.shape)
    if value.shape != like.shape:
        raise InputError(
            f"{where}: {name} is {tuple(value.shape)}, config.json wants {tuple(like.shape)}"
        )
    if _plain(value) and _plain(like):
        return value.to(like.dtype)
    if value.dtype != like.dtype:
        raise InputError(f"{where}: {name} is {value.dtype}, config.json wants {like.dtype}")
    return value


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, not codes."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _check_finite(folder: Path, name: str, scale: Tensor) -> None:
    """InputError for a scale that is not finite."""
    if not bool(torch.isfinite(scale).all()):
        raise InputError(f"{folder}: {name} has values that are not finite in {scale.dtype}")


def _check_shape(folder: Path, name: str, found: Tensor, layer: QuantizedLinear) -> None:
    """InputError for a weight_shape that is another than the layer's."""
    wanted = [layer.out_features, layer.in_features]
    if found.tolist() != wanted:
        raise InputError(f"{folder}: {name} says {found.tolist()}, config.json wants {wanted}")


def _read_generation_config(folder: Path, model: PreTrainedModel) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            path = folder / "generation_config.json"
            raise InputError(f"{path}: {one_line(error)}") from error
