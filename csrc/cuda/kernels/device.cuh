// The instructions that kernels here need beyond C++, one function each; everything else is plain
// C++. So the same kernels compile with nvcc, with NVRTC (no header of CUDA or of C++ is read) and,
// with SLMPERF_EMULATE, with a C++ compiler: cuda/emulate_device.h then gives these functions.
// "PTX" below is NVIDIA's PTX ISA manual.
#pragma once

#if defined(SLMPERF_EMULATE)
#include "cuda/emulate_device.h"
#else

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

namespace slmperf {

// The two half types, by name only: their values travel as 16 bits, or as two in 32.
struct Bf16 {};
struct Half {};

struct Fragment {
  uint32_t part[4];
};

// --- memory: shared memory by byte offset, global memory by pointer
// -------------------------------

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ inline uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory() + offset));
}

template <class T>
__device__ inline T shared_load(uint32_t offset) {
  return *reinterpret_cast<const T*>(shared_memory() + offset);
}

template <class T>
__device__ inline void shared_store(uint32_t offset, T value) {
  *reinterpret_cast<T*>(shared_memory() + offset) = value;
}

template <class T>
__device__ inline T load(const T* from) {
  return *from;
}

template <class T>
__device__ inline void store(T* to, T value) {
  *to = value;
}

// All threads of the block have come here, and see each other's writes.
__device__ inline void barrier() { __syncthreads(); }

// 16 bytes to shared memory without a register in between; those behind the first `bytes` become 0
// and are not read (PTX: cp.async, since sm_80). Both addresses are multiples of 16.
__device__ inline void copy_async(uint32_t offset, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but this thread's newest kNewer groups have arrived; other threads see them after a barrier.
template <int kNewer>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory");
}

// --- clusters: blocks that run together and read each other's shared memory, since sm_90 ---------

__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ inline float peer_load(uint32_t offset, uint32_t rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(offset)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

// --- arithmetic ---------------------------------------------------------------------------------

// (a & mask) | bits in one instruction (PTX: lop3, its table 0xea).
__device__ inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

// a * b + c of two pairs of halves, each rounded once. sm_80 has no other arithmetic of bf16.
template <class T>
__device__ inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ inline uint32_t fma2<Bf16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ inline uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Four matrices of 8 x 8 halves, one row by each lane: lane l gives the offset of row l % 8 of
// matrix l / 8 and gets of each matrix i the pair (row l / 4, columns 2 (l % 4) and the next) as
// part i (PTX: ldmatrix, since sm_75).
__device__ inline Fragment load_matrices(uint32_t offset) {
  Fragment d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.part[0]), "=r"(d.part[1]), "=r"(d.part[2]), "=r"(d.part[3])
               : "r"(shared_address(offset))
               : "memory");
  return d;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8) on tensor cores, fragments as PTX lays them out: lane
// 4 g + t holds a at rows g, g + 8, columns 2 t, 2 t + 8 and the next; b at rows 2 t, 2 t + 8 and
// the next of column g; sums at rows g, g + 8, columns 2 t and the next (mma.m16n8k16, since
// sm_80).
template <class T>
__device__ inline void multiply_add(float (&sums)[4], const Fragment& a, uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<Bf16>(float (&sums)[4], const Fragment& a, uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<Half>(float (&sums)[4], const Fragment& a, uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}

__device__ inline float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Rounded to the nearest, ties to even.
__device__ inline uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline uint16_t float_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace slmperf
#endif
