// Weights of 4 bits as fp32, a strip of 16 outputs at a time. The layout, in whose order inputs are
// left here: slmperf/ops/linear/int4_layout.py. Compiled once per instruction set by each_isa.h.

#include "cpu/linear_rows.h"

namespace slmperf::SLMPERF_ISA {

using linear::Int4;

constexpr int64_t kInputs = 64;                   // of a tile
constexpr int64_t kWords = kStrip * kInputs / 8;  // of a tile
constexpr int64_t kLanes = 16;                    // words of two of its rows, g and g + 8

// Rounded to the scale's dtype S and then to the inputs' X.
template <class S, class X>
struct Rounding {
  static Vec of(Vec a) {
    return rounded(rounded(a, static_cast<const S*>(nullptr)), static_cast<const X*>(nullptr));
  }
};
template <class S>
struct Rounding<S, S> {
  static Vec of(Vec a) { return rounded(a, static_cast<const S*>(nullptr)); }
};

// (code - zero point) * scale of all codes.
template <class S, class X>
inline Table table_of(float scale, float zero) {
  static constexpr float kCodes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  Table table;
  for (int p = 0; p < 16 / Vec::width; p++) {
    const Vec code = load(kCodes + p * Vec::width);
    table.part[p] = Rounding<S, X>::of((code - splat(zero)) * splat(scale));
  }
  return table;
}

// Tables of the strip's rows for one group, the last one for groups behind it (of padding).
template <class S, class X>
void tables_of(const Int4& weight, int64_t strip, int64_t group, Table (&tables)[kStrip]) {
  const int64_t at = group < weight.groups ? group : weight.groups - 1;
  const S* scales = static_cast<const S*>(weight.scale) + at * weight.scale_stride + strip * kStrip;
  float scale[kStrip];
  for (int64_t i = 0; i < kStrip; i += Vec::width) store(scale + i, load(scales + i));
  for (int64_t i = 0; i < kStrip; i++) {
    const float zero =
        weight.zero_point == nullptr
            ? 0.0f
            : static_cast<float>(weight.zero_point[at * weight.zero_stride + strip * kStrip + i]);
    tables[i] = table_of<S, X>(scale[i], zero);
  }
}

// Tiles of a strip into out: 16 rows, `step` apart, of 64 numbers a tile in the order (l, h, t, j).
template <class S, class X>
void decode_strip(const Int4& weight, int64_t strip, int64_t tile_begin, int64_t tile_end,
                  float* out, int64_t step) {
  const uint32_t* words = weight.packed + strip * weight.strip_stride;
  const bool halves = weight.group < kInputs;  // a tile has two groups: of words 0, 1 and 2, 3
  Table first[kStrip], second[kStrip];
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    const int64_t input = tile * kInputs;
    if (tile == tile_begin || input % weight.group == 0) {
      tables_of<S, X>(weight, strip, input / weight.group, first);
      if (halves) tables_of<S, X>(weight, strip, input / weight.group + 1, second);
    }
    for (int64_t row = 0; row < kStrip; row++) {
      const uint32_t* from = words + tile * kWords + row % 8 * kLanes;
      float* to = out + row * step + (tile - tile_begin) * kInputs;
      for (int order = 0; order < 4; order++) {  // 2 l + h
        const int shift = 16 * (order / 2) + 8 * (order % 2) + 4 * (row >= 8);
        for (int64_t i = 0; i < kLanes; i += Vec::width) {
          Vec number = lookup(first[row], from + i, shift);
          if (halves) number = by_halves(number, lookup(second[row], from + i, shift), i);
          store(to + order * kLanes + i, number);
        }
      }
    }
  }
}

// Where input `i` of a tile stands in the order (l, h, t, j).
inline int64_t place_of(int64_t i) { return i % 2 * 32 + i / 8 % 2 * 16 + i / 2 % 4 * 4 + i / 16; }

// A row of x as fp32 in that order, 0 behind its end.
template <class T>
void order_row(const T* x, int64_t count, int64_t depth, float* out) {
  int64_t places[kInputs];
  for (int64_t i = 0; i < kInputs; i++) places[i] = place_of(i);
  for (int64_t first = 0; first < depth; first += kInputs) {
    float numbers[kInputs];
    for (int64_t i = 0; i < kInputs; i += Vec::width) {
      const int64_t left = count - first - i;
      store(numbers + i, left > 0 ? load_first(x + first + i, left) : splat(0.0f));
    }
    for (int64_t i = 0; i < kInputs; i++) out[first + places[i]] = numbers[i];
  }
}

// x (rows, depth) is in that order.
template <class S, class X>
void multiply_int4(const Int4& weight, const float* x, int64_t rows, int64_t depth,
                   const Epilogue& epilogue, int64_t begin, int64_t end, float* scratch) {
  multiply_strips(
      [&](int64_t strip, int64_t from, int64_t to, float* out, int64_t step) {
        decode_strip<S, X>(weight, strip, from / kInputs, to / kInputs, out, step);
      },
      x, rows, depth, epilogue, begin, end, scratch);
}

// The same of one row of x, whose weights are not stored on their way: 16 sums of vectors at once.
template <class S, class X, bool halves>
void multiply_row(const Int4& weight, const float* x, const Epilogue& epilogue, int64_t begin,
                  int64_t end) {
  const Write write = writer(epilogue);
  Table first[kStrip], second[kStrip];
  for (int64_t strip = begin; strip < end; strip++) {
    const uint32_t* words = weight.packed + strip * weight.strip_stride;
    Vec sum_of[kStrip];
    for (Vec& one : sum_of) one = splat(0.0f);
    for (int64_t tile = 0; tile < weight.tiles; tile++, words += kWords) {
      const int64_t input = tile * kInputs;
      if (input % weight.group == 0) {
        tables_of<S, X>(weight, strip, input / weight.group, first);
        if (halves) tables_of<S, X>(weight, strip, input / weight.group + 1, second);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kStrip; row++) {
#pragma GCC unroll 4
        for (int order = 0; order < 4; order++) {  // 2 l + h
          const int shift = 16 * (order / 2) + 8 * (order % 2) + 4 * (row >= 8);
          for (int64_t i = 0; i < kLanes; i += Vec::width) {
            const uint32_t* from = words + row % 8 * kLanes + i;
            Vec number = lookup(first[row], from, shift);
            if (halves) number = by_halves(number, lookup(second[row], from, shift), i);
            sum_of[row] = fma(number, load(x + input + order * kLanes + i), sum_of[row]);
          }
        }
      }
    }
    float sums[kStrip];
    for (int row = 0; row < kStrip; row++) sums[row] = sum(sum_of[row]);
    const int64_t left = epilogue.outputs - strip * kStrip;
    write(epilogue, 0, strip * kStrip, left < kStrip ? left : kStrip, sums);
  }
}

template <class S, class X>
void multiply_one(const Int4& weight, const float* x, const Epilogue& epilogue, int64_t begin,
                  int64_t end) {
  if (weight.group < kInputs) {
    multiply_row<S, X, true>(weight, x, epilogue, begin, end);
  } else {
    multiply_row<S, X, false>(weight, x, epilogue, begin, end);
  }
}

// tables_of as T, bf16 or fp16, the 16 numbers twice: what a look-up by five bits reads.
template <class S, class T>
void half_tables(const Int4& weight, int64_t strip, int64_t group, uint16_t (*out)[32]) {
  Table tables[kStrip];
  tables_of<S, float>(weight, strip, group, tables);
  for (int64_t i = 0; i < kStrip; i++) {
    auto* to = reinterpret_cast<T*>(out[i]);
    for (int p = 0; p < 16 / Vec::width; p++) {
      store(to + p * Vec::width, tables[i].part[p]);
      store(to + 16 + p * Vec::width, tables[i].part[p]);
    }
  }
}

// The weight (outputs, inputs) in the dtype of its scales, strips begin to end.
template <class S>
void dequantize_strips(const Int4& weight, int64_t outputs, int64_t inputs, S* out, int64_t begin,
                       int64_t end) {
  float tile_rows[kStrip * kInputs], ordered[kInputs];
  int64_t places[kInputs];
  for (int64_t i = 0; i < kInputs; i++) places[i] = place_of(i);
  for (int64_t strip = begin; strip < end; strip++) {
    for (int64_t tile = 0; tile < weight.tiles; tile++) {
      decode_strip<S, S>(weight, strip, tile, tile + 1, tile_rows, kInputs);
      const int64_t first = tile * kInputs;
      const int64_t count = inputs - first < kInputs ? inputs - first : kInputs;
      for (int64_t r = 0; r < kStrip && strip * kStrip + r < outputs; r++) {
        S* to = out + (strip * kStrip + r) * inputs + first;
        for (int64_t i = 0; i < kInputs; i++) ordered[i] = tile_rows[r * kInputs + places[i]];
        int64_t i = 0;
        for (; i + Vec::width <= count; i += Vec::width) store(to + i, load(ordered + i));
        if (i < count) store_part(to + i, load(ordered + i), count - i);
      }
    }
  }
}

}  // namespace slmperf::SLMPERF_ISA
