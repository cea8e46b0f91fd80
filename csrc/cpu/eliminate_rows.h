// One pivot of eliminate over a range of columns. Formulas: slmperf/ops/eliminate.py.
// Compiled once per instruction set by each_isa.h; the loops are plain, for the compiler to widen.

namespace slmperf::SLMPERF_ISA {

constexpr int64_t kColumns = 512;  // 4 KiB of each row: the sums stay in the first-level cache

using elimination::Waiting;

// m, q: the pivot's rows, out of date by `waiting`. l, u: where its L and U go; what stood there
// goes to m and q (the rows change places). They may be the same rows.
inline void pivot_columns(const Waiting& waiting, double* m, double* q, double* l, double* u,
                          double scale, double half, double* diagonal_m, double* diagonal_q,
                          int64_t begin, int64_t end) {
  double sum_m[kColumns], sum_q[kColumns];
  for (int64_t from = begin; from < end; from += kColumns) {
    const int64_t count = end - from < kColumns ? end - from : kColumns;
    std::memcpy(sum_m, m + from, count * sizeof(double));
    std::memcpy(sum_q, q + from, count * sizeof(double));
    int64_t p = 0;
    for (; p + 4 <= waiting.count; p += 4) {  // four rows at a time: fewer trips of the sums
      const double *l0 = waiting.l + p * waiting.stride + from, *l1 = l0 + waiting.stride;
      const double *l2 = l1 + waiting.stride, *l3 = l2 + waiting.stride;
      const double *u0 = waiting.u + p * waiting.stride + from, *u1 = u0 + waiting.stride;
      const double *u2 = u1 + waiting.stride, *u3 = u2 + waiting.stride;
      const double *a = waiting.ahead_l + p, *b = waiting.ahead_u + p;
      for (int64_t i = 0; i < count; i++) {
        sum_m[i] -= a[0] * l0[i] + a[1] * l1[i] + a[2] * l2[i] + a[3] * l3[i];
        sum_q[i] -= b[0] * l0[i] + a[0] * u0[i] + b[1] * l1[i] + a[1] * u1[i] + b[2] * l2[i] +
                    a[2] * u2[i] + b[3] * l3[i] + a[3] * u3[i];
      }
    }
    for (; p < waiting.count; p++) {
      const double* l0 = waiting.l + p * waiting.stride + from;
      const double* u0 = waiting.u + p * waiting.stride + from;
      const double a = waiting.ahead_l[p], b = waiting.ahead_u[p];
      for (int64_t i = 0; i < count; i++) {
        sum_m[i] -= a * l0[i];
        sum_q[i] -= b * l0[i] + a * u0[i];
      }
    }
    std::memmove(m + from, l + from, count * sizeof(double));
    std::memmove(q + from, u + from, count * sizeof(double));
    for (int64_t i = 0; i < count; i++) {
      const double new_l = sum_m[i] * scale, new_u = sum_q[i] * scale - half * new_l;
      l[from + i] = new_l;
      u[from + i] = new_u;
      diagonal_m[from + i] -= new_l * new_l;
      diagonal_q[from + i] -= 2 * new_l * new_u;
    }
  }
}

}  // namespace slmperf::SLMPERF_ISA
