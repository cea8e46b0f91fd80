// The element type of a tensor as a C++ type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/element.h"

namespace slmperf {

// Calls f with a value of the element type: float, BFloat16 or Float16.
template <class F>
void with_element(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                  const F& f) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " is ",
                      torch::headeronly::toString(tensor.scalar_type()),
                      ", expected Float, BFloat16 or Half");
  }
}

}  // namespace slmperf
