// Vec: as many floats as the instruction set holds. The only intrinsics of the project, but for the
// codes in codes.h and the matrix units in tiles.h.
// Included by each_isa.h once per set; loads widen bf16 and fp16 to fp32, stores round to nearest
// even.
//
// NaN passes through everything: x86 min and max return their second operand when either is NaN, so
// the value stands second and the bound first.

namespace slmperf::SLMPERF_ISA {

#if defined(SLMPERF_AVX512)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* x) { return {_mm512_loadu_ps(x)}; }
inline Vec load(const Float16* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
inline Vec load(const BFloat16* x) {  // bf16 is the upper half of an fp32
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store(float* x, Vec a) { _mm512_storeu_ps(x, a.v); }
inline void store(Float16* x, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* x, Vec a) {
  // By hand, since AVX512_BF16's own conversion takes subnormals for zero and is not everywhere.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec at_least(float bound, Vec a) { return {_mm512_max_ps(_mm512_set1_ps(bound), a.v)}; }
inline Vec at_most(float bound, Vec a) { return {_mm512_min_ps(_mm512_set1_ps(bound), a.v)}; }
// The largest power of 2 that is at most |a|, for normal a; 0 for smaller ones.
inline Vec power_of_2_below(Vec a) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7f800000)))};
}
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec where_nonzero(Vec weight, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v)};
}
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, 0x08)};
}  // to an integer, no exception
// a 2^n: one instruction that also rounds into the subnormals.
inline Vec scale(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec where_positive(Vec a, Vec yes, Vec no) {
  return {
      _mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), yes.v)};
}
struct Split {
  Vec m, n;
};
inline Split mantissa(
    Vec a) {  // a = m 2^n with m in [0.75, 1.5), so that log m has no cancellation
  const __m512i bits = _mm512_castps_si512(a.v), base = _mm512_set1_epi32(0x3f400000);
  const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, base), 23);
  return {{_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)))},
          {_mm512_cvtepi32_ps(n)}};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(SLMPERF_AVX2)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* x) { return {_mm256_loadu_ps(x)}; }
inline Vec load(const Float16* x) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
inline Vec load(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline void store(float* x, Vec a) { _mm256_storeu_ps(x, a.v); }
inline void store(Float16* x, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* x, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  // packus works within 128-bit lanes; the permutation brings the two halves together.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec at_least(float bound, Vec a) { return {_mm256_max_ps(_mm256_set1_ps(bound), a.v)}; }
inline Vec at_most(float bound, Vec a) { return {_mm256_min_ps(_mm256_set1_ps(bound), a.v)}; }
inline Vec power_of_2_below(Vec a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)))};
}
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec where_nonzero(Vec weight, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(weight.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), a.v)};
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, 0x08)}; }
// a 2^n for integers -252 <= n <= 252 in two factors, so that the result may be subnormal.
inline Vec scale(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}
inline Vec where_positive(Vec a, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
}
struct Split {
  Vec m, n;
};
inline Split mantissa(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v), base = _mm256_set1_epi32(0x3f400000);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, base), 23);
  return {{_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)))},
          {_mm256_cvtepi32_ps(n)}};
}
inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#else  // scalar: one float, any processor

struct Vec {
  static constexpr int width = 1;
  float v;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline Vec splat(float x) { return {x}; }
inline Vec load(const float* x) { return {*x}; }
inline Vec load(const BFloat16* x) { return {from_bits(uint32_t{x->bits} << 16)}; }
inline Vec load(const Float16* x) {
  // The exponent and mantissa moved into place and rescaled by 2^112, the difference of the biases;
  // infinities and NaN keep their all-ones exponent.
  const uint32_t magnitude = uint32_t{x->bits} & 0x7fffu, sign = (uint32_t{x->bits} & 0x8000u)
                                                                 << 16;
  const uint32_t bits = magnitude >= 0x7c00u
                            ? (magnitude << 13) | 0x7f800000u
                            : to_bits(from_bits(magnitude << 13) * from_bits(0x77800000u));
  return {from_bits(bits | sign)};
}
inline void store(float* x, Vec a) { *x = a.v; }
inline void store(BFloat16* x, Vec a) {
  const uint32_t bits = to_bits(a.v);
  x->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(Float16* x, Vec a) {
  const uint32_t sign = (to_bits(a.v) >> 16) & 0x8000u;
  const float magnitude = std::fabs(a.v);
  uint32_t bits;
  if (!(magnitude < 65520.0f)) {  // rounds to infinity, or NaN
    bits = magnitude != magnitude ? 0x7e00u : 0x7c00u;
  } else if (magnitude < from_bits(0x38800000u)) {  // below 2^-14: a multiple of 2^-24
    bits = static_cast<uint32_t>(std::nearbyint(magnitude * from_bits(0x4b800000u)));
  } else {
    const uint32_t wide = to_bits(magnitude);
    bits = (wide - 0x38000000u + 0xfffu + ((wide >> 13) & 1u)) >> 13;
  }
  x->bits = static_cast<uint16_t>(bits | sign);
}
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec at_least(float bound, Vec a) { return {bound > a.v ? bound : a.v}; }
inline Vec at_most(float bound, Vec a) { return {bound < a.v ? bound : a.v}; }
inline Vec power_of_2_below(Vec a) { return {from_bits(to_bits(a.v) & 0x7f800000u)}; }
inline Vec larger(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {std::fabs(a.v)}; }
inline Vec where_nonzero(Vec weight, Vec a) { return {weight.v != 0.0f ? a.v : 0.0f}; }
// Adding 1.5 2^23 leaves no bits for a fraction: nearest even without a library call.
inline Vec round(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }
inline Vec scale(Vec a, Vec n) {
  const int whole = n.v == n.v ? static_cast<int>(n.v) : 0, half = whole >> 1;
  return {a.v * from_bits(static_cast<uint32_t>(half + 127) << 23) *
          from_bits(static_cast<uint32_t>(whole - half + 127) << 23)};
}
inline Vec where_positive(Vec a, Vec yes, Vec no) { return a.v > 0.0f ? yes : no; }
struct Split {
  Vec m, n;
};
inline Split mantissa(Vec a) {
  const uint32_t bits = to_bits(a.v);
  const int n = static_cast<int>(bits - 0x3f400000u) >> 23;
  return {{from_bits(bits - (static_cast<uint32_t>(n) << 23))}, {static_cast<float>(n)}};
}
inline float sum(Vec a) { return a.v; }
inline float largest(Vec a) { return a.v; }

#endif

// Loads `count` < width elements; the others are minus infinity.
template <class T>
Vec load_part(const T* x, int64_t count) {
  T padded[Vec::width];
  for (int i = 0; i < Vec::width; i++) padded[i] = i < count ? x[i] : minus_infinity<T>;
  return load(padded);
}

template <class T>
void store_part(T* x, Vec a, int64_t count) {
  T padded[Vec::width];
  store(padded, a);
  for (int i = 0; i < count; i++) x[i] = padded[i];
}

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

template <class T>
inline void store_up_to(T* x, Vec a, int64_t count) {
  count >= Vec::width ? store(x, a) : store_part(x, a, count);
}

// x = n + r with n an integer and |r| <= 1/2, exactly, and 2^r - 1 = r times a minimax polynomial.
struct PowerOf2 {
  Vec n, fraction_minus_1;
};
inline PowerOf2 power_of_2(Vec x) {
  const Vec n = round(x), r = x - n;
  Vec y = splat(1.54631629e-4f);
  y = fma(y, r, splat(1.33908634e-3f));
  y = fma(y, r, splat(9.61808256e-3f));
  y = fma(y, r, splat(5.55035711e-2f));
  y = fma(y, r, splat(2.40226508e-1f));
  y = fma(y, r, splat(6.93147188e-1f));
  return {n, y * r};
}

// 2^x for x <= 126, to 0.6 ulp; 0 below -150.
inline Vec exp2(Vec x) {
  const PowerOf2 power = power_of_2(at_least(-152.0f, x));
  return scale(power.fraction_minus_1 + splat(1.0f), power.n);
}

// 2^x and 2^x - 1 for x <= 126, the second accurate where it is near 0.
struct Exponential {
  Vec value, minus_1;
};
inline Exponential exp2_and_minus_1(Vec x) {
  const PowerOf2 power = power_of_2(at_least(-152.0f, x));
  const Vec one = splat(1.0f), whole = scale(one, power.n);
  return {fma(power.fraction_minus_1, whole, whole),
          fma(power.fraction_minus_1, whole, whole - one)};
}
inline Vec exp2_minus_1(Vec x) { return exp2_and_minus_1(x).minus_1; }

// tanh(x) from y = -2 log2(e) |x|, whose e^(-2|x|) - 1 is accurate near 0.
inline Vec tanh_of(Vec x, Vec y) {
  const Vec less = exp2_minus_1(y), zero = splat(0.0f);
  const Vec size = less / (splat(2.0f) + less);  // -tanh |x|
  return where_positive(x, zero - size, size);
}

// log x for positive, normal x, to 1.3 ulp: log m is r times a minimax polynomial in r = m - 1.
inline Vec log(Vec x) {
  const Split split = mantissa(x);
  const Vec r = split.m - splat(1.0f);
  Vec y = splat(5.29510641e-2f);
  y = fma(y, r, splat(-1.1956825e-1f));
  y = fma(y, r, splat(1.49728972e-1f));
  y = fma(y, r, splat(-1.6835696e-1f));
  y = fma(y, r, splat(1.99790331e-1f));
  y = fma(y, r, splat(-2.49929166e-1f));
  y = fma(y, r, splat(3.33335028e-1f));
  y = fma(y, r, splat(-5.00000687e-1f));
  y = fma(y, r, splat(9.99999998e-1f));
  return fma(split.n, splat(6.93147181e-1f), y * r);
}

}  // namespace slmperf::SLMPERF_ISA

#include "cpu/codes.h"
