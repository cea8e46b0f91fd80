// Products of floating inputs with weights that are widened to fp32 strip by strip, products of
// int8 codes, and what is done with finished sums. Formulas: slmperf/ops/linear. Compiled once per
// instruction set by each_isa.h, behind codes.h.
//
// Both operands have their inputs side by side, so that a result is a sum of products of vectors
// and no operand has to be turned. Sums run through K in one order.

namespace slmperf::SLMPERF_ISA {

using linear::Bytes;
using linear::Epilogue;
using linear::kChunk;
using linear::Kind;
using linear::kStrip;

constexpr int kOutputs = Vec::width == 16 ? 4 : 2;  // side by side: as many as registers hold sums
constexpr int kRows = 4;
constexpr int64_t kRowBlock = 64;  // rows of x that stay in the second-level cache

// One element in fp32.
template <class T>
float number_of(const T& x) {
  float lanes[Vec::width];
  store(lanes, load_first(&x, 1));
  return lanes[0];
}

// Outputs `first` to `first` + count of row `row`; sums, scales and bias are padded to whole
// strips.
template <class Out, class Added>
void write_outputs(const Epilogue& end, int64_t row, int64_t first, int64_t count,
                   const float* sums) {
  Out* y = static_cast<Out*>(end.y) + row * end.outputs + first;
  const Added* residual = end.residual == nullptr ? nullptr
                                                  : static_cast<const Added*>(end.residual) +
                                                        row * end.residual_stride + first;
  const Vec factor = splat(end.x_scale == nullptr ? 1.0f : end.x_scale[row * end.x_step]);
  for (int64_t i = 0; i < count; i += Vec::width) {
    Vec value = load(sums + i);
    if (end.w_scale != nullptr) value = value * (factor * load(end.w_scale + first + i));
    if (end.w_scale == nullptr && end.x_scale != nullptr) value = value * factor;
    if (end.bias != nullptr) value = value + load(end.bias + first + i);
    if (residual != nullptr) value = value + load_first(residual + i, count - i);
    store_up_to(y + i, value, count - i);
  }
}

using Write = void (*)(const Epilogue&, int64_t row, int64_t first, int64_t count,
                       const float* sums);
template <class Out>
Write writer_of(Kind residual) {
  if (residual == Kind::brain) return &write_outputs<Out, BFloat16>;
  if (residual == Kind::half) return &write_outputs<Out, Float16>;
  return &write_outputs<Out, float>;
}
inline Write writer(const Epilogue& end) {
  if (end.out == Kind::brain) return writer_of<BFloat16>(end.residual_kind);
  if (end.out == Kind::half) return writer_of<Float16>(end.residual_kind);
  return writer_of<float>(end.residual_kind);
}

// sums[c sums_step + r] += w row r . x row c, of `depth` numbers, whole vectors.
template <int outputs, int rows>
void add_dots(const float* w, int64_t w_step, const float* x, int64_t x_step, int64_t depth,
              float* sums, int64_t sums_step) {
  Vec sum_of[rows][outputs];
  for (int c = 0; c < rows; c++)
    for (int r = 0; r < outputs; r++) sum_of[c][r] = splat(0.0f);
  for (int64_t k = 0; k < depth; k += Vec::width) {
    Vec weight[outputs];
    for (int r = 0; r < outputs; r++) weight[r] = load(w + r * w_step + k);
    for (int c = 0; c < rows; c++) {
      const Vec input = load(x + c * x_step + k);
      for (int r = 0; r < outputs; r++) sum_of[c][r] = fma(weight[r], input, sum_of[c][r]);
    }
  }
  for (int c = 0; c < rows; c++)
    for (int r = 0; r < outputs; r++) sums[c * sums_step + r] += sum(sum_of[c][r]);
}

// Strips begin to end of y for x (rows, depth) fp32: decode(strip, from, to, out, step) widens
// inputs from..to, a whole number of 64, of a strip's 16 outputs. scratch: kStrip * (kChunk + rows)
// floats
template <class Decode>
void multiply_strips(const Decode& decode, const float* x, int64_t rows, int64_t depth,
                     const Epilogue& epilogue, int64_t begin, int64_t end, float* scratch) {
  float *weights = scratch, *sums = scratch + kStrip * kChunk;
  const Write write = writer(epilogue);
  for (int64_t strip = begin; strip < end; strip++) {
    std::memset(sums, 0, rows * kStrip * sizeof(float));
    for (int64_t from = 0; from < depth; from += kChunk) {
      const int64_t count = depth - from < kChunk ? depth - from : kChunk;
      decode(strip, from, from + count, weights, kChunk);
      for (int64_t block = 0; block < rows; block += kRowBlock) {
        const int64_t stop = rows - block < kRowBlock ? rows : block + kRowBlock;
        for (int64_t r = 0; r < kStrip; r += kOutputs) {
          const float* w = weights + r * kChunk;
          int64_t c = block;
          for (; c + kRows <= stop; c += kRows)
            add_dots<kOutputs, kRows>(w, kChunk, x + c * depth + from, depth, count,
                                      sums + c * kStrip + r, kStrip);
          for (; c < stop; c++)
            add_dots<kOutputs, 1>(w, kChunk, x + c * depth + from, depth, count,
                                  sums + c * kStrip + r, kStrip);
        }
      }
    }
    const int64_t first = strip * kStrip, left = epilogue.outputs - first;
    for (int64_t c = 0; c < rows; c++)
      write(epilogue, c, first, left < kStrip ? left : kStrip, sums + c * kStrip);
  }
}

// A row of x as fp32, 0 behind its end: `columns` numbers that share a scale, nullptr for none.
template <class T>
void widen_row(const T* x, int64_t count, int64_t padded, const float* scale, int64_t columns,
               float* out) {
  for (int64_t i = 0; i < padded; i += Vec::width) {
    Vec number = i < count ? load_first(x + i, count - i) : splat(0.0f);
    if (scale != nullptr && i < count) number = number * splat(scale[i / columns]);
    store(out + i, number);
  }
}

// put(i, numbers) of inputs from..to of a row, a vector each: code * scale, rounded to the scale's
// dtype S, or the code alone where not `scaled`; 0 behind the weight's edges.
template <class S, bool scaled, class Code, class Put>
void decode_row(const Bytes<Code>& weight, int64_t row, int64_t from, int64_t to, const Put& put) {
  if (row >= weight.outputs) {
    for (int64_t i = from; i < to; i += Vec::width) put(i, splat(0.0f));
    return;
  }
  const Code* codes = weight.codes + row * weight.stride;
  for (int64_t k = from; k < to;) {
    int64_t stop = to;
    Vec scale = splat(1.0f);
    if constexpr (scaled) {
      const int64_t column = k / weight.columns;
      if ((column + 1) * weight.columns < to) stop = (column + 1) * weight.columns;
      const S* scales = static_cast<const S*>(weight.scale) + row / weight.rows * weight.down;
      if (k < weight.inputs) scale = splat(number_of(scales[column]));
    }
    const auto number = [&](Vec code) {
      return scaled ? rounded(code * scale, static_cast<const S*>(nullptr)) : code;
    };
    const int64_t whole = weight.inputs < stop ? weight.inputs - Vec::width : stop - Vec::width;
    for (; k <= whole; k += Vec::width) put(k, number(load(codes + k)));
    for (; k < stop; k += Vec::width) {
      put(k, k < weight.inputs ? number(load_first(codes + k, weight.inputs - k)) : splat(0.0f));
    }
  }
}

// Inputs from..to of the 16 rows of a strip, rounded to the inputs' dtype X.
template <class Code, class S, class X>
void decode_strip(const Bytes<Code>& weight, int64_t strip, int64_t from, int64_t to, float* out,
                  int64_t step) {
  for (int64_t r = 0; r < kStrip; r++, out += step) {
    decode_row<S, true>(weight, strip * kStrip + r, from, to, [&](int64_t i, Vec number) {
      store(out + i - from, rounded(number, static_cast<const X*>(nullptr)));
    });
  }
}

// The same as bf16, in tiles [row][pair] (tiles.h) of 32 inputs.
template <class Code, class S>
void decode_tiles(const Bytes<Code>& weight, int64_t strip, int64_t tile_begin, int64_t tile_end,
                  uint32_t* words) {
  auto* out = reinterpret_cast<BFloat16*>(words);
  const int64_t from = tile_begin * 32;
  for (int64_t r = 0; r < kStrip; r++, out += 32) {
    decode_row<S, true>(weight, strip * kStrip + r, from, tile_end * 32,
                        [&](int64_t i, Vec number) {
                          const int64_t at = i - from;
                          store(out + at / 32 * (kStrip * 32) + at % 32, number);
                        });
  }
}

template <class Code, class S, class X>
void multiply_bytes(const Bytes<Code>& weight, const float* x, int64_t rows, int64_t depth,
                    const Epilogue& epilogue, int64_t begin, int64_t end, float* scratch) {
  multiply_strips(
      [&](int64_t strip, int64_t from, int64_t to, float* out, int64_t step) {
        decode_strip<Code, S, X>(weight, strip, from, to, out, step);
      },
      x, rows, depth, epilogue, begin, end, scratch);
}

// Dot products of int8 codes, in int32.
struct WideDots {
  // to[c to_step + r] = w row r . x row c, of `depth` codes
  template <int outputs, int rows>
  static void run(const int8_t* w, int64_t w_step, const int8_t* x, int64_t x_step, int64_t depth,
                  const int32_t*, float* to, int64_t to_step) {
    Sums sum_of[rows][outputs];
    for (int c = 0; c < rows; c++)
      for (int r = 0; r < outputs; r++) sum_of[c][r] = no_sums();
    int64_t k = 0;
    for (; k + Wide::width <= depth; k += Wide::width) {
      Wide weight[outputs];
      for (int r = 0; r < outputs; r++) weight[r] = widen(w + r * w_step + k);
      for (int c = 0; c < rows; c++) {
        const Wide input = widen(x + c * x_step + k);
        for (int r = 0; r < outputs; r++)
          sum_of[c][r] = add_products(sum_of[c][r], weight[r], input);
      }
    }
    for (int c = 0; c < rows; c++)
      for (int r = 0; r < outputs; r++) {
        int32_t all = total(sum_of[c][r]);
        for (int64_t i = k; i < depth; i++)
          all += int32_t{w[r * w_step + i]} * int32_t{x[c * x_step + i]};
        to[c * to_step + r] = static_cast<float>(all);
      }
  }
};

// Strips begin to end of y for int8 x; x_sums: the sums of x's rows, for dots that want them.
// scratch: kStrip * rows floats
template <class Dots>
void multiply_codes(const Bytes<int8_t>& weight, const Bytes<int8_t>& x, const int32_t* x_sums,
                    const Epilogue& epilogue, int64_t begin, int64_t end, float* scratch) {
  const Write write = writer(epilogue);
  const int64_t rows = x.outputs, depth = weight.inputs;
  for (int64_t strip = begin; strip < end; strip++) {
    const int64_t first = strip * kStrip;
    const int64_t count = weight.outputs - first < kStrip ? weight.outputs - first : kStrip;
    const int8_t* codes = weight.codes + first * weight.stride;
    int64_t r = 0;
    for (; r + kOutputs <= count; r += kOutputs) {
      const int8_t* w = codes + r * weight.stride;
      int64_t c = 0;
      for (; c + kRows <= rows; c += kRows)
        Dots::template run<kOutputs, kRows>(w, weight.stride, x.codes + c * x.stride, x.stride,
                                            depth, x_sums + c, scratch + c * kStrip + r, kStrip);
      for (; c < rows; c++)
        Dots::template run<kOutputs, 1>(w, weight.stride, x.codes + c * x.stride, x.stride, depth,
                                        x_sums + c, scratch + c * kStrip + r, kStrip);
    }
    for (; r < count; r++)
      for (int64_t c = 0; c < rows; c++)
        Dots::template run<1, 1>(codes + r * weight.stride, 0, x.codes + c * x.stride, 0, depth,
                                 x_sums + c, scratch + c * kStrip + r, kStrip);
    for (int64_t c = 0; c < rows; c++) write(epilogue, c, first, count, scratch + c * kStrip);
  }
}

inline void multiply_wide_codes(const Bytes<int8_t>& weight, const Bytes<int8_t>& x,
                                const int32_t* x_sums, const Epilogue& epilogue, int64_t begin,
                                int64_t end, float* scratch) {
  multiply_codes<WideDots>(weight, x, x_sums, epilogue, begin, end, scratch);
}

// `count` numbers, `stride` apart, as fp32.
template <class T>
void gather_floats(const T* from, int64_t stride, int64_t count, float* out) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + Vec::width <= count; i += Vec::width) store(out + i, load(from + i));
  for (; i < count; i++) out[i] = number_of(from[i * stride]);
}

}  // namespace slmperf::SLMPERF_ISA
