// Dot products of int8 codes by AVX512-VNNI, for linear_rows.h's multiply_codes.
#pragma once

#if defined(__x86_64__)

#include "cpu/tiles.h"

#define SLMPERF_TARGET_VNNI \
  __attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")))

namespace slmperf::avx512_tiles {

// The instruction multiplies unsigned by signed bytes: weights are raised by 128, and 128 times the
// sum of a row of x is taken off again.
struct VnniDots {
  template <int outputs, int rows>
  SLMPERF_TARGET_VNNI static void run(const int8_t* w, int64_t w_step, const int8_t* x,
                                      int64_t x_step, int64_t depth, const int32_t* x_sums,
                                      float* to, int64_t to_step) {
    constexpr int64_t kCodes = 64;
    const __m512i sign = _mm512_set1_epi8(-128);
    __m512i sum[rows][outputs];
    for (int c = 0; c < rows; c++)
      for (int r = 0; r < outputs; r++) sum[c][r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += kCodes) {
      const __mmask64 inside = lowest(depth - k, kCodes);
      __m512i weight[outputs];
      for (int r = 0; r < outputs; r++) {
        weight[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, w + r * w_step + k), sign);
      }
      for (int c = 0; c < rows; c++) {
        const __m512i input = _mm512_maskz_loadu_epi8(inside, x + c * x_step + k);
        for (int r = 0; r < outputs; r++) {
          sum[c][r] = _mm512_dpbusd_epi32(sum[c][r], weight[r], input);
        }
      }
    }
    for (int c = 0; c < rows; c++)
      for (int r = 0; r < outputs; r++) {
        const int32_t all = _mm512_reduce_add_epi32(sum[c][r]) - 128 * x_sums[c];
        to[c * to_step + r] = static_cast<float>(all);
      }
  }
};

SLMPERF_TARGET_AVX512 inline int32_t sum_of_codes(const int8_t* x, int64_t count) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 16) {
    const __mmask16 inside = lowest(count - k, 16);
    sums = _mm512_add_epi32(sums, _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, x + k)));
  }
  return _mm512_reduce_add_epi32(sums);
}

}  // namespace slmperf::avx512_tiles

#endif
