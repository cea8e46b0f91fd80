// Products of bf16 matrices with fp32 results on the processor's bf16 units (AMX or AVX512-BF16).
// torch.mm rounds such a product to bf16 on CPU, which logits and a summed gradient cannot bear.
//
// The vocabulary is cut into blocks of 128 entries and every result is made within one block, in
// one order: no bit depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cpu/half_products_tiles.h"
#include "cpu/matrix_unit.h"
#include "cpu/tile_products.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// () -> int: 0 none, 1 AVX512-BF16, 2 AMX. The two products refuse to run where this is 0.
int64_t half_products() { return static_cast<int64_t>(bf16_unit()); }

#if defined(__x86_64__)

using avx512_tiles::Bias;
using avx512_tiles::ceil_div;
using avx512_tiles::Halves;
using avx512_tiles::kDepth;
using avx512_tiles::Matrix;

// 256 KiB for a block of the vocabulary, and for its sums.
constexpr avx512_tiles::Blocking kBlocking{128, 32, 32};

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
  STD_TORCH_CHECK(bf16_unit() != Bf16Unit::none, op,
                  ": slmperf::half_products() is 0 here, expected a processor "
                  "with bf16 units");
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
  const Tensor packed =
      avx512_tiles::pack_right(hidden, tokens, ceil_div(depth, kDepth),
                               [&](int64_t row, int64_t begin, int64_t end, uint32_t* words) {
                                 avx512_tiles::pack_rows<true>(right, row, begin, end, words);
                               });
  avx512_tiles::multiply(
      vocabulary, tokens, ceil_div(depth, kDepth),
      static_cast<const uint32_t*>(packed.const_data_ptr()), false, kBlocking,
      avx512_tiles::bf16_kernels(),
      [&](int64_t row, int64_t begin, int64_t end, uint32_t* words) {
        avx512_tiles::pack_rows<false>(left, row, begin, end, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_tiles::write_logits(quad, strips, row, column, offset, static_cast<float>(scale),
                                   to);
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
  const Tensor packed = avx512_tiles::pack_right(
      hidden, width, ceil_div(tokens, kDepth),
      [&](int64_t column, int64_t begin, int64_t end, uint32_t* words) {
        avx512_tiles::pack_columns<false>(right, column, begin, end, words);
      });
  avx512_tiles::multiply(
      vocabulary, width, ceil_div(tokens, kDepth),
      static_cast<const uint32_t*>(packed.const_data_ptr()), true, kBlocking,
      avx512_tiles::bf16_kernels(),
      [&](int64_t column, int64_t begin, int64_t end, uint32_t* words) {
        avx512_tiles::pack_columns<true>(left, column, begin, end, words);
      },
      [&](const float* quad, int64_t strips, int64_t row, int64_t column) {
        avx512_tiles::write_gradient(quad, strips, row, column, accumulate, to);
      });
}

#endif

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_FRAGMENT(slmperf, m) {
  m.def("half_products() -> int");
  m.def(
      "bf16_logits.cpu(Tensor hidden, Tensor weight, Tensor? bias, float "
      "scale, Tensor(a!) out) "
      "-> ()");
  m.def(
      "bf16_weight_gradient.cpu(Tensor gradient, Tensor hidden, Tensor(a!) "
      "out, "
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
