"""The reading side of a teacher cache: see slmperf.distill.cache."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.cache.files import (
    DTYPES,
    FORMAT,
    HEAD,
    LARGEST,
    MANIFEST,
    CachedHead,
    check_size,
    digests_of,
    numbers_of,
    open_tensors,
    ranges,
    shown,
)
from slmperf.distill.cache.fill import write
from slmperf.models.files import sha256_of
from slmperf.ops import TeacherHead, TeacherTopK

_BLOCK_BYTES = 2**18  # of rows on their way: stays in a core's own cache


class CachedRows(NamedTuple):
    """Rows of several examples, one after the other; a copy, free of the cache's files.

    counts     (E,) int64, rows of each example
    positions  (R,) int64
    hidden     (R, D), or None
    indices    (R, K) int64, or None
    log_probs  (R, K), or None
    """

    counts: Tensor
    positions: Tensor
    hidden: Tensor | None = None
    indices: Tensor | None = None
    log_probs: Tensor | None = None


class _Shard(NamedTuple):
    digests: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    values: dict[str, np.ndarray]


class TeacherCache:
    """Reads a cache, any example at any time, from files mapped into memory.

    folder          a finished cache
    model_hash      of the teacher that is wanted; None does not ask
    tokenizer_hash  of the tokenizer of the examples; None does not ask
    vocabulary      V that is wanted; None does not ask
    open_shards     how many shards are kept mapped

    Threads may share it, and a process forked or spawned (a DataLoader's worker) opens the files
    for itself. len() is the number of examples; `key in cache` asks for one.

    Raises InputError, with the file, what was expected and what was found, for a cache of another
    teacher, tokenizer or vocabulary, and for a shard that is missing or not as long as it was.
    Contents are compared only by `verify`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model_hash: str | None,
        tokenizer_hash: str | None,
        vocabulary: int | None = None,
        open_shards: int = 32,
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            parts = ", ".join(sorted(file.name for file in self.folder.glob("part-*.json")))
            raise InputError(
                f"{path}: wanted a finished cache's manifest, found "
                + (f"none, with parts {parts}" if parts else "none")
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text())
        wanted = {
            "format": FORMAT,
            "model": model_hash,
            "tokenizer": tokenizer_hash,
            "vocabulary": vocabulary,
        }
        for name, value in wanted.items():
            if value is not None and self.manifest.get(name) != value:
                raise InputError(
                    f"{path}: {name} is {self.manifest.get(name)!r}, expected {value!r}"
                )
        self.kind: str = self.manifest["kind"]
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.vocabulary: int = self.manifest["vocabulary"]
        self.open_shards = open_shards
        for record in self._records():
            check_size(self.folder / record["name"], record["bytes"])
        self._forget()

    write = staticmethod(write)

    def __len__(self) -> int:
        return self.manifest["examples"]

    def __contains__(self, key: int | str) -> bool:
        return bool(self._places(numbers_of([key]))[1].all())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def rows(
        self,
        keys: Sequence[int] | Sequence[str] | Tensor,
        *,
        counts: Sequence[int] | Tensor | None = None,
        positions: Tensor | None = None,
        tokens: Sequence[Any] | None = None,
    ) -> CachedRows:
        """Rows of examples, in the order of `keys`; for a collator or a DataLoader's worker.

        counts     (E,), with
        positions  (R,) ascending in each example: exactly these rows, the ones that a batch is
                   about to train on. None: all that the cache has
        tokens     E sequences of token ids, compared with what the cache was written from

        InputError names an example that is not there, or lacks one of the positions, or was written
        from other tokens.
        """
        numbers = numbers_of(keys)
        places, found = self._places(numbers)
        if not found.all():
            missing = keys[int(found.argmin())]
            raise InputError(
                f"{self.folder}: no example {shown(missing)} among its {len(self)}, "
                f"expected all {len(numbers)} that are asked for"
            )
        asked = None
        if positions is not None:
            asked = _asked(positions, counts, len(numbers))
        digests = None if tokens is None else digests_of(tokens, len(numbers))
        _, shard_of, example_of = self._index()
        shard_of, example_of = shard_of[places], example_of[places]
        pieces = []  # (shard, its examples' places in keys, their counts, rows in the shard)
        for number in np.unique(shard_of).tolist():
            shard = self._shard(number)
            (chosen,) = np.nonzero(shard_of == number)
            examples = example_of[chosen]
            if digests is not None:
                self._check_digests(keys, chosen, shard.digests[examples], digests[chosen])
            begins = shard.starts[examples]
            sizes = shard.starts[examples + 1] - begins
            rows = ranges(begins, sizes)
            if asked is not None:
                sizes, rows = self._select(keys, chosen, shard, sizes, rows, *asked)
            pieces.append((shard, chosen, sizes, rows))
        return self._gather(len(numbers), pieces)

    def teacher(
        self,
        rows: CachedRows,
        *,
        device: torch.device | str | None = None,
        tail: str = "renormalise",
    ) -> TeacherHead | TeacherTopK:
        """What slmperf.ops.kd_loss takes, on `device` (None: where the rows are).

        tail: of a cache of kind "top_k", see TeacherTopK; hidden states have none.
        """
        if rows.hidden is not None:
            target = torch.device(device or rows.hidden.device)
            return self.head(target).of(rows.hidden.to(target, non_blocking=True))
        assert rows.indices is not None and rows.log_probs is not None
        target = torch.device(device or rows.indices.device)
        indices = rows.indices.to(target, non_blocking=True)
        return TeacherTopK(indices, rows.log_probs.to(target, non_blocking=True), tail)

    def head(self, device: torch.device | str = "cpu") -> CachedHead:
        """The teacher's output layer, of a cache of hidden states; loaded once for each device."""
        if self.kind != "hidden":
            raise InputError(f"{self.folder}: kind is {self.kind!r}, expected 'hidden' for a head")
        device = torch.device(device)
        self._check_process()
        with self._lock:
            if device not in self._heads:
                with open_tensors(self.folder / HEAD, self.manifest["head"]["bytes"]) as stored:
                    # Cloned: a mapped tensor would be read from the disk again under pressure.
                    tensors = {
                        name: stored.get_tensor(name).clone().to(device) for name in stored.keys()
                    }
                scaling = {name: self.manifest[name] for name in ("softcap", "scale")}
                self._heads[device] = CachedHead(**tensors, **scaling)
            return self._heads[device]

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's checksums; InputError names a file."""
        for record in self._records():
            path = self.folder / record["name"]
            check_size(path, record["bytes"])
            found = sha256_of(path)
            if found != record["sha256"]:
                raise InputError(
                    f"{path}: corrupt: expected SHA-256 {record['sha256']} of its "
                    f"{record['bytes']} bytes, found {found}"
                )

    def _records(self) -> list[dict[str, Any]]:
        extra = [self.manifest[name] for name in ("index", "head") if name in self.manifest]
        return extra + self.manifest["shards"]

    def _forget(self) -> None:
        """Start without open files, as a new process must."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._heads: dict[torch.device, CachedHead] = {}
        self._arrays: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def _check_process(self) -> None:
        if self._process != os.getpid():  # the lock may have been forked while it was held
            self._forget()

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending numbers of keys, their shards and their places there: mapped, not read."""
        self._check_process()
        arrays = self._arrays
        if arrays is None:
            record = self.manifest["index"]
            with open_tensors(self.folder / record["name"], record["bytes"]) as stored:
                keys, shard, example = (
                    stored.get_tensor(name).numpy() for name in ("keys", "shard", "example")
                )
            self._arrays = arrays = keys, shard, example
        return arrays

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the index, and which of them are the key's."""
        known = self._index()[0]
        if not len(known):
            return np.zeros(len(numbers), np.int64), np.zeros(len(numbers), bool)
        places = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        return places, known[places] == numbers

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            shard = self._shards.get(number)
            if shard is None:
                shard = self._open(self.manifest["shards"][number])
                self._shards[number] = shard
                while len(self._shards) > self.open_shards:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return shard

    def _open(self, record: dict[str, Any]) -> _Shard:
        path = self.folder / record["name"]
        values = ["hidden"] if self.kind == "hidden" else ["indices", "log_probs"]
        with open_tensors(path, record["bytes"]) as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}
        for name in ("positions", *values):
            if name not in found or len(found[name]) != record["tokens"]:
                size = len(found[name]) if name in found else "nothing"
                raise InputError(f"{path}: {name} is {size}, expected {record['tokens']} rows")
        digests, starts, positions = (
            found[name].numpy() for name in ("digests", "starts", "positions")
        )
        return _Shard(digests, starts, positions, {name: _bits(found[name]) for name in values})

    def _check_digests(
        self, keys: Any, chosen: np.ndarray, stored: np.ndarray, given: np.ndarray
    ) -> None:
        wrong = stored != given
        if wrong.any():
            at = int(wrong.argmax())
            found = "other tokens" if stored[at] else "no tokens to compare with"
            raise InputError(
                f"{self.folder}: example {shown(keys[int(chosen[at])])} was written from {found}, "
                "expected those that are given"
            )

    def _select(
        self,
        keys: Any,
        chosen: np.ndarray,
        shard: _Shard,
        sizes: np.ndarray,
        rows: np.ndarray,
        counts: np.ndarray,
        begins: np.ndarray,
        positions: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows of the chosen examples those at the positions asked for; counts and rows."""
        wanted = positions[ranges(begins[chosen], counts[chosen])]
        order = np.arange(len(chosen), dtype=np.int64)
        owners = np.repeat(order, counts[chosen])
        # Example and position as one number, ascending: one search finds all.
        stored = np.repeat(order << 32, sizes) + shard.positions[rows]
        asked = (owners << 32) + wanted
        at = np.searchsorted(stored, asked)
        found = (wanted >= 0) & (wanted <= LARGEST) & (at < len(stored))
        found[found] = stored[at[found]] == asked[found]
        if not found.all():
            first = int(found.argmin())
            owner = int(owners[first])
            has = shard.positions[rows[stored >> 32 == owner]]
            some = ", ".join(map(str, has[:8].tolist())) + (", ..." if len(has) > 8 else "")
            raise InputError(
                f"{self.folder}: example {shown(keys[int(chosen[owner])])} has positions "
                f"({some}), expected {int(wanted[first])} among them"
            )
        return counts[chosen], rows[at]

    def _gather(
        self, examples: int, pieces: list[tuple[_Shard, np.ndarray, np.ndarray, np.ndarray]]
    ) -> CachedRows:
        """Copy the rows out of the shards, into the order of the keys."""
        counts = np.zeros(examples, np.int64)
        for _, chosen, sizes, _ in pieces:
            counts[chosen] = sizes
        begins, total = np.cumsum(counts) - counts, int(counts.sum())
        positions = np.empty(total, np.int64)
        width = self.manifest["hidden_size"] if self.kind == "hidden" else self.manifest["k"]
        found: dict[str, Tensor] = {}
        if self.kind == "hidden":
            found["hidden"] = torch.empty(total, width, dtype=self.dtype)
        else:
            found["indices"] = torch.empty(total, width, dtype=torch.int64)
            found["log_probs"] = torch.empty(total, width, dtype=self.dtype)
        for shard, chosen, sizes, rows in pieces:
            target = ranges(begins[chosen], sizes)
            positions[target] = shard.positions[rows]
            for name, out in found.items():
                _copy_rows(shard.values[name], rows, _bits(out), target)
        return CachedRows(torch.from_numpy(counts), torch.from_numpy(positions), **found)


def _asked(
    positions: Tensor, counts: Sequence[int] | Tensor | None, examples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (E,), first rows (E,) and positions (R,) of what is asked for."""
    wanted = positions.cpu().numpy().astype(np.int64)
    sizes = np.asarray([] if counts is None else counts, dtype=np.int64).reshape(-1)
    if len(sizes) != examples or wanted.shape != (int(sizes.sum()),):
        raise InputError(
            f"TeacherCache: counts is of {len(sizes)} examples and positions {wanted.shape}, "
            f"expected {examples} counts whose sum is the number of positions"
        )
    return sizes, np.cumsum(sizes) - sizes, wanted


def _copy_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray, target: np.ndarray) -> None:
    """out[target] = source[rows], each row by one memcpy, or two through a block in the cache."""
    if not len(rows):
        return
    same = source.dtype == out.dtype
    if same and _run(target):
        part = out[int(target[0]) : int(target[0]) + len(target)]
        if _run(rows):
            part[:] = source[int(rows[0]) : int(rows[0]) + len(rows)]
        else:
            # Without mode="clip" numpy would go through a copy of its own.
            np.take(source, rows, axis=0, out=part, mode="clip")
        return
    size = max(1, _BLOCK_BYTES // max(1, source[0].nbytes))
    block = np.empty((min(size, len(rows)), *source.shape[1:]), source.dtype)
    for begin in range(0, len(rows), size):
        taken = rows[begin : begin + size]
        part = block[: len(taken)]
        np.take(source, taken, axis=0, out=part, mode="clip")
        out[target[begin : begin + size]] = part


def _bits(tensor: Tensor) -> np.ndarray:
    """A view of the tensor, bfloat16 as uint16: numpy has none, and rows are only copied."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _run(numbers: np.ndarray) -> bool:
    """Whether they follow each other without a gap."""
    return bool((numbers[1:] - numbers[:-1] == 1).all())
