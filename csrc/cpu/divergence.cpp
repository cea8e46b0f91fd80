// divergence on CPU: one row per task, so no result depends on the number of threads.
// (T, V), (T, V) -> (T,) and (T, 7); backward (T,), ... -> (T, V). fp32, bf16, fp16.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/divergence_join.h"
#include "cpu/logits.h"

#define SLMPERF_ROWS "cpu/divergence_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using divergence::Logits;
using divergence::Settings;
using divergence::Statistics;

constexpr const char* kOp = "divergence";
constexpr int64_t kStatistics = sizeof(Statistics) / sizeof(float);

// Any row stride is read as it is; a vocabulary with gaps is copied first.
Tensor packed_rows(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
}

std::tuple<Tensor, Tensor> forward(Tensor student, Tensor teacher, std::string kind, double weight,
                                   double temperature) {
  check_student(kOp, student);
  check_teacher(kOp, student, teacher);
  const Settings chosen{kind_of(kOp, kind), weight, temperature};
  const int64_t rows = student.size(0);
  Tensor value = torch::stable::new_empty(student, {rows}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(student, {rows, kStatistics}, ScalarType::Float);
  const Tensor student_rows = packed_rows(student), teacher_rows = packed_rows(teacher);
  auto* values = static_cast<float*>(value.mutable_data_ptr());
  auto* statistics = static_cast<Statistics*>(kept.mutable_data_ptr());
  with_element(kOp, "student", student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student_rows, &teacher_rows);
    const auto run = SLMPERF_PICK(forward_rows<T>);
    each_row(student.size(0), student.size(1), [&](int64_t begin, int64_t end) {
      run(logits, chosen, values, statistics, begin, end);
    });
  });
  return {value, kept};
}

Tensor backward(Tensor grad, Tensor student, Tensor teacher, Tensor statistics, std::string kind,
                double weight, double temperature) {
  check_student(kOp, student);
  check_teacher(kOp, student, teacher);
  const Settings chosen{kind_of(kOp, kind), weight, temperature};
  const int64_t rows = student.size(0), vocabulary = student.size(1);
  check_shape(kOp, "grad", grad, {{"T", rows}});
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_shape(kOp, "statistics", statistics, {{"T", rows}, {"7", kStatistics}});
  check_dtype(kOp, "statistics", statistics, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(student, {rows, vocabulary});
  const Tensor student_rows = packed_rows(student), teacher_rows = packed_rows(teacher);
  const Tensor packed = torch::stable::contiguous(statistics);
  const auto* upstream = static_cast<const float*>(grad.const_data_ptr());
  const auto* kept = static_cast<const Statistics*>(packed.const_data_ptr());
  with_element(kOp, "student", student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student_rows, &teacher_rows);
    auto* out = static_cast<T*>(gradient.mutable_data_ptr());
    const auto run = SLMPERF_PICK(backward_rows<T>);
    each_row(student.size(0), student.size(1), [&](int64_t begin, int64_t end) {
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
