// quantize_input on CPU: (M, K) fp32, bf16 or fp16 -> codes (M, K) int8 or fp8, scales in fp32. Row
// by row: no bit depends on the number of threads.

#include "cpu/quantize_input.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "cpu/with_element.h"

#define SLMPERF_ROWS "cpu/quantize_input_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "quantize_input";
constexpr int64_t kWorthAThread = 1 << 15;  // numbers

}  // namespace

std::tuple<Tensor, Tensor> quantize_input(Tensor x, std::optional<Tensor> static_scale, bool fp8,
                                          int64_t group) {
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x has ", x.dim(), " dimensions, expected (M, K)");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(group >= 0 && (group == 0 || columns % group == 0), kOp, ": groups of ", group,
                  " do not divide ", columns, " inputs");
  if (x.stride(1) != 1 && columns > 1) x = torch::stable::contiguous(x);
  const int64_t numbers = group == 0 ? columns : group;
  const int64_t groups = columns == 0 ? 1 : columns / numbers;
  Tensor codes = torch::stable::new_empty(x, {rows, columns},
                                          fp8 ? ScalarType::Float8_e4m3fn : ScalarType::Char);
  Tensor scale;
  const float* given = nullptr;
  if (static_scale) {
    check_tensor(kOp, "static_scale", *static_scale, ScalarType::Float, {{"1", 1}});
    scale = torch::stable::clone(*static_scale);
    given = static_cast<const float*>(static_scale->const_data_ptr());
  } else {
    scale = torch::stable::new_empty(x, {rows, groups}, ScalarType::Float);
  }
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  auto* to = static_cast<int8_t*>(codes.mutable_data_ptr());
  with_element(kOp, "x", x, [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto encode_row = SLMPERF_PICK(encode_row<T>);
    torch::stable::parallel_for(0, rows,
                                std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, columns)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t r = begin; r < end; r++) {
                                    encode_row(from + r * x.stride(0), columns, group, given, fp8,
                                               to + r * columns, scales + r * groups);
                                  }
                                });
  });
  return {codes, scale};
}

}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("quantize_input.cpu", TORCH_BOX(&slmperf::quantize_input));
}
