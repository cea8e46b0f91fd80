"""Gram matrices of a linear layer's inputs x_t, streamed:   H = sum_t w_t x_t x_t'

Pruning by least squares and the error-compensating quantisers see their calibration data only
through H (and, where a layer is to reproduce another model's outputs y_t, through
G = sum_t w_t y_t x_t'). Tokens are put in order into products of `_ROWS` rows, whatever batches
they come in; each product is added up in fp32 and then in fp64, so the error does not grow with the
number of tokens. Tokens of weight 0, padding above all, never enter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slmperf.calibrate.storage import zeros
from slmperf.calibrate.tokens import Tokens
from slmperf.calibrate.workers import sum_of_workers
from slmperf.check import InputError
from slmperf.models.files import write_atomically
from slmperf.ops.gram import gram, packed_size, stripe_of, stripes, unpack
from slmperf.ops.half_products import weight_gradient

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS = 4096  # tokens in one product


class Gram:
    """What calibration knows of one layer's d inputs.

    weight  the sum of the token weights
    tokens  how many tokens had a weight above 0
    target  (N, d) fp64, G above, where the Gram was made with `outputs` N; else None

    With a group_size there are also the activation scores of the d / group_size groups of
    neighbouring inputs (NVIDIA's Minitron, arXiv 2407.14679):
    sqrt(sum over sequences of (mean over their tokens of |a|)^2), with |a| the L2 norm of the
    token's group; token weights weigh in the mean.
    """

    def __init__(
        self,
        size: int,
        *,
        group_size: int | None = None,
        outputs: int = 0,
        device: torch.device | str = "cpu",
        spill: str | os.PathLike[str] | None = None,
    ) -> None:
        """Zeros for `size` inputs.

        spill: a folder; the matrices live in memory-mapped files there, not on `device`.
        Raises InputError where group_size does not divide size.
        """
        if group_size is not None and (group_size < 1 or size % group_size):
            raise InputError(f"Gram: group_size {group_size} does not divide {size} inputs")
        self.size = size
        self.group_size = group_size
        self.weight = 0.0
        self.tokens = 0
        self._spill = spill
        self._lower = zeros((packed_size(size),), torch.float64, device, spill)
        self._target = zeros((outputs, size), torch.float64, device, spill) if outputs else None
        groups = size // group_size if group_size else 0
        self._squares = torch.zeros(groups, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []  # rows (_ROWS, d) and their outputs (_ROWS, N)
        self._filled = 0  # how many of the rows are there

    @property
    def matrix(self) -> Tensor:
        """H, (d, d) fp64, symmetric; put together at every access."""
        self._flush()
        return unpack(self._lower, self.size)

    @property
    def target(self) -> Tensor | None:
        """G, (N, d) fp64, or None."""
        self._flush()
        return self._target

    @property
    def scores(self) -> Tensor | None:
        """Activation scores of the groups, (m,) fp64; None without a group_size."""
        return self._squares.sqrt() if self.group_size else None

    @property
    def finite(self) -> bool:
        """Whether all inputs, and their squares, were finite: H's diagonal shows it."""
        self._flush()
        parts = [torch.cat(list(self._diagonals())), self._squares]
        if self._target is not None:
            parts.append(self._target)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def add(
        self, inputs: Tensor, weights: Tensor | None = None, outputs: Tensor | None = None
    ) -> None:
        """Add sequences: `inputs` (B, T, d), or (T, d) for one, floating.

        weights: (B, T) or (T,), >= 0; None for ones.
        outputs: (B, T, N) or (T, N), the y_t of a Gram with outputs.
        """
        shape = inputs.shape[:-1] if inputs.dim() > 2 else (1, *inputs.shape[:-1])
        tokens = Tokens.of(weights, shape, inputs.device)
        self.add_tokens(inputs, tokens, outputs)

    def add_tokens(self, inputs: Tensor, tokens: Tokens, outputs: Tensor | None = None) -> None:
        """The same with the tokens already chosen, from all of a batch's places."""
        rows = inputs.detach().reshape(inputs.shape[:-1].numel(), self.size)
        parts = [rows]
        if self._target is not None:
            parts.append(_flat(outputs, len(rows), len(self._target)))
        self.tokens += tokens.count
        self.weight += tokens.total
        if not tokens.count:
            return
        if self.group_size:
            self._add_scores(rows, tokens)
        if tokens.weight is not None:
            root = tokens.weight.sqrt()[:, None]
            parts = [tokens.select(part).float() * root for part in parts]
            self._append(parts, None)
        else:
            self._append(parts, tokens.index)

    @property
    def kind(self) -> tuple[int, int | None, int | None]:
        """(inputs, group_size, outputs of the target): what Grams to be merged have in common."""
        return self.size, self.group_size, None if self._target is None else len(self._target)

    def merge(self, other: Gram) -> None:
        """Add what another Gram of the same layer saw; InputError where it is another kind's."""
        if self.kind != other.kind:
            raise InputError(
                f"Gram: wanted (inputs, group_size, outputs) = {self.kind} to merge, "
                f"found {other.kind}"
            )
        self._flush()
        other._flush()
        for ours, added in zip(self._sums(), other._sums(), strict=True):
            ours += added.to(ours.device)
        self.weight += other.weight
        self.tokens += other.tokens

    def sum_over_workers(self) -> None:
        """Replace this worker's sums by those of all; every worker calls it for the same layers."""
        self._flush()
        for whole in self._sums():
            sum_of_workers(whole)
        counts = sum_of_workers(torch.tensor([self.weight, self.tokens], dtype=torch.float64))
        self.weight, self.tokens = float(counts[0]), int(counts[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in one step: the packed lower half (`slmperf.ops.gram`)."""
        from safetensors.torch import save_file

        self._flush()
        tensors = {"lower": self._lower, "squared_scores": self._squares}
        if self._target is not None:
            tensors["target"] = self._target
        metadata = {
            "size": str(self.size),
            "group_size": str(self.group_size or ""),
            "weight": repr(self.weight),
            "tokens": str(self.tokens),
        }
        cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_atomically(path, lambda aside: save_file(cpu, aside, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gram:
        """Read what `save` wrote; its matrices are mapped, not copied, until they change.

        Raises InputError for a file that is missing or is none of these.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            loaded = cls.__new__(cls)
            loaded.size = int(metadata["size"])
            loaded.group_size = int(metadata["group_size"]) if metadata["group_size"] else None
            loaded.weight, loaded.tokens = float(metadata["weight"]), int(metadata["tokens"])
            loaded._lower, loaded._squares = tensors["lower"], tensors["squared_scores"]
            groups = loaded.size // loaded.group_size if loaded.group_size else 0
            wanted = (packed_size(loaded.size),), (groups,)
            found = tuple(loaded._lower.shape), tuple(loaded._squares.shape)
            if found != wanted:
                raise ValueError(f"its tensors are {found}, its sizes want {wanted}")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path}: wanted a Gram matrix as slmperf writes it: {error}"
            ) from error
        loaded._target = tensors.get("target")
        loaded._spill, loaded._waiting, loaded._filled = None, [], 0
        return loaded

    def _sums(self) -> list[Tensor]:
        """What adds up."""
        target = [] if self._target is None else [self._target]
        return [self._lower, self._squares, *target]

    def _diagonals(self) -> Iterator[Tensor]:
        for first, end, place in stripes(self.size):
            yield stripe_of(self._lower, first, end, place)[:, first:].diagonal()

    def _add_scores(self, rows: Tensor, tokens: Tokens) -> None:
        """Add the squared means over each sequence."""
        means = tokens.means(rows, self.group_size or 1)
        self._squares += means.double().square().sum(0).to(self._squares.device)

    def _append(self, parts: list[Tensor], index: Tensor | None) -> None:
        """Put rows (and outputs; those of index) behind what waits; multiply `_ROWS` at a time."""
        count = len(parts[0]) if index is None else len(index)
        if self._waiting and self._waiting[0].dtype != parts[0].dtype:
            self._flush()
        start = 0
        while start < count:
            taken = min(count - start, _ROWS - self._filled)
            if taken == _ROWS and index is None:
                self._multiply([part[start : start + taken] for part in parts])
                start += taken
                continue
            if not self._waiting:
                # On a device they stay there, where the product is made.
                spill = self._spill if parts[0].device.type == "cpu" else None
                self._waiting = [
                    zeros((_ROWS, part.shape[1]), part.dtype, part.device, spill) for part in parts
                ]
            place = slice(start, start + taken)
            for part, waiting in zip(parts, self._waiting, strict=True):
                chosen = part[place] if index is None else part[index[place]]
                waiting[self._filled : self._filled + taken] = chosen
            self._filled += taken
            start += taken
            if self._filled == _ROWS:
                self._multiply(self._waiting)
                self._filled = 0

    def _flush(self) -> None:
        """Multiply the rows that wait, and free them."""
        if self._filled:
            self._multiply([part[: self._filled] for part in self._waiting])
        self._waiting, self._filled = [], 0

    def _multiply(self, parts: list[Tensor]) -> None:
        rows = parts[0]
        if rows.device == self._lower.device:
            gram(rows, self._lower)
        else:  # spilled: the product is made where the rows are
            found = torch.zeros_like(self._lower, device=rows.device)
            gram(rows, found)
            self._lower += found.to(self._lower.device)
        if self._target is not None:
            if rows.dtype == torch.float64:
                product = parts[1].T @ rows
            else:
                product = rows.new_empty(self._target.shape, dtype=torch.float32)
                weight_gradient(parts[1], rows, product, True)
            self._target += product.to(self._target.device)


def _flat(outputs: Tensor | None, rows: int, size: int) -> Tensor:
    if outputs is None:
        raise InputError("Gram: wanted the outputs of a Gram with a target, found none")
    return outputs.detach().reshape(rows, size)
