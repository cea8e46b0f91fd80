"""Checkpoints: Transformers folders, safetensors only, never half-written, never half-read."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slmperf.check import InputError, one_line
from slmperf.models.files import write_folder
from slmperf.models.formats.compressed_tensors import is_quantized, write_config
from slmperf.models.formats.loading import load_quantized
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.stored import read_json, refuse_incomplete, stored_tensors
from slmperf.models.structure import experts_implementation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_LOG = logging.getLogger("slmperf")


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
) -> None:
    """Write config, weights (safetensors) and tokenizer to `folder`, in one step.

    What was there before is replaced, whole, and only when all of it is written.
    """
    with write_folder(folder) as aside:
        write_pretrained(model, tokenizer, aside)


def write_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
) -> None:
    """The same into a folder that the caller makes and renames, as a part of what it writes."""
    if is_quantized(model):
        write_config(model)
        _warn_of_asymmetric(model)
    with _without_progress_bars():
        model.save_pretrained(folder)
        add_older_fields(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _warn_of_asymmetric(model: PreTrainedModel) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if any(layer.scheme.packed and not layer.scheme.weights.symmetric for layer in layers):
        _LOG.warning(
            "asymmetric packed weights: engines load them; Transformers does only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )


def add_older_fields(folder: str | os.PathLike[str]) -> None:
    """Say the rotary parameters in config.json of a folder in the words of Transformers 4, too.

    Readers that do not know `rope_parameters` would silently take their defaults.
    """
    path = Path(folder) / "config.json"
    if not path.exists():  # adapters alone have none
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    older = older_rope_fields(fields.get("rope_parameters"))
    if older:
        path.write_text(json.dumps(fields | older, indent=2, sort_keys=True) + "\n")


def older_rope_fields(rope: dict[str, Any] | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of one set of rotary parameters; {} for several."""
    if not rope or "rope_theta" not in rope:
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if scaled else None}


def load(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model in `folder`, in evaluation mode, its floating tensors in `dtype`.

    Quantised checkpoints (compressed-tensors, GPTQ) come back with `QuantizedLinear` layers, their
    codes as they are stored and their scales in `dtype`, and are saved as compressed-tensors.
    Mixtures of experts run their experts as one grouped matrix product where their size allows it.
    Models whose layers differ come back as `PrunedForCausalLM`. Nothing is fetched from a model
    hub.

    Raises InputError, in one line, for a missing, truncated or contradictory file.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    config = read_config(folder)
    stored = stored_tensors(folder)
    if getattr(config, "quantization_config", None) is not None:
        return load_quantized(folder, config, stored, dtype)

    extra: dict[str, Any] = {}
    if _has_experts(config):
        extra["experts_implementation"] = experts_implementation(config, dtype)
    try:
        with _without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder}: {one_line(error)}") from error
    refuse_incomplete(folder, report["missing_keys"], report["unexpected_keys"])
    return model.eval()


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`; InputError, in one line, for a missing or a wrong one."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import slmperf.models.pruned  # noqa: F401  registers its classes with Transformers

    if not read_json(folder / "config.json").get("model_type"):
        raise InputError(f"{folder / 'config.json'}: wanted key model_type, found none")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"{folder / 'config.json'}: {one_line(error)}") from error


def parameters(model: nn.Module) -> int:
    """Number of weights: tied ones count once, codes as the weights they stand for."""
    tensors = list(model.parameters())  # nn.Module counts a tied parameter once
    codes = [
        layer.out_features * layer.in_features
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
    ]
    return sum(tensor.numel() for tensor in tensors) + sum(codes)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds, tied ones counted once."""
    held: dict[int, int] = {}
    coded = 0
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantizedLinear):  # whose buffers are stored in another form
            coded += sum(one.nbytes for one in module.layout().values())
        else:
            computed = module._non_persistent_buffers_set
            buffers = module.named_buffers(recurse=False)
            own |= {name: one for name, one in buffers if name not in computed}
        held |= {one.untyped_storage().data_ptr(): one.nbytes for one in own.values()}
    return coded + sum(held.values())


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Transformers draws a bar for every shard; the steps that take long have their own."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _has_experts(config: PretrainedConfig) -> bool:
    return any(getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
