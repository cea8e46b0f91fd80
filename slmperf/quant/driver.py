"""driver: a quantisation on its way through the blocks of a model.

Every block is quantised on what the blocks before it, as they are by then, make of the text: first
smoothed, then each unit of layers solved with the Gram matrix of its inputs, then replaced; what it
now makes of the text feeds the next. In memory are one block and the Gram matrices of its four
units.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmperf.calibrate import BlockStream, Gram
from slmperf.calibrate.usage import device_peak_mib, now, peak_mib
from slmperf.calibrate.workers import check_single
from slmperf.check import InputError
from slmperf.models.checkpoint import weight_bytes
from slmperf.models.formats.compressed_tensors import write_config
from slmperf.models.kv_scales import set_kv_scales
from slmperf.models.quantized import QuantizedLinear, held_weights
from slmperf.models.structure import layer_name
from slmperf.ops.weight_spec import stored
from slmperf.quant.artefacts import Artefacts, hash_of_batches
from slmperf.quant.plan import UNITS, Overrides, Plan, plan_layers
from slmperf.quant.results import LayerQuantized, QuantReport
from slmperf.quant.schemes import Scheme
from slmperf.quant.smoothing import check_smoothing, is_smoothed, mark_smoothed, smooth_block
from slmperf.quant.statistics import kv_scales, static_input_scales
from slmperf.quant.unit import Grams, quantize_unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger("slmperf")

Batches = Iterable[Mapping[str, Any]]
# What of a block's smoothing went into the inputs of a unit, by the unit's first layer.
_FOLDS = {
    "self_attn.q_proj": ("input_layernorm",),
    "self_attn.o_proj": ("self_attn.v_proj",),
    "mlp.gate_proj": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "mlp.down_proj": ("mlp.up_proj",),
}


@dataclass(frozen=True)
class Asked:
    """What a model is to become, checked.

    smoothed   per block, by name within it, the layers that smoothing is for
    settings   the arguments as JSON values, for the report
    """

    plan: Plan
    damping: float | None
    smoothed: tuple[dict[str, Scheme], ...]
    kv_cache: bool
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        scheme: str | Scheme,
        *,
        text: bool,
        overrides: Overrides | None,
        method: str | None,
        group_size: int | None,
        damping: float | None,
        smooth: bool | None,
        kv_cache: bool,
    ) -> Asked:
        """The arguments of `quantize_model`; text: whether there is a calibration set.

        Raises InputError for what does not go together, see there.
        """
        plan = plan_layers(model, scheme, overrides=overrides, method=method, group_size=group_size)
        if damping is not None and not 0 <= damping < float("inf"):
            raise InputError(f"damping: wanted a number >= 0, found {damping}")
        smoothed = _smoothed(model, plan, smooth, text)
        settings = {
            "scheme": _name(scheme),
            "overrides": {pattern: _name(one) for pattern, one in (overrides or {}).items()},
            "methods": {one.name: plan.method_of(one, text=text) for one in plan.schemes.values()},
            "group_size": group_size,
            "damping": damping,
            "smooth": any(smoothed),
            "kv_cache": kv_cache,
        }
        if not text:
            wanting = plan.needs_text()
            if smooth:
                wanting = "smoothing"
            if kv_cache:
                wanting = "kv_cache"
            if wanting:
                raise InputError(f"calibration: wanted text for {wanting}, found None")
        return cls(plan, damping, smoothed, kv_cache, settings)


def _name(scheme: str | Scheme | None) -> str | None:
    return scheme.name if isinstance(scheme, Scheme) else scheme


def _smoothed(
    model: PreTrainedModel, plan: Plan, smooth: bool | None, text: bool
) -> tuple[dict[str, Scheme], ...]:
    """See Asked; None for `smooth` leaves a model that is smoothed already, or without text."""
    nothing: tuple[dict[str, Scheme], ...] = tuple({} for _ in plan.layers)
    if smooth is False or (smooth is None and (not text or is_smoothed(model.config))):
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
        asked: Asked,
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

        Raises InputError for texts without tokens and a folder `resume` of another quantisation.
        """
        self._model, self._blocks, self._asked = model, blocks, asked
        self._device, self._start = device, start
        if source.startswith("generic:"):
            _LOG.warning(
                f"calibration on {source}: text of the domain that the model serves loses less"
            )
        texts = [None if one is None else list(one) for one in (calibration, held_out)]
        self._artefacts = None
        if resume is not None:
            check_single("resume")
            hashes = [None if one is None else hash_of_batches(one) for one in texts]
            made_with = {
                "model": model_hash,
                "dtype": str(model.dtype).removeprefix("torch."),
                **asked.settings,
                "schemes": {name: repr(one) for name, one in asked.plan.schemes.items()},
                "calibration": hashes[0],
                "held_out": hashes[1],
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
        outside = {
            tensor.untyped_storage().data_ptr(): tensor.nbytes
            for name, tensor in model.state_dict().items()
            if not name.startswith(layer_name(0, "").removesuffix("0."))
        }
        self._bytes_before = self._bytes_after = sum(outside.values())
        self._layers: list[LayerQuantized] = []
        self._resumed = 0
        self._began = now(device)

    def quantize(self, index: int, block: nn.Module) -> None:
        """Quantise block `index`, or take over what an earlier run made of it, and go on."""
        self._bytes_before += weight_bytes(block)
        layers = None
        if self._artefacts is not None:
            layers = self._artefacts.restore(index, block, self._asked.plan.layers[index])
        if layers is None:
            layers = self._quantize(index, block)
            if self._artefacts is not None:
                self._artefacts.keep(index, block, layers)
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
        if any(self._asked.smoothed):
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
            settings=self._asked.settings,
            calibration=manifests[0],
            held_out=manifests[1],
        )

    def _quantize(self, index: int, block: nn.Module) -> list[LayerQuantized]:
        plan, schemes = self._asked.plan, self._asked.plan.layers[index]
        stream = self._streams[0]
        smoothed = self._asked.smoothed[index]
        alphas: Mapping[str, float | None] = {}
        unsmoothed = ""
        if stream is not None and smoothed:
            linear = {name: scheme.linear for name, scheme in smoothed.items()}
            try:
                alphas = smooth_block(stream, index, linear).alphas
            except InputError as error:
                unsmoothed = f"not smoothed: {error}"
        units = [[name for name in unit if name in schemes] for unit in UNITS]
        units = [unit for unit in units if unit]
        firsts = [unit[0] for unit in units]
        training, held_out = (_grams(one, index, firsts) for one in self._streams)
        fixed = [name for name, scheme in schemes.items() if scheme.static]
        input_scales: dict[str, Tensor] = {}
        if stream is not None and fixed:
            input_scales = static_input_scales(stream, index, fixed)
        rows = []
        for unit in units:
            layers = {layer_name(index, name): block.get_submodule(name) for name in unit}
            own, other = training.pop(unit[0]), held_out.pop(unit[0])
            found = quantize_unit(
                layers,
                schemes[unit[0]],
                Grams(_matrix(own), _matrix(other), own if isinstance(own, str) else ""),
                method=plan.method_of(schemes[unit[0]], text=stream is not None),
                damping=self._asked.damping,
                alpha=_first(alphas.get(fold) for fold in _FOLDS[unit[0]]),
                note=unsmoothed if unit[0] in smoothed else "",
            )
            del own, other
            for name, solved in zip(unit, found.values(), strict=True):
                scale, zero_point = solved.scales
                made = QuantizedLinear(
                    solved.codes,
                    scale,
                    zero_point,
                    block.get_submodule(name).bias,
                    scheme=schemes[name].linear,
                    input_scale=_stored(input_scales.get(name), scale.dtype),
                )
                block.set_submodule(name, made)
                rows.append(solved.row)
        if stream is not None and self._asked.kv_cache:
            with held_weights(block):
                scales = kv_scales(stream, index)
            set_kv_scales(block.self_attn, *(_stored(scale, self._model.dtype) for scale in scales))
        return rows


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


def _matrix(gram: Gram | str) -> Tensor | None:
    """H over the weight of its tokens, fp32."""
    if isinstance(gram, str):
        return None
    matrix = gram.matrix
    matrix /= gram.weight
    return matrix.float()


def _stored(scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if scale is None else stored(scale, dtype)


def _first(alphas: Iterable[float | None]) -> float | None:
    return next((alpha for alpha in alphas if alpha is not None), None)
