// Checks of an operator's tensors, with messages that name the argument, the wanted and the found:
//   divergence: teacher is (8, 32000), expected (T, V) = (8, 32064)
// The Python front says the same first; these hold for callers who come straight to the operator.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace slmperf {

// A dimension by its letter and the size that it must have.
struct Dim {
  const char* letter;
  int64_t size;
};

template <class Range, class Text>
std::string in_parentheses(const Range& range, const Text& text) {
  std::string line = "(";
  for (const auto& part : range) line += (line.size() > 1 ? ", " : "") + text(part);
  return line + ")";
}

inline void check_shape(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                        std::initializer_list<Dim> dims) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == dims.size();
  for (size_t i = 0; equal && i < dims.size(); i++) equal = sizes[i] == dims.begin()[i].size;
  STD_TORCH_CHECK(
      equal, op, ": ", argument, " is ",
      in_parentheses(sizes, [](int64_t size) { return std::to_string(size); }), ", expected ",
      in_parentheses(dims, [](const Dim& dim) { return std::string(dim.letter); }), " = ",
      in_parentheses(dims, [](const Dim& dim) { return std::to_string(dim.size); }));
}

inline void check_dtype(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, op, ": ", argument, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(wanted));
}

// All of these at once, of a tensor whose elements lie side by side.
inline void check_tensor(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                         torch::headeronly::ScalarType type, std::initializer_list<Dim> dims) {
  check_shape(op, argument, tensor, dims);
  check_dtype(op, argument, tensor, type);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", argument, " is not contiguous");
}

}  // namespace slmperf
