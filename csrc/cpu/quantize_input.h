// quantize_input for the operators that round their inputs themselves.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace slmperf {

// (codes, scale) of x (M, K); the operator's arguments, see slmperf/ops/linear/quantize_input.py.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> quantize_input(
    torch::stable::Tensor x, std::optional<torch::stable::Tensor> static_scale, bool fp8,
    int64_t group);

}  // namespace slmperf
