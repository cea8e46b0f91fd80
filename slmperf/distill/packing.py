"""Training sequences packed into rows of a fixed length, and batches of rows in a seeded order.

Several members share one row. A token sees only earlier tokens of its own sequence, and positions
restart with each sequence: a packed sequence gets the logits it would get alone. The block-diagonal
causal mask is given as a 4-d mask, which Transformers hands to eager and SDPA attention as it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.config import DistillationConfig
from slmperf.distill.weights import answer_weights

if TYPE_CHECKING:
    from slmperf.data import TrainingSequence

_ROUND = 8  # rows are padded to a multiple of this many tokens: aligned matrix products


def pack(lengths: np.ndarray, context: int, random: np.random.Generator) -> list[list[int]]:
    """Indices of sequences per row: best fit, longest first, ties and rows in random order.

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


class PackedBatches(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Batch number i of a training, as a function of the sequences, the configuration and i alone.

    Rows of one epoch follow those of the epoch before, so all batches have the same number of rows.

    A batch holds (R rows, L <= context tokens, n positions that enter the loss):
        input_ids       (R, L) int64
        position_ids    (R, L) int64
        attention_mask  (R, 1, L, L) bool, True where attended; absent when every row holds one
                        sequence (plain causal attention is then the same)
        positions       (n,) int64 into the R * L tokens: where `targets` are predicted
        targets         (n,) int64
        weights         (n,) fp32
        examples        () int64, history rows that are answered
        tokens          () int64, without padding
    """

    def __init__(
        self, sequences: Sequence[TrainingSequence], config: DistillationConfig, world_size: int = 1
    ) -> None:
        if not sequences:
            raise InputError("train: there are no training sequences, wanted at least one")
        self.config = config
        self.lengths = np.array([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
        if self.lengths.max() > config.context:
            worst = sequences[int(self.lengths.argmax())]
            raise InputError(
                f"train: the sequence of member {worst.member} has {self.lengths.max()} tokens, "
                f"wanted at most context = {config.context}"
            )
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
        self.answers = np.concatenate([sequence.answer for sequence in sequences]).astype(bool)
        self.weights, self.examples = _weights(sequences, config, self.starts[:-1])
        if not self.weights.any():
            raise InputError(
                "train: no token of any sequence has a weight, wanted at least one answered row"
            )
        self.rows_per_batch = max(1, config.batch_tokens // config.context)
        self._epoch = -1
        self._rows: list[list[int]] = []
        self._load_epoch(0)
        self.rows_per_epoch = len(self._rows)
        if config.steps is not None:
            self.steps = config.steps
        else:
            assert config.epochs is not None  # DistillationConfig: one of steps and epochs
            rows = config.epochs * self.rows_per_epoch
            self.steps = max(
                1, round(rows / (self.rows_per_batch * config.accumulation * world_size))
            )
        self._length = self.steps * config.accumulation * world_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = index * self.rows_per_batch
        packed = []  # (sequences of the row, the epoch's mask of tokens kept in the loss)
        for row in range(first, first + self.rows_per_batch):
            epoch, place = divmod(row, self.rows_per_epoch)
            self._load_epoch(epoch)
            packed.append((self._rows[place], self._kept))
        return self._collate(packed)

    def _load_epoch(self, epoch: int) -> None:
        """Row order and sample of sequence tokens, from (seed, epoch): resumed runs repeat them."""
        if epoch == self._epoch:
            return
        random = np.random.default_rng([self.config.seed, epoch])
        self._rows = pack(self.lengths, self.config.context, random)
        share = self.config.sequence_sample
        self._kept = self.answers | (random.random(len(self.ids), dtype=np.float32) < share)
        self._epoch = epoch

    def _collate(self, packed: list[tuple[list[int], np.ndarray]]) -> dict[str, Tensor]:
        used = max(int(self.lengths[row].sum()) for row, _ in packed)
        width = min(-(-used // _ROUND) * _ROUND, self.config.context)
        shape = (len(packed), width)
        ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        # Padding is a segment of its own: no row of the mask is empty, which would give NaN.
        segment = np.full(shape, -1, np.int64)
        weights = np.zeros(shape, np.float32)
        for line, (row, kept) in enumerate(packed):
            at = 0
            for number, index in enumerate(row):
                begin, length = self.starts[index], self.lengths[index]
                source, target = slice(begin, begin + length), slice(at, at + length)
                ids[line, target] = self.ids[source]
                position_ids[line, target] = np.arange(length)
                segment[line, target] = number
                scale = np.where(self.answers[source], 1.0, 1.0 / self.config.sequence_sample)
                weights[line, target] = self.weights[source] * kept[source] * scale
                at += length
        flat = weights.reshape(-1)
        # A first token weighs 0, so the position before a target is in the same sequence.
        (targets,) = flat.nonzero()
        batch = {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(position_ids),
            "positions": torch.from_numpy(targets - 1),
            "targets": torch.from_numpy(ids.reshape(-1)[targets]),
            "weights": torch.from_numpy(flat[targets]),
            "examples": torch.tensor(
                sum(self.examples[index] for row, _ in packed for index in row)
            ),
            "tokens": torch.tensor(int((segment >= 0).sum())),
        }
        if any(len(row) > 1 for row, _ in packed):
            seen = torch.from_numpy(segment[:, :, None] == segment[:, None, :])
            batch["attention_mask"] = seen.tril_()[:, None]
        return batch


def _weights(
    sequences: Sequence[TrainingSequence], config: DistillationConfig, starts: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Weight of each token of all sequences as a target (T,), before sampling, and the number of
    answered rows of each sequence.
    """
    rows, examples, first = [], [], 0
    for sequence in sequences:
        row, answer = np.asarray(sequence.row), np.asarray(sequence.answer, dtype=bool)
        if len(row) != len(sequence.input_ids) or len(answer) != len(sequence.input_ids):
            raise InputError(
                f"train: the sequence of member {sequence.member} has {len(sequence.input_ids)} "
                f"ids, {len(row)} rows and {len(answer)} answer marks, wanted equal numbers"
            )
        # Rows of different sequences get different numbers.
        rows.append(np.where(row < 0, -1, row.astype(np.int64) + first))
        first += int(row.max(initial=-1)) + 1
        examples.append(len(np.unique(row[answer & (row >= 0)])))
    answers = np.concatenate([sequence.answer for sequence in sequences]).astype(bool)
    weights = answer_weights(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(answers),
        answer_weight=config.answer_weight,
        sequence_weight=config.sequence_weight,
    ).numpy()
    weights[starts] = 0  # nothing stands before a first token to predict it from
    return weights, examples
