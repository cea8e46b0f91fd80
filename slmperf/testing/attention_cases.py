"""What paged_attention is run on, and how its results are judged: against the reference in fp64.

Whatever must not be read is NaN: slots behind a sequence's last key, pages that nobody has, which
the rest of the page table names, and padding rows of the query.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slmperf.ops import HeadMap
from slmperf.ops.paged_attention import PagedAttention, paged_attention
from slmperf.testing.budget import check_error
from slmperf.testing.case import BF16, FP16, FP32

FP8 = torch.float8_e4m3fn
PADDING = 3  # rows of the query behind the last sequence
SPARE = 2  # pages that no sequence has, and entries of the table behind the longest sequence


@dataclass(frozen=True)
class PagedAttentionCase:
    """One call: sequences of (queries, keys), heads by their counts."""

    dtype: torch.dtype
    sequences: tuple[tuple[int, int], ...]
    counts: tuple[int, ...] = (2, 1, 3)
    size: int = 32  # of a head
    page: int = 16
    fp8: bool = False  # pages of e4m3, with a scale for each key/value head
    window: int | None = None
    split_keys: int | None = None
    return_lse: bool = True
    pool: bool = False  # int64 indices and a table of more rows, in another order, as engines have

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), "+".join(map(str, self.counts))]
        parts += [f"{self.size}", f"page{self.page}"]
        parts += [f"{queries}of{keys}" for queries, keys in self.sequences]
        parts += [f"{name}{value}" if value is not True else name
                  for name in ("fp8", "window", "split_keys", "pool")
                  if (value := getattr(self, name))]  # fmt: skip
        return "-".join(parts)

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The op's tensors, the same on every call."""
        random = torch.Generator().manual_seed(len(str(self)) + sum(self.counts))
        queries, keys = zip(*self.sequences, strict=True)
        pages = [-(-length // self.page) for length in keys]
        index = torch.int64 if self.pool else torch.int32
        order = torch.randperm(sum(pages) + SPARE, generator=random)
        unused = int(order[-1])
        table = torch.full((len(keys), max(pages) + SPARE), unused, dtype=torch.int32)
        shape = (len(order), self.page, len(self.counts), self.size)
        key_pages, value_pages = torch.full((2, *shape), torch.nan)
        for row, (length, mine) in enumerate(zip(keys, order.split([*pages, SPARE]), strict=False)):
            table[row, : len(mine)] = mine
            at = torch.arange(length)
            page, slot = mine[at // self.page], at % self.page
            # Keys share a direction and some are long, so scores lie apart; values are near 1.
            shared = torch.randn(1, *shape[2:], generator=random)
            found = torch.randn(length, *shape[2:], generator=random) + shared
            found[::7] *= 3.0
            key_pages[page, slot] = found
            value_pages[page, slot] = torch.randn(length, *shape[2:], generator=random) + 1.0
        tokens = sum(queries)
        query = torch.randn(tokens + PADDING, sum(self.counts), self.size, generator=random)
        query[tokens:] = torch.nan
        stored = FP8 if self.fp8 else self.dtype
        given = {
            "query": query.to(self.dtype),
            "key_pages": key_pages.to(stored),
            "value_pages": value_pages.to(stored),
            "page_table": table,
            "query_starts": torch.tensor([0, *accumulate(queries)], dtype=index),
            "lengths": torch.tensor(keys, dtype=index),
        }
        if self.fp8:
            given["key_scale"] = torch.linspace(0.5, 1.5, len(self.counts))
            given["value_scale"] = torch.linspace(2.0, 0.25, len(self.counts))
        if self.pool:
            given["table_rows"] = torch.arange(len(keys)).flip(0) + 1
            rows = torch.full((len(keys) + 2, table.shape[1]), unused, dtype=torch.int32)
            rows[given["table_rows"]] = table
            given["page_table"] = rows
        return {name: tensor.to(device) for name, tensor in given.items()}

    def run(self, tensors: dict[str, Tensor], impl: str, **other: Any) -> PagedAttention:
        """slmperf.ops.paged_attention; `other` takes the place of the case's own settings."""
        settings: dict[str, Any] = {
            "head_map": HeadMap(self.counts),
            "window": self.window,
            "split_keys": self.split_keys,
            "return_lse": self.return_lse,
            "longest_query": max(queries for queries, _ in self.sequences),
        }
        return paged_attention(**tensors, **settings | other, impl=impl)

    def check(self, tensors: dict[str, Tensor], found: PagedAttention) -> None:
        """AssertionError where a result is further from fp64 than the error budget allows."""
        wide = {name: tensor.double() if name in ("query", "key_pages", "value_pages") else tensor
                for name, tensor in tensors.items()}  # fmt: skip
        gold, twin = self.run(wide, "reference"), self.run(tensors, "reference")
        longest = max(keys for _, keys in self.sequences)
        check_error(f"{self}: output", found.output, twin.output, gold.output, longest)
        assert (found.lse is None) == (not self.return_lse)
        if found.lse is not None:
            assert twin.lse is not None and gold.lse is not None
            check_error(f"{self}: lse", found.lse, twin.lse, gold.lse, longest)


def _compiled() -> tuple[PagedAttentionCase, ...]:
    """Every config of the kernel, whole and in splits, and what engines call."""
    few, some, many, decoded = ((1, 200),), ((9, 200),), ((60, 200),), ((1, 600),)
    pruned, even = (2, 1, 3), (4, 4)
    found = [
        PagedAttentionCase(dtype, sequences, pruned, size, fp8=fp8, return_lse=False)
        for dtype, fp8, sizes in ((BF16, False, (128, 256)), (BF16, True, (128, 256)),
                                  (FP32, False, (128,)))
        for size in sizes
        for sequences in (few, some, many)
    ]  # fmt: skip
    return (
        *found,
        PagedAttentionCase(FP16, many, pruned, 64),
        PagedAttentionCase(BF16, decoded, even, 128, page=1, pool=True),  # SGLang's pool
        PagedAttentionCase(BF16, many, even, 128, page=1, pool=True),
        PagedAttentionCase(BF16, many, even, 128, window=64),
        PagedAttentionCase(BF16, many, even, 80, split_keys=64),
    )


COMPILED = _compiled()
