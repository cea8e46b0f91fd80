// Weights of 8 bits in bf16 tiles (tiles.h): what avx512::decode_tiles makes, by AVX512-BF16.
#pragma once

#if defined(__x86_64__)

#include "cpu/element.h"
#include "cpu/linear_args.h"
#include "cpu/tiles.h"

#define SLMPERF_TARGET_BRAIN                                  \
  __attribute__((                                             \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16," \
             "avx2")))

namespace slmperf::avx512_tiles {

// 32 codes e4m3 as bf16, exactly: the exponent is raised by the difference of the biases, which
// subnormals, below 8, are too small for.
SLMPERF_TARGET_BRAIN inline __m512i brain_of(__m256i codes) {
  // 0 to 7 times 2^-9
  alignas(64) static constexpr uint16_t kSubnormals[32] = {0x0000, 0x3b00, 0x3b80, 0x3bc0,
                                                           0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const __m512i wide = _mm512_cvtepi8_epi16(codes);
  const __m512i size = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
  __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
  const __mmask32 small = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
  if (__builtin_expect(small | nan, 0)) {
    bits = _mm512_mask_permutexvar_epi16(bits, small, size, _mm512_load_si512(kSubnormals));
    bits = _mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7fc0));
  }
  // bits, or the sign of wide
  return _mm512_ternarylogic_epi32(bits, wide, _mm512_set1_epi16(-0x8000), 0xf8);
}

// The same as fp32, lanes 0 to 15 and 16 to 31.
struct Pair {
  __m512 low, high;
};
SLMPERF_TARGET_BRAIN inline Pair singles_of(__m256i codes, const E4m3*) {
  const __m512i bits = brain_of(codes);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)),
          _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
}
SLMPERF_TARGET_BRAIN inline Pair singles_of(__m256i codes, const int8_t*) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes))),
          _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)))};
}

// Codes of one row from a tile to another, `count` of them there; scaled: times a scale, rounded.
// Like the products after it this takes bf16's subnormals for 0.
template <bool scaled, class Code>
SLMPERF_TARGET_BRAIN __attribute__((noinline)) void brain_row(const Code* codes, int64_t count,
                                                              int64_t tile_begin, int64_t tile_end,
                                                              float scale, uint32_t* out) {
  constexpr int64_t kAhead = 16;  // tiles
  const int64_t whole = count / kDepth;
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t t = tile_begin; t < tile_end; t++, out += kTile) {
    const Code* from = codes + t * kDepth;
    const __m256i some = t < whole
                             ? _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(from))
                             : _mm256_maskz_loadu_epi8(lowest(count - t * kDepth, kDepth), from);
    // Of 16 rows in turn the processor does not follow all.
    __builtin_prefetch(from + kAhead * kDepth);
    __m512i numbers;
    if constexpr (scaled) {
      const Pair pair = singles_of(some, static_cast<const Code*>(nullptr));
      numbers = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(pair.high, factor),
                                             _mm512_mul_ps(pair.low, factor));
    } else {
      numbers = brain_of(some);
    }
    _mm512_store_si512(out, numbers);
  }
}

// Tiles of a strip, as pack_left of tile_products.h. scale_of(row, block): what goes with a row's
// inputs of a block.
template <bool scaled, class Code, class Scale>
void brain_strip(const linear::Bytes<Code>& weight, int64_t strip, int64_t tile_begin,
                 int64_t tile_end, const Scale& scale_of, uint32_t* out) {
  for (int64_t r = 0; r < kSide; r++) {
    const int64_t row = strip * kSide + r;
    if (row >= weight.outputs) {
      for (int64_t t = tile_begin; t < tile_end; t++) {
        for (int64_t i = 0; i < kSide; i++) out[(t - tile_begin) * kTile + r * kSide + i] = 0;
      }
      continue;
    }
    for (int64_t t = tile_begin; t < tile_end;) {
      int64_t stop = tile_end;
      float scale = 1.0f;
      if constexpr (scaled) {
        const int64_t block = t * kDepth / weight.columns;
        const int64_t edge = (block + 1) * weight.columns / kDepth;
        if (edge < stop) stop = edge;
        scale = scale_of(row, block);
      }
      brain_row<scaled>(weight.codes + row * weight.stride, weight.inputs, t, stop, scale,
                        out + (t - tile_begin) * kTile + r * kSide);
      t = stop;
    }
  }
}

// The dot product of a row of x with a row of a weight, from input `begin` to `end`.
template <bool scaled, class Code>
SLMPERF_TARGET_BRAIN __attribute__((noinline)) float brain_dot(const Code* codes, const uint16_t* x,
                                                               int64_t begin, int64_t end,
                                                               float scale) {
  constexpr int kSums = 4;  // as many as hide an addition's latency
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 sums[kSums] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                        _mm512_setzero_ps()};
  for (int64_t k = begin; k < end; k += kSums * kDepth) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; i++) {
      const int64_t at = k + i * kDepth;
      const __mmask32 inside = lowest(end - at, kDepth);
      const __m256i some = _mm256_maskz_loadu_epi8(inside, codes + at);
      const __m512i input = _mm512_maskz_loadu_epi16(inside, x + at);
      __m512i numbers;
      if constexpr (scaled) {
        const Pair pair = singles_of(some, static_cast<const Code*>(nullptr));
        numbers = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(pair.high, factor),
                                               _mm512_mul_ps(pair.low, factor));
      } else {
        numbers = brain_of(some);
      }
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)numbers, (__m512bh)input);
    }
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace slmperf::avx512_tiles

#endif
