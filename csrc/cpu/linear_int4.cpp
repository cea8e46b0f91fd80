// linear_int4 and dequantize_int4 on CPU. Formulas: slmperf/ops/linear/int4.py.
//
// bf16 inputs are multiplied in tiles where the processor has bf16 units, all others in fp32.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/linear_args.h"
#include "cpu/with_element.h"

#define SLMPERF_ROWS "cpu/linear_int4_rows.h"
#include "cpu/each_isa.h"
#include "cpu/linear_int4_tiles.h"
#include "cpu/linear_product.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_products.h"

namespace slmperf {
namespace {

using linear::Epilogue;
using linear::Int4;
using linear::kStrip;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTileInputs = 64;
constexpr int64_t kWorthAThread = 1 << 16;  // weights

// Expert e of a weight whose tensors were checked; strides of the dimension of experts come first.
Int4 expert_of(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point,
               int64_t group_size, bool stacked, int64_t e) {
  const int64_t first = stacked ? 1 : 0;
  const auto offset = [&](const Tensor& one) { return stacked ? e * one.stride(0) : 0; };
  const int64_t element = scale.scalar_type() == ScalarType::Float ? 4 : 2;
  return {static_cast<const uint32_t*>(packed.const_data_ptr()) + offset(packed),
          packed.stride(first),
          packed.size(first + 1),
          static_cast<const char*>(scale.const_data_ptr()) + offset(scale) * element,
          scale.stride(first),
          zero_point
              ? static_cast<const int8_t*>(zero_point->const_data_ptr()) + offset(*zero_point)
              : nullptr,
          zero_point ? zero_point->stride(first) : 0,
          scale.size(first),
          group_size == -1 ? INT64_MAX : group_size};
}

// Shapes of a weight (experts, N, K); experts is -1 where it is not stacked.
void check_int4(const char* op, const Tensor& packed, const Tensor& scale,
                const std::optional<Tensor>& zero_point, int64_t experts, int64_t outputs,
                int64_t inputs, int64_t group_size) {
  STD_TORCH_CHECK(group_size == -1 || group_size == 32 || group_size == 64 || group_size == 128, op,
                  ": group_size is ", group_size, ", expected 32, 64, 128 or -1");
  const int64_t strips = (outputs + kStrip - 1) / kStrip;
  const int64_t tiles = (inputs + kTileInputs - 1) / kTileInputs;
  const int64_t groups = group_size == -1 ? 1 : inputs / group_size;
  STD_TORCH_CHECK(group_size == -1 || inputs % group_size == 0, op, ": groups of ", group_size,
                  " do not divide ", inputs, " inputs");
  check_dtype(op, "packed", packed, ScalarType::Int);
  const auto check_beside = [&](const char* name, const Tensor& one) {
    if (experts < 0) {
      check_shape(op, name, one, {{"groups", groups}, {"16 strips", kStrip * strips}});
    } else {
      check_shape(op, name, one,
                  {{"E", experts}, {"groups", groups}, {"16 strips", kStrip * strips}});
    }
    STD_TORCH_CHECK(one.stride(one.dim() - 1) == 1, op, ": ", name,
                    " has gaps between outputs, expected none");
  };
  if (experts < 0) {
    check_shape(op, "packed", packed, {{"strips", strips}, {"tiles", tiles}, {"32", 32}, {"4", 4}});
  } else {
    check_shape(op, "packed", packed,
                {{"E", experts}, {"strips", strips}, {"tiles", tiles}, {"32", 32}, {"4", 4}});
  }
  const int64_t last = packed.dim() - 1;
  STD_TORCH_CHECK(packed.stride(last) == 1 && packed.stride(last - 1) == 4 &&
                      (tiles == 1 || packed.stride(last - 2) == 128),
                  op, ": packed has gaps within a row of tiles, expected none");
  check_beside("scale", scale);
  if (zero_point) {
    check_beside("zero_point", *zero_point);
    check_dtype(op, "zero_point", *zero_point, ScalarType::Char);
  }
}

#if defined(__x86_64__)

// avx512::dequantize_strips for scales of 16 bits, whose numbers are looked up as such.
template <class S>
void dequantize_halves(const Int4& weight, int64_t outputs, int64_t inputs, S* out, int64_t begin,
                       int64_t end) {
  for (int64_t strip = begin; strip < end; strip++) {
    const int64_t rows = std::min(kStrip, outputs - strip * kStrip);
    auto* to = reinterpret_cast<uint16_t*>(out) + strip * kStrip * inputs;
    avx512_tiles::each_tile(
        weight, strip, 0, weight.tiles,
        [&](int64_t group, avx512_tiles::HalfTable& table) {
          avx512::half_tables<S, S>(weight, strip, group, table);
        },
        [&](const uint32_t* codes, const avx512_tiles::HalfTable& first,
            const avx512_tiles::HalfTable* second, int64_t tile) {
          const int64_t left = inputs - tile * kTileInputs;
          avx512_tiles::unpack_rows(codes, first, second, rows, avx512_tiles::lowest(left, 32),
                                    avx512_tiles::lowest(left - 32, 32), to + tile * kTileInputs,
                                    inputs);
        });
  }
}

#endif

Tensor dequantize_int4(Tensor packed, Tensor scale, std::optional<Tensor> zero_point,
                       int64_t outputs, int64_t inputs, int64_t group_size) {
  constexpr const char* kOp = "dequantize_int4";
  const bool stacked = packed.dim() == 5;
  const int64_t experts = stacked ? packed.size(0) : 1;
  check_int4(kOp, packed, scale, zero_point, stacked ? experts : -1, outputs, inputs, group_size);
  Tensor out = stacked ? torch::stable::new_empty(scale, {experts, outputs, inputs})
                       : torch::stable::new_empty(scale, {outputs, inputs});
  const int64_t strips = (outputs + kStrip - 1) / kStrip;
  with_element(kOp, "scale", scale, [&](auto element) {
    using S = decltype(element);
    auto run = SLMPERF_PICK(dequantize_strips<S>);
#if defined(__x86_64__)
    if constexpr (sizeof(S) == 2) {
      if (isa() == Isa::avx512) run = &dequantize_halves<S>;
    }
#endif
    for (int64_t e = 0; e < experts; e++) {
      const Int4 weight = expert_of(packed, scale, zero_point, group_size, stacked, e);
      S* to = static_cast<S*>(out.mutable_data_ptr()) + e * outputs * inputs;
      torch::stable::parallel_for(
          0, strips, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, kStrip * inputs)),
          [&](int64_t begin, int64_t end) { run(weight, outputs, inputs, to, begin, end); });
    }
  });
  return out;
}

// y of `rows` rows of x (M, K) from `first` on, in fp32.
void multiply_wide(const Int4& weight, const Tensor& scale, const Tensor& x, int64_t first,
                   int64_t rows, const Epilogue& end) {
  const int64_t depth = weight.tiles * kTileInputs, inputs = x.size(1);
  Tensor ordered = torch::stable::new_empty(x, {rows, depth}, ScalarType::Float);
  auto* wide = static_cast<float*>(ordered.mutable_data_ptr());
  with_element("linear_int4", "x", x, [&](auto input) {
    using X = decltype(input);
    const auto* from = static_cast<const X*>(x.const_data_ptr()) + first * x.stride(0);
    const auto order_row = SLMPERF_PICK(order_row<X>);
    each_row(rows, depth, [&](int64_t row, int64_t stop) {
      for (; row < stop; row++) {
        order_row(from + row * x.stride(0), inputs, depth, wide + row * depth);
      }
    });
    with_element("linear_int4", "scale", scale, [&](auto element) {
      if (rows == 1 && isa() == Isa::avx512) {  // narrower sets have no room for so many sums
        const auto run = SLMPERF_PICK(multiply_one<decltype(element), X>);
        linear::each_strip(end.outputs, rows, depth, [&](int64_t begin, int64_t stop) {
          run(weight, wide, end, begin, stop);
        });
        return;
      }
      const auto run = SLMPERF_PICK(multiply_int4<decltype(element), X>);
      linear::each_strip(end.outputs, rows, depth, [&](int64_t begin, int64_t stop) {
        std::vector<float> scratch(kStrip * (linear::kChunk + rows));
        run(weight, wide, rows, depth, end, begin, stop, scratch.data());
      });
    });
  });
}

#if defined(__x86_64__)

// The same of bf16 x on bf16 units.
template <class S>
void multiply_tiles(const Int4& weight, const Tensor& x, int64_t first, int64_t rows,
                    const Epilogue& end) {
  const avx512_tiles::Halves halves{
      static_cast<const uint16_t*>(x.const_data_ptr()) + first * x.stride(0), x.stride(0), rows,
      x.size(1)};
  const int64_t depth = 2 * weight.tiles;  // tiles of 32 inputs
  const Tensor right = avx512_tiles::pack_right(
      x, rows, depth, [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
        avx512_tiles::pack_ordered_rows(halves, row, begin, stop, words);
      });
  const auto write = avx512::writer(end);
  avx512_tiles::multiply(
      end.outputs, rows, depth, static_cast<const uint32_t*>(right.const_data_ptr()), false,
      avx512_tiles::blocking_of(end.outputs, rows), avx512_tiles::bf16_kernels(),
      [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
        if (row >= end.outputs) {
          std::memset(words, 0, (stop - begin) * avx512_tiles::kTile * sizeof(uint32_t));
          return;
        }
        const int64_t strip = row / kStrip;
        avx512_tiles::each_tile(
            weight, strip, begin / 2, stop / 2,
            [&](int64_t group, avx512_tiles::HalfTable& table) {
              avx512::half_tables<S, BFloat16>(weight, strip, group, table);
            },
            [&](const uint32_t* codes, const avx512_tiles::HalfTable& first_table,
                const avx512_tiles::HalfTable* second, int64_t tile) {
              avx512_tiles::unpack_tile(codes, first_table, second,
                                        words + (2 * tile - begin) * avx512_tiles::kTile);
            });
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_tiles::write_quad<false>(quad, strips, row, column, rows, end, write);
      });
}

#endif

Tensor linear_int4(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero_point,
                   std::optional<Tensor> bias, std::optional<Tensor> residual,
                   std::optional<Tensor> starts, int64_t outputs, int64_t group_size,
                   ScalarType out_dtype) {
  constexpr const char* kOp = "linear_int4";
  const Tensor rows_of_x = linear::packed_rows(kOp, "x", x);
  const bool stacked = packed.dim() == 5;
  const int64_t experts = stacked ? packed.size(0) : -1;
  check_int4(kOp, packed, scale, zero_point, experts, outputs, x.size(1), group_size);
  linear::Result result(kOp, x, outputs, experts, bias, residual, starts, out_dtype);
  result.each_expert([&](int64_t e, int64_t first, int64_t rows, const Epilogue& end) {
    const Int4 weight = expert_of(packed, scale, zero_point, group_size, stacked, e);
#if defined(__x86_64__)
    if (rows > 1 && x.scalar_type() == ScalarType::BFloat16 && bf16_unit() != Bf16Unit::none) {
      with_element(kOp, "scale", scale, [&](auto element) {
        multiply_tiles<decltype(element)>(weight, rows_of_x, first, rows, end);
      });
      return;
    }
#endif
    multiply_wide(weight, scale, rows_of_x, first, rows, end);
  });
  return result.y;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("linear_int4.cpu", TORCH_BOX(&slmperf::linear_int4));
  m.impl("dequantize_int4.cpu", TORCH_BOX(&slmperf::dequantize_int4));
}
