// What half_products.cpp does with a finished tile.
#pragma once

#if defined(__x86_64__)

#include "cpu/tiles.h"

namespace slmperf::avx512_tiles {

// (V,), fp32 or bf16.
struct Bias {
  const float* single = nullptr;
  const uint16_t* half = nullptr;
};

SLMPERF_TARGET_AVX512 inline __m512 load_bias(const Bias& bias, int64_t first, __mmask16 inside) {
  if (bias.single) return _mm512_maskz_loadu_ps(inside, bias.single + first);
  if (!bias.half) return _mm512_setzero_ps();
  const __m256i bits = _mm256_maskz_loadu_epi16(inside, bias.half + first);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Two by `right` tiles of weight @ hidden.T, from entry `vocabulary` and token `token` on, into
// out (C, V): turned, bias added, scaled.
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void write_logits(
    const float* quad, int64_t right, int64_t vocabulary, int64_t token, const Bias& bias,
    float scale, const Matrix<float>& out) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t n = 0; n < right; n++, token += kSide) {
    const int64_t tokens = out.rows - token < kSide ? out.rows - token : kSide;
    for (int64_t m = 0; m < 2; m++) {
      const int64_t entry = vocabulary + m * kSide;
      const __mmask16 inside = lowest(out.columns - entry, kSide);
      if (!inside) break;
      const __m512 offset = load_bias(bias, entry, inside);
      __m512 turned[kSide];
      turn(quad + (2 * m + n) * kTile, turned);
      float* to = out.data + token * out.stride + entry;
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; i++) {
        if (i >= tokens) break;
        const __m512 value = _mm512_mul_ps(_mm512_add_ps(turned[i], offset), factor);
        _mm512_mask_storeu_ps(to + i * out.stride, inside, value);
      }
    }
  }
}

// Two by `right` tiles of gradient.T @ hidden into, or onto, out (V, D).
SLMPERF_TARGET_AVX512 __attribute__((noinline)) inline void write_gradient(
    const float* quad, int64_t right, int64_t row, int64_t column, bool accumulate,
    const Matrix<float>& out) {
  const int64_t rows = out.rows - row < 2 * kSide ? out.rows - row : 2 * kSide;
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t n = 0; n < right; n++) {
      const __mmask16 inside = lowest(out.columns - column - n * kSide, kSide);
      float* to = out.data + (row + i) * out.stride + column + n * kSide;
      const __m512 sum = _mm512_load_ps(quad + (i / kSide * 2 + n) * kTile + i % kSide * kSide);
      __builtin_prefetch(to + 2 * kSide, 1, 3);  // what the next quad of this row will change
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(inside, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, inside, _mm512_add_ps(sum, before));
    }
  }
}

}  // namespace slmperf::avx512_tiles

#endif
