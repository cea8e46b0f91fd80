"""paged_attention on GPU: one kernel for prefills, suffixes and decoding, and one that merges.

Formulas and layout: slmperf/ops/paged_attention.py. A program has a tile of one sequence's rows of
one key/value head: its query heads, counts[g] of them, packed token by token, so each key is read
once for the whole group and odd groups fill tiles as even ones do. It goes through the keys that
its rows see in blocks, whose pages it looks up, with a running maximum to the base 2 and a running
sum (FlashAttention). Where there are fewer programs than a device takes, the keys of a sequence are
cut into splits: partial results in fp32 and their lse, which `_merge` adds up in order.

    flops per query and key     4 C
    bytes per key of a tile     2 C elements, plus its part of the page table
    programs                    (tiles x G, B, splits); those without rows or keys end at once

Blocks that no row may see are left out, blocks that all rows see are not masked. A tile's rows do
not touch each other, and blocks begin at multiples of their size from a split's first key: with
split_keys, when the tile does not depend on the batch either, a row's bits do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels import common
from slmperf.triton_kernels.common import LOG2_E, LOWEST, configured, e4m3, on_device


class Tile(NamedTuple):
    """Rows and keys of a program's block, its warps, blocks of keys on their way."""

    rows: int
    keys: int
    warps: int
    stages: int


# (capability, bytes of a page's number, of the query's where that has 4) -> the largest head size
# -> tiles, ascending: the first that holds a sequence's rows is taken, else the last. 16 rows are
# what matrix units take at least, 64 what a warpgroup's do. None of them spills; 0 is the
# interpreter. Not yet tuned on a device.
_FEW, _FEW_WIDE = Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)
_OF_A100 = {128: (_FEW, Tile(64, 32, 4, 3)), 256: (_FEW_WIDE, Tile(64, 32, 8, 2))}
_OF_H100 = {
    128: (_FEW, Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    256: (_FEW_WIDE, Tile(64, 32, 8, 2)),
}
_OF_FP32 = {128: (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2))}
_INTERPRETED = {256: (Tile(16, 16, 1, 1), Tile(32, 16, 1, 1))}
CONFIGS: dict[tuple[int, int], dict[int, tuple[Tile, ...]]] = {
    **{(0, bytes_): _INTERPRETED for bytes_ in (1, 2, 4)},
    **{(80, bytes_): _OF_A100 for bytes_ in (1, 2)},
    **{(90, bytes_): _OF_H100 for bytes_ in (1, 2)},
    **{(capability, 4): _OF_FP32 for capability in (80, 90)},
}
# A device gets this many programs for each processor where keys are split; a split has no fewer
# keys than these, unless the caller says so.
PROGRAMS_EACH, LEAST_KEYS = 2, 256
MATRIX_EXEMPT = {
    "_attend(*ROWS=16,*": "16 rows: a warpgroup takes 64",
    "_attend(*ROWS=32,*": "32 rows: products of fp32 take three of TF32, and spill with 64",
}


@triton.jit
def _slots(
    pages_ptr, of_page, of_slot, of_c, page, slot, inside, C: tl.constexpr, BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(KEYS, BLOCK_C) numbers of one head, in the query's dtype; 0 where there are none."""
    c = tl.arange(0, BLOCK_C)
    at = (page * of_page + slot * of_slot)[:, None] + (c * of_c)[None, :]
    if MASKED:
        found = tl.load(pages_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    elif C < BLOCK_C:
        found = tl.load(pages_ptr + at, mask=(c < C)[None, :], other=0.0)
    else:
        found = tl.load(pages_ptr + at)
    if found.dtype == tl.uint8:
        found = e4m3(found)
    return found.to(dtype)


@triton.jit
def _block(
    first, begin, end, position, query, top, total, mixed, table_ptr, key_ptr, value_ptr, key_page,
    key_slot, key_c, value_page, value_slot, value_c, scale, window, PAGE: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `first` on, of those from `begin` to `end`; MASKED: not all are seen.

    scale  > 0, to the base 2
    top    (ROWS,) largest scaled score       total  (ROWS,) sum of 2^(score - top)
    mixed  (ROWS, BLOCK_C) values by those weights
    """
    key = first + tl.arange(0, KEYS)
    inside = (key >= begin) & (key < end)
    if MASKED:
        page = tl.load(table_ptr + key // PAGE, mask=inside, other=0).to(tl.int64)
    else:
        page = tl.load(table_ptr + key // PAGE).to(tl.int64)
    slot = (key % PAGE).to(tl.int64)
    keys = _slots(
        key_ptr, key_page, key_slot, key_c, page, slot, inside, C, BLOCK_C, MASKED, query.dtype
    )
    scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
    if MASKED:
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
    # Scaled here, masked or not: one multiply-add, and the same rounding in both.
    raised = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - raised[:, None])
    shrink = tl.exp2(top - raised)
    values = _slots(
        value_ptr, value_page, value_slot, value_c, page, slot, inside, C, BLOCK_C, MASKED,
        query.dtype,
    )  # fmt: skip
    mixed = tl.dot(
        weights.to(query.dtype), values, mixed * shrink[:, None], input_precision="tf32x3"
    )
    return raised, total * shrink + tl.sum(weights, axis=1), mixed


# Not specialised: numbers that differ from call to call and from layer to layer.
@triton.jit(
    do_not_specialize=["table_row", "tokens", "heads", "kv_heads", "window", "split_keys", "splits"]
)
def _attend(
    query_ptr, key_ptr, value_ptr, table_ptr, rows_ptr, starts_ptr, lengths_ptr, heads_ptr,
    key_scale_ptr, value_scale_ptr, output_ptr, lse_ptr, query_token, query_head, query_c, key_page,
    key_slot, key_head, key_c, value_page, value_slot, value_head, value_c, table_row, tokens,
    heads, kv_heads, scale, window, split_keys, splits, PAGE: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of a sequence's rows of a key/value head, over all keys that they see or one split.

    heads_ptr  (G + 1,) the first query head of each key/value head, and H
    scale         of the scores, to the base 2
    output, lse   of the call; with SPLIT (splits, T, H, C) and (splits, T, H), of which rows that
                  see nothing of a split only get the lse
    split_keys    keys of a split; 0: a sequence's keys over all splits, in whole blocks
    """
    tiles = tl.num_programs(0) // kv_heads
    tile = tiles - 1 - tl.program_id(0) % tiles  # the last rows see most keys: they go first
    kv_head = tl.program_id(0) // tiles
    sequence, split = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + sequence).to(tl.int32)
    queries = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start
    first_head = tl.load(heads_ptr + kv_head)
    group = tl.load(heads_ptr + kv_head + 1) - first_head
    rows = queries * group
    if tile * ROWS >= rows:
        return
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    past = length - queries

    # The keys that any row sees, and of these the ones that all rows see.
    first_token = (tile * ROWS) // group
    last_token = tl.minimum(tile * ROWS + ROWS - 1, rows - 1) // group
    begin, end, origin = 0, tl.maximum(past + last_token + 1, 0), 0
    if SPLIT:
        if split_keys == 0:
            split_keys = tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS
        origin = split * split_keys
        begin, end = origin, tl.minimum(end, origin + split_keys)
    if WINDOWED:
        begin = tl.maximum(begin, past + first_token + 1 - window)
    start_at = origin + (begin - origin) // KEYS * KEYS
    masked_from = start_at
    if not WINDOWED:
        by_all = tl.minimum(end, past + first_token + 1)
        masked_from = start_at + tl.maximum(by_all - start_at, 0) // KEYS * KEYS

    row = tile * ROWS + tl.arange(0, ROWS)
    there = row < rows
    token, head = row // group, first_head + row % group
    position = past + token
    c = tl.arange(0, BLOCK_C)
    at_query = (start + token).to(tl.int64) * query_token + head * query_head
    query = tl.load(
        query_ptr + at_query[:, None] + (c * query_c)[None, :],
        mask=there[:, None] & (c < C)[None, :],
        other=0.0,
    )
    table = sequence.to(tl.int64)
    if rows_ptr is not None:
        table = tl.load(rows_ptr + sequence).to(tl.int64)
    table_ptr += table * table_row
    key_ptr += kv_head.to(tl.int64) * key_head
    value_ptr += kv_head.to(tl.int64) * value_head
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head)

    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(start_at, masked_from, KEYS):
        top, total, mixed = _block(
            first, begin, end, position, query, top, total, mixed, table_ptr, key_ptr, value_ptr,
            key_page, key_slot, key_c, value_page, value_slot, value_c, scale, window, PAGE, C,
            BLOCK_C, KEYS, False, WINDOWED,
        )  # fmt: skip
    for first in range(masked_from, end, KEYS):
        top, total, mixed = _block(
            first, begin, end, position, query, top, total, mixed, table_ptr, key_ptr, value_ptr,
            key_page, key_slot, key_c, value_page, value_slot, value_c, scale, window, PAGE, C,
            BLOCK_C, KEYS, True, WINDOWED,
        )  # fmt: skip

    nothing = total == 0.0
    mixed = tl.where(nothing[:, None], 0.0, mixed / total[:, None])
    if value_scale_ptr is not None:
        mixed *= tl.load(value_scale_ptr + kv_head)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    to = (start + token).to(tl.int64) * heads + head
    written = there
    if SPLIT:
        to += split.to(tl.int64) * tokens * heads
        written = row < tl.where(end > begin, rows, 0)
    tl.store(
        output_ptr + (to * C)[:, None] + c[None, :],
        mixed.to(output_ptr.dtype.element_ty),
        mask=written[:, None] & (c < C)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + to, lse, mask=there)


@triton.jit(do_not_specialize=["rows", "heads", "splits", "sequences"])
def _merge(
    part_ptr, part_lse_ptr, starts_ptr, output_ptr, lse_ptr, rows, heads, splits, sequences,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One head of one token: its splits by their lse, in order; 0 behind the last sequence."""
    row = tl.program_id(0)
    there = row // heads < tl.load(starts_ptr + sequences)
    c = tl.arange(0, BLOCK_C)
    top, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    mixed = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(tl.where(there, splits, 0)):
        at = tl.cast(split, tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + at)
        wanted = tl.where(lse == float("-inf"), 0, C)  # a part that nobody saw is not written
        part = tl.load(part_ptr + at * C + c, mask=c < wanted, other=0.0)
        raised = tl.maximum(top, lse)
        weight, shrink = tl.exp(lse - raised), tl.exp(top - raised)
        top, total, mixed = raised, total * shrink + weight, mixed * shrink + part * weight
    nothing = total == 0.0
    to = row.to(tl.int64) * C + c
    mixed = tl.where(nothing, 0.0, mixed / total)
    tl.store(output_ptr + to, mixed.to(output_ptr.dtype.element_ty), mask=c < C)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(nothing, float("-inf"), top + tl.log(total)))


@cache
def _first_heads(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(G + 1,) int32: the first query head of each key/value head, and H. Copied once."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


def _tile(query: Tensor, key_pages: Tensor, rows: int, repeatable: bool) -> Tile:
    """The tile for a sequence's rows; one that does not depend on them where bits must not."""
    by_size = configured(CONFIGS, key_pages if query.element_size() == 2 else query)
    size = query.shape[2]
    tiles = next((tiles for largest, tiles in by_size.items() if largest >= size), None)
    if tiles is None:
        raise NotImplementedError(
            f"paged_attention: impl='triton' takes heads of {max(by_size)} at most in "
            f"{query.dtype}, found {size}"
        )
    fits = [tile for tile in tiles if tile.rows >= rows]
    return tiles[1] if repeatable else (*fits, tiles[-1])[0]


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor,
    table_rows: Tensor | None, query_starts: Tensor, lengths: Tensor, counts: Sequence[int],
    scale: float, key_scale: Tensor | None, value_scale: Tensor | None, window: int,
    split_keys: int, return_lse: bool, longest_query: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as of the operator. split_keys counts as whole blocks of keys."""
    tokens, heads, size = query.shape
    page, kv_heads, sequences = key_pages.shape[1], len(counts), lengths.shape[0]
    here, most = common.machine(query), max(counts)
    tile = _tile(query, key_pages, longest_query * most, split_keys > 0)
    grid = triton.cdiv(longest_query * most, tile.rows) * kv_heads, sequences
    longest = page_table.shape[1] * page
    if split_keys:
        split_keys = triton.cdiv(split_keys, tile.keys) * tile.keys
        splits = triton.cdiv(longest, split_keys)
    else:
        wanted = triton.cdiv(PROGRAMS_EACH * here.processors, math.prod(grid) or 1)
        splits = 1 if wanted <= PROGRAMS_EACH else min(wanted, triton.cdiv(longest, LEAST_KEYS))

    lse = query.new_full((tokens, heads) if return_lse else (0,), -math.inf, dtype=torch.float32)
    output = query.new_zeros(query.shape)
    if output.numel() == 0 or math.prod(grid) == 0 or splits == 0:
        return output, lse
    to, to_lse = output, lse if return_lse else None
    if splits > 1:
        to = query.new_empty((splits, *query.shape), dtype=torch.float32)
        to_lse = query.new_empty((splits, tokens, heads), dtype=torch.float32)
    if key_pages.element_size() == 1 and here.capability < 89:  # see e4m3
        key_pages, value_pages = key_pages.view(torch.uint8), value_pages.view(torch.uint8)
    sizes = {"C": size, "BLOCK_C": max(16, triton.next_power_of_2(size))}
    with on_device(query):
        _attend[*grid, splits](
            query, key_pages, value_pages, page_table, table_rows, query_starts, lengths,
            _first_heads(tuple(counts), query.device), key_scale, value_scale, to, to_lse,
            *query.stride(), *(key_pages.stride(k) for k in (0, 1, 2, 3)),
            *(value_pages.stride(k) for k in (0, 1, 2, 3)), page_table.stride(0), tokens, heads,
            kv_heads, scale * LOG2_E, window, split_keys, splits, PAGE=page, **sizes,
            ROWS=tile.rows, KEYS=tile.keys, WINDOWED=window > 0, SPLIT=splits > 1,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if splits > 1:
            _merge[(tokens * heads,)](
                to, to_lse, query_starts, output, lse if return_lse else None, tokens * heads,
                heads, splits, sequences, **sizes, num_warps=1,
            )  # fmt: skip
    return output, lse
