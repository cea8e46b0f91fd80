"""The writing side of a teacher cache: parts and their shards, and going on after a kill.

The folder's layout stands in slmperf.distill.cache. What makes it safe:

- A shard is written aside, flushed, renamed, and then entered in its part's JSON file. A writer
  killed in between finds the shard again and enters it then.
- What a killed writer held in memory is lost; the next one takes the examples that are in no
  finished shard, whatever order they come in. A shard that somebody deletes, a damaged one say, is
  written again in the same way.
- One process writes a part, held by a lock on a file that the kernel drops with the process.
  Files of different parts have different names; what all share (index, manifest) is written under
  a lock of its own. Machines that share the folder need a file system whose locks reach all of
  them (NFS does, Lustre mounted with flock).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.cache.files import (
    HEAD,
    LARGEST,
    CachedHead,
    CachedTopK,
    Known,
    acquire,
    check_settings,
    digests_of,
    keys_of,
    merge,
    numbers_of,
    open_tensors,
    ranges,
    read_parts,
    settings_of,
    shown,
)
from slmperf.models.files import sha256_of, write_atomically
from slmperf.ops import TeacherTopK

_MOST_EXAMPLES = 2**20  # of one shard: bounds what examples without a token take in memory


class TeacherCacheWriter:
    """Writes one part of a cache; made anew after a kill, it goes on where the last one stopped.

        with TeacherCacheWriter(folder, head, model_hash=..., tokenizer_hash=...) as writer:
            for ...:
                writer.append(keys, counts, positions, hidden)

    Leaving the block finishes the part, and the cache once every part is finished. After an
    exception what was appended is kept, and the part stays unfinished.

    folder          made if it is not there; one that holds another cache is refused
    contents        CachedHead: hidden states of its dtype and size are cached, with the head;
                    CachedTopK: token ids and log-probabilities
    model_hash      of the teacher, e.g. by `hash_of_model`
    tokenizer_hash  e.g. by `hash_of_tokenizer`
    part            (i, n): this is worker i of n, 0 <= i < n. A run may go on with another n
    shard_bytes     a shard is finished when it holds this many bytes
    shard_seconds   or when, on an append, it is this old: what a kill costs at most
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        contents: CachedHead | CachedTopK,
        *,
        model_hash: str,
        tokenizer_hash: str | None,
        part: tuple[int, int] = (0, 1),
        shard_bytes: int = 2**29,
        shard_seconds: float = 600.0,
    ) -> None:
        index, parts = part
        if not 0 <= index < parts < 10**5:
            raise InputError(f"TeacherCache: part is {part}, expected (i, n) with 0 <= i < n")
        self.folder, self.contents = Path(folder), contents
        self.settings = settings_of(contents, model_hash, tokenizer_hash)
        self._name = f"part-{index:05d}-of-{parts:05d}"
        self._shapes: dict[str, tuple[int, torch.dtype]]  # name -> columns, dtype on disk
        if isinstance(contents, CachedHead):
            self._shapes = {"hidden": (contents.weight.shape[1], contents.weight.dtype)}
        else:
            self._shapes = {
                "indices": (contents.k, torch.int32),
                "log_probs": (contents.k, contents.dtype),
            }
        row = 4 + sum(columns * dtype.itemsize for columns, dtype in self._shapes.values())
        self._capacity, self._seconds = max(1, shard_bytes // row), shard_seconds
        self._known = Known()
        self._buffers: dict[str, Tensor] = {}
        self._begin_shard()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(self.folder / f".{self._name}.lock")
        if self._lock is None:
            owner = (self.folder / f".{self._name}.lock").read_text() or "another process"
            raise InputError(
                f"{self.folder}: part {index} of {parts} is being written by {owner}, "
                "expected no other writer"
            )
        try:
            self._open(write_head=index == 0)
        except BaseException:
            self.close()
            raise

    def _open(self, write_head: bool) -> None:
        """Check what the folder holds, and learn which examples need not come again."""
        # The part is ours, so these are a killed writer's, whatever machine it ran on.
        for stale in self.folder.glob(f".{self._name}[.-]*.new-*"):
            stale.unlink()
        states = read_parts(self.folder)
        for name, state in states.items():
            check_settings(self.folder / name, state["settings"], self.settings)
        stored = states.pop(f"{self._name}.json", None)
        self._state: dict[str, Any] = stored or {
            "settings": self.settings,
            "finished": False,
            "shards": [],
        }
        records = {one["name"]: one for one in self._state["shards"]}
        found = sorted(path.name for path in self.folder.glob(f"{self._name}-*.safetensors"))
        # A shard that someone deleted (a damaged one) is written again, under a new name.
        shards = [records.get(name) or self._record(name) for name in found]
        if shards != self._state["shards"]:
            self._state.update(shards=shards, finished=False)
            stored = None
        self._number = max([-1, *(int(name[-18:-12]) for name in [*found, *records])]) + 1
        everything = [one for state in (*states.values(), self._state) for one in state["shards"]]
        self._known.add([keys_of(self.folder, record) for record in everything])
        if stored is None:
            self._save_state()
        if write_head and isinstance(self.contents, CachedHead):
            if not (self.folder / HEAD).is_file():
                write_atomically(self.folder / HEAD, self._save_head)

    def missing(
        self, keys: Sequence[int] | Sequence[str], tokens: Sequence[Any] | None = None
    ) -> np.ndarray:
        """(E,) bool: which examples the cache does not have yet.

        InputError where it has one of these keys with other `tokens`.
        """
        numbers, digests = numbers_of(keys), digests_of(tokens, len(keys))
        return np.array([found is None for found in self._found(keys, numbers, digests)], bool)

    def append(
        self,
        keys: Sequence[int] | Sequence[str],
        counts: Sequence[int] | Tensor,
        positions: Tensor,
        teacher: Tensor | TeacherTopK,
        tokens: Sequence[Any] | None = None,
    ) -> int:
        """Take examples, in any order; the number of those that were not there yet.

        keys       E integers >= 0 or strings, one an example
        counts     (E,) rows of each example; 0 is allowed
        positions  (R,) integers: the tokens of the rows within their example, ascending
        teacher    hidden states (R, D), or TeacherTopK (R, K), on any device
        tokens     E sequences of token ids, the examples themselves: their digests are stored, so
                   that a cache is never read, or gone on with, for other data under the same keys

        An example that the cache has is skipped. Raises InputError, and takes nothing, for shapes
        or dtypes that do not fit, values that are not finite, and a known key with other tokens.
        """
        numbers, digests = numbers_of(keys), digests_of(tokens, len(keys))
        values = self._checked(keys, counts, positions, teacher)
        counted = np.asarray(counts, dtype=np.int64).reshape(-1)
        taken: dict[int, int] = {}
        for place, found in enumerate(self._found(keys, numbers, digests)):
            if found is None:
                first = taken.setdefault(int(numbers[place]), place)
                self._check_tokens(keys[place], int(digests[first]), int(digests[place]))
        places = np.fromiter(taken.values(), np.int64, len(taken))
        if len(places) < len(numbers):
            ends = np.cumsum(counted)
            rows = torch.from_numpy(ranges(ends[places] - counted[places], counted[places]))
            values = {name: value[rows.to(value.device)] for name, value in values.items()}
        self._place(numbers[places], digests[places], counted[places], values)
        if self._rows >= self._capacity or time.monotonic() - self._began >= self._seconds:
            self.flush()
        return len(places)

    def flush(self) -> None:
        """Write what was appended as a shard, however small; nothing where that is nothing."""
        if not self._examples:
            return
        numbers, digests, counts = map(np.concatenate, zip(*self._examples, strict=True))
        starts = np.concatenate([[0], np.cumsum(counts)])
        name = f"{self._name}-{self._number:06d}.safetensors"
        tensors = {
            "keys": torch.from_numpy(numbers),
            "digests": torch.from_numpy(digests),
            "starts": torch.from_numpy(starts),
            **{kind: buffer[: starts[-1]] for kind, buffer in self._buffers.items()},
        }
        record: dict[str, Any] = {}

        def save(aside: Path) -> None:
            save_file(tensors, aside, metadata={"teacher_cache": json.dumps(self.settings)})
            record.update(self._record(name, aside))

        write_atomically(self.folder / name, save)
        self._state["shards"].append(record)
        self._state["finished"] = False
        self._number += 1
        self._known.settle()
        self._begin_shard()
        self._save_state()

    def finish(self) -> bool:
        """Mark this part finished; True where the cache is whole now and its manifest written."""
        self.flush()
        self._state["finished"] = True
        self._save_state()
        return merge(self.folder)

    def close(self) -> None:
        """Let go of the part, without writing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.flush()
        finally:
            self.close()

    def _begin_shard(self) -> None:
        # Of the shard in memory: (keys, digests, counts) of examples, as they came.
        self._examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._held = self._rows = 0  # examples, rows
        self._began = time.monotonic()

    def _place(
        self, numbers: np.ndarray, digests: np.ndarray, counts: np.ndarray, values: dict
    ) -> None:
        """Copy examples into the shard in memory, writing it out whenever it is full."""
        ends = np.cumsum(counts)
        first = row = 0
        while first < len(numbers):
            room = self._capacity - self._rows
            last = int(np.searchsorted(ends, row + room, side="right"))
            last = min(last, first + _MOST_EXAMPLES - self._held)
            if last <= first:
                if self._held:
                    self.flush()
                    continue
                last = first + 1  # an example larger than a shard is a shard of its own
            end = int(ends[last - 1])
            self._reserve(self._rows + end - row)
            for name, value in values.items():
                self._buffers[name][self._rows : self._rows + end - row].copy_(value[row:end])
            part = numbers[first:last], digests[first:last], counts[first:last]
            self._examples.append(part)  # from here on they count, whatever interrupts
            self._known.recent.update(zip(part[0].tolist(), part[1].tolist(), strict=True))
            self._held += last - first
            self._rows += end - row
            first, row = last, end

    def _reserve(self, rows: int) -> None:
        if not self._buffers or rows > len(self._buffers["positions"]):
            assert self._rows == 0  # only an example larger than a shard asks for more
            rows = max(rows, self._capacity)
            self._buffers = {"positions": torch.empty(rows, dtype=torch.int32)}
            for name, (columns, dtype) in self._shapes.items():
                self._buffers[name] = torch.empty(rows, columns, dtype=dtype)

    def _checked(
        self,
        keys: Sequence[Any],
        counts: Sequence[int] | Tensor,
        positions: Tensor,
        teacher: Tensor | TeacherTopK,
    ) -> dict[str, Tensor]:
        """The rows by their names on disk."""

        def refuse(name: str, found: object, wanted: object) -> None:
            raise InputError(f"TeacherCache: {name} is {found}, expected {wanted}")

        counted = torch.as_tensor(counts, dtype=torch.int64).reshape(-1)
        if len(counted) != len(keys):
            refuse("counts", f"of {len(counted)} examples", f"one for each of {len(keys)} keys")
        rows = int(counted.sum())
        if positions.shape != (rows,) or positions.is_floating_point():
            refuse("positions", f"{tuple(positions.shape)} {positions.dtype}", f"({rows},) integer")
        if isinstance(teacher, TeacherTopK):
            given = {"indices": teacher.indices, "log_probs": teacher.log_probs}
        else:
            given = {"hidden": teacher}
        if given.keys() != self._shapes.keys():
            refuse("teacher", type(teacher).__name__, f"what {type(self.contents).__name__} says")
        for name, value in given.items():
            columns, dtype = self._shapes[name]
            if tuple(value.shape) != (rows, columns):
                refuse(name, tuple(value.shape), (rows, columns))
            if name == "hidden" and value.dtype != dtype:
                refuse(name, value.dtype, f"the head's {dtype}")
        if rows == 0:
            return {"positions": positions, **given}
        places = positions.to("cpu", torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(keys)), counted)
        fine = (places >= 0) & (places <= LARGEST)
        fine[1:] &= (places[1:] > places[:-1]) | (owner[1:] != owner[:-1])
        for name, value in given.items():
            if name == "indices":
                assert isinstance(self.contents, CachedTopK)
                inside = ((value >= 0) & (value < self.contents.vocabulary)).all(dim=1).cpu()
                what = f"token ids from 0 to {self.contents.vocabulary - 1}"
            else:  # -inf fills rows of fewer than k tokens
                least, most = (one.cpu() for one in value.aminmax(dim=1))  # NaN if there is one
                inside = most < 0.01 if name == "log_probs" else (least - most).isfinite()
                what = "log-probabilities" if name == "log_probs" else "finite numbers"
            if not inside.all():
                key = keys[int(owner[int(inside.int().argmin())])]
                raise InputError(f"TeacherCache: {name} of example {shown(key)}: expected {what}")
        if not fine.all():
            key = keys[int(owner[int(fine.int().argmin())])]
            raise InputError(
                f"TeacherCache: positions of example {shown(key)}: expected ascending numbers >= 0"
            )
        return {"positions": positions, **given}

    def _found(
        self, keys: Sequence[Any], numbers: np.ndarray, digests: np.ndarray
    ) -> list[int | None]:
        found = self._known.find(numbers)
        for key, have, given in zip(keys, found, digests.tolist(), strict=True):
            self._check_tokens(key, have or 0, given)
        return found

    def _check_tokens(self, key: object, have: int, given: int) -> None:
        if have and given and have != given:
            raise InputError(
                f"{self.folder}: example {shown(key)} comes with other tokens than before under "
                "this key, expected the same"
            )

    def _record(self, name: str, path: Path | None = None) -> dict[str, Any]:
        """What the manifest says of a shard."""
        path = path or self.folder / name
        with open_tensors(path) as stored:
            told = json.loads((stored.metadata() or {}).get("teacher_cache", "{}"))
            check_settings(path, told, self.settings)
            examples = stored.get_slice("keys").get_shape()[0]
            tokens = stored.get_slice("positions").get_shape()[0]
        return {
            "name": name,
            "examples": examples,
            "tokens": tokens,
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }

    def _save_state(self) -> None:
        write_atomically(self.folder / f"{self._name}.json", json.dumps(self._state, indent=1))

    def _save_head(self, aside: Path) -> None:
        assert isinstance(self.contents, CachedHead)
        tensors = {"weight": self.contents.weight.detach().cpu().contiguous()}
        if self.contents.bias is not None:
            tensors["bias"] = self.contents.bias.detach().cpu().contiguous()
        save_file(tensors, aside)
