"""driver: a quantisation on its way through the blocks of a model.

Every block is quantised on what the blocks before it, as they are by then, make of the text: first
smoothed, then each unit of layers solved with the Gram matrix of its inputs, then replaced; what it
now makes of the text feeds the next. In memory are one block and the Gram matrices of its four
units; of held-out text one at a time. Smoothing adds a copy of the block in fp32.

A block's units are solved from its end to its beginning: what flows into one that is left does not
change then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf import __version__
from slmperf.calibrate import BlockStream, Gram
from slmperf.calibrate.usage import device_peak_mib, now, peak_mib
from slmperf.calibrate.workers import check_single
from slmperf.check import InputError
from slmperf.models.checkpoint import weight_bytes
from slmperf.models.formats.compressed_tensors import write_config
from slmperf.models.kv_scales import set_kv_scales
from slmperf.models.quantized import QuantizedLinear, held_weights
from slmperf.models.structure import block_of, layer_name
from slmperf.ops.weight_spec import stored
from slmperf.quant.artefacts import Artefacts, hash_of_batches, hash_of_tensors
from slmperf.quant.folds import folds_of
from slmperf.quant.plan import UNITS, Overrides, Plan, plan_layers
from slmperf.quant.results import LayerQuantized, QuantReport
from slmperf.quant.schemes import Scheme
from slmperf.quant.smoothing import check_smoothing, is_smoothed, mark_smoothed, smooth_block
from slmperf.quant.statistics import FixedScale, kv_scales, static_input_scales
from slmperf.quant.unit import Grams, quantize_unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger("slmperf")

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Checked:
    """What a model is to become, checked.

    smoothed   per block, by name within it, the layers that smoothing is for
    settings   the arguments as JSON values, for the report
    needs      in words what cannot be done without a calibration set, "" for nothing
    """

    plan: Plan
    damping: float | None
    smoothed: tuple[dict[str, Scheme], ...]
    kv_cache: bool
    settings: dict[str, Any]
    needs: str

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        scheme: str | Scheme,
        *,
        calibrated: bool,
        overrides: Overrides | None,
        method: str | None,
        group_size: int | None,
        damping: float | None,
        smooth: bool | None,
        kv_cache: bool,
    ) -> Checked:
        """The arguments of `quantize_model`; calibrated: whether there is a calibration set.

        Raises InputError for what does not go together, see there.
        """
        plan = plan_layers(model, scheme, overrides=overrides, method=method, group_size=group_size)
        if damping is not None and not 0 <= damping < float("inf"):
            raise InputError(f"damping: wanted a number >= 0, found {damping}")
        schemes = plan.schemes.values()
        methods = {one.name: plan.method_of(one, calibrated=calibrated) for one in schemes}
        if damping is not None and set(methods.values()) == {"rtn"}:
            raise InputError("damping: wanted a method that uses it for some layer, found only rtn")
        smoothed = _smoothed(model, plan, smooth, calibrated)
        settings = {
            "scheme": _name(scheme),
            "overrides": {pattern: _name(one) for pattern, one in (overrides or {}).items()},
            "methods": methods,
            "group_size": group_size,
            "damping": damping,
            "smooth": any(smoothed),
            "kv_cache": kv_cache,
        }
        needs = "smoothing" if smooth else plan.needs_calibration()
        needs = "kv_cache" if kv_cache else needs
        return cls(plan, damping, smoothed, kv_cache, settings, needs)

    def made_with(self, calibration: Batches | None, held_out: Batches | None) -> dict[str, Any]:
        """What finished blocks depend on beside the model's weights, as JSON values."""
        hashes = [None if one is None else hash_of_batches(one) for one in (calibration, held_out)]
        return {
            **self.settings,
            "schemes": {name: repr(one) for name, one in self.plan.schemes.items()},
            "calibration": hashes[0],
            "held_out": hashes[1],
        }


def _name(scheme: str | Scheme | None) -> str | None:
    return scheme.name if isinstance(scheme, Scheme) else scheme


def _smoothed(
    model: PreTrainedModel, plan: Plan, smooth: bool | None, calibrated: bool
) -> tuple[dict[str, Scheme], ...]:
    """See Checked; None for `smooth` leaves a model that is smoothed already, or has no calibration
    set."""
    nothing: tuple[dict[str, Scheme], ...] = tuple({} for _ in plan.layers)
    if smooth is False or (smooth is None and (not calibrated or is_smoothed(model.config))):
        return nothing
    found = tuple(
        {
            name: one
            for name, one in block.items()
            if (one.linear.activations is not None if smooth else one.smooth)
        }
        for block in plan.layers
    )
    if any(found):
        check_smoothing(model)
    elif smooth:
        names = ", ".join(plan.schemes)
        raise InputError(f"smooth: wanted a scheme with quantised inputs, found {names}")
    return found


class Quantizing:
    """What is done, and the time and memory that it takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        checked: Checked,
        *,
        calibration: Batches | None,
        held_out: Batches | None,
        source: str,
        tokenizer: PreTrainedTokenizerBase | None,
        spill: str | PathLike[str] | None,
        resume: str | PathLike[str] | None,
        model_hash: str,
        device: torch.device,
        start: float,
    ) -> None:
        """Reads the texts, which began at `start` (`slmperf.calibrate.usage.begin`).

        model_hash: the model's `fingerprint`. device: that of blocks when they are in memory.

        Raises InputError for texts without tokens or none where it is needed, and a folder `resume`
        of another quantisation.
        """
        if calibration is None and checked.needs:
            raise InputError(f"calibration: wanted text for {checked.needs}, found None")
        self._model, self._blocks, self._checked = model, blocks, checked
        self._device, self._start = device, start
        if source.startswith("generic:"):
            _LOG.warning(
                f"calibration on {source}: text of the domain that the model serves loses less"
            )
        texts = [None if one is None else list(one) for one in (calibration, held_out)]
        outside = {name: one for name, one in model.state_dict().items() if block_of(name) is None}
        self._artefacts = None
        if resume is not None:
            check_single("resume")
            made_with = {
                "model": model_hash,
                "device": device.type,
                "torch": torch.__version__,
                "slmperf": __version__,
                "dtype": str(model.dtype).removeprefix("torch."),
                "outside_blocks": hash_of_tensors(outside),
                **checked.made_with(texts[0], texts[1]),
            }
            self._artefacts = Artefacts(resume, made_with)
        more: dict[str, Any] = {"tokenizer": tokenizer, "spill": spill}
        self._streams = [
            None if text is None else BlockStream(model, blocks, text, source=words, **more)
            for text, words in zip(texts, (source, ""), strict=True)
        ]
        for name, stream in zip(("calibration", "held_out"), self._streams, strict=True):
            if stream is not None:
                stream.manifest["model"] = model_hash
                if not stream.manifest["tokens"]:
                    raise InputError(f"{name}: wanted at least one token that counts, found none")
        sizes = {one.untyped_storage().data_ptr(): one.nbytes for one in outside.values()}
        self._bytes_before = self._bytes_after = sum(sizes.values())
        self._layers: list[LayerQuantized] = []
        self._resumed = 0
        self._began = now(device)

    def quantize(self, index: int, block: nn.Module) -> None:
        """Quantise block `index`, or take over what an earlier run made of it, and go on."""
        self._bytes_before += weight_bytes(block)
        layers, made_of = None, ""
        if self._artefacts is not None:
            made_of = hash_of_tensors(block.state_dict())
            schemes, kv_cache = self._checked.plan.layers[index], self._checked.kv_cache
            layers = self._artefacts.restore(index, block, schemes, made_of, kv_cache=kv_cache)
        if layers is None:
            layers = self._quantize(index, block)
            if self._artefacts is not None:
                self._artefacts.keep(index, block, layers, made_of)
        else:
            self._resumed += 1
        self._layers += layers
        self._bytes_after += weight_bytes(block)
        if index + 1 < len(self._blocks):
            with held_weights(block):
                for stream in filter(None, self._streams):
                    stream.advance(index)

    def finish(self) -> QuantReport:
        """Write into the model's configuration what became of it, and tell."""
        write_config(self._model)
        if any(layer.alpha is not None for layer in self._layers):
            mark_smoothed(self._model.config)
        manifests = [None if one is None else dict(one.manifest) for one in self._streams]
        return QuantReport(
            layers=tuple(self._layers),
            tokens=manifests[0]["tokens"] if manifests[0] is not None else 0,
            bytes_before=self._bytes_before,
            bytes_after=self._bytes_after,
            resumed_blocks=self._resumed,
            calibration_seconds=self._began - self._start,
            seconds=now(self._device) - self._start,
            peak_mib=peak_mib(),
            device_peak_mib=device_peak_mib(self._device),
            settings=self._checked.settings,
            calibration=manifests[0],
            held_out=manifests[1],
        )

    def _quantize(self, index: int, block: nn.Module) -> list[LayerQuantized]:
        plan, schemes = self._checked.plan, self._checked.plan.layers[index]
        stream, held_out = self._streams
        smoothing = self._smooth(index, block)
        units = [unit for unit in UNITS if unit[0] in schemes]  # all of a unit or none
        grams = _grams(stream, index, [unit[0] for unit in units])
        fixed = [name for name, scheme in schemes.items() if scheme.static]
        input_scales: dict[str, FixedScale] = {}
        if stream is not None and fixed:
            input_scales = static_input_scales(stream, index, fixed)
        rows: list[LayerQuantized] = []
        for unit in reversed(units):
            first = unit[0]
            training, why = _matrix(grams.pop(first))
            other, _ = _matrix(_grams(held_out, index, [first])[first])
            alpha, unsmoothed = smoothing.get(first, (None, ""))
            scaled = input_scales[first].note if first in input_scales else ""
            found = quantize_unit(
                {layer_name(index, name): block.get_submodule(name) for name in unit},
                schemes[first],
                Grams(training, other, why),
                method=plan.method_of(schemes[first], calibrated=stream is not None),
                damping=self._checked.damping,
                alpha=alpha,
                note="; ".join(filter(None, (unsmoothed, scaled))),
            )
            del training, other
            for name, solved in zip(unit, found.values(), strict=True):
                scale, zero_point = solved.scales
                input_scale = input_scales[name].scale if name in input_scales else None
                made = QuantizedLinear(
                    solved.codes,
                    scale,
                    zero_point,
                    block.get_submodule(name).bias,
                    scheme=schemes[name].linear,
                    input_scale=None if input_scale is None else stored(input_scale, scale.dtype),
                )
                block.set_submodule(name, made)
            rows[:0] = [solved.row for solved in found.values()]
        if stream is not None and self._checked.kv_cache:
            with held_weights(block):
                scales = kv_scales(stream, index)
            own = [stored(one.scale, self._model.dtype) for one in scales]
            set_kv_scales(block.self_attn, own[0], own[1])
            for name, one in zip(("self_attn.k_proj", "self_attn.v_proj"), scales, strict=True):
                _note(rows, layer_name(index, name), one.note)
        return rows

    def _smooth(self, index: int, block: nn.Module) -> dict[str, tuple[float | None, str]]:
        """Smooth block `index`: of units, by their first layer, alpha, and why there is none."""
        stream, smoothed = self._streams[0], self._checked.smoothed[index]
        if stream is None or not smoothed:
            return {}
        linear = {name: scheme.linear for name, scheme in smoothed.items()}
        try:
            made = smooth_block(stream, index, linear)
        except InputError as error:
            return dict.fromkeys(smoothed, (None, f"not smoothed: {error}"))
        found = {}
        for fold in folds_of(block, index):
            why = made.notes.get(fold.producer)
            alpha = made.alphas.get(fold.producer)
            found[fold.consumers[0]] = alpha, f"not smoothed: {why}" if why else ""
        return found


def _grams(stream: BlockStream | None, index: int, names: list[str]) -> dict[str, Gram | str]:
    """The Gram matrices of the inputs of layers, or in words why one has none."""
    if stream is None:
        return dict.fromkeys(names, "")
    try:
        return dict(stream.grams(index, names))
    except InputError as error:
        if len(names) == 1:
            return {names[0]: str(error)}
        # One of them at a time: the others go on.
        return {name: one for each in names for name, one in _grams(stream, index, [each]).items()}


def _matrix(gram: Gram | str) -> tuple[Tensor | None, str]:
    """H over the weight of its tokens, fp32, or why there is none; the sums are used up."""
    if isinstance(gram, str):
        return None, gram
    matrix = gram.matrix
    matrix /= gram.weight
    return matrix.float(), ""


def _note(rows: list[LayerQuantized], name: str, note: str) -> None:
    """Say it in the layer's row, or in the log where the layer stays as it is and has none."""
    places = [place for place, row in enumerate(rows) if row.name == name]
    if note and not places:
        _LOG.warning(note)
    for place in places:
        told = "; ".join(filter(None, (rows[place].note, note)))
        rows[place] = replace(rows[place], note=told)
