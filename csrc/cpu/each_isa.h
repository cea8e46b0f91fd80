// Compiles the header named by SLMPERF_ROWS once per instruction set, each time in a namespace of
// its own (avx512, avx2, scalar) with that set's vec.h before it. Nothing of the standard library
// may be included in there: a function shared by two sets would be merged by the linker, and the
// wide one would then run on a machine that lacks it.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/element.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

// Functions in between are compiled for the named features, whatever the command line says.
#define SLMPERF_PRAGMA(TEXT) _Pragma(#TEXT)
#if defined(__clang__)
#define SLMPERF_BEGIN_TARGET(FEATURES) \
  SLMPERF_PRAGMA(clang attribute push(__attribute__((target(FEATURES))), apply_to = function))
#define SLMPERF_END_TARGET SLMPERF_PRAGMA(clang attribute pop)
#else
#define SLMPERF_BEGIN_TARGET(FEATURES) \
  SLMPERF_PRAGMA(GCC push_options) SLMPERF_PRAGMA(GCC target(FEATURES))
#define SLMPERF_END_TARGET SLMPERF_PRAGMA(GCC pop_options)
// g++ 12 takes the deliberately undefined operand of its own intrinsics for a mistake (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

SLMPERF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SLMPERF_ISA avx512
#define SLMPERF_AVX512
#include "cpu/vec.h"
#include SLMPERF_ROWS
#undef SLMPERF_ISA
#undef SLMPERF_AVX512
SLMPERF_END_TARGET

SLMPERF_BEGIN_TARGET("avx2,fma,f16c")
#define SLMPERF_ISA avx2
#define SLMPERF_AVX2
#include "cpu/vec.h"
#include SLMPERF_ROWS
#undef SLMPERF_ISA
#undef SLMPERF_AVX2
SLMPERF_END_TARGET
#endif

#define SLMPERF_ISA scalar
#include "cpu/vec.h"
#include SLMPERF_ROWS
#undef SLMPERF_ISA
