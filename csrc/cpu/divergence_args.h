// What divergence.cpp hands to the rows of divergence_rows.h.
#pragma once

#include <cstdint>

namespace slmperf::divergence {

enum class Kind { forward_kl, reverse_kl, jsd };

struct Settings {
  Kind kind;
  double beta;         // of the JSD alone
  double temperature;  // > 0
};

// Kept per row by the forward for the backward, (T, 6) fp32; columns as in
// slmperf/ops/divergence.py.
struct Statistics {
  float student_max, student_log_sum, teacher_max, log_sum_gap, centre, centre_rest;
};

template <class T>
struct Logits {
  const T* student;
  const T* teacher;
  int64_t student_stride, teacher_stride;  // elements from row to row
  int64_t vocabulary;
};

}  // namespace slmperf::divergence
