"""Checkpoints: Transformers folders, safetensors only, never half-written, never half-read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.files import write_folder
from slmperf.models.quantized import QuantizedLinear, replace_linear
from slmperf.models.shards import INDEX, WEIGHTS
from slmperf.models.structure import experts_implementation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    with _without_progress_bars():
        model.save_pretrained(folder)
        add_older_fields(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


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

    Int8 checkpoints as `slmperf.quant` writes them come back with `QuantizedLinear` layers.
    Mixtures of experts run their experts as one grouped matrix product where their size allows it.
    Models whose layers differ come back as `PrunedForCausalLM`. Nothing is fetched from a model
    hub.

    Raises InputError, in one line, for a missing, truncated or contradictory file.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    config = read_config(folder)
    stored = stored_tensors(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        return _load_int8(folder, config, quantization, stored, dtype)

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
        raise InputError(f"{folder}: {_one_line(error)}") from error
    _refuse_incomplete(folder, report["missing_keys"], report["unexpected_keys"])
    return model.eval()


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`; InputError, in one line, for a missing or a wrong one."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import slmperf.models.pruned  # noqa: F401  registers its classes with Transformers

    if not _read_json(folder / "config.json").get("model_type"):
        raise InputError(f"{folder / 'config.json'}: wanted key model_type, found none")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"{folder / 'config.json'}: {_one_line(error)}") from error


def parameters(model: nn.Module) -> int:
    """Number of weights: tied ones count once, int8 codes as the weights they stand for."""
    tensors: list[Tensor] = list(model.parameters())  # nn.Module counts a tied parameter once
    tensors += [layer.weight for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    return sum(tensor.numel() for tensor in tensors)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds, tied ones counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in model.state_dict().values()
    }
    return sum(storages.values())


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


def _load_int8(
    folder: Path,
    config: PretrainedConfig,
    quantization: dict[str, Any],
    stored: dict[str, Path],
    dtype: torch.dtype,
) -> PreTrainedModel:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    kind = quantization.get("format"), quantization.get("quant_method")
    if kind != ("int-quantized", "compressed-tensors"):
        raise InputError(
            f"{folder / 'config.json'}: quantization_config has quant_method "
            f"{kind[1]!r} and format {kind[0]!r}, wanted 'compressed-tensors' and 'int-quantized'"
        )
    for name, group in quantization.get("config_groups", {}).items():
        if group.get("input_activations") is not None:
            raise InputError(
                f"{folder / 'config.json'}: quantization_config.config_groups.{name} "
                "quantises activations, wanted input_activations null"
            )
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def empty(name: str, linear: nn.Linear) -> nn.Module | None:
        if f"{name}.weight_scale" not in stored:
            return None
        codes = torch.empty(linear.weight.shape, dtype=torch.int8)
        scale = torch.empty(linear.out_features, 1, dtype=dtype)
        return QuantizedLinear(codes, scale, None if linear.bias is None else linear.bias.detach())

    replace_linear(model, empty)
    wanted = model.state_dict()
    for file in sorted(set(stored.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                if name not in wanted:
                    continue
                if value.shape != wanted[name].shape:
                    raise InputError(
                        f"{file}: {name} is {tuple(value.shape)}, "
                        f"config.json wants {tuple(wanted[name].shape)}"
                    )
                wanted[name].copy_(value)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    _refuse_incomplete(folder, set(wanted) - set(stored) - tied, set(stored) - set(wanted))
    config.quantization_config = quantization
    return model.eval()


def _refuse_incomplete(folder: Path, missing: Any, unexpected: Any) -> None:
    for names, what in ((missing, "lacks"), (unexpected, "has an unknown")):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: the checkpoint {what} tensor {sorted(names)[0]}{rest}")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of a folder whose safetensors files are all there and whole."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(shards))]
    else:
        raise InputError(f"{folder}: wanted {WEIGHTS} or {INDEX}, found neither")
    return {name: file for file in files for name in _safetensors_names(file)}


def _safetensors_names(file: Path) -> list[str]:
    """The tensors that a safetensors file names; InputError if the file is not as long as its
    header says.

    The header is an 8-byte little-endian length and that many bytes of JSON with each tensor's byte
    range after it (https://github.com/huggingface/safetensors, "Format").
    """
    if not file.is_file():
        raise InputError(f"{file}: wanted a safetensors file, found none")
    found = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        wanted = 8 + length
        if found < max(8, wanted):
            raise InputError(
                f"{file}: truncated: wanted at least {max(8, wanted)} bytes, found {found}"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            wanted += max((int(item["data_offsets"][1]) for item in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a safetensors file: {_one_line(error)}") from error
    if found != wanted:
        state = "truncated" if found < wanted else "too long"
        raise InputError(f"{file}: {state}: wanted {wanted} bytes, found {found}")
    return list(header)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file}: wanted a file, found none")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: wanted a JSON object, found {type(content).__name__}")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
