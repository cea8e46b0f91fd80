"""From a language model of Transformers to the head that kd_loss takes.

The model is called as a whole, wrappers around it too (DistributedDataParallel sees its forward),
but its output layer gets the last position of every row alone: a hook keeps what the layer was to
be given, which is exactly what its logits come from, whatever stands before it.

What happens to logits behind the output layer is in the configuration under several names:

    cap tanh(z / cap)   final_logit_softcapping (Gemma), logits_soft_cap (RecurrentGemma)
    z * value           logit_scale (Cohere), output_multiplier (Muse), lm_head_multiplier (Falcon)
    z / value           logits_scaling (Granite, MiniCPM3; HyperCLOVA X multiplies by it)

A model's own logits of those last positions are compared with them the first time it is run, so
that a model which does anything else is refused and not trained on other logits than its own.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops import StudentHead, TeacherHead, TeacherLogits, TeacherTopK
from slmperf.ops.kd_loss.heads import Teacher, scaled
from slmperf.ops.kd_loss.inputs import whole

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = {  # name -> whether it multiplies
    "logit_scale": True,
    "output_multiplier": True,
    "lm_head_multiplier": True,
    "logits_scaling": False,
}


def student_head(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    positions: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> StudentHead:
    """Run a causal language model on `inputs`; its hidden states, output layer and logit scaling.

    model      of Transformers, or around one: DistributedDataParallel, FSDP2, PEFT
    inputs     arguments of its forward, input_ids (B, L) or inputs_embeds among them, no labels
    positions  (n,) int64 of the B L tokens, those that enter the loss; None: all
    dtype      that hidden states and weights are cast to; None: what the output layer would be
               computed in, so autocast's where it is on

    hidden is (n, D) or (B L, D): row b L + t predicts token t + 1 of sequence b. InputError for a
    model whose logits are not softcap(scale (hidden weight' + bias)), or with adapters on its
    output layer.
    """
    return StudentHead(*_run(model, inputs, positions, dtype))


@torch.no_grad()
def teacher_head(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    positions: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> TeacherHead:
    """The same of a teacher, without a graph. The caller has put it into eval()."""
    return TeacherHead(*_run(model, inputs, positions, dtype))


def same_vocabulary(
    student: StudentHead, teacher: Teacher, tokens: int | None = None
) -> tuple[StudentHead, Teacher]:
    """Both over their first V tokens, V the smaller of their vocabularies: views, where they are
    not of one size already. What is beyond gets no gradient.

    tokens  V of a teacher that does not know it (TeacherTopK); None: the student's
    """
    tokens = tokens if isinstance(teacher, TeacherTopK) else teacher.vocabulary
    size = student.vocabulary if tokens is None else min(tokens, student.vocabulary)
    return _first(student, size), _first(teacher, size)


def _first(head: Any, size: int) -> Any:
    """Of `size` tokens; a head that FSDP 2 holds in shards is gathered."""
    if isinstance(head, TeacherTopK) or head.vocabulary == size:
        return head
    if isinstance(head, TeacherLogits):
        return TeacherLogits(head.logits[:, :size])
    head = whole(head)
    bias = None if head.bias is None else head.bias[:size]
    return replace(head, weight=head.weight[:size], bias=bias)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(model).__mro__):
        raise InputError(
            "kd_loss: model is a FullyShardedDataParallel, expected fully_shard (FSDP2): outside "
            "its forward FSDP 1 holds no weights of the output layer"
        )
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


class _Scaling(NamedTuple):
    """z = softcap(scale * raw)."""

    scale: float | None
    softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        return scaled(raw, self.scale, self.softcap)


_KNOWN: WeakKeyDictionary[torch.nn.Module, _Scaling] = WeakKeyDictionary()


def _run(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, float | None, float | None]:
    """The fields of a head, in their order."""
    inner = unwrapped(model)
    layer = _output_layer(inner)
    seen: list[tuple[Tensor, torch.dtype | None]] = []
    raw: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = given
        kind = hidden.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        seen.append((hidden, cast))
        # Contiguous: of a strided (B, 1, D) the layer would copy its weight for every row.
        return (hidden[..., -1:, :].contiguous(),)

    hooks = [layer.register_forward_pre_hook(keep)]
    if layer not in _KNOWN:
        hooks.append(layer.register_forward_hook(lambda *call: raw.append(call[2])))
    plain: dict[str, Any] = {"use_cache": False}
    if getattr(getattr(inner, "config", None), "output_router_logits", False):
        # A mixture would make a loss of them, from a padding mask, which a packed batch has not.
        plain["output_router_logits"] = False
    try:
        outputs = model(**{**inputs, **additive_mask(inner, inputs), **plain})
    finally:
        for hook in hooks:
            hook.remove()
    name = type(inner).__name__
    if len(seen) != 1:
        raise InputError(
            f"kd_loss: {name} called its output layer {len(seen)} times, expected once"
        )
    (hidden, cast), tokens = seen[0], _tokens(inputs)
    if tokens is not None and hidden.shape[:2] != tokens:
        raise InputError(
            f"kd_loss: {name} gives its output layer {tuple(hidden.shape)}, expected "
            f"{tuple(tokens)} positions, those of its inputs"
        )
    scaling = _KNOWN.get(layer)
    if scaling is None:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        _KNOWN[layer] = scaling = _scaling(inner, raw[0].detach(), logits.detach())
    if torch.is_grad_enabled() and _fully_sharded(model):
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        hidden = _Tied.apply(hidden, logits)
    hidden = hidden.flatten(0, -2)
    if positions is not None:
        hidden = hidden.index_select(0, positions.to(hidden.device))
    weight, bias = layer.weight, getattr(layer, "bias", None)
    # FSDP 2 keeps weights in fp32 and multiplies in the dtype of what it is given.
    wanted = dtype or cast or hidden.dtype
    bias = None if bias is None else bias.to(wanted)
    return hidden.to(wanted), weight.to(wanted), bias, scaling.softcap, scaling.scale


def additive_mask(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A 4-d bool mask, True where attended, as what is added to the scores.

    Transformers hands it on as it is. Eager attention would add True as 1; SDPA would turn it into
    this in every layer anew, and autograd would keep each.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 4 or mask.dtype != torch.bool:
        return {}
    kind = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if kind not in ("sdpa", "eager"):
        raise InputError(
            f"kd_loss: attention_mask is 4-d and the attention of {type(model).__name__} is "
            f"{kind}, expected sdpa or eager, or rows of one example (packing=False)"
        )
    device = mask.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else model.dtype
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return {"attention_mask": added.masked_fill_(~mask, torch.finfo(dtype).min)}


def _fully_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP 2 holds the model; asked without importing it where nothing else has."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


class _Tied(torch.autograd.Function):
    """Hidden states whose gradient reaches the model's logits as well, as zeros.

    FSDP 2 begins its backward at what a module returned; of a model that is one group that is the
    logits alone, and without them its gradients would never be reduced.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape, dtype=ctx.dtype)


def _output_layer(model: torch.nn.Module) -> torch.nn.Module:
    """What makes logits of hidden states."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    name = type(model).__name__
    if layer is None or getattr(layer, "weight", None) is None:
        raise InputError(
            f"kd_loss: {name} has no output layer (get_output_embeddings), expected a causal "
            "language model of Transformers"
        )
    if getattr(layer, "base_layer", None) is not None or not layer.weight.is_floating_point():
        raise InputError(
            f"kd_loss: the output layer of {name} is a {type(layer).__module__}."
            f"{type(layer).__name__}, expected one whose product is with `weight` alone: without "
            "an adapter, and not quantised"
        )
    return layer


def _tokens(inputs: Mapping[str, Any]) -> torch.Size | None:
    """(B, L)."""
    if inputs.get("input_ids") is not None:
        return inputs["input_ids"].shape
    embedded = inputs.get("inputs_embeds")
    return None if embedded is None else embedded.shape[:2]


def _scaling(model: torch.nn.Module, raw: Tensor, logits: Tensor) -> _Scaling:
    """Which of the configuration's scalings makes a model's logits of its output layer's."""
    config = model.config.get_text_config(decoder=True)
    close = max(4 * max(torch.finfo(one.dtype).eps for one in (raw, logits)), 1e-4)
    if raw.shape == logits.shape:
        usable = raw.isfinite()  # padding may be NaN
        raw, logits = raw[usable].float(), logits[usable].float()
        near = close * float(logits.abs().max()) if len(logits) else 0.0
        for found in _candidates(config):
            if bool(((found(raw) - logits).abs() <= near).all()):
                return found
    given = {name: getattr(config, name, None) for name in (*_SCALES, *_CAPS)}
    told = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    raise InputError(
        f"kd_loss: the logits of {type(model).__name__} are not those of its output layer under "
        f"{told or 'no scaling'} of its configuration, expected softcap(scale * logits)"
    )


def _candidates(config: Any) -> Iterator[_Scaling]:
    """What the names commonly mean comes first."""
    caps = [getattr(config, name, None) for name in _CAPS]
    scales: list[float | None] = []
    for name, multiplies in _SCALES.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float) and 0.0 < value < math.inf:
            scales += [value, 1.0 / value] if multiplies else [1.0 / value, value]
    usable = [float(cap) for cap in caps if cap is not None]
    for scale, cap in itertools.product([*scales, None], [*usable, None]):
        yield _Scaling(None if scale == 1.0 else scale, cap)
