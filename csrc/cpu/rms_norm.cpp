// rms_norm on CPU: (T, D) -> (T, D) and h, or codes and scales; backward (T, D), ... -> (T, D),
// (D,). fp32, bf16, fp16. A row is made by one thread, and the weight's gradient is added up over
// ranges of rows that do not depend on the threads: neither does any bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/rounded_output.h"
#include "cpu/with_element.h"

namespace slmperf::norm {

template <class T>
struct Rows {
  const T *x, *weight, *residual, *h;  // residual: nullptr for none; h: as the backward reads it
  int64_t x_row, residual_row, h_row;  // elements from row to row
  int64_t columns;
  float eps, offset;
};

template <class T>
struct Gradients {
  const T *of_output, *of_h;  // of_h: nullptr for none
  int64_t output_row, h_row;
  const float* inverse;
  T* to_h;
};

}  // namespace slmperf::norm

#define SLMPERF_ROWS "cpu/rms_norm_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "rms_norm";
constexpr int64_t kParts = 32;      // sums of the weight's gradient beside each other, at most
constexpr int64_t kLeastRows = 16;  // of one of them

// (rows, columns) of x's dtype without gaps in a row.
void check_rows(const char* argument, const Tensor& tensor, const Tensor& x) {
  check_shape(kOp, argument, tensor, {{"T", x.size(0)}, {"D", x.size(1)}});
  check_dtype(kOp, argument, tensor, x.scalar_type());
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1 || tensor.size(0) == 0, kOp, ": ",
                  argument, " has gaps between the numbers of a row, expected none");
}

void check_inputs(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x has ", x.dim(), " dimensions, expected (T, D)");
  check_rows("x", x, x);
  check_tensor(kOp, "weight", weight, x.scalar_type(), {{"D", x.size(1)}});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight,
                                                   std::optional<Tensor> residual, double eps,
                                                   double offset, int64_t codes, int64_t group,
                                                   std::optional<Tensor> static_scale) {
  check_inputs(x, weight);
  if (residual) check_rows("residual", *residual, x);
  const int64_t rows = x.size(0), columns = x.size(1);
  Output output = new_output(kOp, x, rows, columns, codes, group, static_scale);
  Tensor h = torch::stable::new_empty(x, {residual ? rows : 0, columns});
  Tensor inverse = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  auto* inverses = static_cast<float*>(inverse.mutable_data_ptr());
  with_element(kOp, "x", x, [&](auto element) {
    using T = decltype(element);
    const norm::Rows<T> given{data<T>(x),
                              data<T>(weight),
                              residual ? data<T>(*residual) : nullptr,
                              nullptr,
                              x.stride(0),
                              residual ? residual->stride(0) : 0,
                              0,
                              columns,
                              static_cast<float>(eps),
                              static_cast<float>(offset)};
    auto* to_h = static_cast<T*>(h.mutable_data_ptr());
    auto* to = static_cast<char*>(output.result.mutable_data_ptr());
    const auto norm_row = SLMPERF_PICK(norm_row<T>);
    const auto encode_row = SLMPERF_PICK(encode_row<T>);
    each_row(rows, columns, [&](int64_t begin, int64_t end) {
      std::vector<T> made(output.rounded ? columns : 0);
      for (int64_t row = begin; row < end; row++) {
        T* result = output.rounded ? made.data() : reinterpret_cast<T*>(to) + row * columns;
        inverses[row] = norm_row(given, row, to_h + row * columns, result);
        if (output.rounded)
          encode_row(result, columns, output.group, output.static_scale, output.fp8,
                     to + row * columns, output.scales() + row * output.groups);
      }
    });
  });
  return {output.result, output.scale, h, inverse};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> grad_h, Tensor h,
                                    Tensor weight, Tensor inverse, double offset) {
  check_inputs(h, weight);
  const int64_t rows = h.size(0), columns = h.size(1);
  check_tensor(kOp, "inverse", inverse, ScalarType::Float, {{"T", rows}});
  check_rows("grad", grad, h);
  if (grad_h) check_rows("grad_h", *grad_h, h);
  Tensor of_h = torch::stable::new_empty(h, {rows, columns});
  Tensor of_weight = torch::stable::new_empty(h, {columns});
  const int64_t part = std::max(kLeastRows, (rows + kParts - 1) / kParts);
  const int64_t parts = (rows + part - 1) / part;
  std::vector<float> sums(parts * columns, 0.0f);
  with_element(kOp, "x", h, [&](auto element) {
    using T = decltype(element);
    const norm::Rows<T> given{
        nullptr, data<T>(weight), nullptr, data<T>(h), 0,
        0,       h.stride(0),     columns, 0.0f,       static_cast<float>(offset)};
    const norm::Gradients<T> gradients{
        data<T>(grad),        grad_h ? data<T>(*grad_h) : nullptr,
        grad.stride(0),       grad_h ? grad_h->stride(0) : 0,
        data<float>(inverse), static_cast<T*>(of_h.mutable_data_ptr())};
    const auto gradient_rows = SLMPERF_PICK(gradient_rows<T>);
    each_row(parts, part * columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        gradient_rows(given, gradients, i * part, std::min(rows, (i + 1) * part),
                      sums.data() + i * columns);
    });
    SLMPERF_PICK(add_parts<T>)(sums.data(), parts, columns,
                               static_cast<T*>(of_weight.mutable_data_ptr()));
  });
  return {of_h, of_weight};
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("rms_norm.cpu", TORCH_BOX(&slmperf::forward));
  m.impl("rms_norm_backward.cpu", TORCH_BOX(&slmperf::backward));
}
