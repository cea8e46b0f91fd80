// linear_int4_launch: launches what slmperf/ops/linear/int4_cuda.py has planned. Tensors were
// checked and allocated there: with the same lines, NVRTC's kernels and the tests' emulation are
// launched.

#include <torch/csrc/stable/library.h>

#include "cuda/kernels/linear_int4.cuh"
#include "cuda/stream.h"

namespace slmperf {
namespace {

using Kernel = void (*)(LinearInt4);

template <class T>
Kernel kernel_of(int64_t tiles) {
  if (tiles == 1) return &linear_int4<T, 1, 1, 4>;
  if (tiles == 2) return &linear_int4<T, 2, 2, 4>;
  if (tiles == 4) return &linear_int4<T, 4, 4, 2>;
  STD_TORCH_CHECK(tiles == 8, "linear_int4_launch: no kernel for ", tiles, " tiles");
  return &linear_int4<T, 8, 4, 2>;
}

// problem: address of a LinearInt4; blocks x parts x experts blocks of so many threads and bytes of
// shared memory on torch's current stream of the device, which is the current one. join_blocks: of
// linear_int4_join, 0 where the parts are a cluster, or one.
void linear_int4_launch(int64_t problem, bool fp16, int64_t tiles, int64_t blocks, int64_t parts,
                        int64_t experts, int64_t threads, int64_t bytes, int64_t join_blocks,
                        int64_t device) {
  const auto& p = *reinterpret_cast<const LinearInt4*>(problem);
  const Kernel kernel = fp16 ? kernel_of<Half>(tiles) : kernel_of<Bf16>(tiles);
  const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  STD_TORCH_CHECK(allowed == cudaSuccess, "linear_int4: ", cudaGetErrorString(allowed));

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, static_cast<unsigned>(parts), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts),
                        static_cast<unsigned>(experts));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = current_stream(static_cast<int32_t>(device));
  config.attrs = &cluster;
  config.numAttrs = parts > 1 && join_blocks == 0 ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, p);
  STD_TORCH_CHECK(launched == cudaSuccess, "linear_int4: ", cudaGetErrorString(launched));
  if (join_blocks) {
    linear_int4_join<<<static_cast<unsigned>(join_blocks), 256, 0, config.stream>>>(
        p, static_cast<int>(parts));
    check_launch("linear_int4");
  }
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_FRAGMENT(slmperf, m) {
  m.def(
      "linear_int4_launch(int problem, bool fp16, int tiles, int blocks, int parts, int experts, "
      "int threads, int bytes, int join_blocks, int device) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(slmperf, CompositeExplicitAutograd, m) {
  m.impl("linear_int4_launch", TORCH_BOX(&slmperf::linear_int4_launch));
}
