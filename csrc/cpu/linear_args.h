// What the low-precision products take, as plain data for functions that are compiled once per
// instruction set (linear_rows.h, linear_int4_rows.h).
#pragma once

#include <cstdint>

namespace slmperf::linear {

enum class Kind { single, brain, half };  // fp32, bf16, fp16

constexpr int64_t kStrip = 16;    // outputs that are made together
constexpr int64_t kChunk = 1024;  // inputs of a strip that are widened at a time

// A weight of 4 bits; the layout is slmperf/ops/linear/int4_layout.py's. Strides are in elements.
struct Int4 {
  const uint32_t* packed;
  int64_t strip_stride;  // words from a row of tiles to the next
  int64_t tiles;         // of a row of tiles
  const void* scale;     // (groups, 16 strips)
  int64_t scale_stride;
  const int8_t* zero_point;  // the same shape, nullptr for none
  int64_t zero_stride;
  int64_t groups;
  int64_t group;  // inputs of a group; one group: more than there are inputs
};

// A weight of 8 bits, row by row.
template <class Code>
struct Bytes {
  const Code* codes;
  int64_t stride, outputs, inputs;
  const void* scale;      // of output n and input k: scale[n / rows * stride + k / columns]
  int64_t rows, columns;  // outputs and inputs that share a scale
  int64_t down;           // stride of the scales
};

// y = sums x_scale w_scale + bias + residual, rounded once.
struct Epilogue {
  void* y;  // (M, N), rows side by side
  Kind out;
  int64_t outputs;
  const float* x_scale = nullptr;  // of rows; nullptr: 1
  const float* w_scale = nullptr;  // of outputs; nullptr: 1
  int64_t x_step = 0;              // 0: one for all rows
  const float* bias = nullptr;
  const void* residual = nullptr;
  Kind residual_kind = Kind::single;
  int64_t residual_stride = 0;
};

}  // namespace slmperf::linear
