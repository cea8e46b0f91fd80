// divergence on CPU: one row per task, so no result depends on the number of threads.
// (T, V), (T, V) -> (T,) and (T, 6); backward (T,), ... -> (T, V). fp32, bf16, fp16.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "check.h"
#include "cpu/divergence_args.h"

#define SLMPERF_ROWS "cpu/divergence_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using divergence::Kind;
using divergence::Logits;
using divergence::Settings;
using divergence::Statistics;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "divergence";
constexpr int64_t kStatistics = sizeof(Statistics) / sizeof(float);
constexpr int64_t kGrain = 1 << 15;  // logits that are worth a thread of their own

Settings settings(const std::string& kind, double beta, double temperature) {
  STD_TORCH_CHECK(kind == "forward_kl" || kind == "reverse_kl" || kind == "jsd", kOp, ": kind is ",
                  kind, ", expected forward_kl, reverse_kl or jsd");
  const Kind code = kind == "forward_kl"   ? Kind::forward_kl
                    : kind == "reverse_kl" ? Kind::reverse_kl
                                           : Kind::jsd;
  return {code, beta, temperature};
}

// Any row stride is read as it is; a vocabulary with gaps is copied first.
Tensor packed_rows(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

template <class T>
Logits<T> view(const Tensor& student, const Tensor& teacher) {
  return {static_cast<const T*>(student.const_data_ptr()),
          static_cast<const T*>(teacher.const_data_ptr()), student.stride(0), teacher.stride(0),
          student.size(1)};
}

template <class F>
void each_row(const Tensor& student, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, student.size(1)));
  torch::stable::parallel_for(0, student.size(0), grain, f);
}

// Calls f with a value of the element type.
template <class F>
void with_element(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, kOp, ": student is ",
                      torch::headeronly::toString(logits.scalar_type()),
                      ", expected Float, BFloat16 or Half");
  }
}

void check_logits(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 2, kOp, ": student has ", student.dim(),
                  " dimensions, expected (T, V)");
  check_shape(kOp, "teacher", teacher, {{"T", student.size(0)}, {"V", student.size(1)}});
  check_dtype(kOp, "teacher", teacher, student.scalar_type());
}

std::tuple<Tensor, Tensor> forward(Tensor student, Tensor teacher, std::string kind, double beta,
                                   double temperature) {
  check_logits(student, teacher);
  const Settings chosen = settings(kind, beta, temperature);
  const int64_t rows = student.size(0);
  Tensor value = torch::stable::new_empty(student, {rows}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(student, {rows, kStatistics}, ScalarType::Float);
  const Tensor student_rows = packed_rows(student), teacher_rows = packed_rows(teacher);
  auto* values = static_cast<float*>(value.mutable_data_ptr());
  auto* statistics = static_cast<Statistics*>(kept.mutable_data_ptr());
  with_element(student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student_rows, teacher_rows);
    const auto run = SLMPERF_PICK(forward_rows<T>);
    each_row(student, [&](int64_t begin, int64_t end) {
      run(logits, chosen, values, statistics, begin, end);
    });
  });
  return {value, kept};
}

Tensor backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, std::string kind,
                double beta, double temperature) {
  check_logits(student, teacher);
  const Settings chosen = settings(kind, beta, temperature);
  const int64_t rows = student.size(0), vocabulary = student.size(1);
  check_shape(kOp, "grad", grad, {{"T", rows}});
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_shape(kOp, "statistics", statistics, {{"T", rows}, {"6", kStatistics}});
  check_dtype(kOp, "statistics", statistics, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(student, {rows, vocabulary});
  const Tensor student_rows = packed_rows(student), teacher_rows = packed_rows(teacher);
  const Tensor packed = torch::stable::contiguous(statistics);
  const auto* upstream = static_cast<const float*>(grad.const_data_ptr());
  const auto* kept = static_cast<const Statistics*>(packed.const_data_ptr());
  with_element(student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student_rows, teacher_rows);
    auto* out = static_cast<T*>(gradient.mutable_data_ptr());
    const auto run = SLMPERF_PICK(backward_rows<T>);
    each_row(student, [&](int64_t begin, int64_t end) {
      run(logits, chosen, upstream, grad.stride(0), kept, out, begin, end);
    });
  });
  return gradient;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("divergence.cpu", TORCH_BOX(&slmperf::forward));
  m.impl("divergence_backward.cpu", TORCH_BOX(&slmperf::backward));
}
