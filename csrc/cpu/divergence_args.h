// What divergence.cpp and kd_loss.cpp hand to the rows of divergence_rows.h, and what comes back.
#pragma once

#include <cstdint>

namespace slmperf::divergence {

// `none` is the softmax of the student alone.
enum class Kind {
  forward_kl,
  reverse_kl,
  jsd,
  skew_forward_kl,
  skew_reverse_kl,
  total_variation,
  none
};

// A kind as a type, for templates to choose by.
template <Kind k>
struct Of {
  static constexpr Kind kind = k;
};

// Which model weights the cross sum of the first walk; the other kinds walk a second time.
enum class Weights { nobody, teacher, student };
constexpr Weights weights(Kind kind) {
  return kind == Kind::forward_kl   ? Weights::teacher
         : kind == Kind::reverse_kl ? Weights::student
                                    : Weights::nobody;
}
constexpr bool walks_twice(Kind kind) {
  return weights(kind) == Weights::nobody && kind != Kind::none;
}

struct Settings {
  Kind kind;
  double weight;       // the teacher's in the mixture of the JSD and of the skewed kinds
  double temperature;  // > 0
};

// Kept per row by the forward for the backward, (T, 7) fp32; columns as in
// slmperf/ops/divergence.py.
struct Statistics {
  float student_max, student_log_sum, teacher_max, log_sum_gap, centre, centre_rest, plain_log_sum;
};

template <class T>
struct Logits {
  const T* student;
  const T* teacher;                        // null for Kind::none
  int64_t student_stride, teacher_stride;  // elements from row to row
  int64_t vocabulary;
};

// The class of every row among the vocabulary's columns; anything outside them is no label here.
struct Labels {
  const int64_t* label;  // may be null
  int64_t stride;

  int64_t of(int64_t row, int64_t vocabulary) const {
    const int64_t at = label ? label[row * stride] : -1;
    return at < vocabulary ? at : -1;
  }
};

// What a row's two gradients are multiplied by; null for none.
struct Scales {
  const float* divergence;
  const float* cross_entropy;
};

constexpr float kLowest = -3.4028234663852886e38f;

// What the first walk over a range of the vocabulary adds up; a column each in memory. x are the
// logits less their model's largest, and the weights exp(x / temperature). The range of no logits
// is what a new one holds.
struct Range {
  double student_max = kLowest, teacher_max = kLowest;
  double student = 0.0, teacher = 0.0;  // sums of the weights
  double gap = 0.0;                     // student - teacher, exact where they are close
  // sum w (x_a - x_b), a the model that weights: teacher for the forward KL, student for the
  // reverse
  double cross = 0.0;
  double plain = 0.0;               // sum exp(x) of the student, for a cross entropy, else 0
  double label = -__builtin_inf();  // the student's logit at the label, if that is in the range
};
constexpr int64_t kRange = sizeof(Range) / sizeof(double);

// What the second walk adds up: the value (of the JSD its teacher's half), what centres the
// gradient, and the two totals, which are 1 but for rounding.
struct Means {
  double value = 0.0, centre = 0.0, teacher = 0.0, student = 0.0;
};
constexpr int64_t kMeans = sizeof(Means) / sizeof(double);

}  // namespace slmperf::divergence
