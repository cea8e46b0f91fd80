// Weights of 4 bits and the inputs that go with them in bf16 tiles (tiles.h), in the order of the
// layout (slmperf/ops/linear/int4_layout.py): a layout's tile of 64 inputs is two, h = 0 and h = 1,
// whose pair 4 t + j are the inputs 16 j + 8 h + 2 t and the next.
#pragma once

#if defined(__x86_64__)

#include "cpu/linear_args.h"
#include "cpu/tiles.h"

namespace slmperf::avx512_tiles {

// A strip's numbers in bf16 (or fp16) of one group: 16, twice, for each row.
using HalfTable = uint16_t[kSide][2 * kSide];

// 512 bytes of the layout -> two tiles. second: of inputs 32 to 63 where they have another group.
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void unpack_tile(const uint32_t* words,
                                                                        const HalfTable& first,
                                                                        const HalfTable* second,
                                                                        uint32_t* out) {
  for (int64_t g = 0; g < 8; g++) {
    const __m512i codes = _mm512_loadu_si512(words + g * kSide);
    __builtin_prefetch(words + g * kSide + 4 * (kTile / 2));
    for (int64_t r = 0; r < 2; r++) {
      const int64_t row = g + 8 * r;
      const __m512i table = _mm512_load_si512(first[row]);
      for (int64_t h = 0; h < 2; h++) {
        const __m512i code = _mm512_srli_epi32(codes, static_cast<unsigned>(8 * h + 4 * r));
        __m512i numbers = _mm512_permutexvar_epi16(code, table);  // reads 5 bits: tables are double
        if (second != nullptr) {  // words 2 and 3 of every four are inputs 32 to 63
          numbers = _mm512_mask_mov_epi32(
              numbers, 0xcccc, _mm512_permutexvar_epi16(code, _mm512_load_si512((*second)[row])));
        }
        _mm512_store_si512(out + h * kTile + row * kSide, numbers);
      }
    }
  }
}

// 512 bytes of the layout -> 64 inputs of `rows` rows, `stride` apart, in order; low, high: which
// of the first and the second half are there.
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void unpack_rows(
    const uint32_t* words, const HalfTable& first, const HalfTable* second, int64_t rows,
    __mmask32 low, __mmask32 high, uint16_t* out, int64_t stride) {
  // Pair p of the first half is word 4 (p % 4) + p / 8 of h = p / 4 % 2.
  alignas(64) static constexpr uint32_t kWords[16] = {0, 4, 8, 12, 16, 20, 24, 28,
                                                      1, 5, 9, 13, 17, 21, 25, 29};
  const __m512i lower = _mm512_load_si512(kWords);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(2));
  alignas(64) uint32_t tiles[2 * kTile];
  unpack_tile(words, first, second, tiles);
  for (int64_t r = 0; r < rows; r++, out += stride) {
    const __m512i a = _mm512_load_si512(tiles + r * kSide);
    const __m512i b = _mm512_load_si512(tiles + kTile + r * kSide);
    _mm512_mask_storeu_epi16(out, low, _mm512_permutex2var_epi32(a, lower, b));
    _mm512_mask_storeu_epi16(out + kDepth, high, _mm512_permutex2var_epi32(a, upper, b));
  }
}

// pack_rows<true> in the order of the layout.
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void pack_ordered_rows(
    const Halves& x, int64_t first_row, int64_t tile_begin, int64_t tile_end, uint32_t* out) {
  alignas(64) static constexpr uint32_t kPairs[16] = {0, 8,  16, 24, 1, 9,  17, 25,
                                                      2, 10, 18, 26, 3, 11, 19, 27};
  const __m512i lower = _mm512_load_si512(kPairs);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(4));
  for (int64_t t = tile_begin; t < tile_end; t += 2, out += 2 * kTile) {
    const int64_t first = t * kDepth;
    const __mmask32 low = lowest(x.columns - first, kDepth);
    const __mmask32 high = lowest(x.columns - first - kDepth, kDepth);
    for (int64_t i = 0; i < kSide; i++) {
      const uint16_t* from = x.data + (first_row + i) * x.stride + first;
      const bool inside = first_row + i < x.rows;
      const __m512i a = _mm512_maskz_loadu_epi16(inside ? low : 0, from);
      const __m512i b = _mm512_maskz_loadu_epi16(inside ? high : 0, from + kDepth);
      _mm512_store_si512(out + i * kSide, _mm512_permutex2var_epi32(a, lower, b));
      _mm512_store_si512(out + kTile + i * kSide, _mm512_permutex2var_epi32(a, upper, b));
    }
    turn_in_place(out);
    turn_in_place(out + kTile);
  }
}

// unpack(words, first, second, tile) for layout tiles begin to end of a strip, with the tables that
// go with them, which tables(group, table) makes.
template <class Tables, class Unpack>
void each_tile(const linear::Int4& weight, int64_t strip, int64_t begin, int64_t end,
               const Tables& tables, const Unpack& unpack) {
  alignas(64) HalfTable first, second;
  const bool halves = weight.group < 2 * kDepth;  // a layout's tile has two groups
  const uint32_t* words = weight.packed + strip * weight.strip_stride;
  for (int64_t tile = begin; tile < end; tile++) {
    const int64_t input = tile * 2 * kDepth;
    if (tile == begin || input % weight.group == 0) {
      tables(input / weight.group, first);
      if (halves) tables(input / weight.group + 1, second);
    }
    unpack(words + tile * (kTile / 2), first, halves ? &second : nullptr, tile);
  }
}

}  // namespace slmperf::avx512_tiles

#endif
