"""artefacts: a quantisation's finished blocks in a folder, so that a killed run can be resumed.

    manifest.json               the model, the settings and the text that they were made with
    block-00000.safetensors     a block's tensors, codes not packed, and in its metadata the rows of
                                the report and a hash of the tensors that it was made of

Every file is written aside and renamed: there is all of a block or nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError, one_line
from slmperf.models.files import remove_unfinished, write_atomically
from slmperf.models.hashes import add_tensors
from slmperf.models.kv_scales import set_kv_scales
from slmperf.models.quantized import QuantizedLinear
from slmperf.models.structure import block_name
from slmperf.quant.results import LayerQuantized
from slmperf.quant.schemes import Scheme

MANIFEST = "manifest.json"
_LONGEST = 80  # letters of a value in a message
_KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


class Artefacts:
    """The folder of one quantisation."""

    def __init__(self, folder: str | os.PathLike[str], made_with: Mapping[str, Any]) -> None:
        """A new folder, or that of a run of the same model, settings and text, `made_with` (JSON
        values); InputError for another's, and for a folder of something else.
        """
        self._folder = Path(folder)
        manifest = self._folder / MANIFEST
        if manifest.is_file():
            if told := difference(self._folder, made_with):
                raise InputError(f"resume: {self._folder}: wanted artefacts of {told}")
            remove_unfinished(self._folder)
            return
        if self._folder.exists() and (
            not self._folder.is_dir() or any(not _hidden(one) for one in self._folder.iterdir())
        ):
            raise InputError(
                f"resume: wanted a new folder or one of a quantisation, found {self._folder} with "
                f"other files and no {MANIFEST}"
            )
        write_atomically(manifest, json.dumps(dict(made_with), indent=1) + "\n")

    def keep(
        self, index: int, block: nn.Module, layers: Iterable[LayerQuantized], made_of: str
    ) -> None:
        """Write block `index`, which is as it will be; made_of: `hash_of_tensors` of it before."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        quantized = _quantized(block)
        for name, value in block.state_dict().items():
            if name.rpartition(".")[0] not in quantized:
                tensors[name] = value
        for name, layer in quantized.items():
            parts = {
                "codes": layer.codes,
                "scale": layer.scales.scale,
                "zero_point": layer.scales.zero_point,
                "input_scale": layer.input_scale,  # where it is fixed
                "bias": layer.bias,
            }
            tensors |= {f"{name}.{part}": one for part, one in parts.items() if one is not None}
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        rows = json.dumps([asdict(layer) for layer in layers])
        told = {"layers": rows, "made_of": made_of}
        write_atomically(self._file(index), lambda aside: save_file(whole, aside, told))

    def restore(
        self,
        index: int,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        made_of: str,
        *,
        kv_cache: bool,
    ) -> list[LayerQuantized] | None:
        """Make block `index` what an earlier run made of it; None where that did not come so far.

        schemes: of its quantised layers, by name within the block.
        made_of: `hash_of_tensors` of the block. kv_cache: whether its cache has scales.
        Raises InputError for a file that is not one of `keep`, or that was made of another block.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(index)
        if not path.is_file():
            return None
        device = next(block.parameters()).device
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            layers = [LayerQuantized(**row) for row in json.loads(told["layers"])]
            if told["made_of"] != made_of:
                raise _OtherBlock
            _check_names(set(tensors), _names(block, schemes, kv_cache))
            for name, scheme in schemes.items():
                parts = {
                    part: tensors.pop(f"{name}.{part}", None)
                    for part in ("zero_point", "bias", "input_scale")
                }
                codes, scale = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")
                layer = QuantizedLinear(codes, scale, scheme=scheme.linear, **parts)
                block.set_submodule(name, layer)
            if kv_cache:
                set_kv_scales(block.self_attn, *(tensors.pop(name) for name in _KV_SCALES))
            own = block.state_dict()
            for name, value in tensors.items():
                own[name].copy_(value)
        except _OtherBlock:
            raise InputError(
                f"resume: {path}: wanted what was made of {block_name(index)} as it is now, found "
                "what was made of other weights"
            ) from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: wanted a block as a quantisation keeps it: {one_line(error)}"
            ) from error
        return layers

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"


class _OtherBlock(Exception):
    """A file was made of other weights than the block has."""


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and every byte."""
    whole = hashlib.sha256()
    add_tensors(whole, sorted(tensors.items()))
    return whole.hexdigest()


def hash_of_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of all tensors of a calibration set."""
    whole = hashlib.sha256()
    for batch in batches:
        tensors = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor)}
        add_tensors(whole, sorted(tensors.items()))
    return whole.hexdigest()


def _quantized(block: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: one for name, one in block.named_modules() if isinstance(one, QuantizedLinear)}


def _names(block: nn.Module, schemes: Mapping[str, Scheme], kv_cache: bool) -> set[str]:
    """Of the tensors that `keep` writes of a block; given as it is before."""
    names = {name for name in block.state_dict() if name.rpartition(".")[0] not in schemes}
    for name, scheme in schemes.items():
        parts = {
            "codes": True,
            "scale": True,
            "zero_point": not scheme.linear.weights.symmetric,
            "input_scale": scheme.static,
            "bias": block.get_submodule(name).bias is not None,
        }
        names |= {f"{name}.{part}" for part, there in parts.items() if there}
    return names | set(_KV_SCALES) if kv_cache else names


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        name = min(found ^ wanted)
        what = "without" if name in wanted else "with an unknown"
        raise ValueError(f"found one {what} tensor {name}")


def difference(folder: Path, made_with: Mapping[str, Any]) -> str:
    """What is wanted of the blocks in `folder` and found otherwise, in words; "" for nothing.

    made_with: all that their manifest should say, or a part of it.
    Raises InputError for a manifest that is none.
    """
    path = folder / MANIFEST
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: wanted a quantisation's manifest: {one_line(error)}") from error
    wanted = json.loads(json.dumps(dict(made_with)))  # tuples have become lists
    for name in wanted:
        if name not in found or wanted[name] != found[name]:
            return f"{name} {_short(wanted[name])}, found {_short(found.get(name))}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
