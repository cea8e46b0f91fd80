// The instruction set that this process uses, and the choice of a function compiled for it.
#pragma once

namespace slmperf {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The widest set that the processor and the operating system have, found once. For debugging and
// tests the environment variable SLMPERF_CPU_ISA (scalar, avx2) asks for a narrower one.
Isa isa();

}  // namespace slmperf

// FUNCTION as compiled by each_isa.h for this processor.
#if defined(__x86_64__)
#define SLMPERF_PICK(...)                                            \
  (::slmperf::isa() == ::slmperf::Isa::avx512 ? &avx512::__VA_ARGS__ \
   : ::slmperf::isa() == ::slmperf::Isa::avx2 ? &avx2::__VA_ARGS__   \
                                              : &scalar::__VA_ARGS__)
#else
#define SLMPERF_PICK(...) (&scalar::__VA_ARGS__)
#endif
