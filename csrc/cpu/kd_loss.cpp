// The row phases of kd_loss on CPU, private operators that slmperf/ops/kd_loss/chunks.py calls
// between matrix products, on chunks of logits that are in the cache. One row per task and sums in
// a fixed order, so no result depends on the number of threads.
//
//   statistics   logits -> ranges (T, 8, 1) fp64, the sums of the first walk
//   join         ranges (T, 8, n), of one or more shards of the vocabulary
//                -> divergence (T,), cross entropy (T,), statistics (T, 7)
//   second       logits, statistics -> means (T, 4, 1) fp64, for the kinds that walk twice
//   join_second  means (T, 4, n) -> divergence and statistics in place
//   gradient     logits, statistics, scales of the rows (T,) -> (T, V), in place where asked
//   softcap_     logits = cap tanh(logits / cap)
//   huge_pages_  a request to the system for fresh memory, before anything is in it

#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>

#include "cpu/divergence_join.h"
#include "cpu/logits.h"

#define SLMPERF_ROWS "cpu/kd_loss_rows.h"
#include "cpu/each_isa.h"

namespace slmperf {
namespace {

using divergence::Labels;
using divergence::Logits;
using divergence::Means;
using divergence::Range;
using divergence::Scales;
using divergence::Settings;
using divergence::Statistics;

constexpr const char* kOp = "kd_loss";
constexpr int64_t kStatistics = sizeof(Statistics) / sizeof(float);

Kind kind_or_none(const std::string& name) {
  return name == "none" ? Kind::none : kind_of(kOp, name);
}

// A chunk is a buffer of the caller's: laid out otherwise it would be copied, and not written.
void check_packed(const char* argument, const Tensor& logits) {
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) <= 1, kOp, ": ", argument,
                  " has gaps between the logits of a row, expected none");
}

void check_logits(const Tensor& student, const Tensor* teacher, Kind kind) {
  check_student(kOp, student);
  check_packed("student", student);
  STD_TORCH_CHECK((teacher == nullptr) == (kind == Kind::none), kOp, ": teacher is ",
                  teacher ? "a tensor" : "None", ", expected ",
                  teacher ? "None for kind none" : "logits");
  if (!teacher) return;
  check_teacher(kOp, student, *teacher);
  check_packed("teacher", *teacher);
}

Labels check_labels(const Tensor& student, const std::optional<Tensor>& labels) {
  if (!labels) return {nullptr, 0};
  check_shape(kOp, "labels", *labels, {{"T", student.size(0)}});
  check_dtype(kOp, "labels", *labels, ScalarType::Long);
  return {static_cast<const int64_t*>(labels->const_data_ptr()), labels->stride(0)};
}

// A contiguous tensor of rows, as the records that it holds.
template <class Record, class Element>
const Record* records(const char* argument, const Tensor& tensor, int64_t rows, ScalarType dtype) {
  constexpr int64_t columns = sizeof(Record) / sizeof(Element);
  check_shape(kOp, argument, tensor, {{"T", rows}, {"columns", columns}});
  check_dtype(kOp, argument, tensor, dtype);
  STD_TORCH_CHECK(tensor.is_contiguous(), kOp, ": ", argument, " is strided, expected contiguous");
  return static_cast<const Record*>(tensor.const_data_ptr());
}

const Statistics* records_of(const Tensor& statistics, int64_t rows) {
  return records<Statistics, float>("statistics", statistics, rows, ScalarType::Float);
}

const float* row_scale(const char* argument, const Tensor& scale, int64_t rows) {
  check_shape(kOp, argument, scale, {{"T", rows}});
  check_dtype(kOp, argument, scale, ScalarType::Float);
  STD_TORCH_CHECK(rows < 2 || scale.stride(0) == 1, kOp, ": ", argument,
                  " is strided, expected contiguous");
  return static_cast<const float*>(scale.const_data_ptr());
}

// (T, columns, n) fp64 ranges, contiguous; returns n.
int64_t check_ranges(const Tensor& ranges, int64_t columns) {
  STD_TORCH_CHECK(ranges.dim() == 3 && ranges.size(1) == columns && ranges.size(2) > 0, kOp,
                  ": ranges is ",
                  in_parentheses(ranges.sizes(), [](int64_t size) { return std::to_string(size); }),
                  ", expected (T, ", columns, ", n)");
  check_dtype(kOp, "ranges", ranges, ScalarType::Double);
  return ranges.size(2);
}

Tensor statistics(Tensor student, std::optional<Tensor> teacher, std::optional<Tensor> labels,
                  std::string kind, double temperature, bool cross_entropy) {
  const Kind chosen = kind_or_none(kind);
  const Tensor* taught = teacher ? &*teacher : nullptr;
  check_logits(student, taught, chosen);
  const Labels local = check_labels(student, labels);
  Tensor ranges = torch::stable::new_empty(student, {student.size(0), divergence::kRange, 1},
                                           ScalarType::Double);
  auto* out = static_cast<Range*>(ranges.mutable_data_ptr());
  with_element(kOp, "student", student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student, taught);
    const auto run = SLMPERF_PICK(statistics_rows<T>);
    each_row(student.size(0), student.size(1), [&](int64_t begin, int64_t end) {
      run(logits, chosen, temperature, cross_entropy, local, out, begin, end);
    });
  });
  return ranges;
}

std::tuple<Tensor, Tensor, Tensor> join(Tensor ranges, std::string kind, double temperature) {
  const Kind chosen = kind_or_none(kind);
  const int64_t rows = ranges.size(0), count = check_ranges(ranges, divergence::kRange);
  const Tensor packed = torch::stable::contiguous(ranges);
  Tensor value = torch::stable::new_empty(ranges, {rows}, ScalarType::Float);
  Tensor cross_entropy = torch::stable::new_empty(ranges, {rows}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(ranges, {rows, kStatistics}, ScalarType::Float);
  const auto* from = static_cast<const double*>(packed.const_data_ptr());
  auto* values = static_cast<float*>(value.mutable_data_ptr());
  auto* losses = static_cast<float*>(cross_entropy.mutable_data_ptr());
  auto* statistics = static_cast<Statistics*>(kept.mutable_data_ptr());
  const double inverse_temperature = 1.0 / temperature;
  for (int64_t row = 0; row < rows; row++) {
    const Range range = divergence::join(from + row * divergence::kRange * count, count,
                                         weights(chosen), inverse_temperature);
    values[row] = static_cast<float>(settle(range, chosen, inverse_temperature, statistics[row]));
    losses[row] = static_cast<float>(divergence::cross_entropy(range));
  }
  return {value, cross_entropy, kept};
}

Tensor second(Tensor student, Tensor teacher, Tensor statistics, std::string kind, double weight,
              double temperature) {
  const Settings chosen{kind_or_none(kind), weight, temperature};
  STD_TORCH_CHECK(walks_twice(chosen.kind), kOp, ": kind is ", kind,
                  ", expected one that takes a second walk");
  check_logits(student, &teacher, chosen.kind);
  const auto* kept = records_of(statistics, student.size(0));
  Tensor means = torch::stable::new_empty(student, {student.size(0), divergence::kMeans, 1},
                                          ScalarType::Double);
  auto* out = static_cast<Means*>(means.mutable_data_ptr());
  with_element(kOp, "student", student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student, &teacher);
    const auto run = SLMPERF_PICK(second_rows<T>);
    each_row(student.size(0), student.size(1),
             [&](int64_t begin, int64_t end) { run(logits, chosen, kept, out, begin, end); });
  });
  return means;
}

void join_second(Tensor ranges, std::string kind, double weight, Tensor value, Tensor statistics) {
  const Kind chosen = kind_or_none(kind);
  const int64_t rows = ranges.size(0), count = check_ranges(ranges, divergence::kMeans);
  auto* values = const_cast<float*>(row_scale("divergence", value, rows));
  auto* kept = const_cast<Statistics*>(records_of(statistics, rows));
  const Tensor packed = torch::stable::contiguous(ranges);
  const auto* from = static_cast<const double*>(packed.const_data_ptr());
  for (int64_t row = 0; row < rows; row++) {
    double column[divergence::kMeans] = {};
    for (int64_t k = 0; k < divergence::kMeans; k++) {
      for (int64_t i = 0; i < count; i++) column[k] += *from++;
    }
    const Means means{column[0], column[1], column[2], column[3]};
    values[row] = static_cast<float>(settle(means, chosen, weight, kept[row]));
  }
}

void gradient(Tensor student, std::optional<Tensor> teacher, Tensor statistics,
              std::optional<Tensor> labels, Tensor divergence_scale,
              std::optional<Tensor> cross_entropy_scale, std::string kind, double weight,
              double temperature, double softcap, Tensor out) {
  const Settings chosen{kind_or_none(kind), weight, temperature};
  const Tensor* taught = teacher ? &*teacher : nullptr;
  check_logits(student, taught, chosen.kind);
  const int64_t rows = student.size(0);
  const auto* kept = records_of(statistics, rows);
  const Labels local = check_labels(student, labels);
  const Scales scales{
      row_scale("divergence_scale", divergence_scale, rows),
      cross_entropy_scale ? row_scale("cross_entropy_scale", *cross_entropy_scale, rows) : nullptr};
  check_shape(kOp, "out", out, {{"T", rows}, {"V", student.size(1)}});
  check_packed("out", out);
  // fp32 logits may give way to a narrower gradient.
  if (student.scalar_type() != ScalarType::Float) {
    check_dtype(kOp, "out", out, student.scalar_type());
  }
  with_element(kOp, "student", student, [&](auto element) {
    using T = decltype(element);
    const Logits<T> logits = view<T>(student, taught);
    const auto write = [&](auto result) {
      using Out = decltype(result);
      auto* to = static_cast<Out*>(out.mutable_data_ptr());
      const int64_t stride = out.stride(0);
      const auto run = SLMPERF_PICK(gradient_rows<T, Out>);
      each_row(student.size(0), student.size(1), [&](int64_t begin, int64_t end) {
        run(logits, chosen, kept, scales, softcap, local, to, stride, begin, end);
      });
    };
    if constexpr (sizeof(T) == sizeof(float)) {
      with_element(kOp, "out", out, write);
    } else {
      write(element);
    }
  });
}

void softcap_(Tensor logits, double cap) {
  check_student(kOp, logits);
  check_packed("logits", logits);
  with_element(kOp, "logits", logits, [&](auto element) {
    using T = decltype(element);
    auto* x = static_cast<T*>(logits.mutable_data_ptr());
    const int64_t stride = logits.stride(0), vocabulary = logits.size(1);
    const auto run = SLMPERF_PICK(softcap_rows<T>);
    each_row(logits.size(0), logits.size(1),
             [&](int64_t begin, int64_t end) { run(x, stride, vocabulary, cap, begin, end); });
  });
}

// Fresh memory comes in pages of 4 KiB, each at the price of a fault: for the buffers of a call
// some 3 % of its time. In pages of 2 MiB there are 512 times fewer. Whether the system does it is
// its own matter.
void huge_pages_(Tensor memory) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t end = begin + memory.numel() * memory.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace slmperf

STABLE_TORCH_LIBRARY_FRAGMENT(slmperf, m) {
  m.def(
      "kd_statistics.cpu(Tensor student, Tensor? teacher, Tensor? labels, str kind, float "
      "temperature,"
      " bool cross_entropy) -> Tensor");
  m.def("kd_join.cpu(Tensor ranges, str kind, float temperature) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kd_second.cpu(Tensor student, Tensor teacher, Tensor statistics, str kind, float weight,"
      " float temperature) -> Tensor");
  m.def(
      "kd_join_second.cpu(Tensor ranges, str kind, float weight, Tensor(a!) divergence,"
      " Tensor(b!) statistics) -> ()");
  m.def(
      "kd_gradient.cpu(Tensor student, Tensor? teacher, Tensor statistics, Tensor? labels,"
      " Tensor divergence_scale, Tensor? cross_entropy_scale, str kind, float weight,"
      " float temperature, float softcap, Tensor(a!) out) -> ()");
  m.def("kd_softcap_.cpu(Tensor(a!) logits, float cap) -> ()");
  m.def("kd_huge_pages_.cpu(Tensor(a!) memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(slmperf, CPU, m) {
  m.impl("kd_statistics.cpu", TORCH_BOX(&slmperf::statistics));
  m.impl("kd_join.cpu", TORCH_BOX(&slmperf::join));
  m.impl("kd_second.cpu", TORCH_BOX(&slmperf::second));
  m.impl("kd_join_second.cpu", TORCH_BOX(&slmperf::join_second));
  m.impl("kd_gradient.cpu", TORCH_BOX(&slmperf::gradient));
  m.impl("kd_softcap_.cpu", TORCH_BOX(&slmperf::softcap_));
  m.impl("kd_huge_pages_.cpu", TORCH_BOX(&slmperf::huge_pages_));
}
