// Which instruction set the CPU kernels use. () -> int: 0 scalar, 1 AVX2, 2 AVX-512

#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdlib>
#include <string>

namespace slmperf {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The compiler's check also asks whether the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  // F16C has no name in g++ 12's check; every processor with AVX2 and FMA has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa choose() {
  const char* asked = std::getenv("SLMPERF_CPU_ISA");
  const std::string name = asked ? asked : "";
  const Isa found = widest();
  if (name == "scalar") return Isa::scalar;
  if (name == "avx2" && found == Isa::avx512) return Isa::avx2;
  return found;
}

int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&slmperf::cpu_isa));
}
