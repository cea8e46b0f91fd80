// divergence, row by row: fp32 vectors, fp64 row totals. Formulas: slmperf/ops/divergence.py.
// Compiled once per instruction set by each_isa.h; kd_loss_rows.h builds on it.
//
// A row is walked in blocks that stay in the first-level cache: the block's maxima first, then its
// sums relative to the largest logit so far. So memory is read once for the KLs; the other kinds
// need the finished log-sums and walk the row again, by then in the second-level cache.

namespace slmperf::SLMPERF_ISA {

using divergence::Kind;
using divergence::kLowest;
using divergence::Logits;
using divergence::Means;
using divergence::Of;
using divergence::Range;
using divergence::Settings;
using divergence::Statistics;
using divergence::Weights;

// 64 vectors: as many as one lane adds up in fp32 before its sum moves on to fp64; and two rows of
// 4 KiB at most.
constexpr int64_t kBlock = 64 * Vec::width;
constexpr double kLog2E = 1.4426950408889634;

// Calls f(begin, end) for every block of a row.
template <class F>
inline void each_block(int64_t vocabulary, const F& f) {
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    f(begin, begin + kBlock < vocabulary ? begin + kBlock : vocabulary);
  }
}

// The processor does not look a page ahead by itself, least of all while a block is read again:
// from the third-level cache a walk takes up to 2.6 times as long without this.
template <class T>
inline void prefetch_next_block(const T* x) {
  __builtin_prefetch(x + kBlock);
}

// Calls f(Of<kind>{}) for one of the kinds with a teacher.
template <class F>
inline void with_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::forward_kl:
      return f(Of<Kind::forward_kl>{});
    case Kind::reverse_kl:
      return f(Of<Kind::reverse_kl>{});
    case Kind::jsd:
      return f(Of<Kind::jsd>{});
    case Kind::skew_forward_kl:
      return f(Of<Kind::skew_forward_kl>{});
    case Kind::skew_reverse_kl:
      return f(Of<Kind::skew_reverse_kl>{});
    default:
      return f(Of<Kind::total_variation>{});
  }
}

// The first walk over a row. kTeacher: there is one; kPlain: also the student's sum at
// temperature 1.
template <bool kTeacher, Weights kWho, bool kPlain, class T>
Range accumulate(const T* student, const T* teacher, int64_t vocabulary,
                 double inverse_temperature) {
  Range total;
  float student_largest = kLowest, teacher_largest = kLowest;
  const Vec to_base_2 = splat(static_cast<float>(inverse_temperature * kLog2E));
  each_block(vocabulary, [&](int64_t begin, int64_t end) {
    Vec student_top = splat(student_largest), teacher_top = splat(teacher_largest);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      student_top = larger(student_top, load_up_to(student + i, count));
      if constexpr (kTeacher) teacher_top = larger(teacher_top, load_up_to(teacher + i, count));
    });
    student_largest = largest(student_top);
    if constexpr (kTeacher) teacher_largest = largest(teacher_top);
    rise(total, student_largest, teacher_largest, kWho, inverse_temperature);
    const Vec student_max = splat(student_largest), teacher_max = splat(teacher_largest);
    Vec student_sum = splat(0.0f), teacher_sum = splat(0.0f), gap = splat(0.0f),
        cross = splat(0.0f), plain = splat(0.0f);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      prefetch_next_block(student + i);
      if constexpr (kTeacher) prefetch_next_block(teacher + i);
      const Vec s = load_up_to(student + i, count) - student_max;
      const Vec student_weight = exp2(s * to_base_2);
      student_sum = student_sum + student_weight;
      if constexpr (kPlain) plain = plain + exp2(s * splat(static_cast<float>(kLog2E)));
      if constexpr (kTeacher) {
        const Vec t = load_up_to(teacher + i, count) - teacher_max;
        const Vec teacher_weight = exp2(t * to_base_2);
        teacher_sum = teacher_sum + teacher_weight;
        gap = gap + (student_weight - teacher_weight);
        if constexpr (kWho == Weights::teacher) {
          cross = fma(teacher_weight, where_nonzero(teacher_weight, t - s), cross);
        }
        if constexpr (kWho == Weights::student) {
          cross = fma(student_weight, where_nonzero(student_weight, s - t), cross);
        }
      }
    });
    total.student += sum(student_sum);
    if constexpr (kPlain) total.plain += sum(plain);
    if constexpr (kTeacher) {
      total.teacher += sum(teacher_sum);
      total.gap += sum(gap);
      if constexpr (kWho != Weights::nobody) total.cross += sum(cross);
    }
  });
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
inline Vec exp_minus_1(Vec x) { return exp2_minus_1(x * splat(static_cast<float>(kLog2E))); }
// e^-|x| and e^-|x| - 1.
inline Exponential exp_of_minus_abs(Vec x) {
  return exp2_and_minus_1(abs(x) * splat(static_cast<float>(-kLog2E)));
}
// One of three by the sign of x, for NaN the last.
inline Vec by_sign(Vec x, Vec positive, Vec negative, Vec zero) {
  return where_positive(x, positive, where_positive(splat(0.0f) - x, negative, zero));
}

// How p and q stand to m = w p + (1 - w) q, from l = log q - log p alone: no probability is formed,
// so none can underflow. m / p = w + (1 - w) e^l and m / q = (1 - w) + w e^-l; the one whose
// exponent is not positive is `sum` = 1 + x with x = c (e^-|l| - 1), and the other differs by e^l.
// So all is accurate near p = q, where the divergences cancel to the second order of l. Where q is
// far above p, m / q is instead (1 - w) (1 + x) with x = w / (1 - w) e^-l: what a row's likely
// tokens hold beyond the limit of log(q / m), -log(1 - w), is all that its gradient is then made
// of.
struct Mixture {
  Vec weight, rest, far_weight, log_limit;

  explicit Mixture(double weight)
      : weight(splat(static_cast<float>(weight))),
        rest(splat(static_cast<float>(1.0 - weight))),
        far_weight(splat(static_cast<float>(weight / (1.0 - weight)))),
        log_limit(splat(static_cast<float>(-std::log1p(-weight)))) {}

  struct Parts {
    Vec l, far, e, x, sum;

    // Where q is far above p, above it otherwise, and below it.
    Vec pick(Vec beyond, Vec above, Vec below) const {
      return where_positive(far, beyond, where_positive(l, above, below));
    }
    // log(1 + x): rounding the sum loses x - (sum - 1), which adds itself to the logarithm near 1.
    Vec log1p() const { return log(sum) + (x - (sum - splat(1.0f))); }
  };
  Parts operator()(Vec l) const {
    const Vec one = splat(1.0f);
    Parts parts{l, l - one, {}, {}, {}};
    const Exponential power = exp_of_minus_abs(l);
    parts.e = where_positive(parts.far, power.value, power.minus_1);
    parts.x = parts.pick(far_weight, weight, rest) * parts.e;
    parts.sum = larger(parts.pick(one, rest, weight), one + parts.x);
    return parts;
  }
  // log(p / m), and log(q / m) less its limit where q is far above p.
  Vec teacher(const Parts& parts, Vec log1p) const {
    const Vec zero = splat(0.0f);
    return where_positive(parts.far, log_limit, zero) - at_least(0.0f, parts.l) - log1p;
  }
  Vec student(const Parts& parts, Vec log1p) const {
    return splat(0.0f) - at_least(0.0f, splat(0.0f) - parts.l) - log1p;
  }
};

// What a kind takes the mean of under q, so as to centre its gradient: there q (pull - mean).
template <Kind kind>
struct Pull {
  Normal normal;
  Mixture mixture;
  Vec inverse_rest;
  // What the pull tends to where q is far above p, and is given less there; of the total variation
  // its value wherever q is above p, and its opposite below.
  double limit = 0.0;
  double log_limit = 0.0;  // of log(q / m)

  Pull(const Statistics& row, const Settings& settings)
      : normal(row, settings.temperature),
        mixture(settings.weight),
        inverse_rest(splat(static_cast<float>(1.0 / (1.0 - settings.weight)))) {
    log_limit = -std::log1p(-settings.weight);
    if (kind == Kind::jsd) limit = log_limit;
    if (kind == Kind::skew_forward_kl) limit = -1.0;
    if (kind == Kind::skew_reverse_kl) limit = log_limit - settings.weight;
    if (kind == Kind::total_variation) limit = 1.0;
  }

  // log1p: parts.log1p(), which skew_forward_kl does not need.
  Vec of(const Mixture::Parts& parts, Vec log1p) const {
    const Vec rest = mixture.rest, zero = splat(0.0f);
    if constexpr (kind == Kind::jsd) {
      return mixture.student(parts, log1p);
    } else if constexpr (kind == Kind::skew_forward_kl) {  // p / m - 1
      return parts.pick(inverse_rest, rest, zero - rest) * (parts.e / parts.sum);
    } else {  // log(q / m) - (1 - w) (q / m - 1)
      static_assert(kind == Kind::skew_reverse_kl);
      const Vec factor = parts.pick(splat(1.0f), rest, zero - mixture.weight);
      return fma(factor, parts.x / parts.sum, mixture.student(parts, log1p));
    }
  }
};

// The second walk over a row.
template <Kind kind, class T>
Means take_means(const T* student, const T* teacher, int64_t vocabulary, const Pull<kind>& pull) {
  Means total;
  each_block(vocabulary, [&](int64_t begin, int64_t end) {
    Vec value = splat(0.0f), centre = splat(0.0f), p_sum = splat(0.0f), q_sum = splat(0.0f),
        q_far = splat(0.0f), q_below = splat(0.0f);
    each_vector(begin, end, [&](int64_t i, int64_t count) {
      prefetch_next_block(student + i);
      prefetch_next_block(teacher + i);
      const Vec s = load_up_to(student + i, count), t = load_up_to(teacher + i, count);
      const Vec q = exp(pull.normal.log_q(s)), p = exp(pull.normal.log_p(t));
      const Vec l = pull.normal.log_ratio(s, t), zero = splat(0.0f);
      p_sum = p_sum + p;
      if constexpr (kind == Kind::total_variation) {
        const Vec more = larger(q, p), half = splat(-0.5f) * more;
        value = fma(half, where_nonzero(more, exp_of_minus_abs(l).minus_1), value);
        q_far = q_far + by_sign(l, q, zero, zero);
        q_below = q_below + by_sign(l, zero, q, zero);
        q_sum = q_sum + where_nonzero(q, by_sign(l, zero, zero, q + l));  // l is 0 here, or NaN
      } else {
        const auto parts = pull.mixture(l);
        const Vec log1p = parts.log1p();
        value = kind == Kind::skew_reverse_kl
                    ? fma(q, where_nonzero(q, pull.mixture.student(parts, log1p)), value)
                    : fma(p, where_nonzero(p, pull.mixture.teacher(parts, log1p)), value);
        centre = fma(q, where_nonzero(q, pull.of(parts, log1p)), centre);
        q_sum = q_sum + where_positive(parts.far, zero, q);
        q_far = q_far + where_positive(parts.far, q, zero);
      }
    });
    // The same q_far in the mean and in the total: what sets the mean apart from its limit stays.
    const double far = sum(q_far), below = sum(q_below);
    total.value += sum(value);
    if constexpr (kind == Kind::skew_reverse_kl) total.value += pull.log_limit * far;
    total.centre += sum(centre) + pull.limit * (far - below);
    total.teacher += sum(p_sum);
    total.student += sum(q_sum) + far + below;
  });
  return total;
}

// Rows [begin, end): value (T,) and statistics (T, 7).
template <class T>
void forward_rows(const Logits<T>& logits, const Settings& settings, float* value,
                  Statistics* statistics, int64_t begin, int64_t end) {
  const double inverse_temperature = 1.0 / settings.temperature;
  with_kind(settings.kind, [&](auto of) {
    constexpr Kind kind = decltype(of)::kind;
    for (int64_t row = begin; row < end; row++) {
      const T* student = logits.student + row * logits.student_stride;
      const T* teacher = logits.teacher + row * logits.teacher_stride;
      const Range range = accumulate<true, weights(kind), false>(
          student, teacher, logits.vocabulary, inverse_temperature);
      double result = settle(range, kind, inverse_temperature, statistics[row]);
      if constexpr (walks_twice(kind)) {
        const Pull<kind> pull(statistics[row], settings);
        const Means means = take_means(student, teacher, logits.vocabulary, pull);
        result = settle(means, kind, settings.weight, statistics[row]);
      }
      value[row] = static_cast<float>(result);
    }
  });
}

// The gradient by a row's student logits times `scale`, and the student's probability.
template <Kind kind>
struct Slope {
  Pull<kind> pull;
  Vec factor, centre, centre_rest, far_centre, below_centre;

  Slope(const Statistics& row, const Settings& settings, double scale)
      : pull(row, settings),
        centre(splat(row.centre)),
        centre_rest(splat(row.centre_rest)),
        far_centre(from_mean(row, pull.limit)),
        below_centre(from_mean(row, -pull.limit)) {
    scale /= settings.temperature;
    if (kind == Kind::reverse_kl) scale /= settings.temperature;
    if (kind == Kind::jsd) scale *= 1.0 - settings.weight;
    if (kind == Kind::skew_forward_kl) scale *= settings.weight - 1.0;
    if (kind == Kind::total_variation) scale *= 0.5;
    factor = splat(static_cast<float>(scale));
  }

  struct Result {
    Vec gradient, q;
  };
  Result operator()(Vec student, Vec teacher) const {
    const Normal& normal = pull.normal;
    if constexpr (kind == Kind::forward_kl) {
      // q - p as the larger of them times 1 - e^-|l|: accurate where they are nearly equal.
      const Vec l = normal.log_ratio(student, teacher);
      const Vec more = exp(larger(normal.log_q(student), normal.log_p(teacher)));
      const Exponential less = exp_of_minus_abs(l);
      const Vec up = splat(0.0f) - factor, one = splat(1.0f);
      return {where_positive(l, up, factor) * (more * where_nonzero(more, less.minus_1)),
              more * where_nonzero(more, where_positive(l, one, less.value))};
    } else {
      const Vec q = exp(normal.log_q(student));
      if constexpr (kind == Kind::none) {
        return {factor * q, q};
      } else {
        return {factor * (q * where_nonzero(q, off_centre(student, teacher))), q};
      }
    }
  }

 private:
  // A limit of the pull less the mean of the pull.
  static Vec from_mean(const Statistics& row, double limit) {
    return splat(static_cast<float>(limit - double{row.centre} - row.centre_rest));
  }
  // The pull less its mean.
  Vec off_centre(Vec student, Vec teacher) const {
    if constexpr (kind == Kind::reverse_kl) {
      return pull.normal.x_gap(student, teacher) - centre - centre_rest;
    } else {
      const Vec l = pull.normal.log_ratio(student, teacher);
      if constexpr (kind == Kind::total_variation) {
        return by_sign(l, far_centre, below_centre, l - centre);  // l is 0 there, or NaN
      } else {
        const auto parts = pull.mixture(l);
        const Vec zero = splat(0.0f);
        return pull.of(parts, parts.log1p()) +
               where_positive(parts.far, far_centre, zero - centre) -
               where_positive(parts.far, zero, centre_rest);
      }
    }
  }
};

// Rows [begin, end) of the student's gradient (T, V), contiguous; upstream (T,) with a stride.
template <class T>
void backward_rows(const Logits<T>& logits, const Settings& settings, const float* upstream,
                   int64_t upstream_stride, const Statistics* statistics, T* gradient,
                   int64_t begin, int64_t end) {
  with_kind(settings.kind, [&](auto of) {
    for (int64_t row = begin; row < end; row++) {
      const T* student = logits.student + row * logits.student_stride;
      const T* teacher = logits.teacher + row * logits.teacher_stride;
      T* out = gradient + row * logits.vocabulary;
      const Slope<decltype(of)::kind> slope(statistics[row], settings,
                                            double{upstream[row * upstream_stride]});
      each_vector(0, logits.vocabulary, [&](int64_t i, int64_t count) {
        prefetch_next_block(student + i);
        prefetch_next_block(teacher + i);
        const Vec s = load_up_to(student + i, count), t = load_up_to(teacher + i, count);
        store_up_to(out + i, slope(s, t).gradient, count);
      });
    }
  });
}

}  // namespace slmperf::SLMPERF_ISA
