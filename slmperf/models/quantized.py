"""QuantizedLinear: int8 codes with one scale per output channel; y = x (codes * scale)' + bias.

Only the weight is quantised; activations keep their dtype. The stored tensors (`weight` int8 (out,
in), `weight_scale` (out, 1), `bias`) are those of the compressed-tensors layout "int-quantized",
and the weight is put together as its readers do it, codes * scale in the scale's dtype, so that
they compute the same logits to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class QuantizedLinear(nn.Module):
    """A linear layer with int8 weights, without gradients for them.

    `codes` int8 (out, in); `scale` floating (out, 1); `bias` (out,) or None.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError(
                f"QuantizedLinear: codes are {codes.dtype} {tuple(codes.shape)}, "
                "expected torch.int8 (out, in)"
            )
        if scale.shape != (codes.shape[0], 1) or not scale.is_floating_point():
            raise ValueError(
                f"QuantizedLinear: scale is {scale.dtype} {tuple(scale.shape)}, "
                f"expected floating ({codes.shape[0]}, 1)"
            )
        self.out_features, self.in_features = codes.shape
        # Buffers: an integer tensor cannot take a gradient, and `model.to(dtype)` must leave codes
        # alone.
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantized(self) -> Tensor:
        """The weight that the layer multiplies with, (out, in) in the scale's dtype."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


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
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return len(replaced)
