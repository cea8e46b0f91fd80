"""Where in a watched step the logits are, whose they are, and what belongs to their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmperf.bench.auditing.capture import Batch, Call, InexactError, Watched, head_of
from slmperf.bench.auditing.terms import Head
from slmperf.check import InputError

Key = tuple[Literal["call", "product", "body"], int]
IGNORED = -100


class Point(NamedTuple):
    """The student's logits that the loss uses, in order; or its hidden states, for a kernel."""

    kind: Literal["logits", "hidden"]
    keys: tuple[Key, ...]
    tensors: list[Tensor]
    gradients: list[Tensor]
    idle_rows: int  # of student logits that no gradient reaches at all
    head: Head | None  # from hidden states to logits


class Teacher(NamedTuple):
    """The teacher's logits, by where they are seen, or as a tensor."""

    keys: tuple[Key, ...] = ()
    given: Tensor | None = None
    head: Head | None = None

    def logits(self, seen: Watched, index: Tensor, exact: bool) -> Tensor:
        """(n, V) float64 of some rows of a run; `exact`: with the head's product in float64 where
        known.
        """
        product = exact_products(self.keys, seen) if exact and self.given is None else None
        if product is None:
            product = flat([self.given] if self.given is not None else at(self.keys, seen))
        found = product[index].detach().double()
        return found if self.head is None else self.head(found)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of all tensors, one after the other: (n, last dimension)."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows)  # a copy only where there is no other way


def at(keys: Sequence[Key], seen: Watched) -> list[Tensor]:
    """The tensors of a run that stand at `keys`."""
    found = []
    for kind, number in keys:
        if kind == "product":
            tensor = seen.products[number].result if number < len(seen.products) else None
        elif kind == "call":
            tensor = seen.calls[number].logits if number < len(seen.calls) else None
        else:
            tensor = last_hidden(seen.calls[number]) if number < len(seen.calls) else None
        if tensor is None:
            raise InexactError("it takes another way the second time")
        found.append(tensor)
    return found


def exact_products(keys: Sequence[Key], seen: Watched) -> Tensor | None:
    """The logits with their products in float64; None where other steps lie between."""
    if any(kind != "product" for kind, _ in keys):
        return None
    return flat([seen.products[number].exact() for _, number in keys])


def last_hidden(call: Call) -> Tensor | None:
    """What a model's body returned last: `.last_hidden_state`, or the float tensor it is."""
    body = call.body
    found = body.get("last_hidden_state") if isinstance(body, Mapping) else body
    found = getattr(found, "last_hidden_state", found)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _logit_keys(seen: Watched, student: bool) -> list[Key]:
    """Logits that models returned, or their head's product where that is the same numbers."""
    keys: list[Key] = []
    for number, call in enumerate(seen.calls):
        logits = call.logits
        inner = [
            k
            for k, product in enumerate(seen.products)
            if product.call == number and product.result.requires_grad == student
        ]
        if logits is None:
            keys += [("product", k) for k in inner]
        elif logits.requires_grad == student:
            same = [k for k in inner if _same(seen.products[k].result, logits)]
            keys.append(("product", same[0]) if same else ("call", number))
    for k, product in enumerate(seen.products):
        if product.call is None and product.result.requires_grad == student:
            keys.append(("product", k))
    return keys


def _same(product: Tensor, logits: Tensor) -> bool:
    return product.shape == logits.shape and torch.equal(
        product.detach().to(logits.dtype), logits.detach()
    )


def _head(module: nn.Module | None) -> Head | None:
    head = None if module is None else head_of(module)
    if head is None:
        return None
    bias = getattr(head, "bias", None)
    return Head(head.weight.detach().double(), None if bias is None else bias.detach().double())


def locate(seen: Watched, model: nn.Module) -> Point:
    """Find what the loss is taken of; InputError where that is not seen."""
    if not seen.calls:
        raise InputError("audit: the step calls no language model, expected one that embeds tokens")
    keys = _logit_keys(seen, student=True)
    used: list[tuple[Key, Tensor, Tensor]] = []
    idle = 0
    for key, tensor in zip(keys, at(keys, seen), strict=True):
        gradient = _gradient(seen, tensor)
        if gradient is None or not bool(gradient.any()):
            idle += tensor.numel() // tensor.shape[-1]
        else:
            used.append((key, tensor, gradient))
    if used:
        widths = {tensor.shape[-1] for _, tensor, _ in used}
        if len(widths) > 1:
            raise InputError(f"audit: logits of several widths {sorted(widths)}, expected one")
        one, two, three = zip(*used, strict=True)
        return Point("logits", one, list(two), list(three), idle, None)
    for number, call in enumerate(seen.calls):
        hidden = last_hidden(call)
        head = _head(call.model) or _head(model)
        if hidden is None or not hidden.requires_grad or head is None:
            continue
        gradient = _gradient(seen, hidden)
        if hidden.shape[-1] == head.weight.shape[1] and gradient is not None and gradient.any():
            return Point("hidden", (("body", number),), [hidden], [gradient], idle, head)
    raise InputError(
        "audit: the loss has no gradient by any logits or last hidden states that the models of "
        "the step return"
    )


def _gradient(seen: Watched, tensor: Tensor) -> Tensor | None:
    (found,) = torch.autograd.grad(seen.loss, tensor, allow_unused=True, retain_graph=True)
    return found


def teacher_of(
    seen: Watched, batch: Batch, rows: int, given: Tensor | None, module: nn.Module | None
) -> Teacher | None:
    """The teacher's logits: given, of a call without gradients, of the batch, or by its head."""
    width = given.shape[-1] if given is not None else None
    if given is not None and given.numel() // max(1, width or 1) != rows:
        raise InputError(
            f"audit: teacher_logits are {tuple(given.shape)}, expected {rows} rows, the student's"
        )
    if given is not None:
        return Teacher(given=given.to(seen.loss.device))
    keys = _logit_keys(seen, student=False)
    of_models = [key for key in keys if _by_model(key, seen)]
    for chosen in (of_models, [key for key in keys if key not in of_models]):
        if chosen and sum(_rows(tensor) for tensor in at(chosen, seen)) == rows:
            return Teacher(keys=tuple(chosen))
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            if value.shape[-1] >= _width(seen) and _rows(value) == rows:
                return Teacher(given=value.to(seen.loss.device))
    head = _head(module)
    for number, call in enumerate(seen.calls):
        hidden = last_hidden(call)
        if head is None or hidden is None or hidden.requires_grad:
            continue
        if hidden.shape[-1] == head.weight.shape[1] and _rows(hidden) == rows:
            return Teacher(keys=(("body", number),), head=head)
    return None


def _by_model(key: Key, seen: Watched) -> bool:
    return key[0] == "call" or seen.products[key[1]].call is not None


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def _width(seen: Watched) -> int:
    """The narrowest vocabulary seen."""
    return min(
        [product.result.shape[-1] for product in seen.products]
        + [call.logits.shape[-1] for call in seen.calls if call.logits is not None]
    )


class Labels(NamedTuple):
    """Targets of every row (n,), -100 for none, and those of the same position."""

    targets: Tensor | None
    same_position: Tensor | None
    meant: bool  # False for the next tokens of input_ids, which are no labels


def _of_rows(name: str, given: Tensor, rows: int) -> Tensor:
    """(rows,) of what was declared for every row of logits."""
    if given.numel() != rows:
        raise InputError(
            f"audit: {name} are {tuple(given.shape)}, expected {rows}, one for every row of logits"
        )
    return given.reshape(-1)


def labels_of(batch: Batch, given: Tensor | None, rows: int, device: torch.device) -> Labels:
    """A row of logits predicts the label after it, unless labels of every row are given."""
    if given is not None:
        return Labels(_of_rows("labels", given, rows).to(device), None, True)
    for name in ("labels", "input_ids"):
        labels = batch.get(name)
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            continue
        labels = labels.to(device)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        meant = name == "labels"
        if labels.numel() == rows:
            return Labels(following.reshape(-1), labels.reshape(-1) if meant else None, meant)
        if following[:, :-1].numel() == rows:
            same = labels[:, :-1].reshape(-1) if meant else None
            return Labels(following[:, :-1].reshape(-1), same, meant)
        if meant and int((following != IGNORED).sum()) == rows:
            return Labels(following[following != IGNORED], None, True)
    return Labels(None, None, False)


def weights_of(batch: Batch, given: Tensor | None, labels: Labels, rows: int) -> Tensor:
    """(n,) float64: as given, else 1 where there is a label, else 1 where tokens are attended."""
    if given is not None:
        return _of_rows("weights", given, rows).double()
    if labels.meant:
        assert labels.targets is not None
        return (labels.targets != IGNORED).double()
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == rows:
        return mask.reshape(-1).double()
    return torch.ones(rows, dtype=torch.float64)


def padding_of(batch: Batch) -> tuple[int, int] | None:
    """Padding and all positions, by a two-dimensional attention mask."""
    mask: Any = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return int((mask == 0).sum()), mask.numel()
