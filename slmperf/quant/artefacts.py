"""artefacts: a quantisation's finished blocks in a folder, so that a killed run can be resumed.

    manifest.json               the model, the settings and the text that they were made with
    block-00000.safetensors     a block's tensors, codes not packed, and in its metadata the rows of
                                the report

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
from slmperf.quant.results import LayerQuantized
from slmperf.quant.schemes import Scheme

_MANIFEST = "manifest.json"
_LONGEST = 80  # letters of a value in a message
_KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


class Artefacts:
    """The folder of one quantisation."""

    def __init__(self, folder: str | os.PathLike[str], made_with: Mapping[str, Any]) -> None:
        """A new folder, or that of a run of the same model, settings and text, `made_with` (JSON
        values); InputError for another's, and for a folder of something else.
        """
        self._folder = Path(folder)
        manifest = self._folder / _MANIFEST
        if manifest.is_file():
            _check_same(manifest, made_with)
            remove_unfinished(self._folder)
            return
        if self._folder.exists() and (
            not self._folder.is_dir() or any(not _hidden(one) for one in self._folder.iterdir())
        ):
            raise InputError(
                f"resume: wanted a new folder or one of a quantisation, found {self._folder} with "
                f"other files and no {_MANIFEST}"
            )
        write_atomically(manifest, json.dumps(dict(made_with), indent=1) + "\n")

    def keep(self, index: int, block: nn.Module, layers: Iterable[LayerQuantized]) -> None:
        """Write block `index`, which is as it will be."""
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
                "input_scale": getattr(layer, "input_scale", None),  # where it is fixed
                "bias": layer.bias,
            }
            tensors |= {f"{name}.{part}": one for part, one in parts.items() if one is not None}
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        rows = {"layers": json.dumps([asdict(layer) for layer in layers])}
        write_atomically(self._file(index), lambda aside: save_file(whole, aside, rows))

    def restore(
        self, index: int, block: nn.Module, schemes: Mapping[str, Scheme]
    ) -> list[LayerQuantized] | None:
        """Make block `index` what an earlier run made of it; None where that did not come so far.

        schemes: of its quantised layers, by name within the block.
        Raises InputError for a file that is not one of `keep`.
        """
        from safetensors import SafetensorError, safe_open

        path = self._file(index)
        if not path.is_file():
            return None
        device = next(block.parameters()).device
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                rows = json.loads((file.metadata() or {})["layers"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            layers = [LayerQuantized(**row) for row in rows]
            for name, scheme in schemes.items():
                parts = {
                    part: tensors.pop(f"{name}.{part}", None)
                    for part in ("zero_point", "bias", "input_scale")
                }
                codes, scale = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")
                layer = QuantizedLinear(codes, scale, scheme=scheme.linear, **parts)
                block.set_submodule(name, layer)
            kv_scales = [tensors.pop(name) for name in _KV_SCALES if name in tensors]
            if kv_scales:
                set_kv_scales(block.self_attn, *kv_scales)
            own = block.state_dict()
            for name, value in tensors.items():
                own[name].copy_(value)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: wanted a block as a quantisation keeps it: {one_line(error)}"
            ) from error
        return layers

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"


def hash_of_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of all tensors of a calibration set."""
    whole = hashlib.sha256()
    for batch in batches:
        tensors = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor)}
        add_tensors(whole, sorted(tensors.items()))
    return whole.hexdigest()


def _quantized(block: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: one for name, one in block.named_modules() if isinstance(one, QuantizedLinear)}


def _check_same(path: Path, made_with: Mapping[str, Any]) -> None:
    """InputError where a manifest says anything else."""
    try:
        found = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: wanted a quantisation's manifest: {one_line(error)}") from error
    wanted = json.loads(json.dumps(dict(made_with)))  # tuples have become lists
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"resume: {path.parent}: wanted artefacts of {name} {_short(wanted.get(name))}, "
                f"found {_short(found.get(name))}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
