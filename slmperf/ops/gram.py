"""gram: the lower half of X'X of many rows, added up in fp64.

H = X'X = sum_t x_t x_t' is symmetric, so only stripes of it are computed and kept: rows
[256 i, 256 (i + 1)) up to their last diagonal element, one stripe after the other. That is half of
the operations of the full product, and in fp64 the memory of a full matrix in fp32.

    packed = [H[0:256, 0:256], H[256:512, 0:512], ...], each row by row

Products of bf16 and fp16 rows are exact and added up in fp32, over as many rows as one call gets;
every call then adds to fp64. A caller that gives some thousand rows at a time has errors that do
not grow with their number.

The products are torch's, on CPU those of bf16 the C++ of csrc/cpu/half_products.cpp, where the
processor multiplies bf16; on CUDA bf16 and fp16 give fp32 (cuBLAS).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slmperf.check import InputError, check_shapes
from slmperf.ops.half_products import has_bf16_units, weight_gradient
from slmperf.ops.routing import HALF_AND_FLOAT, Implementation, routes

STRIPE = 256
SCHEMA = "(Tensor rows, Tensor(a!) packed) -> ()"


def gram_reference(rows: Tensor) -> Tensor:
    """X'X in plain torch: (n, d) -> (d, d), in fp32 or wider."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.T @ wide


def stripes(size: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, place in `packed`) of every stripe of a (size, size) matrix."""
    place = 0
    for first in range(0, size, STRIPE):
        end = min(size, first + STRIPE)
        yield first, end, place
        place += (end - first) * end


def stripe_of(packed: Tensor, first: int, end: int, place: int) -> Tensor:
    """A stripe as `stripes` names it, (end - first, end), a view."""
    return packed[place : place + (end - first) * end].view(end - first, end)


def packed_size(size: int) -> int:
    """Number of elements that are kept of a (size, size) matrix."""
    return sum((end - first) * end for first, end, _ in stripes(size))


def unpack(packed: Tensor, size: int) -> Tensor:
    """The whole symmetric (size, size) matrix, in packed's dtype and on its device."""
    whole = packed.new_empty(size, size)
    for first, end, place in stripes(size):
        stripe = stripe_of(packed, first, end, place)
        whole[first:end, :first] = stripe[:, :first]
        whole[:first, first:end] = stripe[:, :first].T
        block = stripe[:, first:]
        whole[first:end, first:end] = block.tril() + block.tril(-1).T
    return whole


ROUTES = routes(
    "gram",
    auto={"cpu": "torch", "cuda": "torch"},
    torch=Implementation(devices=("cpu", "cuda")),
    reference=Implementation(devices=(), dtypes=(*HALF_AND_FLOAT, torch.float64)),
)

torch.library.define("slmperf::gram.torch", SCHEMA, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("slmperf::gram.torch")
def _fake(rows, packed):
    return None


@torch.library.impl("slmperf::gram.torch", ("cpu", "cuda"))
def _torch(rows, packed):
    size = rows.shape[1]
    if rows.device.type == "cpu" and not (
        rows.dtype == torch.bfloat16 and has_bf16_units(rows.device)
    ):
        rows = rows.float()
    height = _stripes_at_once(rows) * STRIPE
    found = rows.new_empty(min(height, size) * size, dtype=torch.float32)
    all_stripes = list(stripes(size))
    for top in range(0, size, height):
        bottom = min(size, top + height)
        product = found[: (bottom - top) * bottom].view(bottom - top, bottom)
        weight_gradient(rows[:, top:bottom], rows[:, :bottom], product, True)
        for first, end, place in all_stripes[top // STRIPE : -(-bottom // STRIPE)]:
            stripe_of(packed, first, end, place).add_(product[first - top : end - top, :end])


def _stripes_at_once(rows: Tensor) -> int:
    """Stripes in one product: more of them do more beyond the diagonal, but run at a higher rate.

    Measured on CPU: for fp32 256 rows are enough; the bf16 product packs its operand anew for each.
    """
    if rows.device.type == "cuda":
        return 8
    return 1 if rows.dtype == torch.float32 else 4


def gram(rows: Tensor, packed: Tensor, *, impl: str = "auto") -> None:
    """packed += the lower half of rows' rows.

    rows    (n, d) float32, bfloat16, float16 or float64, any row stride
    packed  (packed_size(d),) float64, on the rows' device
    impl    "auto" (ROUTES; "reference" for float64, which it multiplies in float64), "torch" or
            "reference"

    Raises InputError for shapes, dtype or device that do not fit.
    """
    size = rows.shape[-1]
    check_shapes("gram", rows=(rows, "n d"), packed=(packed, str(packed_size(size))))
    if packed.dtype != torch.float64 or packed.device != rows.device:
        raise InputError(
            f"gram: packed is {packed.dtype} on {packed.device}, expected torch.float64 on the "
            f"rows' {rows.device}"
        )
    if impl == "auto" and rows.dtype == torch.float64:
        impl = "reference"
    if ROUTES.choose(impl, rows) == "torch":
        torch.ops.slmperf.gram.torch(rows, packed)
        return
    whole = gram_reference(rows)
    for first, end, place in stripes(size):
        stripe_of(packed, first, end, place).add_(whole[first:end, :end])
