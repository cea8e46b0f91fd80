"""Watching one training step from outside, and running its loss again on what was seen.

A step is a function of the batch that calls its models and returns the loss. `watch` runs it and
keeps the models' outputs and every product as wide as the vocabulary. `replay` runs it again with
each model's body answered from memory: in the step's own precision, so that head and loss can be
timed alone, or in float64 whatever the code asks for, so that its gradient is known exactly.

In float64 casts to a narrower type are widened too, so code that rounds does not round there. Code
that cannot take float64 (most kernels) raises, or returns a loss of another type: InexactError.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slmperf.check import InputError

Batch = Mapping[str, Any]
Step = Callable[[Any], Any]  # batch -> loss, or (loss, anything); may pop entries of the batch

_PRODUCTS = {
    nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm,
    torch.addmm, torch.bmm, Tensor.bmm, torch.einsum,
}  # fmt: skip
# Not computations: their tensors must stay the very ones that were given.
_LEFT_ALONE = {
    "__get__", "__set__", "__delete__", "__setitem__", "__len__", "__hash__", "detach",
    "register_hook", "retain_grad", "backward", "grad", "size", "dim", "stride", "data_ptr",
    "is_floating_point",
}  # fmt: skip


class InexactError(RuntimeError):
    """A loss that does not run in float64."""


@dataclass
class Call:
    """One call of a whole model from within the step: its outputs, and those of its body."""

    model: nn.Module
    output: Any = None
    body: Any = None  # what its decoder returned; the output itself where no decoder is known
    redraw: Callable[[], None] | None = None  # random states as they were behind the body

    @property
    def logits(self) -> Tensor | None:
        """`.logits`, ["logits"], or the output itself where it is a float tensor."""
        found = self.output
        if isinstance(found, Mapping):
            found = found.get("logits")
        elif not isinstance(found, Tensor):
            found = getattr(found, "logits", None)
        if isinstance(found, Tensor) and found.is_floating_point() and found.dim() >= 2:
            return found
        return None


@dataclass
class Product:
    """One matrix product as wide as a vocabulary, outside the models' bodies."""

    result: Tensor
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: int | None  # inside which call; None where the loss itself computes it

    def exact(self) -> Tensor:
        """The same product in float64, without a graph."""
        args, kwargs = pytree.tree_map(_widened, (self.args, self.kwargs))
        with torch.no_grad():
            return self.function(*args, **kwargs)

    @property
    def depth(self) -> int:
        """Length of its sums; 0 where the arguments do not say."""
        factors = [value for value in self.args if isinstance(value, Tensor)]
        first = 1 if self.function is torch.addmm else 0
        return int(factors[first].shape[-1]) if len(factors) > first else 0


@dataclass
class Watched:
    """What one run of the step showed."""

    model: nn.Module  # the one that is audited
    loss: Tensor
    calls: list[Call]
    products: list[Product]
    redraw: Callable[[], None]  # random states as they were before the step


def watch(step: Step, batch: Batch, model: nn.Module) -> Watched:
    """Run the step as it is and keep what passes. InputError where it returns no loss."""
    observer, redraw = _Observer(model), keep_random()
    loss = observer.loss(step, batch)
    return Watched(model, loss, observer.calls, observer.products, redraw)


def keep_random() -> Callable[[], None]:
    """Brings the random states of torch, numpy and Python back to those of now."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def back() -> None:
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(states[1])
        random.setstate(states[2])

    return back


def replay(
    step: Step, batch: Batch, seen: Watched, *, recorded: bool, calls: Sequence[int] = ()
) -> Watched:
    """Run the step in float64 on the bodies' recorded outputs.

    recorded   the head's products are those that were seen, widened; otherwise the head runs in
               float64 too, on the recorded hidden states
    calls      numbers of the calls of which, then, the logits they returned are taken as well:
               where more lies between the product and these
    """
    observer = _Observer(
        seen.model, seen, exact=True, given=recorded, calls=calls if recorded else ()
    )
    device = seen.loss.device.type
    wide: Any = copy.copy(batch)
    wide.update({name: _widened(value) for name, value in wide.items()})
    narrow = torch.get_default_dtype()
    try:
        with torch.compiler.set_stance("force_eager"), torch.autocast(device, enabled=False):
            torch.set_default_dtype(torch.float64)
            seen.redraw()
            loss = observer.loss(step, wide)
    except InexactError:
        raise
    except Exception as error:  # the step's own code on tensors it was not written for
        text = " ".join(str(error).split("; ")[0].split())
        raise InexactError(f"{type(error).__name__}: {text[:160]}") from error
    finally:
        torch.set_default_dtype(narrow)
    if loss.dtype != torch.float64:
        raise InexactError(f"its value comes out in {str(loss.dtype).removeprefix('torch.')}")
    return Watched(seen.model, loss, observer.calls, observer.products, seen.redraw)


def rerun(step: Step, batch: Batch, seen: Watched) -> Tensor:
    """The loss by head and loss alone, in the step's own precision, on recorded bodies."""
    return _Observer(seen.model, seen).loss(step, batch)


def scalar(result: Any) -> Tensor:
    """The loss in what a step returned: itself, or the first of a tuple."""
    loss = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"a tensor of shape {tuple(loss.shape)}" + (
                "" if loss.requires_grad else " without a graph"
            )
        raise InputError(f"audit: the loss is {found}, expected a scalar tensor with a gradient")
    return loss.reshape(())


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a (wrapped) Transformers model, None where it names none."""
    get = getattr(unwrapped(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(getattr(head, "weight", None), Tensor) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def body_of(model: nn.Module) -> nn.Module:
    """The decoder below the head, or the model itself where none is known."""
    model = unwrapped(model)
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else model


def _is_closed(model: nn.Module) -> bool:
    """Whether nothing can be seen inside: no decoder is known, or it is compiled."""
    inner = unwrapped(model)
    compiled = any(
        isinstance(getattr(one, "_orig_mod", None), nn.Module)
        or getattr(one, "_compiled_call_impl", None) is not None
        for one in (model, getattr(model, "module", model), inner)
    )
    return compiled or body_of(model) is inner


class _Observer(TorchFunctionMode):
    """Sees model calls and vocabulary-wide products; answers bodies from `seen` where given."""

    def __init__(
        self,
        model: nn.Module,
        seen: Watched | None = None,
        exact: bool = False,
        given: bool = False,
        calls: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.seen, self.exact, self.given, self.given_calls = seen, exact, given, set(calls)
        self.model, self.calls, self.products = unwrapped(model), list[Call](), list[Product]()
        head = head_of(model)  # the loss may apply it to hidden states by itself
        self.widths: set[int] = set() if head is None else {int(head.weight.shape[0])}
        self._narrow = torch.get_default_dtype()
        self._open: int | None = None  # the call we are in
        self._in_body = False
        self._stand_ins: dict[int, Tensor] = {}  # id of a recorded tensor -> what stands for it

    def loss(self, step: Step, batch: Batch) -> Tensor:
        """The step's; every nn.Module call and every torch function passes through here."""
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._call(plain, module, args, kwargs)

        nn.Module.__call__ = call
        try:
            with self:
                return scalar(step(copy.copy(batch)))
        finally:
            nn.Module.__call__ = plain

    def _call(self, plain: Any, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self._open is None and self._whole_model(module, args, kwargs):
            return self._outermost(plain, module, args, kwargs)
        if self._open is None or self._in_body:
            return plain(module, *args, **kwargs)
        call = self.calls[self._open]
        if module is not body_of(call.model):
            return plain(module, *args, **kwargs)
        call.body = self._body(plain, module, args, kwargs)
        return call.body

    def _outermost(self, plain: Any, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        head = head_of(module)
        if head is not None:
            self.widths.add(int(head.weight.shape[0]))
        call = Call(module)
        self._open = len(self.calls)
        self.calls.append(call)
        try:
            if _is_closed(module):
                call.output = call.body = self._body(plain, module, args, kwargs)
            else:
                call.output = self._with_logits(plain(module, *args, **kwargs))
        finally:
            self._open = None
        if call.logits is not None:
            self.widths.add(int(call.logits.shape[-1]))
        return call.output

    def _with_logits(self, output: Any) -> Any:
        """A model's output with its recorded logits, where asked."""
        number = self._open
        if self.seen is None or number not in self.given_calls:
            return output
        recorded, own = (
            self.seen.calls[number].logits,
            Call(self.calls[number].model, output).logits,
        )
        if recorded is None or own is None:
            return output
        leaf = self._stand_in(recorded)
        return map_tensors(output, lambda tensor: leaf if tensor is own else tensor)

    def _body(self, plain: Any, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        assert self._open is not None
        if self.seen is None:
            self._in_body = True
            try:
                return plain(module, *args, **kwargs)
            finally:
                self._in_body = False
                self.calls[self._open].redraw = keep_random()
        if self._open >= len(self.seen.calls) or (
            unwrapped(self.seen.calls[self._open].model)
            is not unwrapped(self.calls[self._open].model)
        ):
            raise InexactError("it calls other models the second time")
        call = self.seen.calls[self._open]
        if self.exact and call.redraw is not None:  # what is drawn behind a body is drawn again
            call.redraw()
        return map_tensors(call.body, self._stand_in)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if id(tensor) not in self._stand_ins:
            leaf = tensor.detach().double() if self.exact else tensor.detach()
            if tensor.requires_grad:
                leaf.requires_grad_()
            self._stand_ins[id(tensor)] = leaf
        return self._stand_ins[id(tensor)]

    def _whole_model(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        """A model is what embeds tokens, and is not given the student's activations."""
        if unwrapped(module) is self.model:
            return True
        if isinstance(module, nn.Embedding) or not any(
            isinstance(inner, nn.Embedding) for inner in module.modules()
        ):
            return False
        return not any(
            isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
            for value in pytree.tree_leaves((args, kwargs))
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.exact and func in (torch.rand, torch.randn):  # other numbers in another type
            return func(*args, **{"dtype": self._narrow, **kwargs}).double()
        if self.exact and not self._in_body:
            args, kwargs, func = _exactly(func, args, kwargs)
        out = func(*args, **kwargs)
        if self._in_body or not isinstance(out, Tensor) or func not in _PRODUCTS:
            return out
        if out.dim() < 2 or out.shape[-1] not in self.widths:
            return out
        if self.given:
            assert self.seen is not None
            if len(self.products) >= len(self.seen.products):
                raise InexactError("it computes other logits the second time")
            out = self._stand_in(self.seen.products[len(self.products)].result)
        self.products.append(Product(out, func, args, kwargs, self._open))
        return out


def _exactly(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict, Any]:
    """The call with every float tensor and every float type in it widened to float64."""
    name = getattr(func, "__name__", "")
    if name in _LEFT_ALONE:
        return args, kwargs, func
    in_place = name.endswith("_") and not name.endswith("__") or "out" in kwargs
    kept = args[:1] if in_place else ()
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.is_floating_point():
            # Whatever was computed so far is float64: this comes from a kernel that is not.
            if value.dtype != torch.float64 and value.grad_fn is not None and not value._is_view():
                name = str(value.dtype).removeprefix("torch.")
                raise InexactError(f"{value.grad_fn.name()} returns {name}")
    args, kwargs = pytree.tree_map(_widened, (args[len(kept) :], kwargs))
    if name in ("float", "half", "bfloat16"):
        return args[:1], {}, Tensor.double
    return (*kept, *args), kwargs, func


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to its tensors, through mappings, sequences and the fields
    of output objects; anything else, caches among it, is passed on as it is.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        inner = {name: map_tensors(entry, function) for name, entry in value.items()}
        return type(value)(**inner) if type(value) is not dict else inner
    if isinstance(value, tuple | list):
        parts = [map_tensors(entry, function) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) or isinstance(getattr(value, "logits", None), Tensor):
        changed = copy.copy(value)
        for name, entry in vars(value).items():
            object.__setattr__(changed, name, map_tensors(entry, function))
        return changed
    return value
