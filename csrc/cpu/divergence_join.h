// From the sums over ranges of the vocabulary to a row's value and statistics, in fp64 and in the
// order of the ranges. Formulas: slmperf/ops/divergence.py.
#pragma once

#include <cmath>

#include "cpu/divergence_args.h"

namespace slmperf::divergence {

// Moves a range to higher maxima: its weights shrink, and its x_a - x_b all move by one shift.
inline void rise(Range& range, double student_max, double teacher_max, Weights who,
                 double inverse_temperature) {
  if (range.student_max == student_max && range.teacher_max == teacher_max) return;
  const double student_shift = range.student_max - student_max;
  const double teacher_shift = range.teacher_max - teacher_max;
  const double student_factor = std::exp(student_shift * inverse_temperature);
  const double teacher_factor = std::exp(teacher_shift * inverse_temperature);
  if (who != Weights::nobody) {
    const bool teacher_weights = who == Weights::teacher;
    const double factor = teacher_weights ? teacher_factor : student_factor;
    const double shift =
        teacher_weights ? teacher_shift - student_shift : student_shift - teacher_shift;
    const double weights = teacher_weights ? range.teacher : range.student;
    // A factor of 0 leaves nothing, of an infinite sum either: a weight that underflows is 0.
    range.cross = factor == 0.0 ? 0.0 : factor * (range.cross + shift * weights);
  }
  range.gap = student_factor * range.gap + (student_factor - teacher_factor) * range.teacher;
  range.student *= student_factor;
  range.teacher *= teacher_factor;
  if (range.plain != 0.0) range.plain *= std::exp(student_shift);
  range.student_max = student_max;
  range.teacher_max = teacher_max;
}

// The ranges of one row as one; their columns are `count` apart.
inline Range join(const double* ranges, int64_t count, Weights who, double inverse_temperature) {
  const auto range = [&](int64_t i) {
    const double* x = ranges + i;
    return Range{x[0],         x[count],     x[2 * count], x[3 * count],
                 x[4 * count], x[5 * count], x[6 * count], x[7 * count]};
  };
  Range total = range(0);
  for (int64_t i = 1; i < count; i++) {
    Range next = range(i);
    const double student_max = std::fmax(total.student_max, next.student_max);
    const double teacher_max = std::fmax(total.teacher_max, next.teacher_max);
    rise(total, student_max, teacher_max, who, inverse_temperature);
    rise(next, student_max, teacher_max, who, inverse_temperature);
    total.student += next.student;
    total.teacher += next.teacher;
    total.gap += next.gap;
    total.cross += next.cross;
    total.plain += next.plain;
    if (next.label != -__builtin_inf()) total.label = next.label;  // one range at most has it
  }
  return total;
}

// The statistics of a row, and its value where that takes one walk (else 0 and no centre yet).
inline double settle(const Range& range, Kind kind, double inverse_temperature, Statistics& kept) {
  kept = {};
  kept.student_max = static_cast<float>(range.student_max);
  kept.student_log_sum = static_cast<float>(std::log(range.student));
  kept.plain_log_sum = range.plain == 0.0 ? 0.0f : static_cast<float>(std::log(range.plain));
  if (kind == Kind::none) return 0.0;
  const double log_gap = std::fabs(range.gap) < 0.5 * range.teacher
                             ? std::log1p(range.gap / range.teacher)
                             : std::log(range.student / range.teacher);
  kept.teacher_max = static_cast<float>(range.teacher_max);
  kept.log_sum_gap = static_cast<float>(log_gap);
  if (kind == Kind::forward_kl) return range.cross / range.teacher * inverse_temperature + log_gap;
  if (kind != Kind::reverse_kl) return 0.0;
  const double centre = range.cross / range.student;
  kept.centre = static_cast<float>(centre);
  kept.centre_rest = static_cast<float>(centre - kept.centre);
  return centre * inverse_temperature - log_gap;
}

// The same for the kinds that walk twice. Divided by their totals the sums are true means, so that
// the gradient q (... - centre) sums to 0 also where one q is nearly 1.
inline double settle(const Means& means, Kind kind, double weight, Statistics& kept) {
  const double centre = means.centre / means.student;
  kept.centre = static_cast<float>(centre);
  kept.centre_rest = static_cast<float>(centre - kept.centre);
  if (kind == Kind::total_variation) return means.value;
  if (kind == Kind::skew_reverse_kl) return means.value / means.student;
  const double teacher = means.value / means.teacher;
  return kind == Kind::skew_forward_kl ? teacher : weight * teacher + (1.0 - weight) * centre;
}

// The student's cross entropy at temperature 1; 0 where no range holds the label.
inline double cross_entropy(const Range& range) {
  if (range.label < kLowest) return 0.0;
  const double log_sum = std::log(range.plain);
  // What a label's logit of minus infinity is kept as.
  if (range.label == kLowest) return log_sum + __builtin_inf();
  return log_sum - (range.label - range.student_max);
}

}  // namespace slmperf::divergence
