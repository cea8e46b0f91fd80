"""Checks of what a caller gives, and their messages: one line with what, wanted and found.

A leaf: imports nothing, torch least of all (it only reads `.shape`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class InputError(ValueError):
    """A mistake in what the user gave: a file, a recipe or an argument. One line of text."""


class Shaped(Protocol):
    """Anything with a shape: tensors, arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions, in order."""
        ...


def one_line(error: Exception, longest: int = 300) -> str:
    """What an exception says, in one line of at most so many letters."""
    return " ".join(str(error).split())[:longest]


def parse_tokens(text: str, what: str = "context") -> int:
    """ "4096" or "4k" (of 1024) -> 4096; InputError for anything that is no whole number >= 1."""
    digits, unit = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise InputError(f"{what} is {text!r}, expected a number of tokens such as 4096 or 4k")
    return int(digits) * unit


def check_plot(path: str | Path) -> str:
    """The format that a figure's file name asks for; InputError for another than these three."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise InputError(f"plot is {path}, expected a name that ends in .png, .svg, .pdf")
    return kind


def check_shapes(op: str, **named: tuple[Shaped, str]) -> dict[str, int]:
    """Check that the same letter means the same size in every argument; return the sizes.

    `check_shapes("divergence", student=(s, "T V"), teacher=(t, "T V"))` returns `{"T": .., "V":
    ..}` or raises InputError: `divergence: teacher is (8, 32000), expected (T, V) = (8, 32064)`.
    A word of digits in place of a letter asks for that very size.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in named.items():
        dims, shape = letters.split(), tuple(tensor.shape)
        if len(shape) == len(dims):
            wanted = tuple(
                int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
                for dim, size in zip(dims, shape, strict=True)
            )
            if shape == wanted:
                continue
        known = tuple(sizes.get(dim, dim) if not dim.isdigit() else int(dim) for dim in dims)
        raise InputError(
            f"{op}: {name} is {_text(shape)}, expected {_text(dims)}"
            + (f" = {_text(known)}" if known != tuple(dims) else "")
        )
    return sizes


def _text(parts: tuple | list) -> str:
    return "(" + ", ".join(map(str, parts)) + ("," if len(parts) == 1 else "") + ")"
