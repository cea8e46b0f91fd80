// Tiles of the bf16 products: packing, the two micro-kernels (AMX, AVX512-BF16) and what is done
// with a finished tile. Only half_products.cpp includes this, and calls none of it before it has
// seen that the processor has the instructions.
//
// A tile is 16 x 16 words of 32 bits, 1 KiB. A word of an operand is a pair of bf16 that follow
// each other along K. The left operand's tiles are [row][pair], the right one's [pair][column]; a
// strip is 16 rows (or columns) with all its tiles along K, one after the other. Padding is zero in
// both operands, so that nothing that lies beyond an edge can reach a result.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#define SLMPERF_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2")))
#define SLMPERF_AVX512_BF16 \
  __attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2")))
#define SLMPERF_AMX __attribute__((noinline, target("amx-tile,amx-bf16")))

// g++ 12 takes the deliberately undefined operand of its own intrinsics for a mistake (its bug
// 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace slmperf::avx512_half {

constexpr int64_t kSide = 16;             // rows, columns and pairs of a tile
constexpr int64_t kDepth = 2 * kSide;     // bf16 of a tile along K
constexpr int64_t kTile = kSide * kSide;  // words of a tile
constexpr int64_t kQuad = 4 * kTile;      // fp32 that a micro-kernel makes: 2 x 2 tiles

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix in memory; neighbours of a row are side by side.
template <class T>
struct Matrix {
  T* data;
  int64_t stride, rows, columns;
};
using Halves = Matrix<const uint16_t>;

// The lowest `count` bits, for any count.
inline uint32_t lowest(int64_t count, int64_t width) {
  const int64_t kept = count < 0 ? 0 : count < width ? count : width;
  return static_cast<uint32_t>((uint64_t{1} << kept) - 1);
}

// Reads a tile and returns it turned: vector j holds column j. Quarters of rows i, i + 4, i + 8 and
// i + 12 are gathered on their way in, which takes half of the shuffles out of the usual network.
SLMPERF_AVX512 inline void turn(const float* tile, __m512 (&out)[kSide]) {
  for (int quarter = 0; quarter < 4; quarter++) {
    __m512 row[4];
    for (int i = 0; i < 4; i++) {
      const float* first = tile + i * kSide + 4 * quarter;
      row[i] = _mm512_castps128_ps512(_mm_loadu_ps(first));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x00f0, _mm_loadu_ps(first + 4 * kSide));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x0f00, _mm_loadu_ps(first + 8 * kSide));
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0xf000, _mm_loadu_ps(first + 12 * kSide));
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(row[0], row[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(row[0], row[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(row[2], row[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(row[2], row[3]));
    out[4 * quarter + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    out[4 * quarter + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    out[4 * quarter + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    out[4 * quarter + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
}

SLMPERF_AVX512 inline void turn_in_place(uint32_t* tile) {
  auto* values = reinterpret_cast<float*>(tile);
  __m512 turned[kSide];
  turn(values, turned);
  for (int64_t i = 0; i < kSide; i++) _mm512_store_ps(values + i * kSide, turned[i]);
}

// A strip of 16 rows of x whose columns run along K: tiles [row][pair], or [pair][row] when turned.
template <bool kTurned>
SLMPERF_AVX512 __attribute__((noinline)) void pack_rows(const Halves& x, int64_t first_row,
                                                        int64_t tile_begin, int64_t tile_end,
                                                        uint32_t* out) {
  for (int64_t t = tile_begin; t < tile_end; t++, out += kTile) {
    const __mmask32 inside = lowest(x.columns - t * kDepth, kDepth);
    for (int64_t i = 0; i < kSide; i++) {
      const int64_t row = first_row + i;
      const __m512i pairs =
          row < x.rows ? _mm512_maskz_loadu_epi16(inside, x.data + row * x.stride + t * kDepth)
                       : _mm512_setzero_si512();
      _mm512_store_si512(out + i * kSide, pairs);
    }
    if constexpr (kTurned) turn_in_place(out);
  }
}

// A strip of 16 columns of x whose rows run along K: tiles [pair][column], or [column][pair] when
// turned.
template <bool kTurned>
SLMPERF_AVX512 __attribute__((noinline)) void pack_columns(const Halves& x, int64_t first_column,
                                                           int64_t tile_begin, int64_t tile_end,
                                                           uint32_t* out) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  const __mmask16 inside = lowest(x.columns - first_column, kSide);
  for (int64_t t = tile_begin; t < tile_end; t++, out += kTile) {
    for (int64_t i = 0; i < kSide; i++) {
      const int64_t row = t * kDepth + 2 * i;
      const uint16_t* first = x.data + row * x.stride + first_column;
      const __m256i even =
          row < x.rows ? _mm256_maskz_loadu_epi16(inside, first) : _mm256_setzero_si256();
      const __m256i odd = row + 1 < x.rows ? _mm256_maskz_loadu_epi16(inside, first + x.stride)
                                           : _mm256_setzero_si256();
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_store_si512(out + i * kSide, _mm512_permutexvar_epi16(interleave, both));
    }
    if constexpr (kTurned) turn_in_place(out);
  }
}

// What a micro-kernel takes: two strips of the left operand, one or two of the right one, and how
// many tiles they have along K. It makes (or adds to) tiles [left][right] of fp32.
struct Strips {
  const uint32_t *left, *right;
  int64_t left_step, right_step;  // words from a strip to the next
  int64_t depth;                  // tiles along K
};
using MicroKernel = void (*)(const Strips&, float* out, bool add);

template <int kRight>
SLMPERF_AVX512_BF16 void multiply_avx512(const Strips& strips, float* out, bool add) {
  constexpr int kRows = 8;  // 8 x 2 sums are in flight: twice the latency of one vdpbf16ps
  for (int64_t first = 0; first < 2 * kSide; first += kRows) {
    const uint32_t* left = strips.left + first / kSide * strips.left_step + first % kSide * kSide;
    float* to = out + first / kSide * 2 * kTile + first % kSide * kSide;
    __m512 sum[kRows][kRight];
    for (int i = 0; i < kRows; i++) {
      for (int j = 0; j < kRight; j++) {
        sum[i][j] = add ? _mm512_load_ps(to + j * kTile + i * kSide) : _mm512_setzero_ps();
      }
    }
    for (int64_t t = 0; t < strips.depth; t++) {
      for (int64_t pair = 0; pair < kSide; pair++) {
        __m512bh right[kRight];
        for (int j = 0; j < kRight; j++) {
          right[j] = (__m512bh)_mm512_load_si512(strips.right + j * strips.right_step + t * kTile +
                                                 pair * kSide);
        }
        for (int i = 0; i < kRows; i++) {
          const auto one =
              (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(left[t * kTile + i * kSide + pair]));
          for (int j = 0; j < kRight; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], one, right[j]);
        }
      }
    }
    for (int i = 0; i < kRows; i++) {
      for (int j = 0; j < kRight; j++) _mm512_store_ps(to + j * kTile + i * kSide, sum[i][j]);
    }
  }
}

template <int kRight>
SLMPERF_AMX void multiply_amx(const Strips& strips, float* out, bool add) {
  // g++ 12's tile loads do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  const uint32_t *left0 = strips.left, *left1 = left0 + strips.left_step;
  const uint32_t *right0 = strips.right, *right1 = right0 + strips.right_step;
  if (add) {
    _tile_loadd(0, out, 64);
    _tile_loadd(2, out + 2 * kTile, 64);
    if constexpr (kRight == 2) {
      _tile_loadd(1, out + kTile, 64);
      _tile_loadd(3, out + 3 * kTile, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kRight == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }
  for (int64_t t = 0; t < strips.depth; t++) {
    _tile_loadd(4, left0 + t * kTile, 64);
    _tile_loadd(6, right0 + t * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight == 2) {
      _tile_loadd(7, right1 + t * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, left1 + t * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRight == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 64);
  _tile_stored(2, out + 2 * kTile, 64);
  if constexpr (kRight == 2) {
    _tile_stored(1, out + kTile, 64);
    _tile_stored(3, out + 3 * kTile, 64);
  }
  __asm__ volatile("" ::: "memory");
}

struct alignas(64) TileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

SLMPERF_AMX inline void load_shapes(const TileShapes& shapes) {
  __asm__ volatile("" ::: "memory");
  if (shapes.palette == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(&shapes);
  }
}

SLMPERF_AMX inline void store_shapes(TileShapes* shapes) {
  _tile_storeconfig(shapes);
  __asm__ volatile("" ::: "memory");
}

// Eight full tiles for as long as this lives. What was set before comes back after: whoever called
// may hold a configuration of his own (the contents of tiles survive no call in any case).
class FullTiles {
 public:
  explicit FullTiles(bool amx) : amx_(amx) {
    if (!amx_) return;
    store_shapes(&before_);
    TileShapes full;
    full.palette = 1;
    for (int i = 0; i < 8; i++) {
      full.row_bytes[i] = 64;
      full.rows[i] = kSide;
    }
    load_shapes(full);
  }
  ~FullTiles() {
    if (amx_) load_shapes(before_);
  }
  FullTiles(const FullTiles&) = delete;
  FullTiles& operator=(const FullTiles&) = delete;

 private:
  const bool amx_;
  TileShapes before_;
};

// (V,), fp32 or bf16.
struct Bias {
  const float* single = nullptr;
  const uint16_t* half = nullptr;
};

SLMPERF_AVX512 inline __m512 load_bias(const Bias& bias, int64_t first, __mmask16 inside) {
  if (bias.single) return _mm512_maskz_loadu_ps(inside, bias.single + first);
  if (!bias.half) return _mm512_setzero_ps();
  const __m256i bits = _mm256_maskz_loadu_epi16(inside, bias.half + first);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Two by `right` tiles of weight @ hidden.T, from entry `vocabulary` and token `token` on, into
// out (C, V): turned, bias added, scaled.
SLMPERF_AVX512 __attribute__((noinline)) inline void write_logits(const float* quad, int64_t right,
                                                                  int64_t vocabulary, int64_t token,
                                                                  const Bias& bias, float scale,
                                                                  const Matrix<float>& out) {
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
SLMPERF_AVX512 __attribute__((noinline)) inline void write_gradient(const float* quad,
                                                                    int64_t right, int64_t row,
                                                                    int64_t column, bool accumulate,
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

}  // namespace slmperf::avx512_half

#endif
