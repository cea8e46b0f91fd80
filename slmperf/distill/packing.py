"""Examples packed into rows of a fixed length, and batches of rows in a seeded order.

Several examples share one row. A token sees only earlier tokens of its own example, and positions
restart with each: a packed example gets the logits it would get alone. The block-diagonal causal
mask is a 4-d one, which Transformers hands to attention as it is (slmperf.distill.heads).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.config import DistillationConfig
from slmperf.distill.examples import Example, example_of, examples_of
from slmperf.distill.weights import answer_weights

Batch = dict[str, Tensor]

_ROUND = 8  # rows are padded to a multiple of this many tokens: aligned matrix products
_EVALUATION = 0  # seed of the order in which examples are evaluated


def pack(lengths: np.ndarray, context: int, random: np.random.Generator) -> list[list[int]]:
    """Indices of examples per row: best fit, longest first, ties and rows in random order.

    The number of rows depends on the lengths alone, so every epoch has the same number.
    """
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> rows that have them
    sizes: list[int] = []  # the keys of `room`, ascending
    for index in order.tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(sizes, length)
        if place == len(sizes):
            row, left = len(rows), context - length
            rows.append([index])
        else:
            size = sizes[place]
            row, left = room[size].pop(), size - length
            rows[row].append(index)
            if not room[size]:
                del room[size]
                sizes.pop(place)
        if left not in room:
            room[left] = []
            bisect.insort(sizes, left)
        room[left].append(row)
    return [rows[row] for row in random.permutation(len(rows))]


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model takes."""
    names = ("input_ids", "position_ids", "attention_mask")
    return {name: batch[name] for name in names if name in batch}


class _Marked:
    """Examples one after the other, and what each token adds to the loss as a target.

    answer_share    (T,) fp32 of the mean over answers
    sequence_share  (T,) fp32 of the mean over all tokens
    totals          (E, 2) fp64, what each example adds to the two numbers that are divided by
    """

    def __init__(self, examples: list[Example], normalization: str) -> None:
        self.lengths = np.array([len(one.ids) for one in examples], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate([one.ids for one in examples])
        self.answers = np.concatenate([one.answer for one in examples])
        rows, first = [], 0
        for one in examples:  # rows of different examples get different numbers
            rows.append(np.where(one.row < 0, -1, one.row + first))
            first += int(one.row.max(initial=-1)) + 1
        row = torch.from_numpy(np.concatenate(rows))
        marks = torch.from_numpy(self.answers)
        shares = [
            answer_weights(row, marks, answer_weight=a, sequence_weight=1 - a).numpy()
            for a in (1.0, 0.0)
        ]
        if normalization == "tokens":
            shares = [(share > 0).astype(np.float32) for share in shares]
        self.answer_share, self.sequence_share = shares
        # Over an example, the shares sum to what is divided by: its tokens, or its answered rows.
        sums = [np.add.reduceat(share.astype(np.float64), self.starts[:-1]) for share in shares]
        self.totals = np.stack(sums, axis=1).round()


class PackedBatches(torch.utils.data.Dataset[Batch]):
    """Batch number i of a training, as a function of the examples, the configuration and i alone.

    Rows of one epoch follow those of the epoch before, so all batches have the same number of rows.
    `once` is for evaluation: every example one time, in a fixed order and all of its tokens; the
    last batch may be smaller.

    A batch holds (R rows, L <= context tokens, n positions that enter the loss, S examples):
        input_ids       (R, L) int64
        position_ids    (R, L) int64
        attention_mask  (R, 1, L, L) bool, True where attended; absent when every row holds one
                        example (plain causal attention is then the same)
        positions       (n,) int64 into the R * L tokens, each before one that enters the loss;
                        example by example, ascending
        targets         (n,) int64; absent from a batch of the student's own text
        answer          (n,) bool
        answer_share, sequence_share  (n,) fp32, a target's part of the two means of the loss
        totals          (2,) fp32, what the batch adds to the two numbers those are divided by
        tokens          () int64, without padding
        number          () int64, the batch's; -1 where it has none
        examples        (S,) int64, their places in the data set; -1 for text of the student's own
        lengths, counts (S,) int64, tokens and positions of each
        places          (n,) int64, of the positions within their example
    """

    def __init__(
        self,
        examples: Sequence[Any],
        config: DistillationConfig,
        world_size: int = 1,
        *,
        once: bool = False,
    ) -> None:
        self.config, self.once = config, once
        found = examples_of(examples)
        self.keys = [one.key for one in found]
        self._marked = _Marked(found, config.normalization)
        self.lengths, self.ids = self._marked.lengths, self._marked.ids
        self.answers = self._marked.answers
        if self.lengths.max() > config.context:
            worst = int(self.lengths.argmax())
            raise InputError(
                f"train: example {worst} has {self.lengths[worst]} tokens, "
                f"wanted at most context = {config.context}"
            )
        self.rows_per_batch = (
            config.per_device_eval_batch_size if once else config.rows_per_batch(world_size)
        )
        # An example without an answer weighs nothing, and takes no room.
        (self.used,) = self._marked.totals[:, 0].nonzero()
        self._epoch = -1
        self._rows: list[list[int]] = []
        self._load_epoch(0)
        self.rows_per_epoch = len(self._rows)
        per_step = self.rows_per_batch * config.gradient_accumulation_steps * world_size
        self.steps_per_epoch = self.rows_per_epoch / per_step
        if config.max_steps > 0:
            self.steps = config.max_steps
        else:
            self.steps = max(1, round(config.num_train_epochs * self.steps_per_epoch))
        if once:
            self._length = -(-self.rows_per_epoch // self.rows_per_batch)
        else:
            self._length = self.steps * config.gradient_accumulation_steps * world_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._batch(self._marked, self._rows_of(index), index)

    def examples_of(self, number: int) -> np.ndarray:
        """(S,) int64, places in the data set of batch `number`'s examples, in its order."""
        rows = self._rows_of(number)
        return np.array([index for row, _ in rows for index in row], dtype=np.int64)

    @property
    def shares_rows(self) -> bool:
        """Whether any row holds several examples."""
        return len(self.used) > self.rows_per_epoch

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the examples: their tokens, and what each weighs."""
        marked, digest = self._marked, hashlib.sha256()
        for array in (marked.ids, marked.lengths, marked.answer_share, marked.sequence_share):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def key(self, index: int) -> int | str:
        """What a teacher's cache calls an example: its own key, or its place."""
        key = self.keys[index]
        return index if key is None else key

    def tokens(self, index: int) -> np.ndarray:
        """(L,) int64, an example's."""
        start, stop = self._marked.starts[index : index + 2]
        return self.ids[start:stop]

    def prompt(self, index: int) -> np.ndarray:
        """(P >= 1,) int64, the tokens before an example's first answer; all of one without one."""
        start, stop = self._marked.starts[index : index + 2]
        (answers,) = self._marked.answers[start:stop].nonzero()
        return self.tokens(index)[: answers[0] if len(answers) else None]

    def collate(self, given: Sequence[Any], number: int = -1) -> Batch:
        """One batch of text that the student wrote, all its tokens, packed as the configuration
        says: without targets, which would be its own draws.
        """
        marked = _Marked(
            [example_of(one, place) for place, one in enumerate(given)], self.config.normalization
        )
        rows = self._packed(marked.lengths, np.random.default_rng([self.config.seed, 0]))
        everything = np.ones(len(marked.ids), bool)
        batch = self._batch(marked, [(row, everything) for row in rows], number, sample=1.0)
        del batch["targets"]
        return {**batch, "examples": torch.full_like(batch["examples"], -1)}

    def _rows_of(self, number: int) -> list[tuple[list[int], np.ndarray]]:
        """A batch's rows: the examples of each, and its epoch's mask of tokens kept in the loss."""
        if not 0 <= number < self._length:
            raise IndexError(number)
        first = number * self.rows_per_batch
        last = first + self.rows_per_batch
        if self.once:
            last = min(last, self.rows_per_epoch)
        packed = []
        for row in range(first, last):
            epoch, place = divmod(row, self.rows_per_epoch)
            self._load_epoch(epoch)
            packed.append((self._rows[place], self._kept))
        return packed

    def _packed(self, lengths: np.ndarray, random: np.random.Generator) -> list[list[int]]:
        if self.config.packing:
            return pack(lengths, self.config.context, random)
        return [[one] for one in random.permutation(len(lengths)).tolist()]

    def _load_epoch(self, epoch: int) -> None:
        """Row order and sample of other tokens, from (seed, epoch): resumed runs repeat them."""
        if epoch == self._epoch:
            return
        seed = _EVALUATION if self.once else self.config.seed
        random = np.random.default_rng([seed, epoch])
        rows = self._packed(self.lengths[self.used], random)
        self._rows = [self.used[row].tolist() for row in rows]
        share = 1.0 if self.once else self.config.sequence_sample
        drawn = random.random(len(self.ids), dtype=np.float32)
        self._kept = self._marked.answers | (drawn < share)
        self._epoch = epoch

    def _batch(
        self,
        marked: _Marked,
        packed: list[tuple[list[int], np.ndarray]],
        number: int,
        sample: float | None = None,
    ) -> Batch:
        if sample is None:
            sample = 1.0 if self.once else self.config.sequence_sample
        used = max(int(marked.lengths[row].sum()) for row, _ in packed)
        width = min(-(-used // _ROUND) * _ROUND, self.config.context)
        shape = (len(packed), width)
        ids = np.zeros(shape, np.int64)
        # Those of padding go on counting: at a 0 Transformers would begin another sequence.
        position_ids = np.tile(np.arange(width), (len(packed), 1))
        # Padding is a segment of its own: no row of the mask is empty, which would give NaN.
        segment = np.full(shape, -1, np.int64)
        answer = np.zeros(shape, bool)
        answer_share, sequence_share = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        scale = np.float32(1.0 / sample)
        for line, (row, kept) in enumerate(packed):
            at = 0
            for place, index in enumerate(row):
                begin, length = marked.starts[index], marked.lengths[index]
                source, target = slice(begin, begin + length), slice(at, at + length)
                ids[line, target] = marked.ids[source]
                position_ids[line, target] = np.arange(length)
                segment[line, target] = place
                answer[line, target] = marked.answers[source]
                answer_share[line, target] = marked.answer_share[source]
                scaled = np.where(marked.answers[source], np.float32(1.0), scale)
                sequence_share[line, target] = marked.sequence_share[source] * kept[source] * scaled
                at += length
        weights = self.config.answer_weight, self.config.sequence_weight
        counted = answer_share * weights[0] + sequence_share * weights[1]
        # A first token weighs 0, so the position before a target is in the same example.
        (targets,) = counted.reshape(-1).nonzero()
        order = [index for row, _ in packed for index in row]
        lengths = marked.lengths[order]
        # Examples counted through all rows: which one a target is of.
        sizes = np.array([len(row) for row, _ in packed])
        owner = (np.cumsum(sizes) - sizes)[:, None] + segment
        counts = np.bincount(owner.reshape(-1)[targets], minlength=len(order))
        batch = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(position_ids),
            "positions": torch.from_numpy(targets - 1),
            "targets": torch.from_numpy(ids.reshape(-1)[targets]),
            "answer": torch.from_numpy(answer.reshape(-1)[targets]),
            "answer_share": torch.from_numpy(answer_share.reshape(-1)[targets]),
            "sequence_share": torch.from_numpy(sequence_share.reshape(-1)[targets]),
            "totals": torch.from_numpy(marked.totals[order].sum(axis=0).astype(np.float32)),
            "tokens": torch.tensor(int(lengths.sum())),
            "number": torch.tensor(number),
            "examples": torch.tensor(order, dtype=torch.int64),
            "lengths": torch.from_numpy(lengths),
            "counts": torch.from_numpy(counts.astype(np.int64)),
            "places": torch.from_numpy(position_ids.reshape(-1)[targets] - 1),
        }
        if any(len(row) > 1 for row, _ in packed):
            seen = torch.from_numpy(segment[:, :, None] == segment[:, None, :])
            batch["attention_mask"] = seen.tril_()[:, None]
        return batch
