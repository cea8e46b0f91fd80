// The processor's units for products of bf16 and of int8 matrices.
#pragma once

namespace slmperf {

enum class Bf16Unit { none = 0, avx512_bf16 = 1, amx = 2 };
enum class Int8Unit { none = 0, avx512_vnni = 1, amx = 2 };

// The units that this process uses, found once. Of bf16: none where fp32 products are no slower.
// For tests SLMPERF_CPU_ISA=avx512_bf16 asks for AVX-512's units instead of AMX, and any narrower
// set for none.
Bf16Unit bf16_unit();
Int8Unit int8_unit();

}  // namespace slmperf
