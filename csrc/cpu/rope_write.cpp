// rope_write on CPU: queries (T, H, C) turned -> (T, H, C); keys (T, G, C) turned and values put
// into pages (N, P, G, C) of the queries' dtype or fp8. fp32, bf16, fp16. A token is one thread's.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/with_element.h"

namespace slmperf::rope {

// A head's numbers before and after; a gap of more than one element lies between those written.
template <class T>
struct Head {
  const T* from;
  void* to;
  int64_t gap;
  bool fp8;
  float scale;  // of fp8
};

}  // namespace slmperf::rope

#define SLMPERF_ROWS "cpu/rope_write_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "rope_write";
constexpr int64_t kWorthAThread = 1 << 15;  // numbers

// Whole numbers of either width.
class Indices {
 public:
  Indices(const char* argument, const Tensor& tensor, int64_t tokens)
      : wide_(tensor.scalar_type() == ScalarType::Long), data_(tensor.const_data_ptr()) {
    check_shape(kOp, argument, tensor, {{"T", tokens}});
    if (!wide_) check_dtype(kOp, argument, tensor, ScalarType::Int);
    stride_ = tensor.stride(0);
  }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i * stride_]
                 : static_cast<const int32_t*>(data_)[i * stride_];
  }

 private:
  bool wide_;
  const void* data_;
  int64_t stride_;
};

// Strides are asked for once: each question goes through torch's C interface.

// Rows of cosines or sines.
struct Table {
  explicit Table(const Tensor& table)
      : data(table.const_data_ptr()), row(table.stride(0)), gap(table.stride(1)) {}
  const void* data;
  int64_t row, gap;
};

// New heads, whose channels lie side by side.
template <class T>
struct Heads {
  explicit Heads(const Tensor& heads)
      : data(static_cast<const T*>(heads.const_data_ptr())),
        token(heads.stride(0)),
        head(heads.stride(1)) {}
  const T* of(int64_t t, int64_t h) const { return data + t * token + h * head; }

  const T* data;
  int64_t token, head;
};

Tensor packed_heads(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

// The pages of keys or of values: an address for each slot and head.
class Pages {
 public:
  Pages(const char* argument, const char* of_scale, const Tensor& pages, const Tensor& key,
        const std::optional<Tensor>& scales)
      : fp8_(pages.scalar_type() == ScalarType::Float8_e4m3fn) {
    STD_TORCH_CHECK(pages.dim() == 4, kOp, ": ", argument, " has ", pages.dim(),
                    " dimensions, expected (N, P, G, C)");
    pages_ = pages.size(0), page_ = pages.size(1);
    check_shape(kOp, argument, pages,
                {{"N", pages_}, {"P", page_}, {"G", key.size(1)}, {"C", key.size(2)}});
    if (!fp8_) check_dtype(kOp, argument, pages, key.scalar_type());
    if (scales) check_tensor(kOp, of_scale, *scales, ScalarType::Float, {{"G", key.size(1)}});
    data_ = pages.mutable_data_ptr();
    for (int i = 0; i < 4; i++) stride_[i] = pages.stride(i);
    scale_ = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  }

  int64_t slots() const { return pages_ * page_; }

  template <class T>
  rope::Head<T> head(const T* from, int64_t slot, int64_t g) const {
    const int64_t at = slot / page_ * stride_[0] + slot % page_ * stride_[1] + g * stride_[2];
    void* to =
        fp8_ ? static_cast<void*>(static_cast<E4m3*>(data_) + at) : static_cast<T*>(data_) + at;
    return {from, to, stride_[3], fp8_, scale_ ? scale_[g] : 1.0f};
  }

 private:
  bool fp8_;
  int64_t pages_, page_, stride_[4];
  void* data_;
  const float* scale_;  // nullptr: 1
};

Tensor rope_write(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin,
                  std::optional<Tensor> positions, Tensor key_pages, Tensor value_pages,
                  Tensor slots, std::optional<Tensor> key_scale,
                  std::optional<Tensor> value_scale) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && cos.dim() == 2, kOp,
                  ": expected query (T, H, C), key (T, G, C) and cos (L, R / 2)");
  const int64_t tokens = query.size(0), heads = query.size(1), size = query.size(2);
  const int64_t kv_heads = key.size(1), half = cos.size(1), length = cos.size(0);
  for (const auto& [name, one] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_shape(kOp, name, *one, {{"T", tokens}, {"G", kv_heads}, {"C", size}});
    check_dtype(kOp, name, *one, query.scalar_type());
  }
  check_shape(kOp, "sin", sin, {{"L", length}, {"R / 2", half}});
  check_dtype(kOp, "sin", sin, cos.scalar_type());
  STD_TORCH_CHECK(2 * half <= size, kOp, ": cos has ", half, " columns, expected at most half of ",
                  size, " channels");
  const Pages keys("key_pages", "key_scale", key_pages, key, key_scale);
  const Pages values("value_pages", "value_scale", value_pages, key, value_scale);
  const Indices slot_of("slots", slots, tokens);
  std::optional<Indices> given;
  if (positions) given.emplace("positions", *positions, tokens);
  const auto position_of = [&](int64_t t) { return given ? (*given)[t] : t; };
  const int64_t capacity = std::min(keys.slots(), values.slots());
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t position = position_of(t);
    STD_TORCH_CHECK(slot_of[t] < capacity, kOp, ": slot ", slot_of[t], " of token ", t,
                    ", expected less than ", capacity);
    STD_TORCH_CHECK(slot_of[t] < 0 || (0 <= position && position < length), kOp, ": position ",
                    position, " of token ", t, ", expected 0 to ", length - 1);
  }
  query = packed_heads(query), key = packed_heads(key), value = packed_heads(value);
  Tensor output = torch::stable::new_empty(query, {tokens, heads, size});
  const int64_t grain =
      std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, (heads + 2 * kv_heads) * size));
  with_element(kOp, "query", query, [&](auto element) {
    using T = decltype(element);
    const Heads<T> queries(query), new_keys(key), new_values(value);
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    const auto turn = SLMPERF_PICK(turn<T>);
    with_element(kOp, "cos", cos, [&](auto of_table) {
      using Of = decltype(of_table);
      const Table cosines(cos), sines(sin);
      const auto widen = SLMPERF_PICK(widen<Of>);
      const auto read = [&](const Table& table, int64_t row, std::vector<float>& found) {
        widen(static_cast<const Of*>(table.data) + row * table.row, table.gap, half, found.data());
      };
      torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> c(half), s(half);
        for (int64_t t = begin; t < end; t++) {
          const int64_t slot = slot_of[t];
          if (slot < 0) {
            std::fill_n(to + t * heads * size, heads * size, T{});
            continue;
          }
          read(cosines, position_of(t), c);
          read(sines, position_of(t), s);
          for (int64_t h = 0; h < heads; h++)
            turn({queries.of(t, h), to + (t * heads + h) * size, 1, false, 1.0f}, size, half,
                 c.data(), s.data());
          for (int64_t g = 0; g < kv_heads; g++) {
            turn(keys.head(new_keys.of(t, g), slot, g), size, half, c.data(), s.data());
            turn(values.head(new_values.of(t, g), slot, g), size, 0, c.data(), s.data());
          }
        }
      });
    });
  });
  return output;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("rope_write.cpu", TORCH_BOX(&slmperf::rope_write));
}
