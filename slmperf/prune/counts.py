"""counts: parameters and cache bytes of a decoder for any sizes of its layers, without weights.

Every parameter belongs to a neuron (rows of gate_proj and up_proj, columns of down_proj, in each
expert), to a query head (rows of q_proj, columns of o_proj), to a key/value head (rows of k_proj
and v_proj), or to none of them and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slmperf.check import InputError
from slmperf.plan.work import KV_BYTES
from slmperf.prune.heads import layer_sizes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


class LayerSize(NamedTuple):
    """Sizes of one decoder block."""

    neurons: int  # of the MLP, or of each expert
    heads: int  # query heads
    kv_heads: int

    def __str__(self) -> str:
        return f"{self.neurons:,} neurons, {self.heads}/{self.kv_heads} heads"


class Counts(NamedTuple):
    """What one neuron and one head of each layer hold, and what is left without any."""

    before: tuple[LayerSize, ...]
    each: tuple[LayerSize, ...]  # parameters of one neuron, one query head, one key/value head
    rest: int
    head_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Counts:
        """Count the model of this configuration on the meta device.

        Raises InputError for a model without Llama-like decoder blocks.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from slmperf.models.structure import head_size

        names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        sizes = zip(*(layer_sizes(config, name) for name in names), strict=True)
        before = tuple(LayerSize(*size) for size in sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        blocks = getattr(getattr(model, "model", None), "layers", None)
        if blocks is None or len(blocks) != len(before):
            raise InputError(f"{type(model).__name__}: wanted decoder blocks in model.layers")
        each = tuple(_each(block, size) for block, size in zip(blocks, before, strict=True))
        total = sum(parameter.numel() for parameter in model.parameters())
        counts = cls(before, each, 0, head_size(config))
        return counts._replace(rest=total - counts.parameters(before))

    def parameters(self, sizes: Sequence[LayerSize]) -> int:
        """All parameters of a model with layers of these sizes."""
        return self.rest + sum(
            number * count
            for each, size in zip(self.each, sizes, strict=True)
            for number, count in zip(size, each, strict=True)
        )

    def kv_bytes_per_token(self, sizes: Sequence[LayerSize]) -> int:
        """Bytes of keys and values that a token leaves in the cache, bf16."""
        return 2 * KV_BYTES * self.head_size * sum(size.kv_heads for size in sizes)

    def first_layer(self) -> Mapping[str, Any]:
        """The first layer's sizes under the names of a configuration, with its head size."""
        size = self.before[0]
        return {
            "intermediate_size": size.neurons,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": self.head_size,
        }


def _each(block: nn.Module, size: LayerSize) -> LayerSize:
    found = {"neurons": 0, "heads": 0, "kv_heads": 0}
    for name, parameter in block.named_parameters():
        # The biases of down_proj and o_proj belong to the outputs, which stay.
        if "gate_proj" in name or "up_proj" in name or ".down_proj" in name.removesuffix(".weight"):
            if not name.endswith("down_proj.bias"):
                found["neurons"] += parameter.numel()
        elif "q_proj" in name or name.endswith("o_proj.weight"):
            found["heads"] += parameter.numel()
        elif "k_proj" in name or "v_proj" in name:
            found["kv_heads"] += parameter.numel()
    if not all(found.values()):
        raise InputError(
            f"{type(block).__name__}: wanted the projections of a Llama-like block, found "
            f"{', '.join(name for name, _ in block.named_parameters())}"
        )
    return LayerSize(*(found[name] // getattr(size, name) for name in LayerSize._fields))
