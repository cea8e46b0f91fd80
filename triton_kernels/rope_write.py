"""rope_write on GPU: one pass over queries, keys and values, which end in the cache's pages.

Formulas and layout: slmperf/ops/rope_write.py. A program has some heads of one token: query heads,
or the keys and the values of key/value heads. Its cosines and sines are read once for all of them.

    bytes per number   2 elements; in fp8 pages one and a byte
    programs           (T, parts of the query heads + parts of the key/value heads)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slmperf.triton_kernels.common import configured, on_device
from slmperf.triton_kernels.encode import E4M3_LARGEST, clamped, e4m3_bytes, rounded

# (capability, bytes per element) -> numbers of a program's heads, its warps. 0 is the interpreter.
# Not yet tuned on a device.
CONFIGS = {
    (0, 2): (128, 1),
    (0, 4): (128, 1),
    (80, 2): (4096, 4),
    (80, 4): (2048, 4),
    (90, 2): (4096, 4),
    (90, 4): (2048, 4),
}


@triton.jit
def _scales(scale_ptr, head, known):
    """The heads' scales; 1 where there are none."""
    if scale_ptr is not None:
        return tl.load(scale_ptr + head, mask=known, other=1.0)[:, None]
    else:
        return tl.full(head.shape, 1.0, tl.float32)[:, None]


@triton.jit
def _put(ptr, at, x, scale, inside, dtype: tl.constexpr):
    """Store numbers of some heads as they are or, as bytes, in fp8 by the heads' scales."""
    if ptr.dtype.element_ty == tl.uint8:
        x = tl.div_rn(rounded(x, dtype), tl.broadcast_to(scale, x.shape))
        tl.store(ptr + at, e4m3_bytes(clamped(x, -E4M3_LARGEST, E4M3_LARGEST)), mask=inside)
    else:
        tl.store(ptr + at, x.to(dtype), mask=inside)


@triton.jit
def _turn(
    from_ptr, from_head, from_c, to_ptr, to_head, to_c, scale, head, known, written, cos, sin,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Heads of a token: read where `known`, written where `written`, which hold for a head each."""
    c = tl.arange(0, BLOCK_HALF)[None, :]
    reads, writes = known[:, None] & (c < HALF), written[:, None] & (c < HALF)
    at, to = head[:, None] * from_head + c * from_c, head[:, None] * to_head + c * to_c
    low = tl.load(from_ptr + at, mask=reads, other=0.0).to(tl.float32)
    high = tl.load(from_ptr + at + HALF * from_c, mask=reads, other=0.0).to(tl.float32)
    _put(to_ptr, to, low * cos - high * sin, scale, writes, dtype)
    _put(to_ptr, to + HALF * to_c, high * cos + low * sin, scale, writes, dtype)
    if REST:
        c = tl.arange(0, BLOCK_REST)[None, :]
        at = head[:, None] * from_head + (2 * HALF + c) * from_c
        to = head[:, None] * to_head + (2 * HALF + c) * to_c
        rest = tl.load(from_ptr + at, mask=known[:, None] & (c < REST), other=0.0).to(tl.float32)
        _put(to_ptr, to, rest, scale, written[:, None] & (c < REST), dtype)


# Not specialised: numbers that differ from model to model without a gain.
@triton.jit(do_not_specialize=["heads", "kv_heads", "query_parts", "capacity"])
def _rope_write(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, key_pages_ptr,
    value_pages_ptr, key_scale_ptr, value_scale_ptr, output_ptr, query_token, query_head, query_c,
    key_token, key_head, key_c, value_token, value_head, value_c, cos_row, cos_c, sin_row, sin_c,
    key_page, key_slot, key_to_head, key_to_c, value_page, value_slot, value_to_head, value_to_c,
    heads, kv_heads, query_parts, capacity, PAGE: tl.constexpr, C: tl.constexpr,
    BLOCK_C: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a token; the parts from query_parts on are of keys and values.

    capacity  slots of all pages
    """
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    there = (slot >= 0) & (slot < capacity)
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token, mask=there, other=0).to(tl.int64)
    c = tl.arange(0, BLOCK_HALF)
    of_table = c < tl.where(there, HALF, 0)
    cos = tl.load(cos_ptr + position * cos_row + c * cos_c, mask=of_table, other=0.0)
    sin = tl.load(sin_ptr + position * sin_row + c * sin_c, mask=of_table, other=0.0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    if part < query_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        _turn(
            query_ptr + token * query_token, query_head, query_c,
            output_ptr + token * heads * C, C, 1, tl.full((HEADS, 1), 1.0, tl.float32), head,
            head < tl.where(there, heads, 0), head < heads, cos, sin, HALF, BLOCK_HALF,
            C - 2 * HALF, BLOCK_REST, dtype,
        )  # fmt: skip
    else:
        head = (part - query_parts) * HEADS + tl.arange(0, HEADS)
        known = head < tl.where(there, kv_heads, 0)
        page, within = slot // PAGE, slot % PAGE
        _turn(
            key_ptr + token * key_token, key_head, key_c,
            key_pages_ptr + page * key_page + within * key_slot, key_to_head, key_to_c,
            _scales(key_scale_ptr, head, known), head, known, known, cos, sin, HALF, BLOCK_HALF,
            C - 2 * HALF, BLOCK_REST, dtype,
        )  # fmt: skip
        channel = tl.arange(0, BLOCK_C)[None, :]
        inside = known[:, None] & (channel < C)
        at = token * value_token + head[:, None] * value_head + channel * value_c
        value = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
        to = page * value_page + within * value_slot
        to += head[:, None] * value_to_head + channel * value_to_c
        scale = _scales(value_scale_ptr, head, known)
        _put(value_pages_ptr, to, value, scale, inside, dtype)


def rope_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    key_pages: Tensor, value_pages: Tensor, slots: Tensor, key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Arguments as of the operator."""
    tokens, heads, size = query.shape
    pages, page, kv_heads, _ = key_pages.shape
    half = cos.shape[1]
    output = query.new_empty(query.shape)
    block_c = triton.next_power_of_2(size)
    numbers, warps = configured(CONFIGS, query)
    part = min(max(1, numbers // block_c), triton.next_power_of_2(max(heads, kv_heads, 1)))
    query_parts = triton.cdiv(heads, part)
    parts = query_parts + triton.cdiv(kv_heads, part)
    if tokens == 0 or parts == 0 or size == 0:
        return output
    if key_pages.dtype == torch.float8_e4m3fn:
        key_pages, value_pages = key_pages.view(torch.uint8), value_pages.view(torch.uint8)
    with on_device(query):
        _rope_write[tokens, parts](
            query, key, value, cos, sin, positions, slots, key_pages, value_pages, key_scale,
            value_scale, output, *query.stride(), *key.stride(), *value.stride(), *cos.stride(),
            *sin.stride(), *key_pages.stride(), *value_pages.stride(), heads, kv_heads,
            query_parts, pages * page, PAGE=page, C=size, BLOCK_C=block_c, HALF=half,
            BLOCK_HALF=triton.next_power_of_2(max(1, half)),
            BLOCK_REST=triton.next_power_of_2(max(1, size - 2 * half)), HEADS=part,
            num_warps=warps,
        )  # fmt: skip
    return output
