// Logits as they come into an operator: kinds by name, checks, views by element type, rows by
// thread. For divergence.cpp and kd_loss.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/divergence_args.h"
#include "cpu/each_row.h"
#include "cpu/with_element.h"

namespace slmperf {

using divergence::Kind;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kinds with a teacher, as code_of in slmperf/ops/divergence.py calls them.
inline Kind kind_of(const char* op, const std::string& name) {
  if (name == "forward_kl") return Kind::forward_kl;
  if (name == "reverse_kl") return Kind::reverse_kl;
  if (name == "jsd") return Kind::jsd;
  if (name == "skew_forward_kl") return Kind::skew_forward_kl;
  if (name == "skew_reverse_kl") return Kind::skew_reverse_kl;
  STD_TORCH_CHECK(name == "total_variation", op, ": kind is ", name,
                  ", expected forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl or "
                  "total_variation");
  return Kind::total_variation;
}

inline void check_student(const char* op, const Tensor& student) {
  STD_TORCH_CHECK(student.dim() == 2, op, ": student has ", student.dim(),
                  " dimensions, expected (T, V)");
}

inline void check_teacher(const char* op, const Tensor& student, const Tensor& teacher) {
  check_shape(op, "teacher", teacher, {{"T", student.size(0)}, {"V", student.size(1)}});
  check_dtype(op, "teacher", teacher, student.scalar_type());
}

template <class T>
divergence::Logits<T> view(const Tensor& student, const Tensor* teacher) {
  return {static_cast<const T*>(student.const_data_ptr()),
          teacher ? static_cast<const T*>(teacher->const_data_ptr()) : nullptr, student.stride(0),
          teacher ? teacher->stride(0) : 0, student.size(1)};
}

}  // namespace slmperf
