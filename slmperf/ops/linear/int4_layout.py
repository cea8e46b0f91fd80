"""The packed int4 layout: one for sm_80, sm_90 and the CPU, made once when a weight is loaded.

A weight (N, K) is cut into tiles of 16 outputs x 64 inputs, 512 bytes each, K and N padded inside:

    packed   (ceil(N / 16), ceil(K / 64), 32, 4) int32; a tile is contiguous, 16-byte aligned, and
             the tiles of a row of tiles follow each other, so K lies innermost:

                 inputs  0..63     64..127
    outputs  0..15  [ tile 0,0 ] [ tile 0,1 ] ...      tile: 32 lanes x 16 bytes
            16..31  [ tile 1,0 ] [ tile 1,1 ] ...            lane 4 g + t, g = 0..7, t = 0..3
                                                             word j = 0..3: inputs 16 j .. 16 j + 15

    word j of lane 4 g + t holds 8 codes, each plus 8, so 0 to 15:

      bits   0-3      4-7      8-11     12-15    16-19    20-23    24-27    28-31
      row    g        g + 8    g        g + 8    g        g + 8    g        g + 8
      input  16j+2t   16j+2t   +8       +8       +1       +1       +9       +9

Why this order: a word is a lane's A fragment of mma.m16n8k16 (and of wgmma's A in registers) for
one step of 16 inputs (PTX ISA, "Matrix fragments for mma.m16n8k16"), its register p = 0..3 made of
nibbles p and p + 4, which one `(word >> 4p) & 0x000f000f` brings out as a pair of halves. A lane's
16 bytes are four steps. On a CPU the 64 bytes of one g are two rows, g and g + 8, by all 64 inputs:
nibble 4 l + 2 h + r of the 16 words is row g + 8 r at inputs 16 j + 8 h + 2 t + l, so that a vector
of x in that order meets them without a shuffle.

Scales and zero points lie beside it as (groups, 16 ceil(N / 16)), outputs innermost.

Slices for tensor parallelism are slices of this tensor: outputs by 16, inputs by 64 as views;
inputs by 16 move whole words. Codes behind N or K are 0 (nibble 8) and never reach a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUTS, INPUTS, STEP = 16, 64, 16  # of a tile; inputs of one of its words
# bits: 4 * (4 l + 2 h + r), in the order of the axes (h, l, r)
_SHIFTS = [[[4 * (4 * l + 2 * h + r) for r in range(2)] for l in range(2)] for h in range(2)]  # noqa: E741


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """Shape of `packed` for a weight (outputs, inputs)."""
    return -(-outputs // OUTPUTS), -(-inputs // INPUTS), 32, 4


def pack_int4(codes: Tensor) -> Tensor:
    """Codes (..., N, K) int8 from -8 to 7 -> packed (..., tiles, tiles, 32, 4) int32."""
    *lead, outputs, inputs = codes.shape
    down, across, _, _ = packed_shape(outputs, inputs)
    whole = torch.nn.functional.pad(
        codes, (0, across * INPUTS - inputs, 0, down * OUTPUTS - outputs)
    )
    # axes: down, r, g, across, j, h, t, l
    parts = whole.reshape(-1, down, 2, 8, across, 4, 2, 4, 2).to(torch.int32) + 8
    parts = parts.permute(0, 1, 4, 3, 7, 5, 6, 8, 2)  # lead, down, across, g, t, j, h, l, r
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=codes.device)
    words = (parts << shifts).sum(dim=(-3, -2, -1), dtype=torch.int32)
    return words.reshape(*lead, down, across, 32, 4).contiguous()


def unpack_int4(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The reverse: codes (..., outputs, inputs) int8."""
    *lead, down, across, _, _ = packed.shape
    words = packed.reshape(-1, down, across, 8, 4, 4)  # g, t, j
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=packed.device)
    parts = (words[..., None, None, None] >> shifts & 15).to(torch.int8) - 8
    parts = parts.permute(0, 1, 8, 3, 2, 5, 6, 4, 7)  # lead, down, r, g, across, j, h, t, l
    codes = parts.reshape(*lead, down * OUTPUTS, across * INPUTS)
    return codes[..., :outputs, :inputs].contiguous()


def slice_inputs(packed: Tensor, begin: int, end: int) -> Tensor:
    """Inputs begin to end, multiples of 16 (end: or the last): a view where begin is a multiple of
    64, else whole words are moved; nothing is unpacked."""
    if begin % INPUTS == 0:
        return packed[..., :, begin // INPUTS : -(-end // INPUTS), :, :]
    *lead, down, across, _, _ = packed.shape
    words = packed.movedim(-1, -2).reshape(*lead, down, across * 4, 32)
    words = words[..., begin // STEP : -(-end // STEP), :]
    tiles = -(-words.shape[-2] // 4)
    pad = 4 * tiles - words.shape[-2]
    # a word of eights is a word of zeros
    words = torch.nn.functional.pad(words, (0, 0, 0, pad), value=-0x77777778)
    return words.reshape(*lead, down, tiles, 4, 32).movedim(-1, -2).contiguous()
