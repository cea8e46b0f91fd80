#include "cpu/matrix_unit.h"

#include <cstdlib>
#include <string>

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slmperf {
namespace {

struct Units {
  Bf16Unit bf16 = Bf16Unit::none;
  Int8Unit int8 = Int8Unit::none;
};

#if defined(__x86_64__)

// Linux lets a process use AMX's tiles only after it has asked, once for all of its threads.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Units choose_units() {
  Units units;
  const char* asked = std::getenv("SLMPERF_CPU_ISA");
  const std::string name = asked ? asked : "";
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (isa() != Isa::avx512 || name == "avx512" || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return units;
  }
  const bool vnni = c >> 11 & 1, tiles = d >> 24 & 1;
  const bool amx_bf16 = tiles && (d >> 22 & 1), amx_int8 = tiles && (d >> 25 & 1);
  if (vnni) units.int8 = Int8Unit::avx512_vnni;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  if (name == "avx512_bf16") {
    if (bf16) units.bf16 = Bf16Unit::avx512_bf16;
    return units;
  }
  const bool permitted = (amx_bf16 || amx_int8) && tiles_permitted();
  if (permitted && amx_int8) units.int8 = Int8Unit::amx;
  if (permitted && amx_bf16 && bf16) {
    units.bf16 = Bf16Unit::amx;
  } else if (bf16 && !__builtin_cpu_is("intel")) {
    // Measured on Intel's cores: one vdpbf16ps in two cycles against two fp32 FMAs in each, so that
    // fp32 products are twice as fast there.
    units.bf16 = Bf16Unit::avx512_bf16;
  }
  return units;
}

#else

Units choose_units() { return {}; }

#endif

const Units& units() {
  static const Units chosen = choose_units();
  return chosen;
}

}  // namespace

Bf16Unit bf16_unit() { return units().bf16; }
Int8Unit int8_unit() { return units().int8; }

}  // namespace slmperf
