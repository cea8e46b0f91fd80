// linear_fp8 on CPU. Formulas: slmperf/ops/linear/fp8.py.
//
// Rounded inputs: codes are bf16 numbers, which bf16 units multiply exactly, and their scales come
// after, or after every 128 inputs; without such units both are multiplied out in fp32.

#include <torch/csrc/stable/library.h>

#include "cpu/linear_args.h"
#include "cpu/quantize_input.h"

#define SLMPERF_ROWS "cpu/linear_rows.h"
#include "cpu/each_isa.h"
#include "cpu/linear_bytes.h"

namespace slmperf {
namespace {

using linear::Bytes;
using linear::Epilogue;
using linear::kStrip;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "linear_fp8";
constexpr int64_t kBlock = 128;                            // inputs and outputs that share a scale
enum Activations : int64_t { none, token, whole, group };  // fp8.py's numbers

// Rounded inputs: rows of codes, and scale[row * down + block * across].
struct Inputs {
  Bytes<E4m3> codes;
  const float* scale;
  int64_t down, across;
};

// y of codes in fp32, the scales multiplied in beforehand.
void multiply_codes(const Bytes<E4m3>& weight, const Inputs& x, const Tensor& like,
                    const Epilogue& end) {
  const int64_t rows = x.codes.outputs, inputs = x.codes.inputs;
  const int64_t depth = linear::ceil_div(inputs, 64) * 64;
  Tensor widened = torch::stable::new_empty(like, {rows, depth}, ScalarType::Float);
  auto* wide = static_cast<float*>(widened.mutable_data_ptr());
  const auto widen_row = SLMPERF_PICK(widen_row<E4m3>);
  each_row(rows, depth, [&](int64_t row, int64_t stop) {
    for (; row < stop; row++) {
      widen_row(x.codes.codes + row * x.codes.stride, inputs, depth, x.scale + row * x.down,
                x.across == 0 ? depth : kBlock, wide + row * depth);
    }
  });
  linear::multiply_wide<E4m3, float, float>(weight, wide, rows, depth, end);
}

#if defined(__x86_64__)

// Sums of 128 inputs at a time, times what their blocks share.
struct BlockKernel {
  static constexpr int64_t kTiles = kBlock / avx512_tiles::kDepth;
  avx512_tiles::Kernels kernels;
  bool amx;
  const float *w_scale, *x_scale;       // (blocks, padded outputs), (blocks, padded rows)
  int64_t padded_outputs, padded_rows;  // 0: x has no scales of blocks

  void operator()(const avx512_tiles::Strips& operands, int64_t rights,
                  const avx512_tiles::Place& place, float* quad, bool add) const {
    // Tiles are at work on one block while the one before is scaled.
    alignas(64) float sums[2][avx512_tiles::kQuad];
    const auto scaled = [&](int64_t i) {
      const int64_t block = place.tile / kTiles + i;
      avx512_tiles::add_scaled(
          sums[i % 2], rights, w_scale + block * padded_outputs + place.row,
          padded_rows == 0 ? nullptr : x_scale + block * padded_rows + place.column, quad,
          add || i > 0);
    };
    int64_t i = 0;
    for (int64_t t = 0; t < operands.depth; t += kTiles, i++) {
      avx512_tiles::Strips part = operands;
      part.left += t * avx512_tiles::kTile;
      part.right += t * avx512_tiles::kTile;
      part.depth = std::min(kTiles, operands.depth - t);
      kernels(part, rights, place, sums[i % 2], false);
      if (i > 0) scaled(i - 1);
    }
    if (i > 0) scaled(i - 1);
  }
};

// y of codes on bf16 units.
void multiply_tiles(const Bytes<E4m3>& weight, const Inputs& x, const Tensor& like, Epilogue end) {
  const int64_t rows = x.codes.outputs, inputs = x.codes.inputs;
  const auto pack_x = [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
    avx512_tiles::brain_strip<false>(x.codes, row / kStrip, begin, stop, nullptr, words);
    for (int64_t t = begin; t < stop; t++, words += avx512_tiles::kTile)
      avx512_tiles::turn_in_place(words);
  };
  const auto pack = [&](int64_t strip, int64_t begin, int64_t stop, uint32_t* words) {
    avx512_tiles::brain_strip<false>(weight, strip, begin, stop, nullptr, words);
  };
  const bool x_blocks = x.across != 0, w_blocks = weight.columns < inputs || weight.rows == kBlock;
  if (!x_blocks) {
    end.x_scale = x.scale;
    end.x_step = x.down;
  }
  if (!x_blocks && !w_blocks) {
    std::vector<float> scales(linear::ceil_div(end.outputs, kStrip) * kStrip);
    for (int64_t n = 0; n < end.outputs; n++) {
      scales[n] = static_cast<const float*>(weight.scale)[n / weight.rows * weight.down];
    }
    end.w_scale = scales.data();
    return linear::multiply_brain(like, rows, inputs, avx512_tiles::bf16_kernels(), end, pack_x,
                                  pack);
  }
  const int64_t padded = linear::ceil_div(rows, 2 * avx512_tiles::kSide) * 2 * avx512_tiles::kSide;
  const int64_t blocks = linear::ceil_div(inputs, kBlock);
  std::vector<float> turned(x_blocks ? blocks * padded : 0);
  for (int64_t b = 0; x_blocks && b < blocks; b++) {
    for (int64_t r = 0; r < rows; r++) turned[b * padded + r] = x.scale[r * x.down + b];
  }
  const int64_t padded_outputs =
      linear::ceil_div(end.outputs, 2 * avx512_tiles::kSide) * 2 * avx512_tiles::kSide;
  std::vector<float> spread(blocks * padded_outputs);
  for (int64_t b = 0; b < blocks; b++) {
    const float* scales = static_cast<const float*>(weight.scale) + b * kBlock / weight.columns;
    float* to = spread.data() + b * padded_outputs;
    for (int64_t n = 0, stop; n < end.outputs; n = stop, scales += weight.down) {
      stop = std::min(end.outputs, n + weight.rows);
      std::fill(to + n, to + stop, *scales);
    }
  }
  const avx512_tiles::Kernels kernels = avx512_tiles::bf16_kernels();
  const BlockKernel kernel{kernels,       kernels.amx,    spread.data(),
                           turned.data(), padded_outputs, x_blocks ? padded : 0};
  linear::multiply_brain(like, rows, inputs, kernel, end, pack_x, pack);
}

#endif

Tensor linear_fp8(Tensor x, std::optional<Tensor> x_scale, Tensor codes, Tensor scale,
                  std::optional<Tensor> bias, std::optional<Tensor> residual,
                  std::optional<Tensor> starts, int64_t activations, ScalarType out_dtype) {
  Tensor inputs = linear::packed_rows(kOp, "x", x);
  linear::check_bytes(kOp, codes, scale, ScalarType::Float8_e4m3fn, x.size(1), kBlock);
  const int64_t dims = codes.dim(), outputs = codes.size(dims - 2);
  linear::Result result(kOp, x, outputs, dims == 3 ? codes.size(0) : -1, bias, residual, starts,
                        out_dtype);
  if (activations == Activations::none) {
    result.each_expert([&](int64_t e, int64_t first, int64_t rows, const Epilogue& end) {
      const auto weight = linear::bytes_of<E4m3>(codes, scale, kBlock, e);
      linear::multiply_weight_only(kOp, weight, scale, inputs, first, rows, end);
    });
    return result.y;
  }
  check_dtype(kOp, "scale", scale, ScalarType::Float);
  Tensor input_scale;
  if (x.scalar_type() == ScalarType::Float8_e4m3fn) {
    STD_TORCH_CHECK(x_scale.has_value(), kOp, ": found no x_scale, expected one of codes");
    input_scale = *x_scale;
  } else {
    std::optional<Tensor> given;
    if (x_scale) given = torch::stable::view(*x_scale, {1});
    std::tie(inputs, input_scale) =
        quantize_input(x, given, true, activations == Activations::group ? kBlock : 0);
  }
  check_dtype(kOp, "x_scale", input_scale, ScalarType::Float);
  input_scale = torch::stable::contiguous(input_scale);
  const int64_t blocks = activations == Activations::group ? x.size(1) / kBlock : 1;
  const bool one = activations == Activations::whole;
  STD_TORCH_CHECK(input_scale.numel() == (one ? 1 : x.size(0) * blocks), kOp, ": x_scale has ",
                  input_scale.numel(), " numbers, expected ", one ? 1 : x.size(0) * blocks);
  const auto* factors = static_cast<const float*>(input_scale.const_data_ptr());
  result.each_expert([&](int64_t e, int64_t first, int64_t rows, const Epilogue& end) {
    const auto weight = linear::bytes_of<E4m3>(codes, scale, kBlock, e);
    const Inputs rows_of_x{
        {static_cast<const E4m3*>(inputs.const_data_ptr()) + first * inputs.stride(0),
         inputs.stride(0), rows, inputs.size(1), nullptr, 1, 1, 0},
        factors + (one ? 0 : first * blocks),
        one ? 0 : blocks,
        activations == Activations::group ? 1 : 0};
#if defined(__x86_64__)
    if (bf16_unit() != Bf16Unit::none) return multiply_tiles(weight, rows_of_x, inputs, end);
#endif
    multiply_codes(weight, rows_of_x, inputs, end);
  });
  return result.y;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("linear_fp8.cpu", TORCH_BOX(&slmperf::linear_fp8));
}
