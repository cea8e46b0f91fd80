// cuda_probe: out = x + 1. x (N,) fp32 contiguous on CUDA -> (N,) fp32.
// Shows that CUDA code built here loads, launches on torch's stream and returns; no model uses it.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cuda/kernels/probe.cuh"
#include "cuda/stream.h"

namespace {

using torch::stable::Tensor;

Tensor cuda_probe(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(),
                  "cuda_probe: x must be contiguous float32");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return out;
  const int64_t blocks = std::min<int64_t>((n + 255) / 256, 65535);
  slmperf::probe_kernel<<<static_cast<unsigned>(blocks), 256, 0,
                          slmperf::current_stream(x.get_device_index())>>>(
      static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), n);
  slmperf::check_launch("cuda_probe");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(slmperf, m) { m.def("cuda_probe(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(slmperf, CUDA, m) { m.impl("cuda_probe", TORCH_BOX(&cuda_probe)); }
