// Products of bf16 matrices with fp32 results on the processor's bf16 units (AMX or AVX512-BF16).
// torch.mm rounds such a product to bf16 on CPU, which logits and a summed gradient cannot bear.
//
// The vocabulary is cut into blocks of 128 entries and every result is made within one block, in
// one order: no bit depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "check.h"
#include "cpu/half_products_tiles.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Unit { none = 0, avx512_bf16 = 1, amx = 2 };

#if defined(__x86_64__)

// Linux lets a process use AMX's tiles only after it has asked, once for all of its threads.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Unit choose_unit() {
  if (isa() != Isa::avx512) return Unit::none;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return Unit::none;
  const char* asked = std::getenv("SLMPERF_CPU_ISA");
  const std::string name = asked ? asked : "";
  if (name == "avx512") return Unit::none;
  if (name == "avx512_bf16") return Unit::avx512_bf16;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // its bf16 products, its tiles
  if (amx && tiles_permitted()) return Unit::amx;
  // Measured on Intel's cores: one vdpbf16ps in two cycles against two fp32 FMAs in each, so that
  // fp32 products are twice as fast there.
  return __builtin_cpu_is("intel") ? Unit::none : Unit::avx512_bf16;
}

#else

Unit choose_unit() { return Unit::none; }

#endif

// The unit that this process uses, found once; none where fp32 products are no slower. For tests
// SLMPERF_CPU_ISA=avx512_bf16 asks for that unit instead of AMX, and any narrower set for none.
Unit unit() {
  static const Unit chosen = choose_unit();
  return chosen;
}

// () -> int: 0 none, 1 AVX512-BF16, 2 AMX. The two products refuse to run where this is 0.
int64_t half_products() { return static_cast<int64_t>(unit()); }

#if defined(__x86_64__)

using avx512_half::Bias;
using avx512_half::ceil_div;
using avx512_half::Halves;
using avx512_half::kDepth;
using avx512_half::kQuad;
using avx512_half::kSide;
using avx512_half::kTile;
using avx512_half::Matrix;
using avx512_half::MicroKernel;

constexpr int64_t kBlock = 128;       // rows of the left operand, the vocabulary, in a task
constexpr int64_t kSlab = 32;         // tiles along K that are packed at a time: 256 KiB a block
constexpr int64_t kRightStrips = 32;  // columns kept in fp32 between slabs: 256 KiB a block

struct Freed {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Freed>;
template <class T>
Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
}

// left (M, K) @ right (K, N): pack_left(row, tile_begin, tile_end, words) packs a strip of 16 rows,
// right is packed whole, and finish(quad, strips, row, column) takes 2 x strips tiles of results.
// across: results are made row by row, otherwise column by column (of a block), which should be the
// order in which finish writes them to neighbouring addresses.
template <class Pack, class Finish>
void multiply(int64_t rows, int64_t columns, int64_t depth, const uint32_t* right, bool across,
              const Pack& pack_left, const Finish& finish) {
  const int64_t tiles = ceil_div(depth, kDepth), strips = ceil_div(columns, kSide);
  const int64_t slabs = std::max<int64_t>(1, ceil_div(tiles, kSlab));
  const int64_t span = slabs == 1 ? strips : kRightStrips;
  const bool amx = unit() == Unit::amx;
  const MicroKernel one = amx ? &avx512_half::multiply_amx<1> : &avx512_half::multiply_avx512<1>;
  const MicroKernel two = amx ? &avx512_half::multiply_amx<2> : &avx512_half::multiply_avx512<2>;

  const auto blocks = [&](int64_t begin, int64_t end) {
    const Scratch<uint32_t> left =
        scratch<uint32_t>(kBlock / kSide * std::min(kSlab, tiles) * kTile);
    const int64_t kept = slabs == 1 ? 1 : kBlock / (2 * kSide) * ceil_div(span, 2);
    const Scratch<float> sums = scratch<float>(kept * kQuad);
    const avx512_half::FullTiles full(amx);
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * kBlock;
      const int64_t lefts = ceil_div(std::min(kBlock, rows - first), 2 * kSide);
      for (int64_t from = 0; from < strips; from += span) {
        const int64_t rights = ceil_div(std::min(span, strips - from), 2);
        for (int64_t slab = 0; slab < slabs; slab++) {
          const int64_t tile_begin = slab * kSlab, tile_end = std::min(tiles, tile_begin + kSlab);
          const int64_t step = (tile_end - tile_begin) * kTile;
          if (slabs > 1 || from == 0) {
            for (int64_t i = 0; i < 2 * lefts; i++) {
              pack_left(first + i * kSide, tile_begin, tile_end, left.get() + i * step);
            }
          }
          for (int64_t i = 0; i < lefts * rights; i++) {
            const int64_t m = across ? i / rights : i % lefts, n = across ? i % rights : i / lefts;
            const int64_t strip = from + 2 * n, count = std::min<int64_t>(2, strips - strip);
            float* quad = sums.get() + (slabs == 1 ? 0 : i * kQuad);
            const avx512_half::Strips operands{left.get() + 2 * m * step,
                                               right + (strip * tiles + tile_begin) * kTile, step,
                                               tiles * kTile, tile_end - tile_begin};
            (count == 2 ? two : one)(operands, quad, slab > 0);
            if (slab + 1 == slabs) finish(quad, count, first + 2 * m * kSide, strip * kSide);
          }
        }
      }
    }
  };
  torch::stable::parallel_for(0, ceil_div(rows, kBlock), 1, blocks);
}

// The right operand (K, N) in tiles, one strip after the other; pack as above.
template <class Pack>
Tensor pack_right(const Tensor& like, int64_t columns, int64_t depth, const Pack& pack) {
  const int64_t tiles = ceil_div(depth, kDepth), strips = ceil_div(columns, kSide);
  Tensor packed = torch::stable::new_empty(like, {strips * tiles * kTile * 2});
  auto* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, strips, ceil_div(64, std::max<int64_t>(1, tiles)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; i++) {
                                  pack(i * kSide, 0, tiles, words + i * tiles * kTile);
                                }
                              });
  return packed;
}

// Any row stride is read as it is; rows with gaps are copied first.
Tensor packed_rows(const Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : torch::stable::contiguous(x);
}

Halves halves(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1)};
}

Matrix<float> singles(const char* op, Tensor& out, int64_t rows, const char* row_letter,
                      int64_t columns, const char* column_letter) {
  check_shape(op, "out", out, {{row_letter, rows}, {column_letter, columns}});
  check_dtype(op, "out", out, ScalarType::Float);
  STD_TORCH_CHECK(out.stride(1) == 1 || columns == 1, op, ": out has stride ", out.stride(1),
                  " in its last dimension, expected 1");
  return {static_cast<float*>(out.mutable_data_ptr()), out.stride(0), rows, columns};
}

void check_halves(const char* op, const char* argument, const Tensor& x, const char* shape) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", argument, " has ", x.dim(), " dimensions, expected ",
                  shape);
  check_dtype(op, argument, x, ScalarType::BFloat16);
}

void check_unit(const char* op) {
  STD_TORCH_CHECK(unit() != Unit::none, op,
                  ": slmperf::half_products() is 0 here, expected a processor with bf16 units");
}

// out (C, V) = scale * (hidden (C, D) @ weight (V, D).T + bias (V,)).
void bf16_logits(Tensor hidden, Tensor weight, std::optional<Tensor> bias, double scale,
                 Tensor out) {
  constexpr const char* kOp = "bf16_logits";
  check_unit(kOp);
  check_halves(kOp, "hidden", hidden, "(C, D)");
  check_halves(kOp, "weight", weight, "(V, D)");
  const int64_t tokens = hidden.size(0), vocabulary = weight.size(0), depth = hidden.size(1);
  check_shape(kOp, "weight", weight, {{"V", vocabulary}, {"D", depth}});
  const Matrix<float> to = singles(kOp, out, tokens, "C", vocabulary, "V");
  Bias offset;
  Tensor packed_bias;
  if (bias) {
    check_shape(kOp, "bias", *bias, {{"V", vocabulary}});
    packed_bias = torch::stable::contiguous(*bias);
    if (bias->scalar_type() == ScalarType::BFloat16) {
      offset.half = static_cast<const uint16_t*>(packed_bias.const_data_ptr());
    } else {
      check_dtype(kOp, "bias", *bias, ScalarType::Float);
      offset.single = static_cast<const float*>(packed_bias.const_data_ptr());
    }
  }
  const Tensor hidden_rows = packed_rows(hidden), weight_rows = packed_rows(weight);
  const Halves left = halves(weight_rows), right = halves(hidden_rows);
  const Tensor packed = pack_right(hidden, tokens, depth,
                                   [&](int64_t row, int64_t begin, int64_t end, uint32_t* words) {
                                     avx512_half::pack_rows<true>(right, row, begin, end, words);
                                   });
  multiply(
      vocabulary, tokens, depth, static_cast<const uint32_t*>(packed.const_data_ptr()), false,
      [&](int64_t row, int64_t begin, int64_t end, uint32_t* words) {
        avx512_half::pack_rows<false>(left, row, begin, end, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_half::write_logits(quad, strips, row, column, offset, static_cast<float>(scale), to);
      });
}

// out (V, D) = gradient (C, V).T @ hidden (C, D), added to out when accumulate.
void bf16_weight_gradient(Tensor gradient, Tensor hidden, Tensor out, bool accumulate) {
  constexpr const char* kOp = "bf16_weight_gradient";
  check_unit(kOp);
  check_halves(kOp, "gradient", gradient, "(C, V)");
  check_halves(kOp, "hidden", hidden, "(C, D)");
  const int64_t tokens = gradient.size(0), vocabulary = gradient.size(1), width = hidden.size(1);
  check_shape(kOp, "hidden", hidden, {{"C", tokens}, {"D", width}});
  const Matrix<float> to = singles(kOp, out, vocabulary, "V", width, "D");
  const Tensor gradient_rows = packed_rows(gradient), hidden_rows = packed_rows(hidden);
  const Halves left = halves(gradient_rows), right = halves(hidden_rows);
  const Tensor packed = pack_right(
      hidden, width, tokens, [&](int64_t column, int64_t begin, int64_t end, uint32_t* words) {
        avx512_half::pack_columns<false>(right, column, begin, end, words);
      });
  multiply(
      vocabulary, width, tokens, static_cast<const uint32_t*>(packed.const_data_ptr()), true,
      [&](int64_t column, int64_t begin, int64_t end, uint32_t* words) {
        avx512_half::pack_columns<true>(left, column, begin, end, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_half::write_gradient(quad, strips, row, column, accumulate, to);
      });
}

#endif

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_FRAGMENT(slmperf, m) {
  m.def("half_products() -> int");
  m.def(
      "bf16_logits.cpu(Tensor hidden, Tensor weight, Tensor? bias, float scale, Tensor(a!) out) "
      "-> ()");
  m.def(
      "bf16_weight_gradient.cpu(Tensor gradient, Tensor hidden, Tensor(a!) out, "
      "bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slmperf, CompositeExplicitAutograd, m) {
  m.impl("half_products", TORCH_BOX(&slmperf::half_products));
}

#if defined(__x86_64__)
STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("bf16_logits.cpu", TORCH_BOX(&slmperf::bf16_logits));
  m.impl("bf16_weight_gradient.cpu", TORCH_BOX(&slmperf::bf16_weight_gradient));
}
#endif
