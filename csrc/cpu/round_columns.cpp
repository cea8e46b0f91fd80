// round_columns on CPU. Outputs are computed on their own, in one order: no bit depends on the
// number of threads or on which outputs stand beside each other.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace slmperf::rounding {

enum class Grid : int64_t { none, integer, e4m3 };  // GRIDS in slmperf/ops/round_columns.py

struct Block {
  float* current;
  const float *gradient, *coefficients, *scale, *zero_point;  // zero_point: nullptr for none
  const int64_t* group;
  const bool* keep;  // nullptr for all
  int64_t columns, outputs;
  float lowest, highest;
  Grid grid;
};

}  // namespace slmperf::rounding

#define SLMPERF_ROWS "cpu/round_columns_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "round_columns";
constexpr int64_t kTask = 64;   // outputs of a task, a whole number of tiles
constexpr int64_t kLanes = 64;  // of the widest tile
constexpr int64_t kGrain = 2;   // tasks that are worth a thread

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

void round_columns(Tensor current, Tensor gradient, Tensor coefficients, Tensor scale,
                   std::optional<Tensor> zero_point, Tensor group, std::optional<Tensor> keep,
                   double lowest, double highest, int64_t grid) {
  const int64_t columns = group.size(0), outputs = current.dim() == 2 ? current.size(1) : 0;
  const int64_t groups = scale.dim() == 2 ? scale.size(0) : 0;
  const std::initializer_list<Dim> whole = {{"b", columns}, {"p", outputs}};
  check_tensor(kOp, "current", current, ScalarType::Float, whole);
  check_tensor(kOp, "gradient", gradient, ScalarType::Float, whole);
  check_tensor(kOp, "coefficients", coefficients, ScalarType::Float,
               {{"b", columns}, {"b", columns}});
  check_tensor(kOp, "scale", scale, ScalarType::Float, {{"g", groups}, {"p", outputs}});
  check_tensor(kOp, "group", group, ScalarType::Long, {{"b", columns}});
  if (zero_point.has_value())
    check_tensor(kOp, "zero_point", *zero_point, ScalarType::Float,
                 {{"g", groups}, {"p", outputs}});
  if (keep.has_value()) check_tensor(kOp, "keep", *keep, ScalarType::Bool, whole);
  STD_TORCH_CHECK(0 <= grid && grid <= 2, kOp, ": grid is ", grid, ", expected 0, 1 or 2");
  const auto* group_of = static_cast<const int64_t*>(group.const_data_ptr());
  STD_TORCH_CHECK(
      std::all_of(group_of, group_of + columns, [&](int64_t g) { return 0 <= g && g < groups; }),
      kOp, ": group names more groups than the ", groups, " of scale");

  const rounding::Block block{
      static_cast<float*>(current.mutable_data_ptr()),
      floats(gradient),
      floats(coefficients),
      floats(scale),
      zero_point.has_value() ? floats(*zero_point) : nullptr,
      group_of,
      keep.has_value() ? static_cast<const bool*>(keep->const_data_ptr()) : nullptr,
      columns,
      outputs,
      static_cast<float>(lowest),
      static_cast<float>(highest),
      static_cast<rounding::Grid>(grid),
  };
  const auto round_outputs = SLMPERF_PICK(round_outputs);
  torch::stable::parallel_for(
      0, (outputs + kTask - 1) / kTask, kGrain, [&](int64_t begin, int64_t end) {
        std::vector<float> steps(columns * kLanes);
        round_outputs(block, begin * kTask, std::min(outputs, end * kTask), steps.data());
      });
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("round_columns.cpu", TORCH_BOX(&slmperf::round_columns));
}
