// Products of matrices in tiles (tiles.h), cut into blocks for the caches and among threads. Every
// result is made within one block, in one order: no bit depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/matrix_unit.h"
#include "cpu/tiles.h"

#if defined(__x86_64__)

namespace slmperf::avx512_tiles {

// How a product is cut. No bit of the result depends on it: sums go on where they were left.
struct Blocking {
  int64_t rows;    // of the left operand, in a task; a multiple of 32
  int64_t tiles;   // along K that are packed at a time; a multiple of kSlab
  int64_t strips;  // of the right operand whose sums are kept in fp32 between
                   // those; even
};

struct Freed {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Freed>;
template <class T>
Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
}

// Where a micro-kernel's tiles lie: the first row, column and tile along K.
struct Place {
  int64_t row, column, tile;
};

// A micro-kernel for one and for two strips of the right operand.
struct Kernels {
  MicroKernel one, two;
  bool amx;

  void operator()(const Strips& operands, int64_t rights, const Place&, float* quad,
                  bool add) const {
    (rights == 2 ? two : one)(operands, quad, add);
  }
};
inline Kernels bf16_kernels() {
  if (bf16_unit() == Bf16Unit::amx) return {&multiply_amx<1, false>, &multiply_amx<2, false>, true};
  return {&multiply_avx512<1>, &multiply_avx512<2>, false};
}

// Tiles along K that a micro-kernel is given: two strips of each operand stay in the first-level
// cache.
constexpr int64_t kSlab = 8;

// The right operand, packed: slabs of kSlab tiles along K, in each one strip after the other.
inline const uint32_t* right_strip(const uint32_t* packed, int64_t strips, int64_t strip,
                                   int64_t tile_begin, int64_t tile_end) {
  return packed + (tile_begin * strips + strip * (tile_end - tile_begin)) * kTile;
}

// left (M, K) @ right (K, N): pack_left(row, tile_begin, tile_end, words) packs a strip of 16 rows,
// right is packed whole, kernel(operands, strips, place, quad, add) makes 2 x strips tiles of
// results, or adds to them, and finish(quad, strips, row, column) takes them. across: results are
// made row by row, otherwise column by column (of a block), which should be the order in which
// finish writes them to neighbouring addresses.
template <class Kernel, class Pack, class Finish>
void multiply(int64_t rows, int64_t columns, int64_t tiles, const uint32_t* right, bool across,
              const Blocking& cut, const Kernel& kernel, const Pack& pack_left,
              const Finish& finish) {
  const int64_t strips = ceil_div(columns, kSide);
  const int64_t panels = std::max<int64_t>(1, ceil_div(tiles, cut.tiles));
  const int64_t span = panels == 1 ? strips : std::min(cut.strips, ceil_div(strips, 2) * 2);

  const auto blocks = [&](int64_t begin, int64_t end) {
    const Scratch<uint32_t> left =
        scratch<uint32_t>(cut.rows / kSide * std::min(cut.tiles, tiles) * kTile);
    const int64_t most = cut.rows / (2 * kSide), pairs = ceil_div(span, 2);
    const int64_t kept = panels > 1 ? most * pairs : across ? pairs : most;
    const Scratch<float> sums = scratch<float>(kept * kQuad);
    const FullTiles full(kernel.amx);
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * cut.rows;
      const int64_t lefts = ceil_div(std::min(cut.rows, rows - first), 2 * kSide);
      for (int64_t from = 0; from < strips; from += span) {
        const int64_t rights = ceil_div(std::min(span, strips - from), 2);
        for (int64_t panel = 0; panel < panels; panel++) {
          const int64_t panel_begin = panel * cut.tiles;
          const int64_t panel_end = std::min(tiles, panel_begin + cut.tiles);
          const auto left_strip = [&](int64_t i, int64_t tile_begin, int64_t tile_end) {
            return left.get() +
                   ((tile_begin - panel_begin) * 2 * lefts + i * (tile_end - tile_begin)) * kTile;
          };
          for (int64_t i = 0; i < 2 * lefts && (panels > 1 || from == 0); i++) {
            for (int64_t t = panel_begin; t < panel_end; t += kSlab) {
              const int64_t stop = std::min(panel_end, t + kSlab);
              pack_left(first + i * kSide, t, stop, left_strip(i, t, stop));
            }
          }
          const int64_t outer = across ? lefts : rights, inner = across ? rights : lefts;
          for (int64_t o = 0; o < outer; o++) {
            for (int64_t t = panel_begin; t == panel_begin || t < panel_end; t += kSlab) {
              const int64_t stop = std::min(panel_end, t + kSlab), depth = stop - t;
              for (int64_t i = 0; i < inner; i++) {
                const int64_t m = across ? o : i, n = across ? i : o;
                const int64_t strip = from + 2 * n, count = std::min<int64_t>(2, strips - strip);
                float* quad = sums.get() + (panels > 1 ? o * inner + i : i) * kQuad;
                const Strips operands{left_strip(2 * m, t, stop),
                                      right_strip(right, strips, strip, t, stop), depth * kTile,
                                      depth * kTile, depth};
                const Place place{first + 2 * m * kSide, strip * kSide, t};
                kernel(operands, count, place, quad, t > 0);
                if (stop == tiles) finish(quad, count, place.row, place.column);
              }
            }
          }
        }
      }
    }
  };
  torch::stable::parallel_for(0, ceil_div(rows, cut.rows), 1, blocks);
}

// The right operand (K, N) as right_strip finds it; pack as above.
template <class Pack>
torch::stable::Tensor pack_right(const torch::stable::Tensor& like, int64_t columns, int64_t tiles,
                                 const Pack& pack) {
  const int64_t strips = ceil_div(columns, kSide);
  torch::stable::Tensor packed =
      torch::stable::new_empty(like, {strips * tiles * kTile}, torch::headeronly::ScalarType::Int);
  auto* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(
      0, strips, ceil_div(64, std::max<int64_t>(1, tiles)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          for (int64_t t = 0; t < tiles; t += kSlab) {
            const int64_t stop = std::min(tiles, t + kSlab);
            pack(i * kSide, t, stop, words + (t * strips + i * (stop - t)) * kTile);
          }
        }
      });
  return packed;
}

}  // namespace slmperf::avx512_tiles

#endif
