// The functions of kernels/device.cuh on a processor, each as its instruction is defined; emulate.h
// runs the threads.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "cuda/emulate.h"

namespace slmperf {

struct Bf16 {};
struct Half {};

namespace emulate {

// --- numbers ------------------------------------------------------------------------------------

// The bits of `value` in a 16-bit format, ties to even.
inline uint16_t round_half(double value, int mantissa, int bias) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(0x7fff >> mantissa << mantissa);
  if (std::isnan(value)) return 0x7fff;
  double size = std::fabs(value);
  int exponent = 0;
  std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  const int step = std::max(exponent - 1, 1 - bias) - mantissa;
  const double steps = std::nearbyint(std::ldexp(size, -step));
  size = std::ldexp(steps, step);
  if (size == 0) return sign;
  std::frexp(size, &exponent);
  if (exponent - 1 > bias) return sign | infinity;
  if (exponent - 1 < 1 - bias) return sign | static_cast<uint16_t>(steps);
  const auto fraction = static_cast<uint32_t>(std::ldexp(size, mantissa - exponent + 1));
  const uint32_t biased = static_cast<uint32_t>(exponent - 1 + bias);
  return sign | static_cast<uint16_t>((biased << mantissa) + fraction - (1u << mantissa));
}

inline double widen_half(uint16_t bits, int mantissa, int bias) {
  const int exponent = (bits & 0x7fff) >> mantissa, top = 0x7fff >> mantissa;
  const int fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

template <class T>
struct Format;
template <>
struct Format<Bf16> {
  static constexpr int kMantissa = 7, kBias = 127;
};
template <>
struct Format<Half> {
  static constexpr int kMantissa = 10, kBias = 15;
};

template <class T>
double widen(uint32_t bits) {
  return widen_half(static_cast<uint16_t>(bits), Format<T>::kMantissa, Format<T>::kBias);
}
template <class T>
uint32_t narrow(double value) {
  return round_half(value, Format<T>::kMantissa, Format<T>::kBias);
}

}  // namespace emulate

// --- memory -------------------------------------------------------------------------------------

// ----------------------------------------------------------

template <class T>
T shared_load(uint32_t offset) {
  emulate::Block& block = *emulate::world.current->block;
  emulate::check_bounds(block, offset, sizeof(T), sizeof(T));
  emulate::read_bytes(block, offset, sizeof(T));
  T value;
  std::memcpy(&value, block.bytes.data() + offset, sizeof(T));
  return value;
}

template <class T>
void shared_store(uint32_t offset, T value) {
  emulate::Block& block = *emulate::world.current->block;
  emulate::check_bounds(block, offset, sizeof(T), sizeof(T));
  emulate::check_writable(block, offset, sizeof(T));
  emulate::mark_written(block, offset, sizeof(T));
  std::memcpy(block.bytes.data() + offset, &value, sizeof(T));
}

template <class T>
T load(const T* from) {
  emulate::check_global(from, sizeof(T), false);
  return *from;
}

template <class T>
void store(T* to, T value) {
  emulate::check_global(to, sizeof(T), true);
  *to = value;
}

inline void barrier() {
  emulate::Block& block = *emulate::world.current->block;
  emulate::Thread& own = *emulate::world.current;
  emulate::meet(block.meeting, blockDim.x, [] {});
  own.barriers++;
}

inline void copy_async(uint32_t offset, const void* from, uint32_t bytes) {
  emulate::Thread& own = *emulate::world.current;
  emulate::check_bounds(*own.block, offset, 16, 16);
  if (bytes > 16) emulate::fail("cp.async of more than 16 bytes");
  if (reinterpret_cast<uint64_t>(from) % 16) emulate::fail("cp.async from a misaligned address");
  if (bytes) emulate::check_global(from, bytes, false);
  emulate::check_writable(*own.block, offset, 16);
  for (uint32_t i = offset; i < offset + 16; i++) own.block->state[i].copier = own.id;
  own.open.push_back({offset, bytes, from});
}

inline void copy_commit() {
  emulate::Thread& own = *emulate::world.current;
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

template <int kNewer>
void copy_wait() {
  emulate::Thread& own = *emulate::world.current;
  while (own.groups.size() > kNewer) {
    for (const emulate::Copy& copy : own.groups.front()) {
      uint8_t* to = own.block->bytes.data() + copy.offset;
      std::memset(to, 0, 16);
      std::memcpy(to, copy.from, copy.bytes);
      emulate::mark_written(*own.block, copy.offset, 16);
    }
    own.groups.pop_front();
  }
}

inline void cluster_barrier() {
  emulate::Thread& own = *emulate::world.current;
  emulate::meet(emulate::world.cluster, emulate::world.threads.size(), [] {});
  own.barriers++;
  own.cluster_barriers++;
}

inline float peer_load(uint32_t offset, uint32_t rank) {
  if (rank >= emulate::world.blocks.size()) emulate::fail("the cluster has no such block");
  emulate::Block& block = *emulate::world.blocks[rank];
  block.peers_read = std::max(block.peers_read, emulate::world.current->cluster_barriers);
  emulate::check_bounds(block, offset, 4, 4);
  emulate::read_bytes(block, offset, 4);
  float value;
  std::memcpy(&value, block.bytes.data() + offset, 4);
  return value;
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    // Exact in double: products of 22 bits, and what is added here is of their size.
    const double value = emulate::widen<T>(a >> shift) * emulate::widen<T>(b >> shift) +
                         emulate::widen<T>(c >> shift);
    result |= emulate::narrow<T>(value) << shift;
  }
  return result;
}

inline Fragment load_matrices(uint32_t offset) {
  emulate::Thread& own = *emulate::world.current;
  emulate::Warp& warp = emulate::warp();
  emulate::check_bounds(*own.block, offset, 16, 16);
  emulate::read_bytes(*own.block, offset, 16);
  const int lane = own.index % 32;
  warp.offsets[lane] = offset;
  emulate::together(1, [&] {
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        const uint32_t from = warp.offsets[8 * i + l / 4] + 4 * (l % 4);
        std::memcpy(&warp.out[l].part[i], own.block->bytes.data() + from, 4);
      }
    }
  });
  return warp.out[lane];
}

template <class T>
void multiply_add(float (&sums)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  emulate::Thread& own = *emulate::world.current;
  emulate::Warp& warp = emulate::warp();
  const int lane = own.index % 32;
  warp.a[lane] = a;
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  warp.sums[lane] = sums;
  emulate::together(2, [&] {
    double left[16][16], right[16][8];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 2; i++) {
        for (int part = 0; part < 4; part++) {
          left[g + part % 2 * 8][2 * t + part / 2 * 8 + i] =
              emulate::widen<T>(warp.a[l].part[part] >> 16 * i);
        }
        for (int part = 0; part < 2; part++) {
          right[2 * t + part * 8 + i][g] = emulate::widen<T>(warp.b[l][part] >> 16 * i);
        }
      }
    }
    for (int l = 0; l < 32; l++) {
      for (int e = 0; e < 4; e++) {
        const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
        double sum = warp.sums[l][e];
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
        warp.sums[l][e] = static_cast<float>(sum);
      }
    }
  });
}

inline float bits_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(emulate::widen<Half>(bits)); }
inline uint16_t float_to_half(float value) {
  return static_cast<uint16_t>(emulate::narrow<Half>(value));
}
inline uint16_t float_to_bf16(float value) {
  return static_cast<uint16_t>(emulate::narrow<Bf16>(value));
}

}  // namespace slmperf
