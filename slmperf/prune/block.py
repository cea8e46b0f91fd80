"""block: the layers of one decoder block whose inputs can leave, and their removal.

Neurons of an MLP are inputs of down_proj (of each expert's own in a mixture of experts), heads are
runs of inputs of o_proj.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from slmperf.calibrate import pruned_layers
from slmperf.check import InputError
from slmperf.models.structure import experts_of, keep_heads, keep_neurons
from slmperf.prune.heads import HeadPlan, layer_sizes, per_layer, plan_heads
from slmperf.prune.layer.refit import Pruned

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = "self_attn.o_proj"
# The arguments of `prune_model` that say what stays.
SIZES = ("intermediate_size", "attention_heads", "key_value_heads", "heads")


class Groups(NamedTuple):
    """What stays of one layer, in the words of `osscar`."""

    keep: int | None  # None: all, but they are ordered
    group_size: int = 1
    families: Tensor | None = None


@dataclass(frozen=True)
class BlockSizes:
    """Neurons and heads of every block after pruning, checked against the model's config."""

    neurons: list[int]
    neurons_before: list[int]
    heads: HeadPlan

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        *,
        intermediate_size: int | Sequence[int] | None = None,
        attention_heads: int | Sequence[int] | None = None,
        key_value_heads: int | Sequence[int] | None = None,
        heads: str = "kv_group",
    ) -> BlockSizes:
        """The sizes asked for, see `prune_model`; InputError where they are impossible."""
        if intermediate_size is None and attention_heads is None and key_value_heads is None:
            raise InputError(
                "wanted intermediate_size, attention_heads or key_value_heads, found none of them"
            )
        before = layer_sizes(config, "intermediate_size")
        wanted = per_layer("intermediate_size", intermediate_size, len(before))
        after = [have if size is None else size for size, have in zip(wanted, before, strict=True)]
        for layer, (size, have) in enumerate(zip(after, before, strict=True)):
            if not 1 <= size <= have:
                raise InputError(
                    f"intermediate_size: wanted 1..{have} neurons in layer {layer}, found {size}"
                )
        plan = plan_heads(
            config, attention_heads=attention_heads, key_value_heads=key_value_heads, heads=heads
        )
        return cls(after, before, plan)

    def layers(self, block: nn.Module, index: int) -> dict[str, Groups]:
        """The layers of block `index` that lose inputs, by their names within it, heads first."""
        found = {}
        if self.heads.prunes(index):
            asked = self.heads.groups(index)
            found[ATTENTION] = Groups(asked.keep, asked.group_size, asked.families)
        if self.neurons[index] < self.neurons_before[index]:
            found |= dict.fromkeys(neuron_layers(block), Groups(self.neurons[index]))
        return found

    def all_layers(self, blocks: Sequence[nn.Module]) -> dict[tuple[int, str], Groups]:
        """The same of all blocks, by (block, name within it)."""
        return {
            (index, name): groups
            for index, block in enumerate(blocks)
            for name, groups in self.layers(block, index).items()
        }


def neuron_layers(block: nn.Module) -> list[str]:
    """Names within the block of the layers whose inputs are neurons."""
    return [name for name in pruned_layers(block) if name != ATTENTION]


def layer_weight(block: nn.Module, name: str) -> Tensor:
    """The weight (N, d) of a layer of the block, as torch.nn.Linear holds it; no copy."""
    experts = experts_of(block)
    if experts is not None and name != ATTENTION:
        return experts.down_proj[int(name.split(".")[2])]
    return block.get_submodule(name).weight


@torch.no_grad()
def remove(block: nn.Module, results: Mapping[str, Pruned], plan: HeadPlan, index: int) -> None:
    """Shrink block `index` to what the solver kept of o_proj, or of all its `neuron_layers`."""
    if ATTENTION in results:
        keep_heads(block, *plan.groups(index).heads(results[ATTENTION].kept))
    else:
        kept = [result.kept for result in results.values()]
        keep_neurons(block, kept[0] if experts_of(block) is None else kept)
    for name, result in results.items():
        layer_weight(block, name).copy_(result.weight)
