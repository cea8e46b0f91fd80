// Runs kernels of csrc/cuda/kernels on a processor, for tests, and looks on as strictly as it can.
// emulate_device.h gives what kernels call.
//
// Every CUDA thread is a fiber; which one goes on is drawn anew wherever one has to wait (seed 0:
// the first, 1: the last that could). A fault ends the run with a line that says what, where:
//
//   shared memory   every byte knows who wrote and read it, and after how many barriers: reading
//                   another thread's byte, or writing what another has read, without a barrier in
//                   between; bytes that nobody wrote; out of bounds; a block that has ended
//   cp.async        bytes arrive when they are waited for, not before: touching them earlier;
//                   misaligned ends; ending with copies that nobody waited for
//   global memory   reading or writing outside of the ranges that a test allows
//   warps, barriers lanes that meet at different instructions; threads that never meet
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};

namespace slmperf {

struct Fragment {
  uint32_t part[4];
};

namespace emulate {

struct Index {
  uint32_t x = 0, y = 0, z = 0;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Range {  // of global memory: [begin, end)
  uint64_t begin, end, writable;
};

struct Byte {
  int32_t writer = -1, written = 0, written_cluster = 0;  // thread; its barriers before
  int32_t reader = -1, read = -1, read_cluster = -1;      // -2: several threads
  int32_t copier = -1;                                    // whose cp.async is under way
};

struct Copy {
  uint32_t offset, bytes;
  const void* from;
};

struct Thread;

// Where threads wait for each other; the last one lets all go on.
struct Meeting {
  std::vector<Thread*> here;
};

struct Warp {
  Meeting meeting;
  int kind = 0;
  uint32_t offsets[32];
  Fragment a[32], out[32];
  uint32_t b[32][2];
  float* sums[32];
};

struct Block {
  Index index;
  uint32_t rank = 0;
  std::vector<uint8_t> bytes;
  std::vector<Byte> state;
  std::vector<Warp> warps;
  Meeting meeting;
  int peers_read = -1;  // cluster barriers that a peer had passed when it last read from here
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int index = 0, id = 0;  // in its block, in its cluster
  int barriers = 0, cluster_barriers = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool done = false;
};

// The blocks that run together, their threads, and what a test allows them.
struct World {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> ready;
  Meeting cluster;
  Thread* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<Range> ranges;
  std::mt19937_64 random;
  uint64_t seed = 0;
  std::exception_ptr fault;
};

inline World world;

inline std::string here() {
  const Thread& t = *world.current;
  return "block (" + std::to_string(t.block->index.x) + ", " + std::to_string(t.block->index.y) +
         ", " + std::to_string(t.block->index.z) + ") thread " + std::to_string(t.index) + ": ";
}

[[noreturn]] inline void fail(const std::string& what) { throw Fault(here() + what); }

}  // namespace emulate
}  // namespace slmperf

inline slmperf::emulate::Index threadIdx, blockIdx, blockDim, gridDim;

namespace slmperf {
namespace emulate {

inline void pause() {
  Thread* own = world.current;
  swapcontext(&own->context, &world.scheduler);
}

// Wait until `all` threads are at the meeting; whether this one was the last, which acts for all.
inline void meet(Meeting& meeting, size_t all, const std::function<void()>& act) {
  meeting.here.push_back(world.current);
  if (meeting.here.size() < all) return pause();
  act();
  for (Thread* one : meeting.here) {
    if (one != world.current) world.ready.push_back(one);
  }
  meeting.here.clear();
}

// --- shared memory ------------------------------------------------------------------------------

inline void check_bounds(const Block& block, uint32_t offset, uint32_t size, uint32_t alignment) {
  if (offset + uint64_t{size} > block.bytes.size()) {
    fail("shared memory at " + std::to_string(offset) + ", of " +
         std::to_string(block.bytes.size()) + " bytes");
  }
  if (offset % alignment) fail("shared memory at " + std::to_string(offset) + " is misaligned");
}

// Whether what another thread did, after so many barriers, is known to be over.
inline bool over(const Block& block, int barriers, int cluster_barriers) {
  const Thread& own = *world.current;
  if (own.cluster_barriers > cluster_barriers) return true;
  return own.block == &block && own.barriers > barriers;
}

inline void read_bytes(Block& block, uint32_t offset, uint32_t size) {
  Thread& own = *world.current;
  for (uint32_t i = offset; i < offset + size; i++) {
    Byte& byte = block.state[i];
    const bool fresh = byte.writer != own.id && !over(block, byte.written, byte.written_cluster);
    if (byte.copier >= 0 || byte.writer < 0 || fresh) {
      fail("shared byte " + std::to_string(i) + " is read " +
           (byte.copier >= 0  ? "before its cp.async was waited for"
            : byte.writer < 0 ? "and was never written"
                              : "without a barrier after another thread wrote it"));
    }
    const bool same = byte.read == own.barriers && byte.read_cluster == own.cluster_barriers;
    byte.reader = same && byte.reader != own.id ? -2 : own.id;
    byte.read = own.barriers;
    byte.read_cluster = own.cluster_barriers;
  }
}

inline void check_writable(Block& block, uint32_t offset, uint32_t size) {
  const int own = world.current->id;
  for (uint32_t i = offset; i < offset + size; i++) {
    const Byte& byte = block.state[i];
    const bool being_read =
        byte.reader != -1 && byte.reader != own && !over(block, byte.read, byte.read_cluster);
    const bool fresh =
        byte.writer >= 0 && byte.writer != own && !over(block, byte.written, byte.written_cluster);
    if (byte.copier >= 0 || being_read || fresh) {
      fail("shared byte " + std::to_string(i) + " is written " +
           (byte.copier >= 0 ? "while a cp.async to it is under way"
            : being_read     ? "without a barrier after another thread read it"
                             : "without a barrier after another thread wrote it"));
    }
  }
}

inline void mark_written(Block& block, uint32_t offset, uint32_t size) {
  for (uint32_t i = offset; i < offset + size; i++) {
    Byte& byte = block.state[i];
    byte.writer = world.current->id;
    byte.written = world.current->barriers;
    byte.written_cluster = world.current->cluster_barriers;
    byte.copier = -1;
  }
}

// --- global memory ------------------------------------------------------------------------------

inline void check_global(const void* at, uint64_t size, bool writes) {
  const uint64_t begin = reinterpret_cast<uint64_t>(at);
  auto after = std::upper_bound(world.ranges.begin(), world.ranges.end(), begin,
                                [](uint64_t a, const Range& range) { return a < range.begin; });
  const Range* range = after == world.ranges.begin() ? nullptr : &*std::prev(after);
  if (!range || begin + size > range->end || (writes && !range->writable)) {
    fail(std::string(writes ? "writes" : "reads") + " " + std::to_string(size) +
         " bytes of global memory that are not the operation's");
  }
}

// --- running ------------------------------------------------------------------------------------

inline void of_thread() {
  try {
    world.kernel();
    Thread& own = *world.current;
    if (!own.groups.empty() || !own.open.empty()) {
      for (const auto& group : own.groups) {
        if (!group.empty()) fail("ends with a cp.async that nobody waited for");
      }
      if (!own.open.empty()) fail("ends with a cp.async that belongs to no group");
    }
    own.done = true;
  } catch (...) {
    world.fault = std::current_exception();
  }
  pause();
}

// A grid of blocks, `cluster` of which, side by side in y, run together; the rest one by one.
// Raises Fault.
inline void run(Index grid, int threads, uint32_t bytes, int cluster,
                const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  gridDim = grid;
  blockDim = {static_cast<uint32_t>(threads), 1, 1};
  world.kernel = kernel;
  world.fault = nullptr;
  for (uint32_t z = 0; z < grid.z; z++) {
    for (uint32_t y = 0; y < grid.y; y += cluster) {
      for (uint32_t x = 0; x < grid.x; x++) {
        world.blocks.clear();
        world.threads.clear();
        world.ready.clear();
        world.cluster.here.clear();
        for (int rank = 0; rank < cluster; rank++) {
          auto block = std::make_unique<Block>();
          block->index = {x, y + rank, z};
          block->rank = rank;
          block->bytes.assign(bytes, 0xff);
          block->state.assign(bytes, Byte{});
          block->warps.resize((threads + 31) / 32);
          for (int i = 0; i < threads; i++) {
            auto thread = std::make_unique<Thread>();
            thread->block = block.get();
            thread->index = i;
            thread->id = rank * threads + i;
            thread->stack.reset(new char[kStack]);
            getcontext(&thread->context);
            thread->context.uc_stack.ss_sp = thread->stack.get();
            thread->context.uc_stack.ss_size = kStack;
            thread->context.uc_link = nullptr;
            makecontext(&thread->context, &of_thread, 0);
            world.ready.push_back(thread.get());
            world.threads.push_back(std::move(thread));
          }
          world.blocks.push_back(std::move(block));
        }
        while (!world.ready.empty()) {
          const size_t count = world.ready.size();
          const size_t pick = world.seed == 0   ? 0
                              : world.seed == 1 ? count - 1
                                                : world.random() % count;
          Thread* next = world.ready[pick];
          world.ready.erase(world.ready.begin() + pick);
          world.current = next;
          threadIdx = {static_cast<uint32_t>(next->index), 0, 0};
          blockIdx = next->block->index;
          swapcontext(&world.scheduler, &next->context);
          if (world.fault) std::rethrow_exception(world.fault);
        }
        for (const auto& thread : world.threads) {
          world.current = thread.get();
          if (!thread->done) fail("waits for threads that never come");
          if (thread->block->peers_read >= thread->cluster_barriers) {
            fail("may have ended while its cluster still reads from its block");
          }
        }
      }
    }
  }
}

inline Warp& warp() { return world.current->block->warps[world.current->index / 32]; }

// Lanes of a warp at one instruction: the last one acts for all.
inline void together(int kind, const std::function<void()>& act) {
  Warp& own = warp();
  if (own.meeting.here.empty()) own.kind = kind;
  if (own.kind != kind) fail("lanes of a warp are at different instructions");
  meet(own.meeting, 32, act);
}

}  // namespace emulate
}  // namespace slmperf
