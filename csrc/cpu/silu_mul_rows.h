// silu_mul, row by row in fp32. Formulas and where they round: slmperf/ops/silu_mul.py.
// Compiled once per instruction set by each_isa.h.

#include "cpu/quantize_input_rows.h"

namespace slmperf::SLMPERF_ISA {

// 1 / (1 + e^-x) times x or 1. Where e^-x is beyond 2^126 it is 0 (of minus infinity NaN, as 0
// times it): the exponential stops there, and x may go on.
inline Vec sigmoid_times(Vec factor, Vec x) {
  const Vec power = x * splat(-1.44269504f);
  const Vec quotient = factor / (splat(1.0f) + exp2(at_most(126.0f, power)));
  return where_positive(power - splat(126.0f), factor * splat(0.0f), quotient);
}

template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t columns, T* output) {
  each_vector(0, columns, [&](int64_t i, int64_t count) {
    const Vec x = load_up_to(gate + i, count);
    const Vec silu = rounded(sigmoid_times(x, x), gate);
    store_up_to(output + i, silu * load_up_to(up + i, count), count);
  });
}

template <class T>
void gradient_row(const T* grad, const T* gate, const T* up, int64_t columns, T* to_gate,
                  T* to_up) {
  const Vec one = splat(1.0f);
  each_vector(0, columns, [&](int64_t i, int64_t count) {
    const Vec x = load_up_to(gate + i, count), g = load_up_to(grad + i, count);
    const Vec share = sigmoid_times(one, x);
    const Vec slope = share * fma(x, one - share, one);
    store_up_to(to_gate + i, g * load_up_to(up + i, count) * slope, count);
    store_up_to(to_up + i, g * x * share, count);
  });
}

}  // namespace slmperf::SLMPERF_ISA
