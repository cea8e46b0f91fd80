// rms_norm, row by row in fp32. Formulas and where they round: slmperf/ops/rms_norm.py.
// Compiled once per instruction set by each_isa.h.

#include "cpu/quantize_input_rows.h"

namespace slmperf::SLMPERF_ISA {

using norm::Gradients;
using norm::Rows;

// One row: h, where there is a residual, and the output, both without gaps -> 1 / sqrt(...).
template <class T>
float norm_row(const Rows<T>& rows, int64_t row, T* to_h, T* output) {
  const int64_t columns = rows.columns;
  const T* h = rows.x + row * rows.x_row;
  Vec squares = splat(0.0f);
  if (rows.residual != nullptr) {
    const T *x = h, *residual = rows.residual + row * rows.residual_row;
    h = to_h;
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec added = rounded(load_first(x + i, count) + load_first(residual + i, count), x);
      store_up_to(to_h + i, added, count);
      squares = fma(added, added, squares);
    });
  } else {
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec x = load_first(h + i, count);
      squares = fma(x, x, squares);
    });
  }
  const float inverse =
      1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(columns) + rows.eps);
  const Vec factor = splat(inverse), offset = splat(rows.offset);
  if (rows.offset == 0.0f) {
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec normed = rounded(load_first(h + i, count) * factor, h);
      store_up_to(output + i, normed * load_first(rows.weight + i, count), count);
    });
  } else {
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec normed = load_first(h + i, count) * factor;
      store_up_to(output + i, normed * (offset + load_first(rows.weight + i, count)), count);
    });
  }
  return inverse;
}

// Rows [begin, end) of the gradient of h; what they add to that of the weight goes to `sums`, zeros
// before.
template <class T>
void gradient_rows(const Rows<T>& rows, const Gradients<T>& gradients, int64_t begin, int64_t end,
                   float* sums) {
  const int64_t columns = rows.columns;
  const Vec offset = splat(rows.offset);
  for (int64_t row = begin; row < end; row++) {
    const T* h = rows.h + row * rows.h_row;
    const T* grad = gradients.of_output + row * gradients.output_row;
    const Vec inverse = splat(gradients.inverse[row]);
    Vec total = splat(0.0f);
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec part = load_first(grad + i, count) * (load_first(h + i, count) * inverse);
      store_up_to(sums + i, load_up_to(sums + i, count) + part, count);
      total = fma(part, offset + load_first(rows.weight + i, count), total);
    });
    const Vec mean = splat(sum(total) / static_cast<float>(columns));
    const T* grad_h = gradients.of_h;
    if (grad_h != nullptr) grad_h += row * gradients.h_row;
    T* to = gradients.to_h + row * columns;
    each_vector(0, columns, [&](int64_t i, int64_t count) {
      const Vec normed = load_first(h + i, count) * inverse;
      const Vec scaled =
          load_first(grad + i, count) * (offset + load_first(rows.weight + i, count));
      Vec of_h = (scaled - normed * mean) * inverse;
      if (grad_h != nullptr) of_h = of_h + load_first(grad_h + i, count);
      store_up_to(to + i, of_h, count);
    });
  }
}

// (parts, columns) fp32 added up in order -> (columns,).
template <class T>
void add_parts(const float* sums, int64_t parts, int64_t columns, T* to) {
  each_vector(0, columns, [&](int64_t i, int64_t count) {
    Vec total = splat(0.0f);
    for (int64_t part = 0; part < parts; part++)
      total = total + load_first(sums + part * columns + i, count);
    store_up_to(to + i, total, count);
  });
}

}  // namespace slmperf::SLMPERF_ISA
