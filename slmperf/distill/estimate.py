"""What a training will take, before anything is loaded: parameters, steps, memory, flops.

Memory is of slmperf.distill.memory. Flops are those a step needs (arXiv 2204.02311, appendix B),
not what recomputation adds:

    forward   2 N per token, N the parameters of the layers (of experts, those that a token visits)
              4 layers H C per pair of a token and one that it sees, itself included
              2 V D per position in the loss
    backward  twice that; of frozen parameters once, for the gradient of their input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slmperf.distill.heads import unwrapped
from slmperf.distill.memory import Memory, memory_of, output_layer
from slmperf.models.structure import head_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from slmperf.distill.config import DistillationConfig

MIB = 2**20


class Batches(Protocol):
    """What an estimate reads of PackedBatches."""

    lengths: np.ndarray  # (S,) tokens of each sequence
    rows_per_epoch: int
    rows_per_batch: int  # of one rank, without accumulation
    steps: int

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Flops(NamedTuple):
    """Of one direction of a model."""

    token: float  # all layers' matrices
    pair: float  # attention, per pair of a token and one that it sees
    position: float  # the output layer, where targets are predicted


class StepFlops(NamedTuple):
    """Of one training step."""

    forward: Flops
    backward: Flops
    teacher: Flops  # zeros where no teacher runs

    def at(self, tokens: float, pairs: float, positions: float) -> tuple[float, float, float]:
        """Of each, for so many of what they are counted by."""
        forward, backward, teacher = (
            one.token * tokens + one.pair * pairs + one.position * positions for one in self
        )
        return forward, backward, teacher


class TrainingPlan(NamedTuple):
    """What a training will take; str() is a table."""

    parameters: int
    trainable: int
    teacher_parameters: int
    sequences: int
    tokens: int  # of all sequences, once
    rows: int  # of an epoch
    rows_per_step: int
    context: int  # tokens of a row, padding included
    steps: int
    epochs: float
    memory: Memory
    flops: StepFlops
    flops_per_step: float  # of all ranks, as of the first batch

    def __str__(self) -> str:
        memory = {
            name: f"{size / MIB:,.0f} MiB"
            for name, size in self.memory._asdict().items()
            if size or name == "peak"
        }
        lines = {
            "parameters": f"{self.parameters:,}, {self.trainable:,} of them trained",
            "teacher's": f"{self.teacher_parameters:,}",
            "data": f"{self.sequences:,} sequences, {self.tokens:,} tokens",
            "rows": f"{self.rows:,} an epoch, of {self.context:,} tokens",
            "steps": f"{self.steps:,} of {self.rows_per_step:,} rows, {self.epochs:.2f} epochs",
            "flops": f"{self.flops_per_step:.3g} a step",
            **{f"memory, {name.replace('_', ' ')}": size for name, size in memory.items()},
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def plan_of(
    model: nn.Module | PretrainedConfig,
    teacher: object,
    batches: Batches,
    config: DistillationConfig,
    device: torch.device | str | None = None,
    new_tokens: int | None = None,
) -> TrainingPlan:
    """What training `model` on `batches` takes. Nothing is loaded, run or changed.

    model    a causal language model, on the meta device too, or the configuration of one
    teacher  the same, or what has such a `model`; anything else (a cache, a server, None) runs no
             layers here
    device   that the step runs on; None: the configuration's
    new_tokens  that the student may write after each prompt, on policy: the step is then one on its
             longest text (what writing takes is less, and over before)

    The first batch stands for all. Any optimizer counts as AdamW: two moments of each trained
    parameter in its dtype; offloaded, with an fp32 weight beside them where it is not fp32 itself.
    InputError for a model without output layer.
    """
    student = _model(model)
    taught = teacher if _is_model(teacher) else getattr(teacher, "model", None)
    other = _model(taught) if _is_model(taught) else None
    where = torch.device(config.device if device is None else device)
    batch = batches[0] if new_tokens is None else _longest(batches, new_tokens)
    accumulation, ranks = config.gradient_accumulation_steps, config.world_size
    rows_per_step = batches.rows_per_batch * accumulation * ranks
    flops = flops_of(student, other)
    return TrainingPlan(
        parameters=_count(student),
        trainable=sum(one.numel() for one in student.parameters() if one.requires_grad),
        teacher_parameters=0 if other is None else _count(other),
        sequences=len(batches.lengths),
        tokens=int(batches.lengths.sum()),
        rows=batches.rows_per_epoch,
        rows_per_step=rows_per_step,
        context=batch["input_ids"].shape[1],
        steps=batches.steps,
        epochs=batches.steps * rows_per_step / batches.rows_per_epoch,
        memory=memory_of(student, other, batch, config, where),
        flops=flops,
        flops_per_step=sum(flops.at(*work_of(batch).tolist())) * accumulation * ranks,
    )


def _longest(batches: Any, new_tokens: int) -> dict[str, Tensor]:
    """The first batch with as much text of the student's own as may come after its prompts."""
    written = []
    for index in batches.examples_of(0).tolist():
        prompt = batches.prompt(index)
        ids = np.resize(prompt, min(len(prompt) + new_tokens, batches.config.context))
        written.append({"input_ids": ids, "answer": np.arange(len(ids)) >= len(prompt)})
    return batches.collate(written)


def work_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens without padding, pairs of a token and one that it sees, and positions: (3,) int64,
    where the batch is, which is not waited for.
    """
    lengths = batch["lengths"]
    pairs = (lengths * (lengths + 1)).sum() // 2
    return torch.stack([lengths.sum(), pairs, torch.full_like(pairs, batch["positions"].numel())])


def flops_of(student: nn.Module, teacher: nn.Module | None = None) -> StepFlops:
    """Flops of the two models' parts of a step, from their parameters and configurations."""
    forward, backward = _flops(student)
    return StepFlops(forward, backward, Flops(0, 0, 0) if teacher is None else _flops(teacher)[0])


def _flops(model: nn.Module) -> tuple[Flops, Flops]:
    """Forward and backward."""
    inner = unwrapped(model)
    config: Any = inner.config
    text = config.get_text_config(decoder=True)
    head = output_layer(inner).weight
    apart = {id(head), id(inner.get_input_embeddings().weight)}
    visited = 1.0
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            visited = text.num_experts_per_tok / getattr(text, name)
    every = trained = 0.0
    for name, value in inner.named_parameters():
        if value.dim() < 2 or id(value) in apart:
            continue
        size = value.numel() * (visited if ".experts." in name else 1.0)
        every += size
        trained += size * value.requires_grad
    # Layers of a pruned model may differ in their heads.
    heads = sum(getattr(layer, "num_attention_heads", None) or 0 for layer in text.per_layer_config)
    pair = 4.0 * heads * head_size(text) if heads else 0.0
    columns = 2.0 * head.numel()
    return (
        Flops(2.0 * every, pair, columns),
        Flops(2.0 * (every + trained), 2.0 * pair, columns * (1 + head.requires_grad)),
    )


def _model(model: Any) -> nn.Module:
    """The model, or one of that configuration on the meta device."""
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model)


def _is_model(thing: object) -> bool:
    return isinstance(thing, nn.Module) or hasattr(thing, "num_hidden_layers")


def _count(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())
