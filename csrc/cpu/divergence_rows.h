// divergence, row by row: fp32 vectors, fp64 row totals. Formulas: slmperf/ops/divergence.py.
// Compiled once per instruction set by each_isa.h.
//
// A row is walked in blocks that stay in the first-level cache: the block's maxima first, then its
// sums relative to the largest logit so far. So memory is read once for the KLs; the JSD needs the
// finished log-sums and walks the row again, by then in the second-level cache.

namespace slmperf::SLMPERF_ISA {

using divergence::Kind;
using divergence::Logits;
using divergence::Settings;
using divergence::Statistics;

// 64 vectors: as many as one lane adds up in fp32 before its sum moves on to fp64; and two rows of
// 4 KiB at most.
constexpr int64_t kBlock = 64 * Vec::width;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kLowest = -3.4028234663852886e38f;

// Calls f(offset, count) for every vector of [begin, end); count < width in the last one alone.
template <class F>
inline void each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + Vec::width <= end; i += Vec::width) f(i, int64_t{Vec::width});
  if (i < end) f(i, end - i);
}

template <class T>
inline Vec load_up_to(const T* x, int64_t count) {
  return count == Vec::width ? load(x) : load_part(x, count);
}

// What one walk over a row adds up. x are the logits less their model's largest so far, and the
// weights exp(x / temperature).
struct Sums {
  float student_max = kLowest, teacher_max = kLowest;
  double student = 0.0, teacher = 0.0;  // sums of the weights
  double gap = 0.0;                     // student - teacher, exact where they are close
  // sum w (x_a - x_b), a the model that weights: teacher for the forward KL, student for the
  // reverse
  double cross = 0.0;

  // Moves to new maxima: old weights shrink, and old x_a - x_b all move by one shift.
  void rise(float new_student_max, float new_teacher_max, bool teacher_weights,
            double inverse_temperature) {
    const double student_shift = double{student_max} - double{new_student_max};
    const double teacher_shift = double{teacher_max} - double{new_teacher_max};
    const double student_factor = std::exp(student_shift * inverse_temperature);
    const double teacher_factor = std::exp(teacher_shift * inverse_temperature);
    const double factor = teacher_weights ? teacher_factor : student_factor;
    const double shift =
        teacher_weights ? teacher_shift - student_shift : student_shift - teacher_shift;
    // A factor of 0 leaves nothing, of an infinite sum either: a weight that underflows counts as
    // 0.
    cross = factor == 0.0 ? 0.0 : factor * (cross + shift * (teacher_weights ? teacher : student));
    gap = student_factor * gap + (student_factor - teacher_factor) * teacher;
    student *= student_factor;
    teacher *= teacher_factor;
    student_max = new_student_max;
    teacher_max = new_teacher_max;
  }

  // log(student / teacher).
  double log_gap() const {
    return std::fabs(gap) < 0.5 * teacher ? std::log1p(gap / teacher) : std::log(student / teacher);
  }
};

// One walk over a row. kCross is false where the cross sum is not wanted.
template <bool kCross, class T>
Sums accumulate(const T* student, const T* teacher, int64_t vocabulary, bool teacher_weights,
                double inverse_temperature) {
  Sums total;
  const Vec to_base_2 = splat(static_cast<float>(inverse_temperature * kLog2E));
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    Vec student_top = splat(total.student_max), teacher_top = splat(total.teacher_max);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      student_top = larger(student_top, load_up_to(student + i, count));
      teacher_top = larger(teacher_top, load_up_to(teacher + i, count));
    });
    total.rise(largest(student_top), largest(teacher_top), teacher_weights, inverse_temperature);
    const Vec student_max = splat(total.student_max), teacher_max = splat(total.teacher_max);
    Vec student_sum = splat(0.0f), teacher_sum = splat(0.0f), gap = splat(0.0f),
        cross = splat(0.0f);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      const Vec s = load_up_to(student + i, count) - student_max;
      const Vec t = load_up_to(teacher + i, count) - teacher_max;
      const Vec student_weight = exp2(s * to_base_2), teacher_weight = exp2(t * to_base_2);
      student_sum = student_sum + student_weight;
      teacher_sum = teacher_sum + teacher_weight;
      gap = gap + (student_weight - teacher_weight);
      if constexpr (kCross) {
        const Vec weight = teacher_weights ? teacher_weight : student_weight;
        cross = fma(weight, where_nonzero(weight, teacher_weights ? t - s : s - t), cross);
      }
    });
    total.student += sum(student_sum);
    total.teacher += sum(teacher_sum);
    total.gap += sum(gap);
    total.cross += sum(cross);
  }
  return total;
}

// A row of logits under its statistics: x the logits less their model's maximum.
struct Normal {
  Vec student_max, student_log_sum, teacher_max, teacher_log_sum, log_sum_gap, scale;

  Normal(const Statistics& row, double temperature)
      : student_max(splat(row.student_max)),
        student_log_sum(splat(row.student_log_sum)),
        teacher_max(splat(row.teacher_max)),
        teacher_log_sum(splat(row.student_log_sum - row.log_sum_gap)),
        log_sum_gap(splat(row.log_sum_gap)),
        scale(splat(static_cast<float>(1.0 / temperature))) {}

  Vec log_q(Vec student) const { return (student - student_max) * scale - student_log_sum; }
  Vec log_p(Vec teacher) const { return (teacher - teacher_max) * scale - teacher_log_sum; }
  // A likely token's x is near 0 and carries little rounding, whatever the logits are.
  Vec x_gap(Vec student, Vec teacher) const {
    return (student - student_max) - (teacher - teacher_max);
  }
  // log q - log p, by way of x: a difference of the two above would round at the size of log_sum.
  Vec log_ratio(Vec student, Vec teacher) const {
    return x_gap(student, teacher) * scale - log_sum_gap;
  }
};

inline Vec exp(Vec x) { return exp2(x * splat(static_cast<float>(kLog2E))); }

// log(p / m) and log(q / m) from l = log q - log p alone: no probability is formed, so none can
// underflow. m / p = beta + (1 - beta) e^l and m / q = (1 - beta) + beta e^-l; the one whose
// exponent is not positive is 1 + c (e^-|l| - 1), and the other differs by e^l. Taken as log1p of
// expm1, its logarithm is accurate near p = q, where both divergences cancel to the second order of
// l.
struct Mixture {
  Vec beta, rest;

  explicit Mixture(double beta)
      : beta(splat(static_cast<float>(beta))), rest(splat(static_cast<float>(1.0 - beta))) {}

  struct Ratios {
    Vec teacher, student;
  };
  Ratios operator()(Vec l) const {
    const Vec zero = splat(0.0f), one = splat(1.0f), minus_l = zero - l;
    const Vec c = where_positive(l, beta, rest), least = where_positive(l, rest, beta);
    const Vec x = c * exp2_minus_1(abs(l) * splat(static_cast<float>(-kLog2E)));
    // Rounding 1 + x loses x - ((1 + x) - 1), which adds itself to the logarithm near 1.
    const Vec sum = larger(least, one + x);
    const Vec tail = log(sum) + (x - (sum - one));
    return {zero - at_least(0.0f, l) - tail, zero - at_least(0.0f, minus_l) - tail};
  }
};

// KL(p || m) and KL(q || m) of a row.
struct ToMixture {
  double teacher, student;
};

template <class T>
ToMixture to_mixture(const T* student, const T* teacher, int64_t vocabulary, const Normal& normal,
                     const Mixture& mixture) {
  double teacher_kl = 0.0, student_kl = 0.0, p_total = 0.0, q_total = 0.0;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    Vec of_teacher = splat(0.0f), of_student = splat(0.0f), p_sum = splat(0.0f),
        q_sum = splat(0.0f);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      const Vec s = load_up_to(student + i, count), t = load_up_to(teacher + i, count);
      const Vec q = exp(normal.log_q(s)), p = exp(normal.log_p(t));
      const auto ratios = mixture(normal.log_ratio(s, t));
      of_teacher = fma(p, where_nonzero(p, ratios.teacher), of_teacher);
      of_student = fma(q, where_nonzero(q, ratios.student), of_student);
      p_sum = p_sum + p;
      q_sum = q_sum + q;
    });
    teacher_kl += sum(of_teacher);
    student_kl += sum(of_student);
    p_total += sum(p_sum);
    q_total += sum(q_sum);
  }
  // The totals are 1 but for rounding. Divided by them the results are true means, so that the
  // gradient's q (log(q / m) - centre) sums to 0 also where one q is nearly 1.
  return {teacher_kl / p_total, student_kl / q_total};
}

// Rows [begin, end): value (T,) and statistics (T, 6).
template <class T>
void forward_rows(const Logits<T>& logits, const Settings& settings, float* value,
                  Statistics* statistics, int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / settings.temperature;
  const bool teacher_weights = settings.kind == Kind::forward_kl;
  const auto walk = settings.kind == Kind::jsd ? &accumulate<false, T> : &accumulate<true, T>;
  for (int64_t row = begin; row < end; row++) {
    const T* student = logits.student + row * logits.student_stride;
    const T* teacher = logits.teacher + row * logits.teacher_stride;
    const Sums sums =
        walk(student, teacher, logits.vocabulary, teacher_weights, inverse_temperature);
    const double log_gap = sums.log_gap();
    double result = 0.0, centre = 0.0;
    Statistics& kept = statistics[row];
    kept = {sums.student_max, static_cast<float>(std::log(sums.student)), sums.teacher_max,
            static_cast<float>(log_gap), 0.0f};
    if (settings.kind == Kind::forward_kl) {
      result = sums.cross / sums.teacher * inverse_temperature + log_gap;
    } else if (settings.kind == Kind::reverse_kl) {
      centre = sums.cross / sums.student;
      result = centre * inverse_temperature - log_gap;
    } else {
      const auto kl = to_mixture(student, teacher, logits.vocabulary,
                                 Normal(kept, settings.temperature), Mixture(settings.beta));
      centre = kl.student;
      result = settings.beta * kl.teacher + (1.0 - settings.beta) * kl.student;
    }
    value[row] = static_cast<float>(result);
    kept.centre = static_cast<float>(centre);
    kept.centre_rest = static_cast<float>(centre - kept.centre);
  }
}

// One row of the gradient: gradient[v] = f(student logit, teacher logit).
template <class T, class F>
inline void gradient_row(const T* student, const T* teacher, T* gradient, int64_t vocabulary,
                         const F& f) {
  each_vector(0, vocabulary, [&](int64_t i, int64_t count) {
    const Vec result = f(load_up_to(student + i, count), load_up_to(teacher + i, count));
    count == Vec::width ? store(gradient + i, result) : store_part(gradient + i, result, count);
  });
}

// Rows [begin, end) of the student's gradient (T, V), contiguous; upstream (T,) with a stride.
template <class T>
void backward_rows(const Logits<T>& logits, const Settings& settings, const float* upstream,
                   int64_t upstream_stride, const Statistics* statistics, T* gradient,
                   int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / settings.temperature;
  const int64_t vocabulary = logits.vocabulary;
  for (int64_t row = begin; row < end; row++) {
    const T* student = logits.student + row * logits.student_stride;
    const T* teacher = logits.teacher + row * logits.teacher_stride;
    T* out = gradient + row * vocabulary;
    const Normal normal(statistics[row], settings.temperature);
    const Vec centre = splat(statistics[row].centre);
    const Vec centre_rest = splat(statistics[row].centre_rest);
    const double scale = double{upstream[row * upstream_stride]} * inverse_temperature;
    if (settings.kind == Kind::forward_kl) {
      // q - p as the larger of them times 1 - e^-|l|: accurate where they are nearly equal.
      const Vec up = splat(static_cast<float>(-scale)), down = splat(static_cast<float>(scale));
      gradient_row(student, teacher, out, vocabulary, [&](Vec s, Vec t) {
        const Vec l = normal.log_ratio(s, t);
        const Vec more = exp(larger(normal.log_q(s), normal.log_p(t)));
        const Vec gap = exp2_minus_1(abs(l) * splat(static_cast<float>(-kLog2E)));
        return where_positive(l, up, down) * (more * where_nonzero(more, gap));
      });
    } else if (settings.kind == Kind::reverse_kl) {
      const Vec factor = splat(static_cast<float>(scale * inverse_temperature));
      gradient_row(student, teacher, out, vocabulary, [&](Vec s, Vec t) {
        const Vec q = exp(normal.log_q(s));
        return factor * (q * where_nonzero(q, normal.x_gap(s, t) - centre - centre_rest));
      });
    } else {
      const Vec factor = splat(static_cast<float>(scale * (1.0 - settings.beta)));
      const Mixture mixture(settings.beta);
      gradient_row(student, teacher, out, vocabulary, [&](Vec s, Vec t) {
        const Vec q = exp(normal.log_q(s));
        const Vec ratio = mixture(normal.log_ratio(s, t)).student;
        return factor * (q * where_nonzero(q, ratio - centre - centre_rest));
      });
    }
  }
}

}  // namespace slmperf::SLMPERF_ISA
