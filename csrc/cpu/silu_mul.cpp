// silu_mul on CPU: (T, F) x 2 or (T, 2 F) -> (T, F), or codes and scales; backward (T, F), ... ->
// gradients of both. fp32, bf16, fp16. A row is made by one thread: no bit depends on their number.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/rounded_output.h"
#include "cpu/with_element.h"

#define SLMPERF_ROWS "cpu/silu_mul_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "silu_mul";

void check_packed(const char* argument, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1 || tensor.size(0) == 0, kOp, ": ",
                  argument, " has gaps between the numbers of a row, expected none");
}

// Gates and what they let through, in two tensors or one.
struct Pair {
  int64_t rows, columns, gate_row, up_row;  // elements from row to row

  Pair(const Tensor& gate, const std::optional<Tensor>& up) {
    STD_TORCH_CHECK(gate.dim() == 2, kOp, ": gate has ", gate.dim(), " dimensions, expected 2");
    STD_TORCH_CHECK(up || gate.size(1) % 2 == 0, kOp, ": gate has ", gate.size(1),
                    " columns, expected an even number without up");
    rows = gate.size(0), columns = up ? gate.size(1) : gate.size(1) / 2;
    if (up) {
      check_shape(kOp, "up", *up, {{"T", rows}, {"F", columns}});
      check_dtype(kOp, "up", *up, gate.scalar_type());
    }
    check_packed("gate", gate);
    if (up) check_packed("up", *up);
    gate_row = gate.stride(0), up_row = up ? up->stride(0) : gate_row;
  }
};

std::tuple<Tensor, Tensor> forward(Tensor gate, std::optional<Tensor> up, int64_t codes,
                                   int64_t group, std::optional<Tensor> static_scale) {
  const Pair pair(gate, up);
  const int64_t columns = pair.columns;
  Output output = new_output(kOp, gate, pair.rows, columns, codes, group, static_scale);
  with_element(kOp, "gate", gate, [&](auto element) {
    using T = decltype(element);
    const auto* gates = static_cast<const T*>(gate.const_data_ptr());
    const auto* ups = up ? static_cast<const T*>(up->const_data_ptr()) : gates + columns;
    auto* to = static_cast<char*>(output.result.mutable_data_ptr());
    const auto silu_mul_row = SLMPERF_PICK(silu_mul_row<T>);
    const auto encode_row = SLMPERF_PICK(encode_row<T>);
    each_row(pair.rows, columns, [&](int64_t begin, int64_t end) {
      std::vector<T> made(output.rounded ? columns : 0);
      for (int64_t row = begin; row < end; row++) {
        T* result = output.rounded ? made.data() : reinterpret_cast<T*>(to) + row * columns;
        silu_mul_row(gates + row * pair.gate_row, ups + row * pair.up_row, columns, result);
        if (output.rounded)
          encode_row(result, columns, output.group, output.static_scale, output.fp8,
                     to + row * columns, output.scales() + row * output.groups);
      }
    });
  });
  return {output.result, output.scale};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor gate, std::optional<Tensor> up) {
  const Pair pair(gate, up);
  const int64_t columns = pair.columns;
  check_shape(kOp, "grad", grad, {{"T", pair.rows}, {"F", columns}});
  check_dtype(kOp, "grad", grad, gate.scalar_type());
  check_packed("grad", grad);
  Tensor of_gate = torch::stable::new_empty(gate, gate.sizes());
  Tensor of_up =
      up ? torch::stable::new_empty(gate, gate.sizes()) : torch::stable::new_empty(gate, {0});
  with_element(kOp, "gate", gate, [&](auto element) {
    using T = decltype(element);
    const auto* gates = static_cast<const T*>(gate.const_data_ptr());
    const auto* ups = up ? static_cast<const T*>(up->const_data_ptr()) : gates + columns;
    const auto* grads = static_cast<const T*>(grad.const_data_ptr());
    auto* to_gate = static_cast<T*>(of_gate.mutable_data_ptr());
    auto* to_up = up ? static_cast<T*>(of_up.mutable_data_ptr()) : to_gate + columns;
    const int64_t to_row = up ? columns : 2 * columns;
    const auto gradient_row = SLMPERF_PICK(gradient_row<T>);
    each_row(pair.rows, columns, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        gradient_row(grads + row * grad.stride(0), gates + row * pair.gate_row,
                     ups + row * pair.up_row, columns, to_gate + row * to_row,
                     to_up + row * to_row);
    });
  });
  return {of_gate, of_up};
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("silu_mul.cpu", TORCH_BOX(&slmperf::forward));
  m.impl("silu_mul_backward.cpu", TORCH_BOX(&slmperf::backward));
}
