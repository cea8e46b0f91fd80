// Kernels with one fault each, which csrc/cuda/emulate.h has to find: of 64 threads, 1 KiB of
// shared memory and, in `memory`, 16 floats that may be read and 16 that may be written.

#include <cstdio>

#include "cuda/kernels/device.cuh"

namespace slmperf {
namespace {

using Kernel = void (*)(const float* memory);

int own() { return static_cast<int>(threadIdx.x); }

void right(const float* memory) {
  copy_async(own() * 16, memory, 16);
  copy_commit();
  copy_wait<0>();
  barrier();
  const float value = shared_load<float>((63 - own()) * 16);
  if (own() < 16) store(const_cast<float*>(memory) + 16 + own(), value);
}
void copy_not_waited_for(const float* memory) {
  copy_async(own() * 16, memory, 16);
  copy_commit();
  copy_wait<1>();
  shared_load<float>(own() * 16);
}
void copy_never_waited_for(const float* memory) {
  copy_async(own() * 16, memory, 16);
  copy_commit();
}
void copy_without_a_barrier(const float* memory) {
  copy_async(own() * 16, memory, 16);
  copy_commit();
  copy_wait<0>();
  if (own() == 63) barrier();
  shared_load<float>((63 - own()) * 16);
}
void copy_into_what_is_read(const float* memory) {
  shared_store<float>(own() * 16, 1);
  barrier();
  shared_load<float>((63 - own()) * 16);
  copy_async(own() * 16, memory, 16);
  copy_commit();
  copy_wait<0>();
}
void copy_misaligned(const float* memory) { copy_async(own() * 16, memory + 1, 16); }
void copy_too_far(const float* memory) { copy_async(own() * 16, memory + 128, 16); }
void read_without_a_barrier(const float*) {
  shared_store<float>(own() * 4, 1);
  shared_load<float>((own() ^ 1) * 4);
}
void write_without_a_barrier(const float*) {
  shared_store<float>(own() * 4, 1);
  barrier();
  shared_load<float>((own() ^ 1) * 4);
  shared_store<float>(own() * 4, 2);
}
void two_writers(const float*) { shared_store<float>(0, 1); }
void never_written(const float*) { shared_load<float>(0); }
void out_of_bounds(const float*) { shared_store<float>(1024 + own() * 4, 1); }
void read_beside(const float* memory) { load(memory - 1); }
void write_where_only_read(const float* memory) { store(const_cast<float*>(memory), 1.0f); }
void different_instructions(const float*) {
  shared_store<uint4>(own() * 16, uint4{});
  float sums[4] = {};
  if (own() % 2) {
    load_matrices(own() * 16);
  } else {
    multiply_add<Half>(sums, {}, 0, 0);
  }
}
void half_a_warp(const float*) {
  shared_store<uint4>(own() * 16, uint4{});
  if (own() % 2) load_matrices(own() * 16);
}
void not_at_the_barrier(const float*) {
  if (own()) barrier();
}
void peer_without_a_barrier(const float*) {
  shared_store<float>(own() * 4, 1);
  barrier();
  peer_load(own() * 4, 1 - blockIdx.y);
}
void peer_has_ended(const float*) {
  shared_store<float>(own() * 4, 1);
  cluster_barrier();
  if (blockIdx.y == 0) peer_load(own() * 4, 1);
}

constexpr struct {
  const char* name;
  Kernel kernel;
} kKernels[] = {
    {"right", right},
    {"copy_not_waited_for", copy_not_waited_for},
    {"copy_never_waited_for", copy_never_waited_for},
    {"copy_without_a_barrier", copy_without_a_barrier},
    {"copy_into_what_is_read", copy_into_what_is_read},
    {"copy_misaligned", copy_misaligned},
    {"copy_too_far", copy_too_far},
    {"read_without_a_barrier", read_without_a_barrier},
    {"write_without_a_barrier", write_without_a_barrier},
    {"two_writers", two_writers},
    {"never_written", never_written},
    {"out_of_bounds", out_of_bounds},
    {"read_beside", read_beside},
    {"write_where_only_read", write_where_only_read},
    {"different_instructions", different_instructions},
    {"half_a_warp", half_a_warp},
    {"not_at_the_barrier", not_at_the_barrier},
    {"peer_without_a_barrier", peer_without_a_barrier},
    {"peer_has_ended", peer_has_ended},
};

}  // namespace
}  // namespace slmperf

// A line for each kernel, in two orders of its threads: its name, and what was found.
int main() {
  using namespace slmperf;
  alignas(16) static float memory[33];
  const auto begin = reinterpret_cast<uint64_t>(memory);
  emulate::world.ranges = {{begin, begin + 64, 0}, {begin + 64, begin + 128, 1}};
  for (const auto& [name, kernel] : kKernels) {
    for (emulate::world.seed = 0; emulate::world.seed < 2; emulate::world.seed++) {
      const char* found = "nothing";
      std::string text;
      try {
        emulate::run({1, 2, 1}, 64, 1024, 2, [kernel] { kernel(memory); });
      } catch (const std::exception& fault) {
        found = (text = fault.what()).c_str();
      }
      std::printf("%s: %s\n", name, found);
    }
  }
}
