"""The files of a teacher cache: what both its sides, writing and reading, know of them.

Keys of examples, digests of their tokens, hashes of teacher and tokenizer, the settings on which
all files agree, opening a file, and the index and manifest that make a whole of finished parts. The
folder's layout stands in slmperf.distill.cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slmperf.check import InputError
from slmperf.models.files import sha256_of, write_atomically
from slmperf.models.hashes import add_tensors, canonical, text_state
from slmperf.ops import TeacherHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**31 - 1  # positions and, on disk, token ids are int32

_PART = re.compile(r"part-(\d{5})-of-(\d{5})\.json")
# What a configuration says of how it was loaded, not of what it computes.
_PASSING = ("transformers_version", "use_cache", "_name_or_path", "architectures")


@dataclass(frozen=True, eq=False)
class CachedHead:
    """A teacher's vocabulary head without hidden states: fields as of slmperf.ops.TeacherHead."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | None = None

    def of(self, hidden: Tensor) -> TeacherHead:
        """The head over hidden states (T, D); InputError where D or dtype are others."""
        return TeacherHead(hidden, self.weight, self.bias, self.softcap, self.scale)


@dataclass(frozen=True)
class CachedTopK:
    """The shape of top-k entries: k of a vocabulary, log-probabilities in a floating dtype."""

    k: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocabulary <= LARGEST + 1:
            raise InputError(
                f"CachedTopK: k is {self.k} of a vocabulary of {self.vocabulary}, "
                "expected 1 <= k <= vocabulary <= 2^31"
            )


def hash_of_model(model: PreTrainedModel | str | os.PathLike[str]) -> str:
    """What a teacher is recognised by.

    Of a folder: "files:" and the SHA-256 over config.json and all *.safetensors, names and
    contents. Of a model in memory: "parameters:" and the SHA-256 over its configuration and all of
    its state dict, names, dtypes, shapes and contents; loading in another dtype gives another hash,
    as the teacher then gives other outputs. The two never agree: write and read by the same one.
    Either reads every byte of the weights.
    """
    whole = hashlib.sha256()
    if isinstance(model, str | os.PathLike):
        folder = Path(model)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights or not (folder / "config.json").is_file():
            raise InputError(f"{folder}: wanted config.json and *.safetensors, found no model")
        for path in (folder / "config.json", *weights):
            whole.update(f"{sha256_of(path)}  {path.name}\n".encode())
        return f"files:{whole.hexdigest()}"
    config = json.loads(model.config.to_json_string(use_diff=False))
    whole.update(canonical({key: config[key] for key in config if key not in _PASSING}))
    add_tensors(whole, sorted(model.state_dict().items()))
    return f"parameters:{whole.hexdigest()}"


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str]) -> str:
    """What a tokenizer, or the one in a folder, is recognised by: SHA-256 over all that makes ids
    of text (`text_state`) and its special tokens.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(canonical([text_state(tokenizer), special])).hexdigest()


class Known:
    """Keys with their digests: sorted arrays of those in shards, a dict of those in memory."""

    def __init__(self) -> None:
        self.numbers = np.empty(0, np.int64)
        self.digests = np.empty(0, np.int64)
        self.recent: dict[int, int] = {}

    def add(self, shards: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Keys and digests of shards."""
        numbers = np.concatenate([self.numbers, *(one[0] for one in shards)])
        digests = np.concatenate([self.digests, *(one[1] for one in shards)])
        order = np.argsort(numbers, kind="stable")
        self.numbers, self.digests = numbers[order], digests[order]

    def settle(self) -> None:
        """What was in memory is in a shard now."""
        size = len(self.recent)
        numbers = np.fromiter(self.recent.keys(), np.int64, size)
        self.add([(numbers, np.fromiter(self.recent.values(), np.int64, size))])
        self.recent = {}

    def find(self, numbers: np.ndarray) -> list[int | None]:
        """The digest of each, None where the key is unknown."""
        place = np.searchsorted(self.numbers, numbers)
        return [
            int(self.digests[at])
            if at < len(self.numbers) and self.numbers[at] == number
            else self.recent.get(number)
            for at, number in zip(place.tolist(), numbers.tolist(), strict=True)
        ]


def merge(folder: str | os.PathLike[str]) -> bool:
    """Write index and manifest if, of some number n of parts, all are finished; else False.

    The last part to finish does this by itself. All finished shards enter, those of unfinished
    parts of another n too. Of an example that is in two shards (samplers pad their last round) the
    first counts. InputError where the two were made of different tokens.
    """
    folder = Path(folder)
    lock = acquire(folder / ".merge.lock", wait=True)
    assert lock is not None
    try:
        states = read_parts(folder)
        finished: dict[str, int] = {}
        for name, state in states.items():
            number = name.rpartition("-")[2].removesuffix(".json")
            finished[number] = finished.get(number, 0) + bool(state["finished"])
        if not any(count == int(number) for number, count in finished.items()):
            return False
        settings = next(iter(states.values()))["settings"]
        for name, state in states.items():
            check_settings(folder / name, state["settings"], settings)
        shards = [record for state in states.values() for record in state["shards"]]
        index, examples = _index(folder, shards)
        manifest: dict[str, Any] = {**settings, "examples": examples}
        manifest["tokens"] = sum(record["tokens"] for record in shards)
        manifest["index"] = index
        if settings["kind"] == "hidden":
            manifest["head"] = _file_record(folder / HEAD)
        manifest["shards"] = shards
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
        return True
    finally:
        os.close(lock)


def _index(folder: Path, shards: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Write where each example is, by ascending key; the file's record and the examples in it."""
    read = [keys_of(folder, record) for record in shards]
    empty = [np.empty(0, np.int64)]
    numbers = np.concatenate(empty + [keys for keys, _ in read])
    digests = np.concatenate(empty + [found for _, found in read])
    sizes = [len(keys) for keys, _ in read]
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    example = ranges(np.zeros(len(sizes), np.int64), np.array(sizes, np.int64)).astype(np.int32)
    order = np.argsort(numbers, kind="stable")
    numbers, digests, shard, example = (
        array[order] for array in (numbers, digests, shard, example)
    )
    again = np.zeros(len(numbers), bool)
    again[1:] = numbers[1:] == numbers[:-1]
    other = again.copy()
    other[1:] &= (digests[1:] != digests[:-1]) & (digests[1:] != 0) & (digests[:-1] != 0)
    if other.any():
        at = int(other.argmax())
        raise InputError(
            f"{folder}: example {int(numbers[at])} is in {shards[shard[at - 1]]['name']} and in "
            f"{shards[shard[at]]['name']} with different tokens, expected the same"
        )
    tensors = {
        "keys": torch.from_numpy(numbers[~again]),
        "shard": torch.from_numpy(shard[~again]),
        "example": torch.from_numpy(example[~again]),
    }
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().tobytes())
    # Named by its content, and older ones stay: trainings may have them mapped.
    path = folder / f"index-{digest.hexdigest()[:16]}.safetensors"
    write_atomically(path, lambda aside: save_file(tensors, aside))
    return _file_record(path), int((~again).sum())


def _file_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: wanted a file, found none")
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def keys_of(folder: Path, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and digests (E,) of a shard's examples."""
    with open_tensors(folder / record["name"], record["bytes"]) as stored:
        return stored.get_tensor("keys").numpy(), stored.get_tensor("digests").numpy()


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> content of the parts' files, in the order of (n, i)."""
    found = [(match, path) for path in folder.iterdir() if (match := _PART.fullmatch(path.name))]
    found.sort(key=lambda one: (one[0][2], one[0][1]))
    return {path.name: json.loads(path.read_text()) for _, path in found}


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """InputError where a file belongs to another cache."""
    for name in (*wanted, *sorted(found.keys() - wanted.keys())):  # kind and model first
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: belongs to another teacher cache, its {name} is {found.get(name)!r}, "
                f"expected {wanted.get(name)!r}"
            )


@contextlib.contextmanager
def open_tensors(path: Path, size: int | None = None) -> Iterator[Any]:
    """A safetensors file, mapped; InputError where it is absent, not of `size` bytes, or damaged.

    Its tensors stay valid after the block, and on Linux after the file is deleted.
    """
    check_size(path, size)
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file of {path.stat().st_size} bytes: {error}"
        ) from error


def check_size(path: Path, size: int | None) -> None:
    """InputError where the file is absent or does not have its bytes."""
    if not path.is_file():
        raise InputError(f"{path}: wanted a safetensors file, found none")
    found = path.stat().st_size
    if size is not None and found != size:
        state = "truncated" if found < size else "too long"
        raise InputError(f"{path}: {state}: expected {size} bytes, found {found}")


def numbers_of(keys: Sequence[int] | Sequence[str] | Tensor | np.ndarray) -> np.ndarray:
    """(E,) int64 that stand for keys: integers for themselves, strings for 63 bits of a hash,
    below 0.
    """
    if isinstance(keys, Tensor):
        keys = keys.cpu().numpy()
    array = np.asarray(keys)
    if array.ndim != 1:
        raise InputError(f"TeacherCache: keys is {array.shape}, expected (E,)")
    if array.dtype.kind in "iu" or not len(array):
        numbers = array.astype(np.int64)
        if (numbers < 0).any():
            raise InputError(f"TeacherCache: keys holds {numbers.min()}, expected integers >= 0")
        return numbers
    texts = [key for key in keys if isinstance(key, str)]
    if len(texts) < len(keys):
        found = ", ".join(sorted({type(key).__name__ for key in keys}))
        raise InputError(f"TeacherCache: keys are {found}, expected all int or all str")
    return np.array([_digest(key.encode()) | -(2**63) for key in texts], np.int64)


def digests_of(tokens: Sequence[Any] | None, examples: int) -> np.ndarray:
    """(E,) int64: what examples' token ids are recognised by, 0 where they are not given."""
    if tokens is None:
        return np.zeros(examples, np.int64)
    if len(tokens) != examples:
        raise InputError(f"TeacherCache: tokens is of {len(tokens)} examples, expected {examples}")
    arrays = (np.ascontiguousarray(one, dtype="<i8") for one in tokens)
    return np.array([_digest(array.tobytes()) or 1 for array in arrays], np.int64)


def ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ..., counts[0] of them, then those of begins[1], and so on."""
    ends = np.cumsum(counts)
    return np.repeat(begins - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0)


def shown(key: Any) -> str:
    """A key in a message, tensors' and arrays' elements as plain numbers."""
    return repr(key.item() if hasattr(key, "item") else key)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def acquire(path: Path, wait: bool = False) -> int | None:
    """Lock a file; its descriptor, None where another has it. The file stays, the lock goes with
    the process.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    owner = f"process {os.getpid()} on {socket.gethostname()}".encode()
    os.pwrite(handle, owner, 0)
    os.ftruncate(handle, len(owner))
    return handle


def settings_of(
    contents: CachedHead | CachedTopK, model_hash: str, tokenizer_hash: str | None
) -> dict[str, Any]:
    """What every file of a cache must agree on, as JSON has it."""
    if isinstance(contents, CachedHead):
        contents.of(contents.weight[:0])  # its checks
        dtype, (vocabulary, size) = contents.weight.dtype, contents.weight.shape
        own = {"hidden_size": size, "softcap": contents.softcap, "scale": contents.scale}
    else:
        dtype, vocabulary, own = contents.dtype, contents.vocabulary, {"k": contents.k}
    if dtype not in DTYPES.values():
        raise InputError(f"TeacherCache: dtype is {dtype}, expected {' or '.join(DTYPES)}")
    return {
        "format": FORMAT,
        "kind": "hidden" if isinstance(contents, CachedHead) else "top_k",
        "model": model_hash,
        "tokenizer": tokenizer_hash,
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary": vocabulary,
        **own,
    }
