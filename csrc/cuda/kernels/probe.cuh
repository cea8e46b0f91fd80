// Device code of cuda_probe: raw pointers, no torch header.
#pragma once

#include <cstdint>

namespace slmperf {

// out[i] = x[i] + 1 in a grid-stride loop; n may exceed the number of threads.
__global__ void probe_kernel(const float* __restrict__ x_ptr, float* __restrict__ out_ptr,
                             int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    out_ptr[i] = x_ptr[i] + 1.0f;
}

}  // namespace slmperf
