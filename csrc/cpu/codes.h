// Codes of quantised numbers as vectors of fp32: what vec.h does for bf16 and fp16, and included by
// it, once per instruction set.
//
//   load, store     int8 and fp8 e4m3
//   Table, lookup   4-bit codes: the 16 numbers that they stand for
//   rounded         to bf16 or fp16 and back
//   Sums, Wide      products of int8, added up in int32

namespace slmperf::SLMPERF_ISA {

inline Vec rounded(Vec a, const float*) { return a; }

#if defined(SLMPERF_AVX512)

inline Vec load(const int8_t* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
// e4m3 as fp16 whose exponent is 8 too small: subnormals become subnormals.
inline Vec load(const E4m3* x) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  return {_mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")))};
}
inline void store(int8_t* x, Vec a) {  // of whole numbers in range; NaN becomes 0
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512i whole = _mm512_maskz_cvtps_epi32(number, a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(whole));
}
// To the nearest, of numbers up to 448: an exponent of -6 or more by rounding the mantissa to three
// bits, smaller ones by adding 2^14, whose last bit is e4m3's smallest number.
inline void store(E4m3* x, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(size, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(up, 20), _mm512_set1_epi32(120 << 3));
  const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(16384.0f));
  const __m512i small =
      _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
  const __mmask16 tiny = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x3c800000));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(0x7f800000));
  __m512i code = _mm512_mask_mov_epi32(normal, tiny, small);
  code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                   _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign)));
}
inline Vec rounded(Vec a, const BFloat16*) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return {_mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-0x10000)))};
}
inline Vec rounded(Vec a, const Float16*) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// The numbers of codes 0 to 15, and a vector of them: bits `shift` to `shift` + 3 of each word.
struct Table {
  Vec part[1];
};
inline Vec lookup(const Table& table, const uint32_t* words, int shift) {
  const __m512i code = _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi32_si128(shift));
  return {_mm512_permutexvar_ps(code, table.part[0].v)};  // which reads four bits
}
// Lanes 0 and 1 of every four from a, 2 and 3 from b; `first`: the number of the vector's lane 0.
inline Vec by_halves(Vec a, Vec b, int64_t first) { return {_mm512_mask_mov_ps(a.v, 0xcccc, b.v)}; }

struct Wide {
  static constexpr int width = 32;
  __m512i v;
};
struct Sums {
  __m512i v;
};
inline Wide widen(const int8_t* x) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
inline Sums no_sums() { return {_mm512_setzero_si512()}; }
inline Sums add_products(Sums sums, Wide a, Wide b) {
  return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(a.v, b.v))};
}
inline int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums.v); }

#elif defined(SLMPERF_AVX2)

inline __m128i eight_bytes(const void* x) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
}
inline Vec load(const int8_t* x) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(x)))};
}
inline Vec load(const E4m3* x) {
  const __m128i wide = _mm_cvtepi8_epi16(eight_bytes(x));
  const __m128i size = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_and_si128(wide, _mm_set1_epi16(-0x8000));
  const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
  // 0x7f80 is a NaN of fp16
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, _mm_slli_epi16(size, 7)),
                                    _mm_and_si128(nan, _mm_set1_epi16(0x7f80)));
  return {_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f))};
}
inline void store_bytes(void* x, __m256i numbers) {  // of 0 to 255 or -128 to 127
  const __m256i order =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(numbers, order);
  const __m128i joined =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(x), joined);
}
inline void store(int8_t* x, Vec a) {
  const __m256 number = _mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q);
  store_bytes(x, _mm256_cvtps_epi32(_mm256_and_ps(a.v, number)));
}
inline void store(E4m3* x, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(size, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(size, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(up, 20), _mm256_set1_epi32(120 << 3));
  const __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(16384.0f));
  const __m256i small =
      _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
  const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), size);
  const __m256i nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
  __m256i code = _mm256_blendv_epi8(normal, small, tiny);
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  store_bytes(x, _mm256_or_si256(code, sign));
}
inline Vec rounded(Vec a, const BFloat16*) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return {_mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(-0x10000)))};
}
inline Vec rounded(Vec a, const Float16*) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))};
}

struct Table {
  Vec part[2];
};
inline Vec lookup(const Table& table, const uint32_t* words, int shift) {
  const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i code = _mm256_srl_epi32(word, _mm_cvtsi32_si128(shift));  // three bits are read
  const __m256 low = _mm256_permutevar8x32_ps(table.part[0].v, code);
  const __m256 high = _mm256_permutevar8x32_ps(table.part[1].v, code);
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)))};
}
inline Vec by_halves(Vec a, Vec b, int64_t first) { return {_mm256_blend_ps(a.v, b.v, 0xcc)}; }

struct Wide {
  static constexpr int width = 16;
  __m256i v;
};
struct Sums {
  __m256i v;
};
inline Wide widen(const int8_t* x) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
inline Sums no_sums() { return {_mm256_setzero_si256()}; }
inline Sums add_products(Sums sums, Wide a, Wide b) {
  return {_mm256_add_epi32(sums.v, _mm256_madd_epi16(a.v, b.v))};
}
inline int32_t total(Sums sums) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums.v), _mm256_extracti128_si256(sums.v, 1));
  four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
}

#else  // scalar

inline Vec load(const int8_t* x) { return {static_cast<float>(*x)}; }
inline Vec load(const E4m3* x) {
  const uint32_t size = x->bits & 0x7fu, sign = uint32_t{x->bits & 0x80u} << 24;
  if (size == 0x7fu) return {from_bits(0x7fc00000u | sign)};
  // 2^120, the difference of the biases
  return {from_bits(to_bits(from_bits(size << 20) * from_bits(0x7b800000u)) | sign)};
}
inline void store(int8_t* x, Vec a) { *x = a.v == a.v ? static_cast<int8_t>(a.v) : int8_t{0}; }
inline void store(E4m3* x, Vec a) {
  const uint32_t size = to_bits(a.v) & 0x7fffffffu, sign = to_bits(a.v) >> 24 & 0x80u;
  uint32_t code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  if (size < 0x3c800000u) code = to_bits(from_bits(size) + 16384.0f) - 0x46800000u;
  if (size > 0x7f800000u) code = 0x7fu;
  x->bits = static_cast<uint8_t>(code | sign);
}
template <class T>
inline Vec rounded(Vec a, const T*) {
  T narrow;
  store(&narrow, a);
  return load(&narrow);
}

struct Table {
  Vec part[16];
};
inline Vec lookup(const Table& table, const uint32_t* words, int shift) {
  return table.part[*words >> shift & 15u];
}
inline Vec by_halves(Vec a, Vec b, int64_t first) { return first & 2 ? b : a; }

struct Wide {
  static constexpr int width = 1;
  int32_t v;
};
struct Sums {
  int32_t v;
};
inline Wide widen(const int8_t* x) { return {*x}; }
inline Sums no_sums() { return {0}; }
inline Sums add_products(Sums sums, Wide a, Wide b) { return {sums.v + a.v * b.v}; }
inline int32_t total(Sums sums) { return sums.v; }

#endif

// Loads `count` elements, all where these are as many as the width or more; the others are 0.
template <class T>
Vec load_first(const T* x, int64_t count) {
  if (count >= Vec::width) return load(x);
  T padded[Vec::width] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = x[i];
  return load(padded);
}

}  // namespace slmperf::SLMPERF_ISA
