"""rope_write: new queries and keys turned by their positions, keys and values put into the cache.

What stands between the product that makes queries, keys and values and paged_attention, in one pass
over them. With p the position of a token, of a head's first R channels c and c + R / 2 are a pair:

    turned_c         = x_c cos_p,c - x_(c + R/2) sin_p,c                c < R / 2
    turned_(c + R/2) = x_(c + R/2) cos_p,c + x_c sin_p,c

as in Llama, GPT-NeoX and Transformers' rotate_half (Su et al., arXiv 2104.09864), in fp32 and
rounded once; channels from R on stay. The key and the value of a token with slot s lie at slot
s % P of page s // P:

    page = x                                                pages of the query's dtype
    page = e4m3(clamp(x / scale of the key/value head))     fp8 pages; x in the query's dtype

so that page times scale is x again, as paged_attention reads it. A token whose slot is negative is
padding: nothing of it is read or written, its output is 0.

    query                    (T, H, C) fp32, bf16 or fp16, any strides
    key, value               (T, G, C) likewise, of the same dtype
    cos, sin                 (L, R / 2) fp32 or of the query's dtype; R <= C
    positions                (T,) int32 or int64, a token's row of cos and sin; None: L = T, row t
    key_pages, value_pages   (N, P, G, C) of the query's dtype or fp8 e4m3, any strides; written
    slots                    (T,) int32 or int64, less than N P
    key_scale, value_scale   (G,) fp32 > 0, of fp8 pages; None: 1

Tables, rather than sines taken here: they are the same for every layer, and those of a position of
100 thousand need a careful reduction of the angle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, require_interpreter, routes

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? positions,"
    " Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor slots, Tensor? key_scale,"
    " Tensor? value_scale) -> Tensor"
)
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of fp8 e4m3


def rope_write_reference(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    key_pages: Tensor, value_pages: Tensor, slots: Tensor, key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same in plain torch, in fp64 as well; nothing waits for the device.

    A padding row does what the first other row does once more. Where there are none but padding,
    slot 0 is written as it is.
    """
    if len(slots) == 0:
        return query.new_empty(query.shape)
    there = slots >= 0
    rows = torch.where(there, torch.arange(len(slots), device=slots.device), there.int().argmax())
    slot = slots[rows].clamp(min=0).long()
    page_of, wide = key_pages.shape[1], torch.promote_types(query.dtype, torch.float32)
    at = rows if positions is None else torch.where(there.any(), positions[rows], 0).long()
    half = cos.shape[1]
    c, s = cos[at, None].to(wide), sin[at, None].to(wide)

    def turned(x: Tensor) -> Tensor:
        low, high, rest = x[rows].to(wide).tensor_split((half, 2 * half), dim=-1)
        return torch.cat([low * c - high * s, high * c + low * s, rest], dim=-1).to(x.dtype)

    def write(pages: Tensor, x: Tensor, scale: Tensor | None) -> None:
        if pages.dtype == FP8:
            x = x.to(wide) if scale is None else x.to(wide) / scale[:, None]
            x = x.clamp(-LARGEST, LARGEST).to(FP8)
            pages, x = pages.view(torch.uint8), x.view(torch.uint8)  # fp8 is not put at indices
        place = slot // page_of, slot % page_of
        pages[place] = torch.where(there.any(), x, pages[place])

    write(key_pages, turned(key), key_scale)
    write(value_pages, value[rows], value_scale)
    return torch.where(there[:, None, None], turned(query), 0.0).to(query.dtype).contiguous()


ROUTES = routes(
    "rope_write",
    {"cpu": "cpu", "cuda": "triton"},
    cpu=Implementation(("cpu",), needs="native"),
    triton=Implementation(("cuda", "cpu"), needs="triton"),  # cpu: the interpreter
    reference=Implementation((), (*HALF_AND_FLOAT, torch.float64)),
)


def _fake(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


for _name in ("cpu", "triton", "reference"):
    torch.library.define(f"slmperf::rope_write.{_name}", SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"slmperf::rope_write.{_name}", _fake)
torch.library.impl("slmperf::rope_write.reference", ("cpu", "cuda"))(rope_write_reference)


@torch.library.impl("slmperf::rope_write.triton", ("cpu", "cuda"))
def _triton(query: Tensor, *arguments: Any) -> Tensor:
    require_interpreter("rope_write", query)
    from slmperf.triton_kernels.rope_write import rope_write as launch

    return launch(query, *arguments)


def rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slots: Tensor,
    positions: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Turned queries (T, H, C), contiguous; turned keys and values go into the pages, in place.

    Formulas and shapes are above; `impl` is "auto" (CUDA: "triton"; CPU: "cpu"), "triton", "cpu" or
    "reference". Of several tokens of one slot any may stay.

    Forward only. Nothing waits for the device, and a CUDA graph can hold the call. InputError for
    shapes, dtypes and devices that do not fit; NotImplementedError for what `impl` does not take
    and where a gradient is wanted. The cpu implementation raises RuntimeError for positions and
    slots beyond the tables and pages; elsewhere positions are not looked at, and triton skips a
    token of a slot beyond the pages as if it were padding.
    """
    sizes = check_shapes(
        "rope_write",
        query=(query, "T H C"),
        key=(key, "T G C"),
        value=(value, "T G C"),
        key_pages=(key_pages, "N P G C"),
        value_pages=(value_pages, "N P G C"),
        slots=(slots, "T"),
        cos=(cos, "T half" if positions is None else "L half"),
        sin=(sin, "T half" if positions is None else "L half"),
        **{} if positions is None else {"positions": (positions, "T")},
        **{} if key_scale is None else {"key_scale": (key_scale, "G")},
        **{} if value_scale is None else {"value_scale": (value_scale, "G")},
    )
    if 2 * sizes["half"] > sizes["C"]:
        raise InputError(
            f"rope_write: cos has {sizes['half']} columns, wanted half as many as the {sizes['C']} "
            "channels of a head, or fewer"
        )
    _check_numbers(query, {"key": key, "value": value}, [query.dtype])
    _check_numbers(query, {"cos": cos, "sin": sin}, [torch.float32, query.dtype])
    pages = {"key_pages": key_pages, "value_pages": value_pages}
    _check_numbers(query, pages, [query.dtype, FP8])
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    _check_numbers(query, scales, [torch.float32])
    _check_numbers(query, {"slots": slots, "positions": positions}, [torch.int32, torch.int64])
    if value_pages.dtype != key_pages.dtype:
        raise InputError(
            f"rope_write: value_pages are {value_pages.dtype}, key_pages {key_pages.dtype}"
        )
    if sin.dtype != cos.dtype:
        raise InputError(f"rope_write: sin is {sin.dtype}, cos {cos.dtype}")
    if key_pages.dtype != FP8 and (key_scale is not None or value_scale is not None):
        raise InputError(f"rope_write: pages are {key_pages.dtype}, found scales, wanted none")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise NotImplementedError("rope_write: a gradient is wanted, and there is none here")
    op = getattr(torch.ops.slmperf.rope_write, ROUTES.choose(impl, query))
    return op(
        query, key, value, cos, sin, positions, key_pages, value_pages, slots, key_scale,
        value_scale,
    )  # fmt: skip


def _check_numbers(
    query: Tensor, tensors: dict[str, Tensor | None], dtypes: list[torch.dtype]
) -> None:
    """InputError for a tensor of another dtype than these or of another device than the query's."""
    for name, one in tensors.items():
        if one is not None and (one.dtype not in dtypes or one.device != query.device):
            names = " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))
            raise InputError(
                f"rope_write: {name} is {one.dtype} on {one.device}, wanted {names} on "
                f"{query.device}"
            )
