// eliminate on CPU, for groups of one column. Every column is computed on its own, in one order: no
// bit depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"

namespace slmperf::elimination {

// Rows of L and U that the pivot's rows are out of date by, row-major, and their values in its
// column.
struct Waiting {
  const double *l, *u, *ahead_l, *ahead_u;
  int64_t count, stride;
};

}  // namespace slmperf::elimination

#define SLMPERF_ROWS "cpu/eliminate_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "eliminate";
constexpr int64_t kChunk = 1024;              // columns of a task
constexpr int64_t kWorthAThread = 64 * 1024;  // values of waiting rows that a thread reads

struct Candidate {
  double cost = std::numeric_limits<double>::infinity();
  int64_t group = -1;
};

struct State {
  double *m, *q;  // diagonals
  const bool* alive;
  const int64_t *family, *quota;

  // The cheapest of a range of groups, the first of equals; NaN before all others.
  Candidate cheapest(int64_t begin, int64_t end) const {
    Candidate best;
    for (int64_t g = begin; g < end; g++) {
      if (!alive[g] || quota[family[g]] <= 0) continue;
      const double cost = m[g] > 0 ? std::max(0.0, q[g] / m[g] / 2) : std::nan("");
      if (std::isnan(cost)) return {cost, g};
      if (cost < best.cost) best = {cost, g};
    }
    return best;
  }
};

Candidate cheaper(const std::vector<Candidate>& candidates) {
  Candidate best;
  for (const Candidate& one : candidates) {
    if (std::isnan(one.cost)) return one;
    if (one.cost < best.cost) best = one;
  }
  return best;
}

template <class T>
T* values(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor eliminate(Tensor inverse, Tensor square, Tensor blocks_m, Tensor blocks_q, Tensor order,
                 Tensor place, Tensor alive, Tensor family, Tensor quota, int64_t start,
                 int64_t steps, int64_t active) {
  const int64_t size = order.size(0);
  check_tensor(kOp, "inverse", inverse, ScalarType::Double, {{"d", size}, {"d", size}});
  check_tensor(kOp, "square", square, ScalarType::Double, {{"d", size}, {"d", size}});
  check_tensor(kOp, "blocks_m", blocks_m, ScalarType::Double, {{"d", size}, {"1", 1}, {"1", 1}});
  check_tensor(kOp, "blocks_q", blocks_q, ScalarType::Double, {{"d", size}, {"1", 1}, {"1", 1}});
  check_tensor(kOp, "order", order, ScalarType::Long, {{"d", size}});
  check_tensor(kOp, "place", place, ScalarType::Long, {{"d", size}});
  check_tensor(kOp, "alive", alive, ScalarType::Bool, {{"d", size}});
  check_tensor(kOp, "family", family, ScalarType::Long, {{"d", size}});
  check_tensor(kOp, "quota", quota, ScalarType::Long, {{"f", quota.size(0)}});
  STD_TORCH_CHECK(0 <= start && 0 <= steps && start + steps <= size && active <= size, kOp,
                  ": start ", start, ", steps ", steps, ", active ", active, " do not fit ", size,
                  " groups");

  const auto* families = static_cast<const int64_t*>(family.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(families, families + size,
                              [&](int64_t f) { return 0 <= f && f < quota.size(0); }),
                  kOp, ": family names more families than the ", quota.size(0), " of quota");

  Tensor made = torch::stable::new_empty(inverse, {steps});
  double* costs = values<double>(made);
  std::fill(costs, costs + steps, std::numeric_limits<double>::infinity());
  double *m = values<double>(inverse), *q = values<double>(square);
  int64_t *group_of = values<int64_t>(order), *block_of = values<int64_t>(place);
  bool* living = values<bool>(alive);
  int64_t* left = values<int64_t>(quota);
  const State state{values<double>(blocks_m), values<double>(blocks_q), living, families, left};

  const auto pivot_columns = SLMPERF_PICK(pivot_columns);
  std::vector<Candidate> best((size + kChunk - 1) / kChunk);
  std::vector<double> ahead_l(steps), ahead_u(steps);
  Candidate next = state.cheapest(0, size);
  for (int64_t step = 0; step < steps && next.group >= 0; step++) {
    const int64_t group = next.group, block = block_of[group], pivot = start + step;
    if (std::isnan(next.cost)) {
      costs[step] = next.cost;
      break;
    }
    if (block >= active) break;
    costs[step] = next.cost;
    for (int64_t p = 0; p < step; p++) {
      ahead_l[p] = m[(start + p) * size + group];
      ahead_u[p] = q[(start + p) * size + group];
    }
    const double scale = 1 / std::sqrt(state.m[group]);
    const double half = state.q[group] * scale * scale / 2;
    const int64_t moved = group_of[pivot];
    group_of[block] = moved, block_of[moved] = block;
    group_of[pivot] = group, block_of[group] = pivot;
    living[group] = false;
    left[families[group]]--;
    const auto chunks = [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t from = chunk * kChunk, to = std::min(size, from + kChunk);
        pivot_columns(
            {m + start * size, q + start * size, ahead_l.data(), ahead_u.data(), step, size},
            m + block * size, q + block * size, m + pivot * size, q + pivot * size, scale, half,
            state.m, state.q, from, to);
        best[chunk] = state.cheapest(from, to);
      }
    };
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / (kChunk * (2 * step + 8)));
    torch::stable::parallel_for(0, static_cast<int64_t>(best.size()), grain, chunks);
    next = cheaper(best);
  }
  return made;
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("eliminate.cpu", TORCH_BOX(&slmperf::eliminate));
}
