// Finished tiles (tiles.h) of y' = W x' into y: turned, and handed to linear_rows.h's writer.
#pragma once

#if defined(__x86_64__)

#include <torch/csrc/stable/ops.h>

#include "cpu/linear_args.h"
#include "cpu/tile_products.h"

namespace slmperf::avx512_tiles {

// Few inputs: a pair of strips at a time, which stays in the first-level cache
// until it is used. Some, which stay in the second-level cache: small blocks, so
// that weights come from memory between products. Many: 1 MiB of the weight in bf16 stays in the
// second-level cache, past which the inputs come as often as there are such blocks.
inline Blocking blocking_of(int64_t outputs, int64_t rows) {
  if (rows <= 2 * kSide) return {2 * kSide, 16, 2};
  if (rows <= 16 * kSide) return {4 * kSide, 64, 32};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = threads * ceil_div(outputs, 256 * threads);
  return {ceil_div(ceil_div(outputs, tasks), 2 * kSide) * 2 * kSide, 64, 32};
}

// Two by `strips` tiles from output `row` and token `column` on. kInt8: they are int32. write:
// avx512::writer(end)
template <bool kInt8, class Write>
SLMPERF_TARGET_AVX512 __attribute__((noinline)) void write_quad(const float* quad, int64_t strips,
                                                                int64_t row, int64_t column,
                                                                int64_t tokens,
                                                                const linear::Epilogue& end,
                                                                Write write) {
  alignas(64) float sums[kSide][2 * kSide];
  const int64_t left = end.outputs - row, count = left < 2 * kSide ? left : 2 * kSide;
  for (int64_t n = 0; n < strips; n++, column += kSide) {
    for (int64_t m = 0; m < 2; m++) {
      __m512 turned[kSide];
      turn(quad + (2 * m + n) * kTile, turned);
      for (int64_t i = 0; i < kSide; i++) {
        if constexpr (kInt8) turned[i] = _mm512_cvtepi32_ps(_mm512_castps_si512(turned[i]));
        _mm512_store_ps(sums[i] + m * kSide, turned[i]);
      }
    }
    const int64_t size = end.out == linear::Kind::single ? 4 : 2;
    for (int64_t i = 0; i < kSide && column + i < tokens; i++) {
      __builtin_prefetch(  // what the next quad of this row will write
          static_cast<char*>(end.y) + ((column + i) * end.outputs + row + 2 * kSide) * size, 1, 2);
      write(end, column + i, row, count, sums[i]);
    }
  }
}

// sums, times the factor of their row and of their column (columns: nullptr for 1), into, or onto,
// a quad.
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void add_scaled(const float* sums,
                                                                       int64_t strips,
                                                                       const float* rows,
                                                                       const float* columns,
                                                                       float* quad, bool add) {
  for (int64_t n = 0; n < strips; n++) {
    const __m512 column =
        columns == nullptr ? _mm512_set1_ps(1.0f) : _mm512_loadu_ps(columns + n * kSide);
    for (int64_t i = 0; i < 2 * kSide; i++) {
      const int64_t at = (i / kSide * 2 + n) * kTile + i % kSide * kSide;
      const __m512 factor = _mm512_mul_ps(column, _mm512_set1_ps(rows[i]));
      const __m512 before = add ? _mm512_load_ps(quad + at) : _mm512_setzero_ps();
      _mm512_store_ps(quad + at, _mm512_fmadd_ps(_mm512_load_ps(sums + at), factor, before));
    }
  }
}

}  // namespace slmperf::avx512_tiles

#endif
