// Tiles of matrix products: packing and the micro-kernels for bf16 (AMX, AVX512-BF16). Whoever
// includes this calls none of it before matrix_unit() says that the processor has the instructions.
//
// A tile is 16 x 16 words of 32 bits, 1 KiB. A word of an operand is a pair of bf16 (or four int8)
// that follow each other along K. The left operand's tiles are [row][word], the right one's
// [word][column]; a strip is 16 rows (or columns) with all its tiles along K, one after the other.
// Padding is zero in both operands, so that nothing that lies beyond an edge can reach a result.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#define SLMPERF_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2")))
#define SLMPERF_TARGET_BF16 \
  __attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2")))
#define SLMPERF_TARGET_AMX __attribute__((noinline, target("amx-tile,amx-bf16,amx-int8")))

// g++ 12 takes the deliberately undefined operand of its own intrinsics for a mistake (its bug
// 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace slmperf::avx512_tiles {

constexpr int64_t kSide = 16;             // rows, columns and words of a tile
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
inline uint64_t lowest(int64_t count, int64_t width) {
  const int64_t kept = count < 0 ? 0 : count < width ? count : width;
  return kept == 64 ? ~uint64_t{0} : (uint64_t{1} << kept) - 1;
}

// Reads a tile and returns it turned: vector j holds column j. Quarters of rows i, i + 4, i + 8 and
// i + 12 are gathered on their way in, which takes half of the shuffles out of the usual network.
SLMPERF_TARGET_AVX512 inline void turn(const float* tile, __m512 (&out)[kSide]) {
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

SLMPERF_TARGET_AVX512 inline void turn_in_place(uint32_t* tile) {
  auto* values = reinterpret_cast<float*>(tile);
  __m512 turned[kSide];
  turn(values, turned);
  for (int64_t i = 0; i < kSide; i++) _mm512_store_ps(values + i * kSide, turned[i]);
}

// A strip of 16 rows of x whose columns run along K: tiles [row][word], or [word][row] when turned.
template <bool kTurned, class T>
SLMPERF_TARGET_AVX512 __attribute__((noinline)) void pack_rows(const Matrix<const T>& x,
                                                               int64_t first_row,
                                                               int64_t tile_begin, int64_t tile_end,
                                                               uint32_t* out) {
  constexpr int64_t kSize = sizeof(T), kAcross = 64 / kSize;  // numbers of a tile's row
  for (int64_t t = tile_begin; t < tile_end; t++, out += kTile) {
    const __mmask64 inside = lowest((x.columns - t * kAcross) * kSize, 64);
    for (int64_t i = 0; i < kSide; i++) {
      const int64_t row = first_row + i;
      const __m512i words =
          row < x.rows ? _mm512_maskz_loadu_epi8(inside, x.data + row * x.stride + t * kAcross)
                       : _mm512_setzero_si512();
      _mm512_store_si512(out + i * kSide, words);
    }
    if constexpr (kTurned) turn_in_place(out);
  }
}

// A strip of 16 columns of x whose rows run along K: tiles [pair][column], or [column][pair] when
// turned.
template <bool kTurned>
SLMPERF_TARGET_AVX512 __attribute__((noinline)) void pack_columns(const Halves& x,
                                                                  int64_t first_column,
                                                                  int64_t tile_begin,
                                                                  int64_t tile_end, uint32_t* out) {
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
  // Bytes from a tile of the left operand, and from a row of it, to the next; AMX reads other
  // matrices than packed ones.
  int64_t left_tile = 4 * kTile, left_row = 4 * kSide;
};
using MicroKernel = void (*)(const Strips&, float* out, bool add);

template <int kRight>
SLMPERF_TARGET_BF16 void multiply_avx512(const Strips& strips, float* out, bool add) {
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

#define SLMPERF_TILE_DOT(...)    \
  if constexpr (kInt8) {         \
    _tile_dpbssd(__VA_ARGS__);   \
  } else {                       \
    _tile_dpbf16ps(__VA_ARGS__); \
  }

// kInt8: words are four int8, sums int32.
template <int kRight, bool kInt8>
SLMPERF_TARGET_AMX void multiply_amx(const Strips& strips, float* out, bool add) {
  // g++ 12's tile loads do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  const auto* left0 = reinterpret_cast<const char*>(strips.left);
  const char* left1 = left0 + 4 * strips.left_step;
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
    _tile_loadd(4, left0 + t * strips.left_tile, strips.left_row);
    _tile_loadd(6, right0 + t * kTile, 64);
    SLMPERF_TILE_DOT(0, 4, 6)
    if constexpr (kRight == 2) {
      _tile_loadd(7, right1 + t * kTile, 64);
      SLMPERF_TILE_DOT(1, 4, 7)
    }
    _tile_loadd(5, left1 + t * strips.left_tile, strips.left_row);
    SLMPERF_TILE_DOT(2, 5, 6)
    if constexpr (kRight == 2) {
      SLMPERF_TILE_DOT(3, 5, 7)
    }
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

SLMPERF_TARGET_AMX inline void load_shapes(const TileShapes& shapes) {
  __asm__ volatile("" ::: "memory");
  if (shapes.palette == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(&shapes);
  }
}

SLMPERF_TARGET_AMX inline void store_shapes(TileShapes* shapes) {
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

}  // namespace slmperf::avx512_tiles

#endif
