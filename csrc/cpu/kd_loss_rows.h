// The row phases of kd_loss on the functions of divergence_rows.h. Formulas:
// slmperf/ops/kd_loss/loss.py. Compiled once per instruction set by each_isa.h.

#include "cpu/divergence_rows.h"

namespace slmperf::SLMPERF_ISA {

using divergence::Labels;
using divergence::Scales;

// One logit in the first lane of a vector.
template <class T>
inline Vec load_one(const T* x) {
  return load_part(x, 1);
}

// Rows [begin, end) -> ranges (T, 8), each the whole of its row.
template <class T>
void statistics_rows(const Logits<T>& logits, Kind kind, double temperature, bool cross_entropy,
                     const Labels& labels, Range* ranges, int64_t begin, int64_t end) {
  const bool same = temperature == 1.0;
  const auto walk = [&]<bool kPlain>() {
    switch (weights(kind)) {
      case Weights::teacher:
        return &accumulate<true, Weights::teacher, kPlain, T>;
      case Weights::student:
        return &accumulate<true, Weights::student, kPlain, T>;
      default:
        return kind == Kind::none ? &accumulate<false, Weights::nobody, kPlain, T>
                                  : &accumulate<true, Weights::nobody, kPlain, T>;
    }
  };
  const auto run =
      cross_entropy && !same ? walk.template operator()<true>() : walk.template operator()<false>();
  for (int64_t row = begin; row < end; row++) {
    const T* student = logits.student + row * logits.student_stride;
    const T* teacher = logits.teacher + row * logits.teacher_stride;
    Range range = run(student, teacher, logits.vocabulary, 1.0 / temperature);
    if (kind == Kind::none) range.teacher_max = 0.0;
    if (cross_entropy && same) range.plain = range.student;
    const int64_t label = cross_entropy ? labels.of(row, logits.vocabulary) : -1;
    // Minus infinity stands for no label; a logit that is minus infinity is told apart from it.
    if (label >= 0) range.label = largest(at_least(kLowest, load_one(student + label)));
    ranges[row] = range;
  }
}

// Rows [begin, end) -> means (T, 4).
template <class T>
void second_rows(const Logits<T>& logits, const Settings& settings, const Statistics* statistics,
                 Means* means, int64_t begin, int64_t end) {
  with_kind(settings.kind, [&](auto of) {
    constexpr Kind kind = decltype(of)::kind;
    if constexpr (walks_twice(kind)) {
      for (int64_t row = begin; row < end; row++) {
        const Pull<kind> pull(statistics[row], settings);
        means[row] =
            take_means(logits.student + row * logits.student_stride,
                       logits.teacher + row * logits.teacher_stride, logits.vocabulary, pull);
      }
    }
  });
}

// What stands beside the divergence in a row's gradient: cross entropy and softcap.
struct Beside {
  bool cross_entropy, same_temperature, capped;
  Vec scale, student_max, plain_log_sum, inverse_cap;

  Beside(const Statistics& row, double temperature, float scale, double softcap)
      : cross_entropy(scale != 0.0f),
        // Under a top-k teacher the two sums are over different tokens.
        same_temperature(temperature == 1.0 && row.student_log_sum == row.plain_log_sum),
        capped(softcap > 0.0),
        scale(splat(scale)),
        student_max(splat(row.student_max)),
        plain_log_sum(splat(row.plain_log_sum)),
        inverse_cap(splat(capped ? static_cast<float>(1.0 / softcap) : 0.0f)) {}

  bool any() const { return cross_entropy || capped; }

  // gradient and q of the divergence for these logits; kLabel: they are that of the label.
  template <bool kLabel>
  Vec operator()(Vec student, Vec gradient, Vec q) const {
    if (cross_entropy) {
      const Vec log_q = student - student_max - plain_log_sum;
      const Vec pull = kLabel ? exp_minus_1(log_q) : same_temperature ? q : exp(log_q);
      gradient = fma(scale, pull, gradient);
    }
    if (capped) {  // d logit / d before the cap = 1 - tanh^2
      const Vec one = splat(1.0f), tanh = student * inverse_cap;
      gradient = gradient * where_nonzero(gradient, (one - tanh) * (one + tanh));
    }
    return gradient;
  }
};

// One row of the gradient. `out` may lie over the student's row: every logit is read before its
// place is written, also where the elements of `out` are half as wide.
template <bool kBeside, Kind kind, class T, class Out>
void gradient_row(const T* student, const T* teacher, Out* out, int64_t vocabulary, int64_t label,
                  const Slope<kind>& slope, const Beside& beside) {
  const auto teacher_at = [&](int64_t i, int64_t count) {
    if constexpr (kind == Kind::none)
      return splat(0.0f);
    else
      return load_up_to(teacher + i, count);
  };
  Vec at_label = splat(0.0f);
  if (kBeside && label >= 0) {
    const Vec s = load_one(student + label);
    const auto [gradient, q] = slope(s, teacher_at(label, 1));
    at_label = beside.template operator()<true>(s, gradient, q);
  }
  each_vector(0, vocabulary, [&](int64_t i, int64_t count) {
    prefetch_next_block(student + i);
    if constexpr (kind != Kind::none) prefetch_next_block(teacher + i);
    const Vec s = load_up_to(student + i, count);
    auto [gradient, q] = slope(s, teacher_at(i, count));
    if constexpr (kBeside) gradient = beside.template operator()<false>(s, gradient, q);
    store_up_to(out + i, gradient, count);
  });
  if (kBeside && label >= 0) store_part(out + label, at_label, 1);
}

// Rows [begin, end) of the student's gradient, (T, V) with a row stride.
template <class T, class Out>
void gradient_rows(const Logits<T>& logits, const Settings& settings, const Statistics* statistics,
                   const Scales& scales, double softcap, const Labels& labels, Out* gradient,
                   int64_t gradient_stride, int64_t begin, int64_t end) {
  const int64_t vocabulary = logits.vocabulary;
  for (int64_t row = begin; row < end; row++) {
    const T* student = logits.student + row * logits.student_stride;
    const T* teacher = logits.teacher + row * logits.teacher_stride;
    Out* out = gradient + row * gradient_stride;
    const float scale = scales.divergence[row];
    const float plain_scale = scales.cross_entropy ? scales.cross_entropy[row] : 0.0f;
    if (scale == 0.0f && plain_scale == 0.0f) {  // whatever the logits hold
      std::memset(out, 0, vocabulary * sizeof(Out));
      continue;
    }
    const int64_t label = plain_scale != 0.0f ? labels.of(row, vocabulary) : -1;
    const Beside beside(statistics[row], settings.temperature, plain_scale, softcap);
    const auto write = [&](auto of) {
      const Slope<decltype(of)::kind> slope(statistics[row], settings, double{scale});
      const auto run = beside.any() ? &gradient_row<true, decltype(of)::kind, T, Out>
                                    : &gradient_row<false, decltype(of)::kind, T, Out>;
      run(student, teacher, out, vocabulary, label, slope, beside);
    };
    // Of a divergence that does not count only the student's softmax is left, times 0.
    scale == 0.0f || settings.kind == Kind::none ? write(Of<Kind::none>{})
                                                 : with_kind(settings.kind, write);
  }
}

// Rows [begin, end) of logits (T, V): cap tanh(logits / cap) in place.
template <class T>
void softcap_rows(T* logits, int64_t stride, int64_t vocabulary, double cap, int64_t begin,
                  int64_t end) {
  const Vec to_tanh = splat(static_cast<float>(-2.0 * kLog2E / cap));
  const Vec size = splat(static_cast<float>(cap));
  for (int64_t row = begin; row < end; row++) {
    T* x = logits + row * stride;
    each_vector(0, vocabulary, [&](int64_t i, int64_t count) {
      prefetch_next_block(x + i);
      const Vec logit = load_up_to(x + i, count);
      store_up_to(x + i, size * tanh_of(logit, abs(logit) * to_tanh), count);
    });
  }
}

}  // namespace slmperf::SLMPERF_ISA
