// Rows of a matrix on the threads that torch has.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace slmperf {

// Calls f(begin, end) for ranges of rows of `columns` numbers, on one thread or more.
template <class F>
void each_row(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 15;  // numbers
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, f);
}

}  // namespace slmperf
