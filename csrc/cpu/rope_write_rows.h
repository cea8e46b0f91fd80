// rope_write, head by head in fp32. Formulas: slmperf/ops/rope_write.py. Compiled once per
// instruction set by each_isa.h.

namespace slmperf::SLMPERF_ISA {

using rope::Head;

// Numbers that lie `gap` apart, in fp32.
template <class T>
void widen(const T* from, int64_t gap, int64_t count, float* to) {
  if (gap == 1) {
    each_vector(0, count, [&](int64_t i, int64_t lanes) {
      store_up_to(to + i, load_up_to(from + i, lanes), lanes);
    });
    return;
  }
  for (int64_t i = 0; i < count; i++) store_part(to + i, load_part(from + i * gap, 1), 1);
}

// Numbers as a page holds them: as they are, or by a head's scale in fp8.
template <class T>
inline Vec stored(Vec a, const Head<T>& head, const T*) {
  return a;
}
template <class T>
inline Vec stored(Vec a, const Head<T>& head, const E4m3*) {
  const Vec code = rounded(a, head.from) / splat(head.scale);
  return at_most(448.0f, at_least(-448.0f, code));
}

// The first 2 `half` channels turned, the others as they are.
template <class T, class Out>
inline void turn_to(const Head<T>& head, int64_t size, int64_t half, const float* cos,
                    const float* sin) {
  const T* from = head.from;
  Out* to = static_cast<Out*>(head.to);
  const int64_t gap = head.gap;
  const auto put = [&](int64_t at, Vec a, int64_t count) {
    const Vec made = stored(a, head, to);
    if (gap == 1) return store_up_to(to + at, made, count);
    Out lanes[Vec::width];
    store(lanes, made);
    for (int64_t i = 0; i < count; i++) to[(at + i) * gap] = lanes[i];
  };
  each_vector(0, half, [&](int64_t i, int64_t count) {
    const Vec low = load_up_to(from + i, count), c = load_up_to(cos + i, count);
    const Vec high = load_up_to(from + half + i, count), s = load_up_to(sin + i, count);
    put(i, low * c - high * s, count);
    put(half + i, high * c + low * s, count);
  });
  each_vector(2 * half, size,
              [&](int64_t i, int64_t count) { put(i, load_up_to(from + i, count), count); });
}

template <class T>
void turn(const Head<T>& head, int64_t size, int64_t half, const float* cos, const float* sin) {
  head.fp8 ? turn_to<T, E4m3>(head, size, half, cos, sin)
           : turn_to<T, T>(head, size, half, cos, sin);
}

}  // namespace slmperf::SLMPERF_ISA
