// linear_int8 on CPU. Formulas: slmperf/ops/linear/int8.py.
//
// Rounded inputs: AMX's int8 tiles, AVX512-VNNI's dot products, or those of 16 bits.

#include <torch/csrc/stable/library.h>

#include "cpu/linear_args.h"
#include "cpu/quantize_input.h"

#define SLMPERF_ROWS "cpu/linear_rows.h"
#include "cpu/each_isa.h"
#include "cpu/linear_bytes.h"
#include "cpu/linear_int8_dots.h"

namespace slmperf {
namespace {

using linear::Bytes;
using linear::Epilogue;
using linear::kStrip;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "linear_int8";
constexpr int64_t kFewRows = 4;  // for which weights are read as they lie, not packed

#if defined(__x86_64__)

// AMX's products of codes that are read as they lie, but for the weight's edges, which are packed.
struct PlainKernel {
  static constexpr bool amx = true;
  static constexpr int64_t kCodes = 64;  // of a tile's row
  const Bytes<int8_t>& weight;
  int64_t ahead;  // outputs of a task

  bool inside(int64_t row, int64_t tile_end) const {
    return row / (2 * kStrip) * (2 * kStrip) + 2 * kStrip <= weight.outputs &&
           tile_end * kCodes <= weight.inputs;
  }

  // Fetches codes of `depth` tiles of a pair of strips into the second-level cache: rows that are
  // far apart are more streams than a processor follows by itself.
  void fetch(int64_t row, int64_t tile, int64_t depth) const {
    if (!inside(row, tile + depth)) return;
    for (int64_t r = 0; r < 2 * kStrip; r++) {
      const int8_t* codes = weight.codes + (row + r) * weight.stride + tile * kCodes;
      for (int64_t t = 0; t < depth; t++) __builtin_prefetch(codes + t * kCodes, 0, 2);
    }
  }

  void operator()(avx512_tiles::Strips operands, int64_t rights, const avx512_tiles::Place& place,
                  float* quad, bool add) const {
    const int64_t end = place.tile + operands.depth;
    if (inside(place.row, end)) {
      const int8_t* codes = weight.codes + place.row * weight.stride + place.tile * kCodes;
      operands.left = reinterpret_cast<const uint32_t*>(codes);
      operands.left_step = kStrip * weight.stride / 4;
      operands.left_tile = kCodes;
      operands.left_row = weight.stride;
    }
    if (place.column == 0) {
      const bool more = end * kCodes < weight.inputs;
      fetch(more ? place.row : place.row + ahead, more ? end : 0, operands.depth);
    }
    (rights == 2 ? avx512_tiles::multiply_amx<2, true>
                 : avx512_tiles::multiply_amx<1, true>)(operands, quad, add);
  }
};

void multiply_tiles(const Bytes<int8_t>& weight, const Bytes<int8_t>& x, const Tensor& like,
                    const Epilogue& end) {
  const avx512_tiles::Matrix<const int8_t> left{weight.codes, weight.stride, weight.outputs,
                                                weight.inputs};
  const avx512_tiles::Matrix<const int8_t> turned{x.codes, x.stride, x.outputs, x.inputs};
  const int64_t depth = linear::ceil_div(x.inputs, 64);
  const Tensor right = avx512_tiles::pack_right(
      like, x.outputs, depth, [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
        avx512_tiles::pack_rows<true>(turned, row, begin, stop, words);
      });
  const auto write = avx512::writer(end);
  const avx512_tiles::Blocking cut = avx512_tiles::blocking_of(end.outputs, x.outputs);
  const PlainKernel kernel{weight, cut.rows};
  avx512_tiles::multiply(
      weight.outputs, x.outputs, depth, static_cast<const uint32_t*>(right.const_data_ptr()), false,
      cut, kernel,
      [&](int64_t row, int64_t begin, int64_t stop, uint32_t* words) {
        if (!kernel.inside(row, stop))
          avx512_tiles::pack_rows<false>(left, row, begin, stop, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_tiles::write_quad<true>(quad, strips, row, column, x.outputs, end, write);
      });
}

#endif

// y of codes x, whatever unit there is.
void multiply_codes(const Bytes<int8_t>& weight, const Bytes<int8_t>& x, const Tensor& like,
                    const Epilogue& end) {
  auto run = SLMPERF_PICK(multiply_wide_codes);
  std::vector<int32_t> sums(x.outputs);
#if defined(__x86_64__)
  if (int8_unit() == Int8Unit::amx && x.outputs > kFewRows)
    return multiply_tiles(weight, x, like, end);
  if (int8_unit() != Int8Unit::none) {
    for (int64_t r = 0; r < x.outputs; r++) {
      sums[r] = avx512_tiles::sum_of_codes(x.codes + r * x.stride, x.inputs);
    }
    run = &avx512::multiply_codes<avx512_tiles::VnniDots>;
  }
#endif
  linear::each_strip(end.outputs, x.outputs, x.inputs, [&](int64_t begin, int64_t stop) {
    std::vector<float> scratch(kStrip * x.outputs);
    run(weight, x, sums.data(), end, begin, stop, scratch.data());
  });
}

Tensor linear_int8(Tensor x, std::optional<Tensor> x_scale, Tensor codes, Tensor scale,
                   std::optional<Tensor> bias, std::optional<Tensor> residual,
                   std::optional<Tensor> starts, int64_t activations, ScalarType out_dtype) {
  Tensor inputs = linear::packed_rows(kOp, "x", x);
  linear::check_bytes(kOp, codes, scale, ScalarType::Char, x.size(1), 0);
  const int64_t dims = codes.dim(), outputs = codes.size(dims - 2);
  linear::Result result(kOp, x, outputs, dims == 3 ? codes.size(0) : -1, bias, residual, starts,
                        out_dtype);
  if (activations == 0) {
    result.each_expert([&](int64_t e, int64_t first, int64_t rows, const Epilogue& end) {
      const auto weight = linear::bytes_of<int8_t>(codes, scale, 0, e);
      linear::multiply_weight_only(kOp, weight, scale, inputs, first, rows, end);
    });
    return result.y;
  }
  Tensor input_scale;
  if (x.scalar_type() == ScalarType::Char) {
    STD_TORCH_CHECK(x_scale.has_value(), kOp, ": found no x_scale, expected one of codes");
    input_scale = *x_scale;
  } else {
    std::optional<Tensor> given;
    if (x_scale) given = torch::stable::view(*x_scale, {1});
    std::tie(inputs, input_scale) = quantize_input(x, given, false, 0);
  }
  check_dtype(kOp, "x_scale", input_scale, ScalarType::Float);
  const bool one = input_scale.numel() == 1;
  STD_TORCH_CHECK(one || input_scale.numel() == x.size(0), kOp, ": x_scale has ",
                  input_scale.numel(), " numbers, expected 1 or ", x.size(0));
  const std::vector<float> factors = linear::floats(
      kOp, "x_scale", input_scale, 0, one ? 1 : input_scale.stride(0), input_scale.numel());
  result.each_expert([&](int64_t e, int64_t first, int64_t rows, Epilogue end) {
    const auto weight = linear::bytes_of<int8_t>(codes, scale, 0, e);
    const bool whole = scale.size(dims - 2) == 1;
    const std::vector<float> w_scale =
        linear::floats(kOp, "scale", scale, dims == 3 ? e * scale.stride(0) : 0,
                       whole ? 0 : scale.stride(dims - 2), outputs);
    end.x_scale = factors.data() + (one ? 0 : first);
    end.x_step = one ? 0 : 1;
    end.w_scale = w_scale.data();
    const Bytes<int8_t> rows_of_x{
        static_cast<const int8_t*>(inputs.const_data_ptr()) + first * inputs.stride(0),
        inputs.stride(0),
        rows,
        inputs.size(1),
        nullptr,
        1,
        1,
        0};
    multiply_codes(weight, rows_of_x, inputs, end);
  });
  return result.y;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("linear_int8.cpu", TORCH_BOX(&slmperf::linear_int8));
}
