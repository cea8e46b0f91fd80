// What the products of `linear` share on CPU: the checks of slmperf/ops/linear/product.py's
// arguments, experts one after the other, work among threads. Included behind each_isa.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/each_row.h"
#include "cpu/linear_args.h"
#include "cpu/with_element.h"

namespace slmperf::linear {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Kind kind_of(const char* op, const char* argument, ScalarType type) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": ", argument, " is ", torch::headeronly::toString(type),
      ", expected Float, BFloat16 or Half");
  return type == ScalarType::Float      ? Kind::single
         : type == ScalarType::BFloat16 ? Kind::brain
                                        : Kind::half;
}

// x (M, K), any row stride; a matrix with gaps within rows is copied.
inline Tensor packed_rows(const char* op, const char* argument, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", argument, " has ", x.dim(), " dimensions, expected 2");
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

// `count` numbers of a floating tensor, `stride` apart, in fp32, 0 behind them to a whole strip.
inline std::vector<float> floats(const char* op, const char* argument, const Tensor& tensor,
                                 int64_t offset, int64_t stride, int64_t count) {
  std::vector<float> out(ceil_div(count, kStrip) * kStrip);
  with_element(op, argument, tensor, [&](auto element) {
    using T = decltype(element);
    SLMPERF_PICK(gather_floats<T>)
    (static_cast<const T*>(tensor.const_data_ptr()) + offset, stride, count, out.data());
  });
  return out;
}

// f(begin, end) for ranges of strips of a product, on one thread or more.
template <class F>
void each_strip(int64_t outputs, int64_t rows, int64_t depth, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 18;  // products of two numbers
  const int64_t each = std::max<int64_t>(1, rows * depth * kStrip);
  torch::stable::parallel_for(0, ceil_div(outputs, kStrip),
                              std::max<int64_t>(1, kWorthAThread / each), f);
}

// A call's y and what is added to it.
class Result {
 public:
  // experts: -1 where the weight is not stacked
  Result(const char* op, const Tensor& x, int64_t outputs, int64_t experts,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
         const std::optional<Tensor>& starts, ScalarType out_dtype)
      : y(torch::stable::new_empty(x, {x.size(0), outputs}, out_dtype)),
        op_(op),
        rows_(x.size(0)),
        outputs_(outputs),
        experts_(experts),
        bias_(bias) {
    out_ = kind_of(op, "out_dtype", out_dtype);
    if (bias && experts < 0) check_shape(op, "bias", *bias, {{"N", outputs}});
    if (bias && experts >= 0) {
      check_shape(op, "bias", *bias, {{"E", experts}, {"N", outputs}});
    }
    if (residual) {
      check_shape(op, "residual", *residual, {{"M", rows_}, {"N", outputs}});
      residual_ = packed_rows(op, "residual", *residual);
      residual_kind_ = kind_of(op, "residual", residual->scalar_type());
    }
    STD_TORCH_CHECK(starts.has_value() == (experts >= 0), op, ": starts: ",
                    experts < 0 ? "found some, expected a stacked weight with them"
                                : "found none, expected them for a stacked weight");
    if (!starts) {
      edges_ = {0, rows_};
      return;
    }
    check_tensor(op, "starts", *starts, ScalarType::Int, {{"E + 1", experts + 1}});
    const auto* edges = static_cast<const int32_t*>(starts->const_data_ptr());
    edges_.assign(edges, edges + experts + 1);
    STD_TORCH_CHECK(edges_.front() == 0 && edges_.back() == rows_ &&
                        std::is_sorted(edges_.begin(), edges_.end()),
                    op, ": starts do not go up from 0 to ", rows_);
  }

  // f(expert, first row, rows, epilogue) for every expert that has rows; the epilogue's are counted
  // from the first of them.
  template <class F>
  void each_expert(const F& f) {
    for (int64_t e = 0; e + 1 < static_cast<int64_t>(edges_.size()); e++) {
      const int64_t first = edges_[e], rows = edges_[e + 1] - first;
      if (rows == 0 || outputs_ == 0) continue;
      const int64_t size = out_ == Kind::single ? 4 : 2;
      Epilogue end{static_cast<char*>(y.mutable_data_ptr()) + first * outputs_ * size, out_,
                   outputs_};
      std::vector<float> bias;
      if (bias_) {
        const int64_t offset = experts_ < 0 ? 0 : e * bias_->stride(0);
        bias = floats(op_, "bias", *bias_, offset, bias_->stride(bias_->dim() - 1), outputs_);
        end.bias = bias.data();
      }
      if (residual_) {
        const int64_t element = residual_kind_ == Kind::single ? 4 : 2;
        end.residual = static_cast<const char*>(residual_->const_data_ptr()) +
                       first * residual_->stride(0) * element;
        end.residual_kind = residual_kind_;
        end.residual_stride = residual_->stride(0);
      }
      f(e, first, rows, end);
    }
  }

  Tensor y;

 private:
  const char* op_;
  int64_t rows_, outputs_, experts_;
  std::optional<Tensor> bias_, residual_;
  Kind out_, residual_kind_ = Kind::single;
  std::vector<int64_t> edges_;
};

}  // namespace slmperf::linear
