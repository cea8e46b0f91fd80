// The optional rounding of rms_norm's and silu_mul's results: the three arguments of
// slmperf/ops/linear/rounding.py, and the memory that they ask for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "check.h"
#include "cpu/each_row.h"

namespace slmperf {

// Where results go: numbers of x's dtype, or codes and their scales.
struct Output {
  torch::stable::Tensor result, scale;
  bool rounded, fp8;
  int64_t group, groups;      // columns that share a scale, 0: all; scales of a row
  const float* static_scale;  // nullptr: scales are found

  float* scales() { return static_cast<float*>(scale.mutable_data_ptr()); }
};

inline Output new_output(const char* op, const torch::stable::Tensor& x, int64_t rows,
                         int64_t columns, int64_t codes, int64_t group,
                         const std::optional<torch::stable::Tensor>& static_scale) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(0 <= codes && codes <= 2, op, ": codes is ", codes, ", expected 0, 1 or 2");
  STD_TORCH_CHECK(group >= 0 && (group == 0 || columns % group == 0), op, ": groups of ", group,
                  " do not divide ", columns, " columns");
  if (static_scale) check_tensor(op, "static_scale", *static_scale, ScalarType::Float, {{"1", 1}});
  const ScalarType type = codes == 0   ? x.scalar_type()
                          : codes == 1 ? ScalarType::Char
                                       : ScalarType::Float8_e4m3fn;
  const int64_t groups = group == 0 ? 1 : columns / group;
  const bool found = codes != 0 && !static_scale;
  return {torch::stable::new_empty(x, {rows, columns}, type),
          found ? torch::stable::new_empty(x, {rows, groups}, ScalarType::Float)
                : torch::stable::new_empty(x, {0}, ScalarType::Float),
          codes != 0,
          codes == 2,
          group,
          groups,
          static_scale ? static_cast<const float*>(static_scale->const_data_ptr()) : nullptr};
}

}  // namespace slmperf
