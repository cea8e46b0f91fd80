// Elements of a tensor as bits, for types that C++20 lacks.
#pragma once

#include <cstdint>

namespace slmperf {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct E4m3 {  // fp8 of 4 exponent and 3 mantissa bits, without infinities
  uint8_t bits;
};

// What pads the last, partial vector of a row of logits: minus infinity has weight 0 everywhere.
template <class T>
inline constexpr T minus_infinity{};
template <>
inline constexpr float minus_infinity<float> = -__builtin_inff();
template <>
inline constexpr BFloat16 minus_infinity<BFloat16>{0xff80};
template <>
inline constexpr Float16 minus_infinity<Float16>{0xfc00};

}  // namespace slmperf
