// round_columns over a tile of outputs. Formulas: slmperf/ops/round_columns.py.
// Compiled once per instruction set by each_isa.h.

namespace slmperf::SLMPERF_ISA {

using rounding::Block;
using rounding::Grid;

constexpr int kVectors = 4;  // side by side: as many chains of sums as hide a sum's latency
constexpr int kTile = kVectors * Vec::width;

// The nearest value of fp8 e4m3: a whole number of steps of an eighth of the power of 2 below, or
// of 2^-9, to the even one of two.
inline Vec nearest_e4m3(Vec x) {
  const Vec step = at_least(0.001953125f, power_of_2_below(x) * splat(0.125f));
  return round(x / step) * step;
}

template <Grid grid>
inline Vec nearest(Vec target, Vec scale, Vec zero, float lowest, float highest) {
  if constexpr (grid == Grid::none) return target;
  Vec code = target / scale;
  if constexpr (grid == Grid::integer) code = round(code) + zero;
  code = at_most(highest, at_least(lowest, code));
  if constexpr (grid == Grid::e4m3) return nearest_e4m3(code) * scale;
  return (code - zero) * scale;
}

// `rows` <= kTile outputs from `first` on. steps (block.columns, kTile) is scratch.
template <Grid grid>
void round_tile(const Block& block, int64_t first, int64_t rows, float* steps) {
  float part[4][kTile];  // current, gradient, scale and zero point of a column
  const auto fetch = [&](float* to, const float* from) {
    if (from != nullptr) std::memcpy(to, from + first, rows * sizeof(float));
  };
  for (int64_t r = 0; r < kTile; r++)
    part[0][r] = part[1][r] = part[3][r] = 0.0f, part[2][r] = 1.0f;
  for (int64_t j = 0; j < block.columns; j++) {
    const int64_t place = j * block.outputs, group = block.group[j] * block.outputs;
    const float* row = block.coefficients + j * block.columns;
    fetch(part[0], block.current + place);
    fetch(part[1], block.gradient + place);
    fetch(part[2], block.scale + group);
    if (block.zero_point != nullptr) fetch(part[3], block.zero_point + group);
    Vec sum[kVectors];
    for (int v = 0; v < kVectors; v++) sum[v] = load(part[1] + v * Vec::width);
    for (int64_t i = 0; i < j; i++) {
      const Vec factor = splat(-row[i]);
      for (int v = 0; v < kVectors; v++)
        sum[v] = fma(factor, load(steps + i * kTile + v * Vec::width), sum[v]);
    }
    const Vec diagonal = splat(row[j]);
    for (int v = 0; v < kVectors; v++) {
      const int at = v * Vec::width;
      const Vec old = load(part[0] + at);
      Vec made = nearest<grid>(old + sum[v] / diagonal, load(part[2] + at), load(part[3] + at),
                               block.lowest, block.highest);
      store(part[0] + at, made);
    }
    if (block.keep != nullptr)
      for (int64_t r = 0; r < rows; r++)
        if (!block.keep[place + first + r]) part[0][r] = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
      float& old = block.current[place + first + r];
      steps[j * kTile + r] = part[0][r] - old;
      old = part[0][r];
    }
    for (int64_t r = rows; r < kTile; r++) steps[j * kTile + r] = part[0][r] = 0.0f;
  }
}

inline void round_outputs(const Block& block, int64_t first, int64_t end, float* steps) {
  for (; first < end; first += kTile) {
    const int64_t rows = end - first < kTile ? end - first : kTile;
    if (block.grid == Grid::none) round_tile<Grid::none>(block, first, rows, steps);
    if (block.grid == Grid::integer) round_tile<Grid::integer>(block, first, rows, steps);
    if (block.grid == Grid::e4m3) round_tile<Grid::e4m3>(block, first, rows, steps);
  }
}

}  // namespace slmperf::SLMPERF_ISA
