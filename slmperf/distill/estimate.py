"""What a training will take, before anything is loaded: parameters, steps, memory, flops.

Memory is found by going through one step, teacher, student, loss and backward, on tensors that have
shapes and no contents, and by adding up what is alive. That follows any architecture, adapters,
autocast and checkpointing without a formula for each. For a Llama layer in fp32 it comes to about

    T (3 D + (2 H + 4 G) C + H C + 3 D + 4 F) * 4 bytes

of what autograd keeps (two norms with their input, the normed and the scaled rows; q, k, v before
and after rotation and repetition; what attention gave; gate, its activation, up, their product),
and with checkpointing to T D * 4 and one layer's at a time.

Flops are those a step needs (arXiv 2204.02311, appendix B), not what recomputation adds:

    forward   2 N per token, N the parameters of the layers (of experts, those that a token visits)
              4 layers H C per pair of a token and one that it sees, itself included
              2 V D per position in the loss
    backward  twice that; of frozen parameters once, for the gradient of their input
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.distill.heads import unwrapped
from slmperf.models.structure import head_size
from slmperf.ops.kd_loss.chunks import CHUNK_BYTES, LEAST_ROWS

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


class Memory(NamedTuple):
    """Bytes on one rank's device, unless another place is named."""

    weights: int
    teacher: int
    gradients: int  # with several ranks twice: DistributedDataParallel keeps buckets of its own
    optimizer: int
    host_optimizer: int  # in the host's memory
    activations: int  # what autograd keeps when the student's forward is done
    loss: int  # buffers of logits and the gradients of hidden states and head
    batch: int
    peak: int  # the most at any time of a step; less than the sum, as not all is held at once

    @property
    def working(self) -> int:
        """The peak less weights, teacher and optimizer: what depends on the size of a batch."""
        return self.peak - self.weights - self.teacher - self.optimizer


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
) -> TrainingPlan:
    """What training `model` on `batches` takes. Nothing is loaded, run or changed.

    model    a causal language model, on the meta device too, or the configuration of one
    teacher  the same, or what has such a `model`; anything else (a cache, a server, None) runs no
             layers here
    device   that the step runs on; None: the configuration's

    The first batch stands for all. Any optimizer counts as AdamW: two moments of each trained
    parameter in its dtype; offloaded, with an fp32 weight beside them where it is not fp32 itself.
    InputError for a model without output layer.
    """
    student = _model(model)
    taught = teacher if _is_model(teacher) else getattr(teacher, "model", None)
    other = _model(taught) if _is_model(taught) else None
    where = torch.device(config.device if device is None else device)
    batch = batches[0]
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
        memory=_memory(student, other, batch, config, ranks, where),
        flops=flops,
        flops_per_step=sum(flops.at(*work_of(batch).tolist())) * accumulation * ranks,
    )


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
    head = _head(inner).weight
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
    heads = getattr(text, "num_attention_heads", None) or 0
    pair = 4.0 * text.num_hidden_layers * heads * head_size(text) if heads else 0.0
    columns = 2.0 * head.numel()
    return (
        Flops(2.0 * every, pair, columns),
        Flops(2.0 * (every + trained), 2.0 * pair, columns * (1 + head.requires_grad)),
    )


# --- memory -------------------------------------------------------------------------------------


def _memory(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Tensor],
    config: DistillationConfig,
    ranks: int,
    device: torch.device,
) -> Memory:
    trained = [one for one in student.parameters() if one.requires_grad]
    gradients = sum(one.nbytes for one in trained) * (2 if ranks > 1 else 1)
    moments = 2 * sum(one.nbytes for one in trained)
    host = 0
    if config.offload_optimizer:
        wide = (4 * one.numel() * (2 if one.dtype == torch.float32 else 3) for one in trained)
        moments, host = 0, sum(wide)
    weights = _bytes(student)
    taught = 0 if teacher is None else _bytes(teacher)
    given = sum(value.nbytes for value in batch.values())
    kept, loss, most = _Step(student, teacher, batch, config, device).bytes()
    buckets = gradients // 2 if ranks > 1 else 0
    return Memory(
        weights=weights,
        teacher=taught,
        gradients=gradients,
        optimizer=moments,
        host_optimizer=host,
        activations=kept,
        loss=loss,
        batch=given,
        peak=weights + taught + moments + given + buckets + most,
    )


class _Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the bytes of all storages that operators make, until they are let go."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        # Views of what was there before have its storage.
        self.sizes = {one.untyped_storage()._cdata: 0 for one in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(found):
            if not isinstance(one, Tensor):
                continue
            storage = one.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return found

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Step:
    """One step as the trainer makes it, on tensors without contents."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        batch: Mapping[str, Tensor],
        config: DistillationConfig,
        device: torch.device,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.config, self.device = config, device
        with self.fake:
            self.student = _hollow(unwrapped(student), device).train()
            self.teacher = None if teacher is None else _hollow(unwrapped(teacher), device).eval()
            self.batch = {
                name: torch.empty(value.shape, dtype=value.dtype, device=device)
                for name, value in batch.items()
            }
        if config.gradient_checkpointing and not self.student.is_gradient_checkpointing:
            self.student.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        whole_rows = bool((batch["position_ids"].diff(dim=1) == 1).all())
        for one in (self.student, self.teacher):
            if one is not None and whole_rows and "attention_mask" not in batch:
                _without_mask(one)
        self.known = [*self.student.parameters(), *self.student.buffers(), *self.batch.values()]
        if self.teacher is not None:
            self.known += [*self.teacher.parameters(), *self.teacher.buffers()]

    def bytes(self) -> tuple[int, int, int]:
        """What the student's forward leaves behind, what the loss adds, and the peak."""
        accumulated = self.config.gradient_accumulation_steps > 1
        with self.fake, _Alive(self.known) as alive:
            if accumulated:  # the gradients of the batches before this one
                for one in self.student.parameters():
                    if one.requires_grad:
                        one.grad = torch.empty_like(one)
            teacher = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = self._rows(self.teacher)
            before = alive.now
            hidden, weight = self._rows(self.student)
            kept = alive.now - before
            loss = _Loss.apply(hidden, weight, teacher is not None, lambda: alive.now)
            added = loss.held
            del hidden, weight, teacher
            loss.backward()
            return kept, added, alive.most

    def _rows(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Hidden states at the positions of the loss (n, D), and the output layer (V, D)."""
        layer = _head(model)
        seen: list[Tensor] = []

        def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(given[0])
            return (given[0][..., -1:, :],)

        names = ("input_ids", "position_ids", "attention_mask")
        inputs = {name: self.batch[name] for name in names if name in self.batch}
        hook = layer.register_forward_pre_hook(keep)
        wide = nullcontext()
        if self.config.bf16:
            wide = torch.autocast(self.device.type, torch.bfloat16)
        try:
            with wide:
                model(**inputs, use_cache=False)
        finally:
            hook.remove()
        hidden = seen[0].flatten(0, -2).index_select(0, self.batch["positions"])
        wanted = torch.bfloat16 if self.config.bf16 else hidden.dtype
        return hidden.to(wanted), layer.weight.to(wanted)


class _Loss(torch.autograd.Function):
    """What slmperf.ops.kd_loss holds: logits of a chunk of rows, and gradients from the forward.

    hidden (n, D), weight (V, D), teacher: whether there is a second head
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher: bool, held: Callable[[], int]):
        before, on_cpu = held(), hidden.device.type == "cpu"
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        half = hidden.dtype == torch.bfloat16
        logits = torch.bfloat16 if half and teacher and not on_cpu else torch.float32
        gradient = torch.bfloat16 if half else logits
        both = 1 + teacher
        beside = gradient.itemsize if gradient != logits and not on_cpu else 0
        kind = "cpu" if on_cpu else "cuda"
        fits = CHUNK_BYTES[kind] // ((both * logits.itemsize + beside) * vocabulary)
        size = -(-rows // -(-rows // max(LEAST_ROWS[kind], fits))) if rows else 0
        buffers = [hidden.new_empty(both, size, vocabulary, dtype=logits)]
        if beside:
            buffers.append(hidden.new_empty(size, vocabulary, dtype=gradient))
        if on_cpu and not half:  # sums over eighths of the vocabulary
            buffers.append(hidden.new_empty(8, size, hidden.shape[1]))
        ctx.gradients = [None, None, None, None]
        if hidden.requires_grad:
            ctx.gradients[0] = torch.empty_like(hidden)
        if weight.requires_grad:
            once = size == rows and not on_cpu
            ctx.gradients[1] = torch.empty_like(weight, dtype=None if once else torch.float32)
        loss = hidden.new_empty((), dtype=torch.float32)
        loss.held = held() - before
        del buffers
        if weight.requires_grad:
            ctx.gradients[1] = ctx.gradients[1].to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, _: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


def _hollow(model: nn.Module, device: torch.device) -> Any:
    """A copy of the model whose parameters and buffers have no contents; in a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for one in model.parameters():
        like = torch.empty(one.shape, dtype=one.dtype, device=device)
        memo[id(one)] = nn.Parameter(like, requires_grad=one.requires_grad)
    for one in model.buffers():
        memo[id(one)] = torch.empty(one.shape, dtype=one.dtype, device=device)
    return copy.deepcopy(model, memo)


def _without_mask(model: Any) -> None:
    """Rows of one sequence each need no mask, which Transformers finds in the position ids; where
    it cannot look at them it makes one. An attention that it has no masks for gets none.
    """
    if model.config._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.config._attn_implementation = "sdpa_without_mask"


def _model(model: Any) -> nn.Module:
    """The model, or one of that configuration on the meta device."""
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model)


def _is_model(thing: object) -> bool:
    return isinstance(thing, nn.Module) or hasattr(thing, "num_hidden_layers")


def _head(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    if layer is None:
        raise InputError(
            f"plan: {type(model).__name__} has no output layer, expected a causal language model"
        )
    return layer


def _count(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def _bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
