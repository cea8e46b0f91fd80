"""paged_attention: causal attention of new queries over keys and values that lie in pages.

Sequence b has n_b queries, rows query_starts[b] to query_starts[b + 1], and lengths[b] keys, the
queries' own among them and already written. Its key at position j lies in slot j % P of page
page_table[b, j // P]. The query at position p = lengths[b] - n_b + i of head h, which reads
key/value head g, sees the keys 0 .. p, or the last `window` of them:

    score_j = scale query . key_j key_scale[g]         lse = log sum_j exp(score_j)
    output  = value_scale[g] sum_j exp(score_j - lse) value_j

One call takes prefills, suffixes behind a cached prefix and single decoded tokens together. Which
key/value head a query head reads is a HeadMap, for pruned layers have 12 query heads over 8; the
queries of a group are packed, so each key is read once for all of them. Long sequences with few
queries are cut into splits of keys, which are merged by their lse (Flash-Decoding, Dao et al. 2023;
the running softmax is FlashAttention's, arXiv 2205.14135).

    query         (T, H, C) fp32, bf16 or fp16, any strides; T counts padding rows at the end too
    key_pages     (N, P, G, C) of the query's dtype or fp8 e4m3, any strides; P >= 1
    value_pages   (N, P, G, C) likewise
    page_table    (R, M) int32 or int64; entries behind a sequence's last key are not read
    table_rows    (B,) int32 or int64: the row of page_table that a sequence has; None: R = B, row b
    query_starts  (B + 1,) int32 or int64, not descending, from 0 on
    lengths       (B,) int32 or int64
    key_scale, value_scale   (G,) fp32 > 0: what the pages' numbers are multiplied by; None: 1

Output rows are 0, and their lse is minus infinity, where a query sees no key: padding rows from
query_starts[B] on, and queries before position 0 (lengths[b] < n_b, as of a padded sequence).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.head_map import HeadMap
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

SCHEMA = (
    "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor? table_rows,"
    " Tensor query_starts, Tensor lengths, int[] counts, float scale, Tensor? key_scale,"
    " Tensor? value_scale, int window, int split_keys, bool return_lse, SymInt longest_query)"
    " -> (Tensor, Tensor)"
)
SCORES = 2**24  # what the reference holds of them at a time, or of one query


class PagedAttention(NamedTuple):
    """What paged_attention returns."""

    output: Tensor  # (T, H, C) of the query's dtype, contiguous
    lse: Tensor | None  # (T, H) fp32, to the base e; None unless asked for


def paged_attention_reference(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    table_rows: Tensor | None,
    query_starts: Tensor,
    lengths: Tensor,
    counts: list[int],
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    window: int,
    split_keys: int,
    return_lse: bool,
    longest_query: int,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, some queries of one sequence after the other; fp64 as well.

    window 0 is none. split_keys and longest_query have no effect on the result.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, page_size = query.shape[1], key_pages.shape[1]
    reads = torch.tensor(HeadMap(tuple(counts)).reads, device=query.device)
    output = query.new_zeros(query.shape)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=wide)

    def gathered(pages: Tensor, page: Tensor, slot: Tensor, by_head: Tensor | None) -> Tensor:
        """(keys, H, C): what the query heads read."""
        found = pages[page, slot].to(wide)
        found = found if by_head is None else found * by_head[:, None]
        return found[:, reads]

    starts = query_starts.tolist()
    rows = range(len(lengths)) if table_rows is None else table_rows.tolist()
    for row, start, end, length in zip(rows, starts, starts[1:], lengths.tolist(), strict=False):
        past = length - (end - start) - start  # position of a query, less its row
        step = max(1, SCORES // (heads * max(1, length)))
        for first in range(max(start, -past), end, step):
            last = min(first + step, end)
            positions = torch.arange(first + past, last + past, device=query.device)
            oldest = max(0, first + past + 1 - window) if window else 0
            of_keys = torch.arange(oldest, last + past, device=query.device)
            at = page_table[row, of_keys // page_size].long(), of_keys % page_size
            keys, values = (
                gathered(pages, *at, by_head)
                for pages, by_head in ((key_pages, key_scale), (value_pages, value_scale))
            )
            scores = torch.einsum("thc,lhc->htl", query[first:last].to(wide) * scale, keys)
            hidden = of_keys > positions[:, None]
            if window:
                hidden |= of_keys <= positions[:, None] - window
            scores.masked_fill_(hidden, -torch.inf)
            sums = scores.logsumexp(dim=-1)  # (H, t)
            weighted = torch.einsum("htl,lhc->thc", (scores - sums[..., None]).exp(), values)
            output[first:last] = weighted.to(query.dtype)
            lse[first:last] = sums.T
    return output, lse if return_lse else lse.new_empty(0)


ROUTES = routes(
    "paged_attention",
    {"cpu": "reference", "cuda": "triton"},
    triton=Implementation(("cuda", "cpu"), HALF_AND_FLOAT, "triton"),
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)


def _fake(
    query, key_pages, value_pages, page_table, table_rows, query_starts, lengths, counts, scale,
    key_scale, value_scale, window, split_keys, return_lse, longest_query,
):  # fmt: skip
    of_lse = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:2] if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=of_lse)


for _name in ("triton", "reference"):
    torch.library.define(
        f"slmperf::paged_attention.{_name}", SCHEMA, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.register_fake(f"slmperf::paged_attention.{_name}", _fake)
torch.library.impl("slmperf::paged_attention.reference", ("cpu", "cuda"))(paged_attention_reference)


@torch.library.impl("slmperf::paged_attention.triton", ("cpu", "cuda"))
def _triton(query, *arguments):
    require_interpreter("paged_attention", query)
    from slmperf.triton_kernels.paged_attention import paged_attention as launch

    return launch(query, *arguments)


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    *,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    table_rows: Tensor | None = None,
    head_map: HeadMap | None = None,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window: int | None = None,
    split_keys: int | None = None,
    return_lse: bool = False,
    longest_query: int | None = None,
    impl: str = "auto",
) -> PagedAttention:
    """Attention over pages; shapes and meanings of the tensors are above.

    head_map       which key/value head each query head reads; None: as many each, H % G == 0
    scale          of the scores, > 0; None: C ** -0.5
    window         a query sees this many keys at most, its own among them; None: all before it
    split_keys     keys of a split: then a query's result has the same bits in any batch and for any
                   number of queries at once. None: chosen by how many programs the device takes
    return_lse     whether the lse is wanted, to the base e
    longest_query  the largest n_b or more, a host's number that sizes the launch (the caller sees
                   to it: a longer sequence's last rows would be missing); None: T, right but slower
    impl           "auto" (CUDA: "triton"; CPU: "reference"), "triton" (heads of at most 256, in
                   fp32 of 128) or "reference"

    Forward only. Nothing waits for the device, and a CUDA graph can hold the call, once one of the
    same head map ran outside of it: the map is copied to the device then. InputError for shapes,
    dtypes, devices and head counts that do not fit, NotImplementedError for what `impl` does not
    take and for a query that wants a gradient. Contents of the integer tensors are not looked at.
    """
    sizes = check_shapes(
        "paged_attention",
        query=(query, "T H C"),
        key_pages=(key_pages, "N P G C"),
        value_pages=(value_pages, "N P G C"),
        lengths=(lengths, "B"),
        page_table=(page_table, "B M" if table_rows is None else "R M"),
        query_starts=(query_starts, str(len(lengths) + 1)),
        **{} if table_rows is None else {"table_rows": (table_rows, "B")},
        **{} if key_scale is None else {"key_scale": (key_scale, "G")},
        **{} if value_scale is None else {"value_scale": (value_scale, "G")},
    )
    heads, kv_heads = sizes["H"], sizes["G"]
    if head_map is None:
        if kv_heads == 0 or heads % kv_heads or heads == 0:
            raise InputError(
                "paged_attention: without a head map wanted as many query heads for each key/value "
                f"head, found {heads} over {kv_heads}"
            )
        head_map = HeadMap((heads // kv_heads,) * kv_heads)
    elif (head_map.query_heads, head_map.kv_heads) != (heads, kv_heads):
        raise InputError(
            f"paged_attention: head_map has {head_map.query_heads} query heads over "
            f"{head_map.kv_heads}, the tensors have {heads} over {kv_heads}"
        )
    _check_numbers(query, key_pages, value_pages, key_scale, value_scale)
    indices = {"page_table": page_table, "query_starts": query_starts, "lengths": lengths,
               "table_rows": table_rows}  # fmt: skip
    for name, index in indices.items():
        if index is not None and index.dtype not in (torch.int32, torch.int64):
            raise InputError(f"paged_attention: {name} is {index.dtype}, wanted int32 or int64")
        if index is not None and index.device != query.device:
            raise InputError(
                f"paged_attention: {name} is on {index.device}, the query on {query.device}"
            )
    if scale is not None and not 0.0 < scale < math.inf:
        raise InputError(f"paged_attention: scale is {scale}, wanted a finite number > 0")
    if sizes["P"] == 0:
        raise InputError("paged_attention: key_pages have no slots, wanted 1 or more in a page")
    for name, number, least in (
        ("window", window, 1), ("split_keys", split_keys, 1), ("longest_query", longest_query, 0)
    ):  # fmt: skip
        if number is not None and number < least:
            raise InputError(
                f"paged_attention: {name} is {number}, wanted {least} or more, or None"
            )
    if query.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("paged_attention: query wants a gradient, there is none here")
    op = getattr(torch.ops.slmperf.paged_attention, ROUTES.choose(impl, query))
    output, lse = op(
        query, key_pages, value_pages, page_table, table_rows, query_starts, lengths,
        list(head_map.counts), sizes["C"] ** -0.5 if scale is None else scale, key_scale,
        value_scale, window or 0, split_keys or 0, return_lse,
        sizes["T"] if longest_query is None else longest_query,
    )  # fmt: skip
    return PagedAttention(output, lse if return_lse else None)


def _check_numbers(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:  # fmt: skip
    """InputError for dtypes and devices that do not go together."""
    numbers = {"key_pages": key_pages, "value_pages": value_pages, "key_scale": key_scale,
               "value_scale": value_scale}  # fmt: skip
    for name, tensor in numbers.items():
        if tensor is None:
            continue
        pages = name.endswith("pages")
        wanted = [query.dtype, torch.float8_e4m3fn] if pages else [torch.float32]
        if tensor.dtype not in wanted or tensor.device != query.device:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise InputError(
                f"paged_attention: {name} is {tensor.dtype} on {tensor.device}, "
                f"wanted {names} on {query.device}"
            )
    if value_pages.dtype != key_pages.dtype:
        raise InputError(
            f"paged_attention: value_pages are {value_pages.dtype}, key_pages {key_pages.dtype}"
        )
