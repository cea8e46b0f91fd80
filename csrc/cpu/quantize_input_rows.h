// Inputs rounded to int8 or fp8, row by row. Formulas: slmperf/ops/linear/quantize_input.py, whose
// steps are in x's dtype: an fp32 result rounded to bf16 or fp16 is the same number. Compiled once
// per instruction set by each_isa.h.

namespace slmperf::SLMPERF_ISA {

template <class T>
inline constexpr bool is_brain = false;
template <>
inline constexpr bool is_brain<BFloat16> = true;

// x's epsilon, the scale of zeros.
inline float epsilon_of(const float*) { return 0x1p-23f; }
inline float epsilon_of(const BFloat16*) { return 0x1p-7f; }
inline float epsilon_of(const Float16*) { return 0x1p-10f; }

template <class T>
float rounded(float x, const T* tag) {
  float lanes[Vec::width];
  store(lanes, rounded(splat(x), tag));
  return lanes[0];
}

// The largest |x| of a row, NaN where it has one: without their sign, bits are in the order of the
// numbers, and NaN's are the largest.
inline float top_of(const float* x, int64_t count) {
  uint32_t top = 0, bits;
  for (int64_t i = 0; i < count; i++) {
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float value;
  std::memcpy(&value, &top, sizeof value);
  return value;
}
template <class T>
float top_of(const T* x, int64_t count) {
  uint16_t top = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint16_t bits = x[i].bits & 0x7fffu;
    top = bits > top ? bits : top;
  }
  const T value{top};
  float lanes[Vec::width];
  store(lanes, load_first(&value, 1));
  return lanes[0];
}

inline Vec code_of(Vec ratio, const int8_t*) {
  return round(at_most(127.0f, at_least(-128.0f, ratio)));
}
inline Vec code_of(Vec ratio, const E4m3*) { return at_most(448.0f, at_least(-448.0f, ratio)); }

// `count` numbers x / scale as codes. mended: the quotient is a product with the reciprocal, mended
// once, in a fifth of a division's time: for bf16 x and a scale that was found from it. No quotient
// of two numbers of 8 bits is nearer than 2^-18 to the middle of two others, unless it is the
// middle, which the mending then gives exactly; both round alike.
template <bool mended, class T, class Code>
void encode_part(const T* x, int64_t count, float scale, Code* codes) {
  const Vec divisor = splat(scale), zero = splat(0.0f);
  const Vec reciprocal = splat(1.0f / scale), minus = splat(-1.0f / scale);
  const auto code = [&](Vec a) {
    Vec ratio = a / divisor;
    if constexpr (mended) {
      ratio = a * reciprocal;
      ratio = fma(fma(ratio, divisor, zero - a), minus, ratio);  // of -0 it is -0
    }
    return code_of(rounded(ratio, x), codes);
  };
  int64_t i = 0;
  for (; i + Vec::width <= count; i += Vec::width) store(codes + i, code(load(x + i)));
  if (i < count) store_part(codes + i, code(load_first(x + i, count - i)), count - i);
}

template <class T, class Code>
void encode_part(const T* x, int64_t count, float scale, bool found, Code* codes) {
  constexpr bool kMended = is_brain<T> && Vec::width > 1;  // the scalar fma rounds twice
  if (kMended && found && scale > 0x1p-40f && scale < 0x1p40f) {
    encode_part<kMended>(x, count, scale, codes);
  } else {
    encode_part<false>(x, count, scale, codes);
  }
}

// A row of `width` numbers; `group` of them share a scale, 0: all. static_scale: that of all rows,
// and none is written; nullptr: scales are found. codes: int8, or e4m3 where fp8.
template <class T>
void encode_row(const T* x, int64_t width, int64_t group, const float* static_scale, bool fp8,
                void* codes, float* scales) {
  const int64_t step = group == 0 || static_scale != nullptr ? width : group;
  for (int64_t from = 0, g = 0; g == 0 || from < width; from += step, g++) {
    float scale;
    if (static_scale != nullptr) {
      scale = rounded(*static_scale, x);
    } else {
      scale = rounded(top_of(x + from, step) / (fp8 ? 448.0f : 127.5f), x);
      if (scale == 0.0f) scale = epsilon_of(x);
      scales[g] = scale;
    }
    if (fp8) {
      encode_part(x + from, step, scale, static_scale == nullptr, static_cast<E4m3*>(codes) + from);
    } else {
      encode_part(x + from, step, scale, static_scale == nullptr,
                  static_cast<int8_t*>(codes) + from);
    }
  }
}

}  // namespace slmperf::SLMPERF_ISA
