// Device code of linear_int4 for few rows: y = x W' + bias + residual, W of 4 bits in groups.
//
// The weight is what is read: x (M <= 64 rows at a time) meets it as the right operand, 8 rows a
// tile, and 16 outputs x 64 inputs of the layout (slmperf/ops/linear/int4_layout.py) are the left
// operand of four mma.m16n8k16 as they lie: a lane's 16 bytes are its fragments.
//
//   block    64 kAcross outputs; a warp has 4 tiles of 16 outputs, kAcross warps lie side by side.
//            kDeep such rows of warps take every kDeep-th 64 inputs, which they add up at the end
//   step     64 kDeep inputs; kStages of them are under way (cp.async), one barrier each:
//              weights  as in memory: a lane copies and reads its own 16 bytes
//              x        rows of 64 inputs, 144 bytes apart, so that ldmatrix meets no bank twice
//              scale, zero point   of the block's outputs and of the step's groups
//   grid     (blocks of outputs, parts of the inputs, experts). What the parts of a block of
//   outputs
//            have summed is added up in their order: on sm_90 they are a cluster and read each
//            other's shared memory; elsewhere each writes fp32 and linear_int4_join adds.
//
// A weight is exact to the bit: nibble n becomes the half of 128 + n (fp16: 1024 + n) by putting it
// into the mantissa; 128 + 8 + zero point is taken off without rounding; times the scale, rounded.
#pragma once

#include "cuda/kernels/device.cuh"

namespace slmperf {

enum class Type : int32_t { none = 0, fp32 = 1, bf16 = 2, fp16 = 3 };

// One product. slmperf/ops/linear/int4_cuda.py fills the same fields in the same order. Strides are
// in elements; what has stride 1 innermost is not named.
struct LinearInt4 {
  const uint16_t* x;         // (rows, inputs)
  const uint32_t* packed;    // (experts, tiles of outputs, tiles of inputs, 32, 4)
  const uint16_t* scale;     // (experts, groups, 16 tiles of outputs), as x: bf16 or fp16
  const int8_t* zero_point;  // the same shape; null: 0
  const void* bias;          // (experts, outputs)
  const void* residual;      // (rows, outputs)
  const int32_t* starts;     // (experts + 1,): first row of each; null: one expert, all rows
  void* y;                   // (rows, outputs), contiguous
  float* partial;            // (parts, rows, outputs); null where blocks of a cluster join
  int64_t x_row;
  int64_t packed_expert, packed_row;
  int64_t scale_expert, scale_group;
  int64_t zero_expert, zero_group;
  int64_t bias_expert;
  int64_t residual_row;
  int32_t rows, outputs, inputs;
  int32_t group_shift;  // input k has the scale of group k >> group_shift; 31: one for all
  int32_t x_aligned;    // whether rows of x begin at multiples of 16 bytes
  Type bias_type, residual_type, y_type;
};

constexpr int kLanes = 32, kTile = 16, kInputs = 64;  // of a warp; outputs and inputs of a tile
constexpr int kWarpTiles = 4;                         // tiles of outputs of a warp
constexpr int kRows = 8;                              // rows of x in a tile
constexpr int kRowBytes = 2 * (kInputs + 8);          // of x in shared memory
constexpr int kStages = 4;

// Where things lie in shared memory, in bytes; the sums take the place of the stages.
template <int kTiles, int kAcross, int kDeep>
struct Shape {
  static constexpr int kThreads = kLanes * kAcross * kDeep;
  static constexpr int kOutputs = kWarpTiles * kTile * kAcross;
  static constexpr int kWeightBytes = kDeep * kOutputs * kInputs / 2;
  static constexpr int kXBytes = kDeep * kTiles * kRows * kRowBytes;
  static constexpr int kScaleBytes = kDeep * 2 * kOutputs * 2;  // groups of 32: two of a tile
  static constexpr int kZeroBytes = kScaleBytes / 2;
  static constexpr int kX = kWeightBytes, kScale = kX + kXBytes, kZero = kScale + kScaleBytes;
  static constexpr int kStageBytes = kZero + kZeroBytes;
  static constexpr int kSumRow = kOutputs + 4;  // floats: lanes of a warp meet different banks
  static constexpr int kSumBytes = kDeep * kTiles * kRows * kSumRow * 4;
  static constexpr int kBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
};

// What turns a nibble into a weight: two ones, -(128 + 8) of both halves, a nibble's mantissa.
template <class T>
struct Grid;
template <>
struct Grid<Bf16> {
  static constexpr uint32_t kOnes = 0x3f803f80, kCentre = 0xc308, kMantissa = 0x43004300;
};
template <>
struct Grid<Half> {
  static constexpr uint32_t kOnes = 0x3c003c00, kCentre = 0xe408, kMantissa = 0x64006400;
};

__device__ inline float load_as_float(const void* from, int64_t index, Type type) {
  if (type == Type::fp32) return load(static_cast<const float*>(from) + index);
  const uint16_t bits = load(static_cast<const uint16_t*>(from) + index);
  return type == Type::fp16 ? half_to_float(bits)
                            : bits_as_float(static_cast<uint32_t>(bits) << 16);
}

// One result: bias and residual added in fp32, rounded once.
__device__ inline void write_result(const LinearInt4& p, float sum, int64_t row, int64_t output,
                                    int64_t expert) {
  if (p.bias_type != Type::none) {
    sum += load_as_float(p.bias, expert * p.bias_expert + output, p.bias_type);
  }
  if (p.residual_type != Type::none) {
    sum += load_as_float(p.residual, row * p.residual_row + output, p.residual_type);
  }
  const int64_t at = row * p.outputs + output;
  if (p.y_type == Type::fp32) {
    store(static_cast<float*>(p.y) + at, sum);
  } else {
    const uint16_t bits = p.y_type == Type::fp16 ? float_to_half(sum) : float_to_bf16(sum);
    store(static_cast<uint16_t*>(p.y) + at, bits);
  }
}

// What a thread copies of the weight: its lane's 16 bytes of four tiles, one step after the other.
struct Weights {
  const uint32_t* from;  // of the first tile, at the next step
  int tiles;             // of the four that are there
  int left;              // tiles of inputs until the last one

  __device__ inline void copy(uint32_t to, int64_t row, int deep) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++) {  // what is not there becomes 0
      const bool inside = i < tiles && left > 0;
      copy_async(to + i * kLanes * 16, inside ? from + i * row : from, inside ? 16 : 0);
    }
    left -= deep;
    if (left > 0) from += deep * (kLanes * 4);
  }
};

// Begin the copies of one step, 64 kDeep inputs, into a stage; inputs behind the last are 0.
template <int kTiles, int kAcross, int kDeep>
__device__ inline void copy_step(const LinearInt4& p, uint32_t stage, int step, int64_t expert,
                                 int64_t first_row, int rows, Weights& weights) {
  using S = Shape<kTiles, kAcross, kDeep>;
  const int thread = threadIdx.x;
  weights.copy(stage + thread / kLanes * kWarpTiles * kLanes * 16 + thread % kLanes * 16,
               p.packed_row, kDeep);

  // Scales and zero points of 16 outputs and a group; a tile of inputs has two groups of 32.
  const int halves = p.group_shift == 5 ? 2 : 1;
  const int padded = (p.outputs + kTile - 1) / kTile * kTile;
  const int last = (p.inputs - 1) >> p.group_shift;
  constexpr int kUnits = S::kOutputs / kTile;
#pragma unroll 1
  for (int i = thread; i < kDeep * halves * kUnits; i += S::kThreads) {
    const int part = i / kUnits, deep = part >> (halves - 1), half = part & (halves - 1);
    const int group = ((step * kDeep + deep) * kInputs + half * 32) >> p.group_shift;
    const int at = i % kUnits * kTile, output = blockIdx.x * S::kOutputs + at;
    const bool inside = group <= last && output < padded;
    const int slot = (deep * 2 + half) * S::kOutputs + at;
    const uint16_t* scale = p.scale;
    if (inside) scale += expert * p.scale_expert + group * p.scale_group + output;
    copy_async(stage + S::kScale + 2 * slot, scale, inside ? 16 : 0);
    copy_async(stage + S::kScale + 2 * slot + 16, inside ? scale + 8 : scale, inside ? 16 : 0);
    if (p.zero_point) {
      const int8_t* zero = p.zero_point;
      if (inside) zero += expert * p.zero_expert + group * p.zero_group + output;
      copy_async(stage + S::kZero + slot, zero, inside ? 16 : 0);
    }
  }

  // x, 8 inputs of a row at a time, begun by the threads that have no scales.
  constexpr int kChunks = kDeep * kInputs / 8;
#pragma unroll 1
  for (int i = S::kThreads - 1 - thread; i < rows * kChunks; i += S::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int input = step * kDeep * kInputs + chunk * 8;
    const int left = p.inputs - input, count = left < 0 ? 0 : left < 8 ? left : 8;
    const uint32_t to =
        stage + S::kX + (chunk / 8 * kTiles * kRows + row) * kRowBytes + chunk % 8 * 16;
    const uint16_t* from = p.x + (first_row + row) * p.x_row + (count > 0 ? input : 0);
    if (p.x_aligned) {
      copy_async(to, from, 2 * count);
    } else {
      for (int j = 0; j < 8; j++) {
        shared_store<uint16_t>(to + 2 * j, j < count ? load(from + j) : uint16_t{0});
      }
    }
  }
}

// sums += this warp's 64 outputs x the rows, over the 64 inputs of its part of a step.
template <class T, bool kZeros, int kTiles, int kAcross, int kDeep>
__device__ inline void multiply_step(uint32_t stage, int rows, bool groups_of_32,
                                     float (&sums)[kWarpTiles][kTiles][4]) {
  using S = Shape<kTiles, kAcross, kDeep>;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, deep = warp / kAcross;
  const int column = warp % kAcross * kWarpTiles * kTile + lane / 4;
  const uint32_t x = stage + S::kX + deep * kTiles * kRows * kRowBytes + lane / 8 * 16;
  uint4 words[kWarpTiles];
#pragma unroll
  for (int i = 0; i < kWarpTiles; i++) {
    words[i] = shared_load<uint4>(stage + ((warp * kWarpTiles + i) * kLanes + lane) * 16);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {  // 32 inputs: two steps of mma
    Fragment right[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (n == 0 || n * kRows < rows) {
        // For a row that is not there the last one: nobody looks at its sums.
        const int row = n * kRows + lane % 8;
        right[n] = load_matrices(x + (row < rows ? row : rows - 1) * kRowBytes + half * 64);
      }
    }
    const int group = deep * 2 + (groups_of_32 ? half : 0);
#pragma unroll
    for (int i = 0; i < kWarpTiles; i++) {
      uint32_t scale[2], centre[2];  // of outputs g and g + 8, each twice in 32 bits
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int output = group * S::kOutputs + column + i * kTile + r * 8;
        scale[r] = shared_load<uint16_t>(stage + S::kScale + 2 * output) * 0x10001u;
        const int zero = kZeros ? shared_load<int8_t>(stage + S::kZero + output) : 0;
        centre[r] = (Grid<T>::kCentre + zero) * 0x10001u;
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint32_t word =
            half == 0 ? (j == 0 ? words[i].x : words[i].y) : (j == 0 ? words[i].z : words[i].w);
        Fragment left;
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const uint32_t n = masked_or(word >> 4 * q, 0x000f000f, Grid<T>::kMantissa);
          const uint32_t code = fma2<T>(n, Grid<T>::kOnes, centre[q % 2]);
          left.part[q] = fma2<T>(code, scale[q % 2], 0x80008000);  // + -0: changes nothing
        }
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
          if (n == 0 || n * kRows < rows) {
            multiply_add<T>(sums[i][n], left, right[n].part[2 * j], right[n].part[2 * j + 1]);
          }
        }
      }
    }
  }
}

// Rows first_row to first_row + rows of one expert: the block's outputs, its part of the inputs.
template <class T, int kTiles, int kAcross, int kDeep>
__device__ inline void multiply_rows(const LinearInt4& p, int64_t expert, int64_t first_row,
                                     int rows) {
  using S = Shape<kTiles, kAcross, kDeep>;
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int across = (p.inputs + kInputs - 1) / kInputs;
  const int parts = gridDim.y, part = blockIdx.y, all = (across + kDeep - 1) / kDeep;
  const int begin = static_cast<int>(static_cast<int64_t>(all) * part / parts);
  const int end = static_cast<int>(static_cast<int64_t>(all) * (part + 1) / parts);

  const int first_tile = blockIdx.x * (S::kOutputs / kTile) + warp % kAcross * kWarpTiles;
  const int down = (p.outputs + kTile - 1) / kTile, first_step = begin * kDeep + warp / kAcross;
  Weights weights{p.packed, down - first_tile, across - first_step};
  if (weights.tiles > 0 && weights.left > 0) {
    weights.from += expert * p.packed_expert + first_tile * p.packed_row +
                    static_cast<int64_t>(first_step) * (kLanes * 4) + lane * 4;
  }

  float sums[kWarpTiles][kTiles][4];
#pragma unroll
  for (int i = 0; i < kWarpTiles; i++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][n][e] = 0;
    }
  }

#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) {
    if (begin + i < end) {
      copy_step<kTiles, kAcross, kDeep>(p, i * S::kStageBytes, begin + i, expert, first_row, rows,
                                        weights);
    }
    copy_commit();
  }
#pragma unroll 1
  for (int step = begin; step < end; step++) {
    copy_wait<kStages - 2>();
    barrier();  // everyone's copies of this step are here, and everyone is done with the last one
    const int next = step + kStages - 1;
    if (next < end) {
      const uint32_t stage = (next - begin) % kStages * S::kStageBytes;
      copy_step<kTiles, kAcross, kDeep>(p, stage, next, expert, first_row, rows, weights);
    }
    copy_commit();
    const uint32_t stage = (step - begin) % kStages * S::kStageBytes;
    if (p.zero_point) {
      multiply_step<T, true, kTiles, kAcross, kDeep>(stage, rows, p.group_shift == 5, sums);
    } else {
      multiply_step<T, false, kTiles, kAcross, kDeep>(stage, rows, p.group_shift == 5, sums);
    }
  }
  barrier();  // all copies have arrived; the sums take their place

  const int deep = warp / kAcross, column = warp % kAcross * kWarpTiles * kTile + lane / 4;
  for (int i = 0; i < kWarpTiles; i++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = deep * kTiles * kRows + n * kRows + lane % 4 * 2 + e % 2;
        const int output = column + i * kTile + e / 2 * 8;
        shared_store<float>((row * S::kSumRow + output) * 4, sums[i][n][e]);
      }
    }
  }
  const bool cluster = parts > 1 && !p.partial;
  if (cluster) {
    cluster_barrier();
  } else {
    barrier();
  }
  const int sharers = cluster ? parts : 1;  // blocks that write a share of the results each
  for (int i = thread + (cluster ? part * S::kThreads : 0); i < rows * S::kOutputs;
       i += sharers * S::kThreads) {
    const int row = i / S::kOutputs, of_block = i % S::kOutputs;
    const int64_t output = static_cast<int64_t>(blockIdx.x) * S::kOutputs + of_block;
    if (output >= p.outputs) continue;
    float sum = 0;
    for (int peer = 0; peer < sharers; peer++) {
      for (int q = 0; q < kDeep; q++) {
        const uint32_t at = ((q * kTiles * kRows + row) * S::kSumRow + of_block) * 4;
        sum += cluster ? peer_load(at, peer) : shared_load<float>(at);
      }
    }
    if (p.partial && parts > 1) {
      store(
          p.partial + (static_cast<int64_t>(part) * p.rows + first_row + row) * p.outputs + output,
          sum);
    } else {
      write_result(p, sum, first_row + row, output, expert);
    }
  }
  // Nobody overwrites, or ends with, sums that others still read.
  if (cluster) {
    cluster_barrier();
  } else {
    barrier();
  }
}

// All rows, 8 kTiles at a time: more rows, or an expert's, read the weight again.
template <class T, int kTiles, int kAcross, int kDeep>
__device__ inline void multiply(const LinearInt4& p) {
  const int64_t expert = blockIdx.z;
  const int begin = p.starts ? load(p.starts + expert) : 0;
  const int end = p.starts ? load(p.starts + expert + 1) : p.rows;
  for (int row = begin; row < end; row += kTiles * kRows) {
    const int left = end - row;
    multiply_rows<T, kTiles, kAcross, kDeep>(p, expert, row,
                                             left < kTiles * kRows ? left : kTiles * kRows);
  }
}

template <class T, int kTiles, int kAcross, int kDeep>
__global__ void __launch_bounds__(Shape<kTiles, kAcross, kDeep>::kThreads, 1)
    linear_int4(const __grid_constant__ LinearInt4 p) {
  multiply<T, kTiles, kAcross, kDeep>(p);
}

// The parts' sums, in the order of the parts; of one expert. A name of C, which NVRTC's callers
// know.
extern "C" __global__ void __launch_bounds__(256)
    linear_int4_join(const __grid_constant__ LinearInt4 p, int parts) {
  const int64_t all = static_cast<int64_t>(p.rows) * p.outputs;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= all) return;
  float sum = 0;
  for (int part = 0; part < parts; part++) sum += load(p.partial + part * all + i);
  write_result(p, sum, i / p.outputs, i % p.outputs, 0);
}

}  // namespace slmperf
