"""Numbers rounded to int8 or fp8 inside a kernel, to the bit as `ActivationSpec.encode` does it.

For quantize_input, and for rms_norm, silu_mul and rope_write, whose results are rounded before they
leave the registers. Everything is fp32 that holds numbers of the inputs' dtype: an fp32 result
rounded to bf16 or fp16 is what arithmetic in that dtype gives. Codes of fp8 (e4m3) are bytes made
by arithmetic, for an A100 has no such type.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> the nearest number of a dtype, in fp32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def largest_size(x, axis: tl.constexpr):
    """max |x| along an axis; NaN where one is. As integers, where NaN stand above infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest, FP8: tl.constexpr, dtype: tl.constexpr):
    """The scale that reaches a largest number; the dtype's epsilon where it would be 0."""
    top = tl.full(largest.shape, 448.0 if FP8 else 127.5, tl.float32)
    scale = rounded(tl.div_rn(largest, top), dtype)
    if dtype == tl.bfloat16:
        return tl.where(scale == 0.0, 0.0078125, scale)
    elif dtype == tl.float16:
        return tl.where(scale == 0.0, 0.0009765625, scale)
    else:
        return tl.where(scale == 0.0, 1.1920928955078125e-07, scale)


@triton.jit
def e4m3_bytes(x):
    """fp32 up to 448, or NaN -> the nearest fp8 e4m3, the even one of two, as bytes.

    An exponent of e4m3 is 120 less than that of fp32; below 2^-6 a code counts steps of 2^-9, which
    is what a number's last place is after 2^14 was added.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 120 * 8
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def clamped(x, lowest, highest):
    """x between two numbers; NaN stays NaN."""
    x = tl.maximum(x, lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, highest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def codes_of(x, scale, FP8: tl.constexpr, dtype: tl.constexpr):
    """Codes of x, int8 or the bytes of e4m3; x and scale, of one shape, hold numbers of `dtype`.

    bf16 needs no division: a quotient of two numbers of 8 bits lies no nearer to the middle of two
    such numbers than 2^-17 of itself, and a reciprocal is good to 2^-21. Tiny scales are lifted,
    for the reciprocal to be finite.
    """
    if dtype == tl.bfloat16:
        lift = tl.where(scale < 7.888609052210118e-31, 1.2676506002282294e30, 1.0)  # 2^-100, 2^100
        ratio = (x * lift) * (1.0 / (scale * lift))
    else:
        ratio = tl.div_rn(x, scale)
    ratio = rounded(ratio, dtype)
    if FP8:
        return e4m3_bytes(clamped(ratio, -E4M3_LARGEST, E4M3_LARGEST))
    else:
        # Adding 1.5 2^23 leaves no bits for a fraction: to the nearest, the even one of two.
        whole = (clamped(ratio, -128.0, 127.0) + 12582912.0) - 12582912.0
        return whole.to(tl.int8)


@triton.jit
def encode_rows(
    y, static_ptr, scale_ptr, row, rows, first, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, FP8: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Codes of y (ROWS, BLOCK), whose columns lie at `first` of a row of `columns`; their scales
    are stored.

    y           fp32 numbers of `dtype`, 0 outside of the rows and columns that there are
    static_ptr  the one scale; None: found here, for each GROUP of columns or, where that is 0, for
                all of them, which then lie in one block
    """
    if static_ptr is not None:
        scale = rounded(tl.load(static_ptr), dtype)
        return codes_of(y, tl.broadcast_to(scale, [ROWS, BLOCK]), FP8, dtype)
    elif GROUP == 0:
        scale = scale_of(largest_size(y, 1), FP8, dtype)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        return codes_of(y, tl.broadcast_to(scale[:, None], [ROWS, BLOCK]), FP8, dtype)
    else:
        parts = tl.reshape(y, [ROWS, BLOCK // GROUP, GROUP])
        scale = scale_of(largest_size(parts, 2), FP8, dtype)
        group, groups = first // GROUP + tl.arange(0, BLOCK // GROUP), columns // GROUP
        at = row[:, None] * groups + group[None, :]
        tl.store(scale_ptr + at, scale, mask=(row < rows)[:, None] & (group < groups)[None, :])
        scale = tl.broadcast_to(scale[:, :, None], [ROWS, BLOCK // GROUP, GROUP])
        return tl.reshape(codes_of(parts, scale, FP8, dtype), [ROWS, BLOCK])
