// linear_int4 on a processor, for tests/test_linear_cuda.py: g++ -DSLMPERF_EMULATE, no CUDA.
// Takes what csrc/cuda/linear_int4.cu takes, and the memory that may be touched.

#include <cstdio>

#include "cuda/kernels/linear_int4.cuh"

namespace slmperf {
namespace {

using emulate::Fault;
using emulate::Index;
using emulate::Range;

template <class T, int kTiles, int kAcross, int kDeep>
void run(const LinearInt4& p, Index grid, int threads, uint32_t bytes, int cluster) {
  using S = Shape<kTiles, kAcross, kDeep>;
  if (threads != S::kThreads || bytes != S::kBytes) {
    throw Fault("planned " + std::to_string(threads) + " threads and " + std::to_string(bytes) +
                " bytes, the kernel wants " + std::to_string(S::kThreads) + " and " +
                std::to_string(S::kBytes));
  }
  emulate::run(grid, threads, bytes, cluster, [&] { linear_int4<T, kTiles, kAcross, kDeep>(p); });
}

template <class T>
void choose(const LinearInt4& p, int tiles, Index grid, int threads, uint32_t bytes, int cluster) {
  if (tiles == 1) return run<T, 1, 1, 4>(p, grid, threads, bytes, cluster);
  if (tiles == 2) return run<T, 2, 2, 4>(p, grid, threads, bytes, cluster);
  if (tiles == 4) return run<T, 4, 4, 2>(p, grid, threads, bytes, cluster);
  if (tiles == 8) return run<T, 8, 4, 2>(p, grid, threads, bytes, cluster);
  throw Fault("no kernel for " + std::to_string(tiles) + " tiles");
}

}  // namespace
}  // namespace slmperf

// 0, or 1 and what went wrong in `message`. `ranges` in order of their begin.
extern "C" int emulate_linear_int4(const slmperf::LinearInt4* problem, int fp16, int tiles,
                                   int blocks, int parts, int experts, int threads, int bytes,
                                   int join_blocks, const slmperf::emulate::Range* ranges,
                                   int64_t count, uint64_t seed, char* message, int64_t size) {
  using namespace slmperf;
  emulate::world.ranges.assign(ranges, ranges + count);
  emulate::world.seed = seed;
  emulate::world.random.seed(seed);
  const Index grid{static_cast<uint32_t>(blocks), static_cast<uint32_t>(parts),
                   static_cast<uint32_t>(experts)};
  const int cluster = problem->partial ? 1 : parts;
  try {
    (fp16 ? choose<Half> : choose<Bf16>)(*problem, tiles, grid, threads, bytes, cluster);
    if (problem->partial) {
      emulate::run({static_cast<uint32_t>(join_blocks), 1, 1}, 256, 0, 1,
                   [&] { linear_int4_join(*problem, parts); });
    }
  } catch (const std::exception& fault) {
    std::snprintf(message, size, "%s", fault.what());
    return 1;
  }
  return 0;
}
