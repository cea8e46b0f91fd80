"""Writing files and folders so that a reader sees the old content or the new, never a half.

Everything is written beside its target under a hidden name, flushed to the disk (fsync of the files
and of the folders that name them), and renamed. A process killed half-way leaves only a hidden
sibling, which the next writer of the same target removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE = 2  # linux/fs.h: swap two names in one step


def fsync(path: str | os.PathLike[str]) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: str | os.PathLike[str]) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync(Path(root, name))
        fsync(root)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, or of a folder: its files' paths and contents in sorted order."""
    path = Path(path)
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            whole.update(f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return whole.hexdigest()
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]
) -> None:
    """Write `path` in one step. `content` is the bytes, the text (UTF-8), or a function that writes
    the path it gets.

    The parent folders are made. On an exception the target is untouched and nothing is left beside
    it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync(aside)
        os.replace(aside, path)
    finally:
        _remove(aside)
    fsync(path.parent)


def finite(value: Any) -> Any:
    """A JSON value without NaN and infinity, for which JSON has no word: None stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def write_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty folder to fill; when the block ends without an exception it becomes `path`,
    replacing what was there.

    On an exception the target is untouched and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        replace_folder(aside, path)
    finally:
        _remove(aside)


def replace_folder(new: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Flush the folder `new` and rename it to `path` (same file system); what stood there before is
    deleted.

    Where the kernel can swap two names (Linux), `path` names a whole folder at every moment.
    Elsewhere an existing `path` is moved away first, so a process killed between the two renames
    leaves `path` absent, not half-written.
    """
    new, path = Path(new), Path(path)
    fsync_tree(new)
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        _remove(new)
    else:
        old = _aside(path, mark="old")
        os.rename(path, old)
        os.rename(new, path)
        _remove(old)
    fsync(path.parent)


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Delete what processes that are no more left half-written directly in `folder`."""
    for stale in Path(folder).glob(".*.*-*"):
        mark, _, owner = stale.name.rpartition(".")[2].partition("-")
        if mark in ("new", "old") and owner.isdecimal() and not _alive(int(owner)):
            _remove(stale)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where kernel or file system cannot."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # C libraries other than glibc >= 2.28 and musl >= 1.2.6
        return False
    names = os.fsencode(first), os.fsencode(second)
    if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _aside(path: Path, mark: str = "new") -> Path:
    """A free hidden sibling of `path`; what killed processes left for the same path is removed."""
    prefix = f".{path.name}.{mark}-"
    for stale in path.parent.glob(f".{_escape(path.name)}.{mark}-*"):
        owner = stale.name.removeprefix(prefix)
        if owner == str(os.getpid()) or (owner.isdecimal() and not _alive(int(owner))):
            _remove(stale)
    return path.parent / f"{prefix}{os.getpid()}"


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
