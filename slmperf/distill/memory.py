"""Memory of a training step, from shapes alone.

One step, teacher, student, loss and backward, is made on tensors that have shapes and no contents,
and what is alive is added up. That follows any architecture, adapters, autocast and checkpointing
without a formula for each. Of a Llama layer in fp32 autograd keeps about

    T (6 D + 2 (H + G) C + 4 F) * 4 bytes

(two norms with their input, the normed and the scaled rows; q and k after rotation, v, and what
attention gave; gate, its activation, up, their product); where rows have a mask T 2 (H - G) C * 4
more, because k and v are repeated for it; with checkpointing T D * 4, and one layer's of the above
at a time. What a kernel takes for itself is not seen, and nor are pieces of memory too small for
what is asked next: at 58 million parameters and T = 2048 a process held 1 to 3 % more.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.distill.heads import additive_mask, unwrapped
from slmperf.ops.kd_loss.chunks import CHUNK_BYTES, LEAST_ROWS

if TYPE_CHECKING:
    from slmperf.distill.config import DistillationConfig


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


def memory_of(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Tensor],
    config: DistillationConfig,
    device: torch.device,
) -> Memory:
    """Of a step with batches of these shapes on `device`; models may be on the meta device.

    Any optimizer counts as AdamW: two moments of each trained parameter in its dtype; offloaded, in
    fp32, with an fp32 weight beside them where it is not fp32 itself.
    """
    ranks = config.world_size
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

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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
        layer = output_layer(model)
        seen: list[Tensor] = []

        def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(given[0])
            return (given[0][..., -1:, :],)

        names = ("input_ids", "position_ids", "attention_mask")
        inputs: dict[str, Any] = {name: self.batch[name] for name in names if name in self.batch}
        inputs |= additive_mask(model, inputs)
        if hasattr(model.config, "output_router_logits"):
            inputs["output_router_logits"] = False
        hook = layer.register_forward_pre_hook(keep)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: bool, held: Callable[[], int]
    ) -> Tensor:
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
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
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


def output_layer(model: nn.Module) -> Any:
    """What makes logits of hidden states; InputError for a model without."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    if layer is None:
        raise InputError(
            f"plan: {type(model).__name__} has no output layer, expected a causal language model"
        )
    return layer


def _bytes(model: nn.Module) -> int:
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
