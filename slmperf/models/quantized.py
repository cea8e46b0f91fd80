"""QuantizedLinear: a linear layer that holds its weight as a checkpoint does, codes and scales.

    y = x~ W' + bias        W = (codes - zero_point) * scale        x~: x, or x rounded as well

Its buffers have the names, dtypes and shapes of the compressed-tensors layout
(https://github.com/vllm-project/compressed-tensors), so that a model takes the memory of its file
and is saved as it is:

    weight            (out, in) int8 or float8_e4m3fn; where only an integer weight is quantised
    weight_packed     (out, ceil(in * bits / 32)) int32 instead, with weight_shape (2,) int64
    weight_scale      (out, groups), rows and columns of blocks, or (1,) for the whole weight
    weight_zero_point of asymmetric weights, int8 as weight_scale; packed: along the outputs, int32
    input_scale       (1,), of inputs with a static scale

The weight is put together as the readers of the format do it, in the scale's dtype, so that they
compute the same logits to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.formats.packing import pack, unpack
from slmperf.ops.activation_spec import GROUP, ActivationSpec
from slmperf.ops.weight_spec import Scales, WeightSpec


@dataclass(frozen=True)
class LinearScheme:
    """How a linear layer is quantised: its weight, and its inputs; None: they stay as they are."""

    weights: WeightSpec
    activations: ActivationSpec | None = None

    @property
    def packed(self) -> bool:
        """Whether codes are stored packed: readers want it of integer weights alone."""
        return self.weights.kind == "int" and self.activations is None


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight, without gradients for it.

    codes        (out, in) int8 or float8_e4m3fn
    scale        as `WeightSpec.scale_shape` says, floating
    zero_point   of that shape, int8; None where the weight is symmetric
    bias         (out,) or None
    scheme       what the tensors are
    input_scale  one number, floating, where the inputs have a static scale

    `.to(dtype)` changes the bias alone: codes and scales are the weight. Raises InputError for
    tensors that the scheme does not want.
    """

    weight_scale: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scheme: LinearScheme,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check(codes, scale, zero_point, input_scale, scheme)
        spec = scheme.weights
        self.scheme = scheme
        self.out_features, self.in_features = codes.shape
        # Buffers: an integer tensor cannot take a gradient.
        if scheme.packed:
            self.register_buffer("weight_packed", pack(codes, spec.bits))
            self.register_buffer("weight_shape", torch.tensor(codes.shape, device=codes.device))
        else:
            self.register_buffer("weight", _own(codes))
        if spec.group_size is None:
            scale = scale.view(1)
        self.register_buffer("weight_scale", _own(scale))
        if zero_point is not None:
            if spec.group_size is None:
                zero_point = zero_point.view(1)
            elif scheme.packed:
                zero_point = pack(zero_point.T, spec.bits).T
            self.register_buffer("weight_zero_point", _own(zero_point))
        if input_scale is not None:
            self.register_buffer("input_scale", _own(input_scale.reshape(1)))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._held: Tensor | None = None

    @classmethod
    def empty(
        cls, outputs: int, inputs: int, scheme: LinearScheme, dtype: torch.dtype, *, bias: bool
    ) -> QuantizedLinear:
        """A layer without contents, on the meta device, its scales and bias in `dtype`: what a
        checkpoint's tensors are put into."""
        spec = scheme.weights
        with torch.device("meta"):
            scale = torch.empty(spec.scale_shape((outputs, inputs)), dtype=dtype)
            layer = cls(
                torch.empty(outputs, inputs, dtype=spec.code_dtype),
                scale,
                None if spec.symmetric else torch.empty(scale.shape, dtype=torch.int8),
                torch.empty(outputs, dtype=dtype) if bias else None,
                scheme=scheme,
                input_scale=torch.empty(1, dtype=dtype) if _static(scheme) else None,
            )
        return layer

    @property
    def codes(self) -> Tensor:
        """(out, in) int8 or float8_e4m3fn; a copy where they are stored packed."""
        if self.scheme.packed:
            return unpack(self.weight_packed, self.scheme.weights.bits, self.in_features)
        return self.weight

    @property
    def scales(self) -> Scales:
        """Scales and zero points in the shape that `WeightSpec` gives them."""
        spec = self.scheme.weights
        scale = self.weight_scale.view(spec.scale_shape((self.out_features, self.in_features)))
        zero_point = getattr(self, "weight_zero_point", None)
        if zero_point is not None and self.scheme.packed and spec.group_size is not None:
            zero_point = unpack(zero_point.T.contiguous(), spec.bits, self.out_features).T
        return Scales(scale, None if zero_point is None else zero_point.reshape(scale.shape))

    def dequantized(self) -> Tensor:
        """The weight that the layer multiplies with, (out, in) in the scale's dtype."""
        return self.scheme.weights.decode(self.codes, self.scales)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) floating -> (..., out) in its dtype; the bias must be of that dtype."""
        if self.scheme.activations is not None:
            scale = getattr(self, "input_scale", None)
            input = self.scheme.activations.fake_quantized(input, scale)
        weight = self.dequantized() if self._held is None else self._held
        return nn.functional.linear(input, weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """To another device or dtype; the buffers keep their dtype (fp8 counts as floating)."""
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        return self


@contextlib.contextmanager
def held_weights(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block every QuantizedLinear below `module` multiplies with a weight that is
    put together once, not at every call: for many batches in a row, at the memory of the weights.

    The layers are not to be changed or moved inside it.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    try:
        for layer in layers:
            layer._held = layer.dequantized()
        yield
    finally:
        for layer in layers:
            layer._held = None


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(full name, layer) of every nn.Linear except the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def replace_linear(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None]) -> int:
    """Put `make(name, layer)` in the place of every linear layer but the output head.

    None leaves a layer as it is. Returns how many were replaced.
    """
    # All of them first: when `make` raises, the model is unchanged.
    made = [(name, make(name, linear)) for name, linear in decoder_linears(model)]
    replaced = [(name, new) for name, new in made if new is not None]
    for name, new in replaced:
        model.set_submodule(name, new)
    return len(replaced)


def _own(tensor: Tensor) -> Tensor:
    """A copy: callers cut tensors out of larger ones and give several layers the same one, which
    files of checkpoints cannot hold."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _static(scheme: LinearScheme) -> bool:
    return scheme.activations is not None and scheme.activations.static


def _check(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    scheme: LinearScheme,
) -> None:
    """InputError unless the tensors are what the scheme wants."""
    spec = scheme.weights
    if codes.dtype != spec.code_dtype or codes.dim() != 2:
        raise InputError(
            f"QuantizedLinear: codes are {codes.dtype} {tuple(codes.shape)}, "
            f"expected {spec.code_dtype} (out, in)"
        )
    try:
        wanted = spec.scale_shape((codes.shape[0], codes.shape[1]))
    except InputError as error:
        raise InputError(f"QuantizedLinear: {error}") from error
    if scale.shape != wanted or not scale.is_floating_point():
        raise InputError(
            f"QuantizedLinear: scale is {scale.dtype} {tuple(scale.shape)}, "
            f"expected floating {wanted}"
        )
    if spec.symmetric != (zero_point is None):
        found = "none" if zero_point is None else "some"
        raise InputError(f"QuantizedLinear: zero_point: found {found} with {spec}")
    if zero_point is not None and (zero_point.shape != wanted or zero_point.dtype != torch.int8):
        raise InputError(
            f"QuantizedLinear: zero_point is {zero_point.dtype} {tuple(zero_point.shape)}, "
            f"expected torch.int8 {wanted}"
        )
    activations = scheme.activations
    if _static(scheme) != (input_scale is not None and input_scale.numel() == 1):
        found = "none" if input_scale is None else str(tuple(input_scale.shape))
        raise InputError(
            f"QuantizedLinear: input_scale: found {found} with {activations}, "
            "wanted one number where the inputs have a static scale"
        )
    if activations is not None and activations.strategy == "group" and codes.shape[1] % GROUP:
        raise InputError(
            f"QuantizedLinear: activations: groups of {GROUP} do not divide {codes.shape[1]} inputs"
        )
