// slmperf._C: build facts and native classes. No operator lives here and no torch header.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace py = pybind11;

namespace {

// What was compiled, as text; an empty string where a part was left out.
std::map<std::string, std::string> build_facts() {
  return {
      {"revision", SLMPERF_REVISION},
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#else
      {"compiler", "g++ " __VERSION__},
#endif
      {"cpu_isas", SLMPERF_ISAS},
      {"cuda", SLMPERF_CUDA},
      {"cuda_archs", SLMPERF_CUDA_ARCHS},
      {"torch", SLMPERF_TORCH},
      {"python", std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION)},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and native classes of slmperf.";
  m.def("build_facts", &build_facts, "What was compiled: revision, compiler, ISAs, CUDA, torch.");
}
