"""QuantizedLinear: a linear layer with a quantised weight, computed by `slmperf.ops.linear`.

    y = x~ W' + bias        W = (codes - zero_point) * scale        x~: x, or x rounded as well

It holds its weight once, in the layout that the kernels read (`Int4Weight`, `Int8Weight`,
`Fp8Weight`), as buffers. What it saves and loads are the tensors of the compressed-tensors layout
(formats/tensors.py and input_scale, (1,), where inputs have a static scale;
https://github.com/vllm-project/compressed-tensors), into which codes and scales go without loss.

Schemes that `linear` has no kernel for (2 and 3 bits, odd groups, rounded inputs with groups or
zero points) hold the layout's own tensors, and their weight is put together at every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.formats.tensors import codes_of, scales_of, tensors_of
from slmperf.ops.activation_spec import GROUP, ActivationSpec
from slmperf.ops.linear import Fp8Weight, Int4Weight, Int8Weight, linear
from slmperf.ops.linear.weights import BLOCK, GROUPS
from slmperf.ops.routing import HALF_AND_FLOAT
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
    input_scale  one number, floating, where the inputs have a static scale; it is rounded to the
                 dtype of `scale`, in which it is stored

    `.to(dtype)` changes the bias alone: codes and scales are the weight. Raises InputError for
    tensors that the scheme does not want.
    """

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
        self.scheme = scheme
        self.out_features, self.in_features = codes.shape
        known = scale.dtype in HALF_AND_FLOAT
        self._int4_group = _int4_group(scheme, self.in_features) if known else None
        self._eight_bit = _eight_bit(scheme) if known else None
        if input_scale is not None:
            input_scale = input_scale.reshape(1).to(scale.dtype)
        self._hold(_own(codes), Scales(_own(scale), _own(zero_point)), _own(input_scale))
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
            return cls(
                torch.empty(outputs, inputs, dtype=spec.code_dtype),
                scale,
                None if spec.symmetric else torch.empty(scale.shape, dtype=torch.int8),
                torch.empty(outputs, dtype=dtype) if bias else None,
                scheme=scheme,
                input_scale=torch.empty(1, dtype=dtype) if _static(scheme) else None,
            )

    @property
    def kernel_weight(self) -> Int4Weight | Int8Weight | Fp8Weight | None:
        """What `slmperf.ops.linear` multiplies with: the layer's buffers; None where there is no
        kernel for the scheme."""
        if self._int4_group is not None:
            sizes = self.out_features, self.in_features, self._int4_group
            return Int4Weight(self.packed, self.scale, self.zero_point, *sizes)
        if self._eight_bit is not None:
            return self._eight_bit(
                self.data, self.scale, self.scheme.activations, self.input_scale, self._scale_dtype
            )
        return None

    @property
    def codes(self) -> Tensor:
        """(out, in) int8 or float8_e4m3fn; a copy where they are held packed."""
        kernel = self.kernel_weight
        if kernel is not None:
            return kernel.codes
        return codes_of(dict(self.named_buffers()), self.scheme.weights, self.in_features)

    @property
    def scales(self) -> Scales:
        """Scales and zero points in the shape that `WeightSpec` gives them."""
        kernel = self.kernel_weight
        if kernel is not None:
            return kernel.scales
        shape = self.out_features, self.in_features
        buffers = dict(self.named_buffers())
        return scales_of(buffers, self.scheme.weights, shape, packed=self.scheme.packed)

    @property
    def qweight(self) -> Tensor:
        """The codes as they are held, for peft: it looks by this name where a layer is, and takes
        the dtype of floating ones for its own."""
        held = next(self.buffers())
        return held.view(torch.uint8) if held.is_floating_point() else held

    def dequantized(self) -> Tensor:
        """The weight that the layer multiplies with, (out, in) in the scale's dtype."""
        return self.scheme.weights.decode(self.codes, self.scales)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) floating -> (..., out) in its dtype."""
        return self.multiply(input, self.bias)

    def multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The same with a bias (out,) that belongs to another, in the input's dtype or fp32."""
        kind = input.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))  # as of any other linear layer
        kernel = self.kernel_weight
        if kernel is not None and input.dtype in HALF_AND_FLOAT:
            return linear(input, kernel, bias)
        if self.scheme.activations is not None:
            rounded = self.scheme.activations.fake_quantized(input, self.input_scale)
            input = input + (rounded - input).detach() if input.requires_grad else rounded
        weight = self.dequantized() if self._held is None else self._held
        return nn.functional.linear(input, weight.to(input.dtype), bias)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds of the layer beside its bias, by name; a copy where
        they are held in another form."""
        return self._as_stored(self.codes, self.scales, self.input_scale, self.scheme.packed)

    def layout(self, *, packed: bool | None = None) -> dict[str, Tensor]:
        """Their names, shapes and dtypes: on the meta device.

        packed   whether codes are stored packed; None: as the layer stores them
        """
        spec, shape = self.scheme.weights, (self.out_features, self.in_features)
        packed = self.scheme.packed if packed is None else packed
        with torch.device("meta"):
            codes = torch.empty(shape, dtype=spec.code_dtype)
            scale = torch.empty(spec.scale_shape(shape), dtype=self._scale_dtype)
            zero_point = None if spec.symmetric else torch.empty(scale.shape, dtype=torch.int8)
            input_scale = torch.empty(1) if _static(self.scheme) else None
            return self._as_stored(codes, Scales(scale, zero_point), input_scale, packed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _as_stored(
        self, codes: Tensor, scales: Scales, input_scale: Tensor | None, packed: bool
    ) -> dict[str, Tensor]:
        tensors = tensors_of(codes, scales, self.scheme.weights, packed=packed)
        if input_scale is not None:
            tensors["input_scale"] = input_scale.to(scales.scale.dtype)
        return tensors

    def _hold(self, codes: Tensor, scales: Scales, input_scale: Tensor | None) -> None:
        """Make the buffers of a weight; they may be what is given."""
        for name, tensor in self._arranged(codes, scales, input_scale).items():
            self.register_buffer(name, tensor, persistent=False)  # saved in another form
        self._scale_dtype = scales.scale.dtype

    def _arranged(
        self, codes: Tensor, scales: Scales, input_scale: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The buffers that a weight becomes, by name."""
        if self._int4_group is not None:
            four = Int4Weight.from_codes(codes, scales, self._int4_group)
            buffers = {"packed": four.packed, "scale": four.scale, "zero_point": four.zero_point}
            return {**buffers, "input_scale": None}
        if self._eight_bit is not None:
            activations = self.scheme.activations
            eight = self._eight_bit.from_codes(codes, scales.scale, activations, input_scale)
            return {"data": eight.data, "scale": eight.scale, "input_scale": eight.input_scale}
        tensors = tensors_of(codes, scales, self.scheme.weights, packed=self.scheme.packed)
        tensors.pop("weight_shape", None)
        return {**tensors, "input_scale": input_scale}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Arrange the stored tensors as the kernels want them, once; weight_shape is not read.
        Integers of eight bits may be stored as they are, too, where the layer stores them packed.
        """
        wanted = self.layout(packed=self.scheme.packed and f"{prefix}weight" not in state_dict)
        found = {name: state_dict[prefix + name] for name in wanted if prefix + name in state_dict}
        rest = {key: value for key, value in state_dict.items()
                if key.removeprefix(prefix) not in wanted}  # fmt: skip
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict:
            missing_keys += [prefix + name for name in wanted if name not in found]
        wrong = [
            f"{prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"wanted {wanted[name].dtype} {tuple(wanted[name].shape)}"
            for name, tensor in found.items()
            if not _alike(tensor, wanted[name])
        ]
        error_msgs += wrong
        if wrong or not found:
            return
        if len(found) < len(wanted):  # the others are the layer's own
            found = self.stored() | found
        spec, shape = self.scheme.weights, (self.out_features, self.in_features)
        codes = codes_of(found, spec, self.in_features)
        scales = scales_of(found, spec, shape, packed=self.scheme.packed)
        input_scale = found.get("input_scale")
        if local_metadata.get("assign_to_params_buffers", False):
            self._hold(codes, scales, input_scale)
            return
        scales = scales._replace(scale=scales.scale.to(self._scale_dtype))
        for name, tensor in self._arranged(codes, scales, input_scale).items():
            if tensor is not None:
                self.get_buffer(name).copy_(tensor)

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
    """Inside the `with` block every QuantizedLinear below `module` that has no kernel multiplies
    with a weight that is put together once, not at every call: for many batches in a row, at the
    memory of the weights.

    The layers are not to be changed or moved inside it.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    layers = [layer for layer in layers if layer.kernel_weight is None]
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
    made = [(name, make(name, layer)) for name, layer in decoder_linears(model)]
    replaced = [(name, new) for name, new in made if new is not None]
    for name, new in replaced:
        model.set_submodule(name, new)
    return len(replaced)


def _int4_group(scheme: LinearScheme, inputs: int) -> int | None:
    """The group_size of an `Int4Weight` with so many inputs; None: it cannot be one."""
    spec = scheme.weights
    if (spec.kind, spec.bits) != ("int", 4) or scheme.activations is not None or not spec.by_row:
        return None
    group = spec.group_of(inputs)
    return -1 if group == inputs else group if group in GROUPS else None


def _eight_bit(scheme: LinearScheme) -> type[Int8Weight | Fp8Weight] | None:
    """The class of an eight-bit weight; None: there is no kernel for it."""
    spec, activations = scheme.weights, scheme.activations
    if spec.bits != 8 or (activations is not None and activations.kind != spec.kind):
        return None
    if spec.kind == "float":
        known = spec.block == (BLOCK, BLOCK) or spec.block is None and spec.group_size in (-1, None)
        return Fp8Weight if known else None
    by_channel = spec.symmetric and spec.block is None and spec.group_size == -1
    grouped = activations is not None and activations.strategy == "group"
    return Int8Weight if by_channel and not grouped else None


def _own(tensor: Tensor | None) -> Any:
    """A copy: callers cut tensors out of larger ones and give several layers the same one, which
    files of checkpoints cannot hold."""
    if tensor is None:
        return None
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _alike(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a stored tensor may be loaded: scales may be of another dtype."""
    floating = wanted.is_floating_point() and wanted.dtype.itemsize > 1
    fits = tensor.is_floating_point() if floating else tensor.dtype == wanted.dtype
    return fits and tensor.shape == wanted.shape


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
