"""rope_write's family: what it is run on, padding among the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slmperf.ops.rope_write import FP8, rope_write, rope_write_reference
from slmperf.testing.case import BF16, FP16, FP32, Case, Family, called

PAGES, SCALES = ("key_pages", "value_pages"), ("key_scale", "value_scale")


@dataclass(frozen=True)
class RopeWriteCase(Case):
    """rope_write of T tokens, every fifth of them padding, which is NaN and has no position.

    heads      (H, G); size: C; rotary: R; page: slots of a page
    fp8        pages of e4m3 with a scale for each head
    wide       int64 indices; tables in fp32, whatever the query's dtype is
    read_back  the value is the queries beside what then lies in the tokens' slots; otherwise the
               queries alone, which costs nothing more
    """

    op: ClassVar[str] = "rope_write"
    row_axis: ClassVar[dict[str, int]] = {
        name: 0 for name in ("query", "key", "value", "positions", "slots")
    }

    tokens: int
    heads: tuple[int, int]
    size: int
    rotary: int
    page: int = 16
    fp8: bool = False
    wide: bool = False
    read_back: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, H, G, C)."""
        return self.tokens, *self.heads, self.size

    @property
    def setting(self) -> str:
        """Slots of a page, its numbers."""
        return f"page {self.page}" + (", fp8" if self.fp8 else "")

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The op's tensors. Pages hold 7, which is no token's number."""
        random = self.generator()
        heads, kv_heads = self.heads
        index = torch.int64 if self.wide else torch.int32
        pages = -(-max(1, self.tokens) // self.page) + 1
        length = 4096
        angle = torch.arange(length)[:, None] * 500000.0 ** (-torch.arange(self.rotary // 2) / 32)
        slots = torch.randperm(pages * self.page, generator=random)[: self.tokens]
        padding = torch.arange(self.tokens) % 5 == 4
        slots[padding] = -1
        positions = torch.randint(0, length, (self.tokens,), generator=random)
        positions[padding] = -9
        shape = (pages, self.page, kv_heads, self.size)
        table = FP32 if self.wide else self.dtype
        made = {
            "query": 3 * torch.randn(self.tokens, heads, self.size, generator=random),
            "key": 3 * torch.randn(self.tokens, kv_heads, self.size, generator=random),
            "value": torch.randn(self.tokens, kv_heads, self.size, generator=random),
        }
        for one in made.values():
            one[padding] = torch.nan
        made = {name: one.to(self.dtype) for name, one in made.items()}
        made |= {"cos": angle.cos().to(table), "sin": angle.sin().to(table)}
        made |= {"positions": positions.to(index), "slots": slots.to(index)}
        for name in PAGES:
            made[name] = torch.full(shape, 7.0).to(FP8 if self.fp8 else self.dtype)
        if self.fp8:
            made["key_scale"] = torch.linspace(0.02, 0.1, kv_heads)
            made["value_scale"] = torch.linspace(0.03, 0.003, kv_heads)  # the last one saturates
        return {name: one.to(device) for name, one in made.items()}

    def run(self, tensors: dict[str, Tensor], impl: str) -> Tensor:
        """slmperf.ops.rope_write, into the tensors' own pages."""
        return self._value(tensors, rope_write(**tensors, impl=impl))

    def reference(self, tensors: dict[str, Tensor]) -> Tensor:
        """The reference's function itself, so that torch.compile sees into it."""
        names = ("query", "key", "value", "cos", "sin", "positions", *PAGES, "slots", *SCALES)
        found = rope_write_reference(*(tensors.get(name) for name in names))
        return self._value(tensors, found)

    def _value(self, tensors: dict[str, Tensor], found: Tensor) -> Tensor:
        """The queries, beside what was written."""
        if not self.read_back:
            return found
        slots = tensors["slots"].long()
        place = slots.clamp(min=0) // self.page, slots.clamp(min=0) % self.page
        there = (slots >= 0)[:, None, None]
        back = [torch.where(there, tensors[name][place], 0.0) for name in PAGES]
        return torch.cat([one.flatten(1) for one in (found, *back)], dim=1)

    def operator(self, tensors: dict[str, Tensor], impl: str) -> tuple[Callable, tuple]:
        """torch.ops.slmperf.rope_write.<impl>."""
        return called(lambda: self.run(tensors, impl), self.op)

    @property
    def reduction(self) -> int:
        """Two products."""
        return 2

    @property
    def bytes(self) -> int:
        """Of tokens that are none of padding: all is read once and written once, tables too."""
        heads, kv_heads = self.heads
        tokens, number = self.tokens - self.tokens // 5, self.dtype.itemsize
        of_pages = 1 if self.fp8 else number
        moved = heads * 2 * number + 2 * kv_heads * (number + of_pages)
        tables = self.rotary * (4 if self.wide else number)
        return tokens * (moved * self.size + tables) + self.tokens // 5 * heads * self.size * number


def _rope(
    dtype: torch.dtype, tokens: int, heads: tuple[int, int], channels: tuple[int, int], page: int,
    wide: bool,
) -> RopeWriteCase:  # fmt: skip
    return RopeWriteCase(dtype, tokens, heads, *channels, page, wide=wide, read_back=True)


ROPE_WRITE = Family(
    make=_rope,
    axes={
        "dtype": (FP32, BF16, FP16),
        "tokens": (1, 8, 60),
        "heads": ((3, 1), (6, 2), (8, 8), (12, 5)),
        # the whole head, a part of it, less than a vector, odd ones
        "channels": ((64, 64), (80, 80), (96, 32), (6, 2), (33, 26)),
        "page": (1, 16, 128),
        "wide": (False, True),
    },
    small={"tokens": (1, 6), "heads": ((3, 1), (6, 2))},
    checked=(
        _rope(BF16, 9, (6, 2), (48, 32), 16, True),
        _rope(FP32, 9, (3, 1), (32, 32), 1, False),
    ),
    crossed=("dtype", "heads", "channels"),
    compiled=(
        *(
            RopeWriteCase(BF16, 8, (24, 8), size, rotary, fp8=fp8, wide=fp8)
            for size, rotary in ((128, 128), (64, 64), (80, 40))
            for fp8 in (False, True)
        ),
        RopeWriteCase(FP16, 8, (24, 8), 128, 128, fp8=True),
        RopeWriteCase(FP32, 8, (24, 8), 128, 128),
        RopeWriteCase(BF16, 8, (32, 8), 128, 128, page=1, wide=True),  # SGLang's pool
    ),
    bench={
        "cuda": (
            RopeWriteCase(BF16, 8192, (32, 8), 128, 128, wide=True),
            RopeWriteCase(BF16, 8192, (32, 8), 128, 128, fp8=True, wide=True),
            RopeWriteCase(BF16, 8192, (24, 8), 128, 128, page=1, wide=True),
            RopeWriteCase(BF16, 64, (32, 8), 128, 128, wide=True),
        ),
        "cpu": (
            RopeWriteCase(FP32, 1024, (32, 8), 64, 64, wide=True),
            RopeWriteCase(BF16, 1024, (32, 8), 64, 64, wide=True),
            RopeWriteCase(BF16, 1024, (32, 8), 64, 64, fp8=True, wide=True),
        ),
    },
)
