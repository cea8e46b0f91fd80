// Weights of 8 bits: their checks, and products with inputs that stay floating (weight-only), for
// linear_int8.cpp and linear_fp8.cpp.
#pragma once

#include <type_traits>

#include "cpu/linear_bytes_tiles.h"
#include "cpu/linear_product.h"
#include "cpu/linear_tiles.h"
#include "cpu/tile_products.h"

namespace slmperf::linear {

// Checks codes (N, K) and scale, (1, 1), (N, 1) or of blocks of `block` squared (0: none); stacked
// ones have experts before.
inline void check_bytes(const char* op, const Tensor& codes, const Tensor& scale, ScalarType type,
                        int64_t inputs, int64_t block) {
  const int64_t dims = codes.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, op, ": codes have ", dims,
                  " dimensions, expected 2 or 3");
  check_dtype(op, "codes", codes, type);
  const int64_t outputs = codes.size(dims - 2);
  if (dims == 2) check_shape(op, "codes", codes, {{"N", outputs}, {"K", inputs}});
  if (dims == 3) {
    check_shape(op, "codes", codes, {{"E", codes.size(0)}, {"N", outputs}, {"K", inputs}});
  }
  STD_TORCH_CHECK(codes.stride(dims - 1) == 1 || inputs <= 1, op,
                  ": codes have gaps between inputs, expected none");
  STD_TORCH_CHECK(scale.dim() == dims && (dims == 2 || scale.size(0) == codes.size(0)), op,
                  ": scale has other dimensions than codes");
  const int64_t down = scale.size(dims - 2), across = scale.size(dims - 1);
  const bool plain = across == 1 && (down == 1 || down == outputs);
  const bool blocks =
      block > 0 && down == ceil_div(outputs, block) && across == ceil_div(inputs, block);
  STD_TORCH_CHECK(plain || blocks, op, ": scale is (", down, ", ", across, "), expected ",
                  block > 0 ? "(1, 1), (N, 1) or that of blocks" : "(1, 1) or (N, 1)",
                  " for a weight (", outputs, ", ", inputs, ")");
  STD_TORCH_CHECK(scale.stride(dims - 1) == 1 || across == 1, op,
                  ": scale has gaps between columns, expected none");
}

// Expert e of a weight that was checked.
template <class Code>
Bytes<Code> bytes_of(const Tensor& codes, const Tensor& scale, int64_t block, int64_t e) {
  const int64_t dims = codes.dim(), outputs = codes.size(dims - 2), inputs = codes.size(dims - 1);
  const int64_t element = scale.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t down = scale.size(dims - 2), across = scale.size(dims - 1);
  const bool whole_rows = across == 1 && (down == 1 || down == outputs);
  constexpr int64_t far = int64_t{1} << 40;  // more than there are
  return {static_cast<const Code*>(codes.const_data_ptr()) + (dims == 3 ? e * codes.stride(0) : 0),
          codes.stride(dims - 2),
          outputs,
          inputs,
          static_cast<const char*>(scale.const_data_ptr()) +
              (dims == 3 ? e * scale.stride(0) * element : 0),
          !whole_rows ? block
          : down == 1 ? far
                      : 1,
          whole_rows ? far : block,
          scale.stride(dims - 2)};
}

#if defined(__x86_64__)

// Tiles of a strip in bf16, rounded to the scale's dtype S before.
template <class Code, class S>
void pack_brain(const Bytes<Code>& weight, int64_t strip, int64_t begin, int64_t end,
                uint32_t* words) {
  const auto scale_of = [&](int64_t row, int64_t block) {
    const S* scales = static_cast<const S*>(weight.scale);
    return scalar::number_of(scales[row / weight.rows * weight.down + block]);
  };
  if constexpr (!std::is_same_v<S, Float16>) {  // which would round twice
    avx512_tiles::brain_strip<true>(weight, strip, begin, end, scale_of, words);
  } else {
    avx512::decode_tiles<Code, S>(weight, strip, begin, end, words);
  }
}

// y of one row of bf16 x.
template <class Code, class S>
void multiply_brain_row(const Bytes<Code>& weight, const uint16_t* x, const Epilogue& end) {
  const S* scales = static_cast<const S*>(weight.scale);
  const auto scale_of = [&](int64_t row, int64_t block) {
    return scalar::number_of(scales[row / weight.rows * weight.down + block]);
  };
  const int64_t blocks = ceil_div(weight.inputs, weight.columns);
  const auto write = avx512::writer(end);
  each_strip(end.outputs, 1, weight.inputs, [&](int64_t begin, int64_t stop) {
    for (; begin < stop; begin++) {
      float sums[kStrip];
      const int64_t count = std::min(kStrip, end.outputs - begin * kStrip);
      for (int64_t r = 0; r < count; r++) {
        const int64_t row = begin * kStrip + r;
        sums[r] = 0.0f;
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t from = b * weight.columns,
                        to = std::min(weight.inputs, from + weight.columns);
          sums[r] += avx512_tiles::brain_dot<true>(weight.codes + row * weight.stride, x, from, to,
                                                   scale_of(row, b));
        }
      }
      write(end, 0, begin * kStrip, count, sums);
    }
  });
}

// y = W x' on bf16 units: of `rows` rows of `inputs` numbers that pack_x(row, begin, end, words)
// packs, and W of strips that pack(strip, begin, end, words) makes.
template <class Kernel, class PackX, class Pack>
void multiply_brain(const Tensor& like, int64_t rows, int64_t inputs, const Kernel& kernel,
                    const Epilogue& end, const PackX& pack_x, const Pack& pack) {
  const int64_t depth = ceil_div(inputs, avx512_tiles::kDepth);
  const Tensor right = avx512_tiles::pack_right(like, rows, depth, pack_x);
  const auto write = avx512::writer(end);
  avx512_tiles::multiply(
      end.outputs, rows, depth, static_cast<const uint32_t*>(right.const_data_ptr()), false,
      avx512_tiles::blocking_of(end.outputs, rows), kernel,
      [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
        pack(row / kStrip, begin, stop, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_tiles::write_quad<false>(quad, strips, row, column, rows, end, write);
      });
}

#endif

// y of x (rows, depth) in fp32; W is rounded to the dtypes S and X on its way.
template <class Code, class S, class X>
void multiply_wide(const Bytes<Code>& weight, const float* x, int64_t rows, int64_t depth,
                   const Epilogue& end) {
  const auto run = SLMPERF_PICK(multiply_bytes<Code, S, X>);
  each_strip(end.outputs, rows, depth, [&](int64_t begin, int64_t stop) {
    std::vector<float> scratch(kStrip * (kChunk + rows));
    run(weight, x, rows, depth, end, begin, stop, scratch.data());
  });
}

// `rows` rows of x (M, K) from `first` on, inputs as they are.
template <class Code>
void multiply_weight_only(const char* op, const Bytes<Code>& weight, const Tensor& scale,
                          const Tensor& x, int64_t first, int64_t rows, const Epilogue& end) {
  const int64_t inputs = x.size(1), depth = ceil_div(inputs, 64) * 64;
#if defined(__x86_64__)
  if (x.scalar_type() == ScalarType::BFloat16 && bf16_unit() != Bf16Unit::none) {
    const auto* from = static_cast<const uint16_t*>(x.const_data_ptr()) + first * x.stride(0);
    with_element(op, "scale", scale, [&](auto element) {
      using S = decltype(element);
      if constexpr (!std::is_same_v<S, Float16>) {  // which would round twice
        if (rows == 1) return multiply_brain_row<Code, S>(weight, from, end);
      }
      const avx512_tiles::Halves halves{from, x.stride(0), rows, inputs};
      multiply_brain(
          x, rows, inputs, avx512_tiles::bf16_kernels(), end,
          [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
            avx512_tiles::pack_rows<true>(halves, row, begin, stop, words);
          },
          [&](int64_t strip, int64_t begin, int64_t stop, uint32_t* words) {
            pack_brain<Code, S>(weight, strip, begin, stop, words);
          });
    });
    return;
  }
#endif
  Tensor widened = torch::stable::new_empty(x, {rows, depth}, ScalarType::Float);
  auto* wide = static_cast<float*>(widened.mutable_data_ptr());
  with_element(op, "x", x, [&](auto input) {
    using X = decltype(input);
    const auto* from = static_cast<const X*>(x.const_data_ptr()) + first * x.stride(0);
    const auto widen_row = SLMPERF_PICK(widen_row<X>);
    each_row(rows, depth, [&](int64_t row, int64_t stop) {
      for (; row < stop; row++) {
        widen_row(from + row * x.stride(0), inputs, depth, nullptr, 1, wide + row * depth);
      }
    });
    with_element(op, "scale", scale, [&](auto element) {
      multiply_wide<Code, decltype(element), X>(weight, wide, rows, depth, end);
    });
  });
}

}  // namespace slmperf::linear
