"""Codes of a few bits in 32-bit words: one dense stream, the lowest bits first.

Code i of a row takes the bits i*b to i*b + b - 1 of the row, and so may begin in one word and end
in the next (3 bits: 32 codes in 3 words). Signed codes are stored plus 2^(b-1). A row ends with its
last word in use, the rest of which is 0.

Words are stored with their lowest byte first, so the stream is one of bytes, too, and is made as
that: 2, 4 and 8 bits never straddle one, 3 bits do after 8 codes in 3 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words(codes: int, bits: int) -> int:
    """32-bit words that so many codes of `bits` bits take."""
    return -(-codes * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, n) int8 -> (rows, ceil(n * bits / 32)) int32."""
    rows, count = codes.shape
    period = 8 // math.gcd(8, bits)  # codes after which a byte ends with a code
    periods, size = -(-count // period), 4 * words(count, bits)
    unsigned = codes.view(torch.uint8) + 2 ** (bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, periods * period - count))
    unsigned = unsigned.reshape(rows, periods, period)
    stream = unsigned.new_zeros(rows, periods, period * bits // 8)
    for place, (byte, offset) in enumerate(_places(period, bits)):
        code = unsigned[:, :, place]
        stream[:, :, byte] |= code << offset  # what does not fit is cut off
        if offset + bits > 8:
            stream[:, :, byte + 1] |= code >> (8 - offset)
    flat = stream.flatten(1)
    whole = torch.nn.functional.pad(flat, (0, max(0, size - flat.shape[1])))[:, :size]
    return whole.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The reverse: (rows, ceil(count * bits / 32)) int32 -> signed codes (rows, count) int8."""
    rows = packed.shape[0]
    period = 8 // math.gcd(8, bits)
    periods, each = -(-count // period), period * bits // 8
    # One row: an axis of one word has any stride, and a view of other bytes wants it to be 1.
    flat = packed.reshape(-1).view(torch.uint8).view(rows, 4 * packed.shape[1])
    flat = torch.nn.functional.pad(flat, (0, max(0, periods * each - flat.shape[1])))
    stream = flat[:, : periods * each].reshape(rows, periods, each)
    codes = stream.new_empty(rows, periods, period)
    for place, (byte, offset) in enumerate(_places(period, bits)):
        code = stream[:, :, byte] >> offset
        if offset + bits > 8:
            code |= stream[:, :, byte + 1] << (8 - offset)
        codes[:, :, place] = (code & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.flatten(1)[:, :count].view(torch.int8)


def _places(period: int, bits: int) -> list[tuple[int, int]]:
    """For each code of a period: the byte that it begins in, and at which of its bits."""
    return [divmod(place * bits, 8) for place in range(period)]
