// Tiles of A and B: how they come to shared memory, and how a warp multiplies what is there.
//
// A tile lies in shared memory as its matrix does in global memory, so that 16 bytes are copied at once whatever is
// transposed: rows of `kChunk` elements of k where k is contiguous, or `kChunk` rows of m (or n). Padding spreads what
// the lanes of a warp read at once over all banks.
#pragma once

#include "../tile_map.h"
#include "launch.h"

namespace prelora::cuda {

constexpr int kThreads = 128;
constexpr int kWarpSize = 32;
// A warp makes 32 x 32 elements of C: 2 x 4 results of the tensor cores.
constexpr int kWarpLog2 = 5;
constexpr int kResultRows = 2, kResultColumns = 4;
using Sums = float[kResultRows][kResultColumns][4];

template <int kBytes>
struct Unsigned {
  using Type = uint32_t;
};
template <>
struct Unsigned<2> {
  using Type = uint16_t;
};

// Bytes from row to row in shared memory.
template <int kBytes>
constexpr int kPitchAlongK = (kChunk + 8) * kBytes;
template <int kBytes>
PRELORA_HOST_DEVICE int pitch_across_k(int extent_log2) {
  return ((1 << extent_log2) + (kBytes == 4 ? 4 : 8)) * kBytes;
}

// A tile on its way to shared memory: 2^rows_log2 rows, each of 2^vectors_log2 times 16 bytes. What lies outside the
// matrix, after its `rows` and `row_bytes`, becomes zeros.
struct TileCopy {
  unsigned char* to;
  const unsigned char* from;
  int64_t stride;
  int pitch, rows_log2, vectors_log2, rows, row_bytes;

  // Calls copy(target, source, how many bytes there are at the source) for the i-th 16 bytes.
  template <typename Copy>
  __device__ __forceinline__ void vector(int i, Copy copy) const {
    const int row = i >> vectors_log2, byte = (i - (row << vectors_log2)) * 16;
    const int valid = row < rows ? max(0, min(16, row_bytes - byte)) : 0;
    copy(to + row * pitch + byte, valid > 0 ? from + row * stride + byte : from, valid);
  }
};

template <int kBytes>
__device__ __forceinline__ void copy_tile(const TileCopy& tile, bool wide) {
  const int vectors = 1 << (tile.rows_log2 + tile.vectors_log2);
  if (wide) {
    // Copies only begin here: unrolled, their addresses would take 15 to 30 registers from the sums, and once spilled.
#pragma unroll 1
    for (int i = threadIdx.x; i < vectors; i += kThreads) tile.vector(i, copy_16);
    return;
  }
  using Element = typename Unsigned<kBytes>::Type;
#pragma unroll 1
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    tile.vector(i, [](unsigned char* to, const unsigned char* from, int valid) {
      const auto* const source = global(reinterpret_cast<const Element*>(from));
#pragma unroll
      for (int j = 0; j < 16 / kBytes; ++j) {
        reinterpret_cast<Element*>(to)[j] = j * kBytes < valid ? source[j] : Element{0};
      }
    });
  }
}

// One operand of a tile: its rows are the tile's rows (of A) or columns (of B), from `first` on.
struct Operand {
  const unsigned char* matrix;
  int64_t stride;  // in bytes
  int first, extent, extent_log2;
  bool along_k, wide, half;
};

// Copies `depth` of k from `k` on.
template <int kBytes>
__device__ __forceinline__ void copy_operand(unsigned char* to, const Operand& x, int k, int depth) {
  constexpr int kVectorLog2 = kBytes == 4 ? 2 : 3;
  constexpr int kChunkLog2 = 4;
  const int extent = min(1 << x.extent_log2, x.extent - x.first);
  if (x.along_k) {
    const unsigned char* const from = x.matrix + x.first * x.stride + int64_t{k} * kBytes;
    copy_tile<kBytes>({to, from, x.stride, kPitchAlongK<kBytes>, x.extent_log2, kChunkLog2 - kVectorLog2, extent,
                       depth * kBytes}, x.wide);
  } else {
    const unsigned char* const from = x.matrix + k * x.stride + int64_t{x.first} * kBytes;
    copy_tile<kBytes>({to, from, x.stride, pitch_across_k<kBytes>(x.extent_log2), kChunkLog2,
                       x.extent_log2 - kVectorLog2, depth, extent * kBytes}, x.wide);
  }
}

// Elements as the tensor cores take them. 11 significant bits hold a 16-bit element; an fp32 one takes two numbers,
// and products then lack only the lower ones' product, 2^-22 of the whole.
template <int kBytes, int kCount>
struct Fragment {
  uint32_t high[kCount];
  uint32_t low[kCount];

  __device__ __forceinline__ void set(int i, float x) {
    if constexpr (kBytes == 4) {
      high[i] = round_to_tf32(x);
      low[i] = round_to_tf32(x - float_of_bits(high[i]));
    } else {
      high[i] = bits_of_float(x);
    }
  }
};

__device__ __forceinline__ float widen(uint32_t bits, bool half) {
  return half ? half_to_float(bits) : float_of_bits(bits << 16);
}

struct Pair {
  float x, y;
};

// Elements (row, k) and (row, k + 1) of a tile in shared memory.
template <int kBytes, bool kAlongK>
__device__ __forceinline__ Pair load_pair(const unsigned char* tile, int pitch, int row, int k, bool half) {
  if constexpr (kAlongK) {
    const unsigned char* const at = tile + row * kPitchAlongK<kBytes> + k * kBytes;
    if constexpr (kBytes == 4) {
      const float2 both = *reinterpret_cast<const float2*>(at);
      return {both.x, both.y};
    } else {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(at);
      return {widen(both & 0xffff, half), widen(both >> 16, half)};
    }
  } else {
    const unsigned char* const at = tile + k * pitch + row * kBytes;
    if constexpr (kBytes == 4) {
      return {*reinterpret_cast<const float*>(at), *reinterpret_cast<const float*>(at + pitch)};
    } else {
      return {widen(*reinterpret_cast<const uint16_t*>(at), half),
              widen(*reinterpret_cast<const uint16_t*>(at + pitch), half)};
    }
  }
}

// sums += a warp's rows of A's tile times its columns of B's, over `kChunk` of k.
//
// Which k a lane holds is free as long as A and B agree: it takes neighbours, 2t and 2t + 1, in one load. Tensor cores
// round sums towards zero, which over thousands of k would add up: only the few products of a chunk are summed there.
template <int kBytesA, bool kAlongA, int kBytesB, bool kAlongB>
__device__ __forceinline__ void multiply_chunk(Sums& sums, const unsigned char* a_tile, const Operand& a, int a_row,
                                               const unsigned char* b_tile, const Operand& b, int b_row) {
  constexpr int kSteps = kChunk / 8;
  const int lane = threadIdx.x % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
  const int a_pitch = pitch_across_k<kBytesA>(a.extent_log2), b_pitch = pitch_across_k<kBytesB>(b.extent_log2);
  Fragment<kBytesA, 4> left[kSteps][kResultRows];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 2 * kResultRows; ++i) {
      const Pair x =
          load_pair<kBytesA, kAlongA>(a_tile, a_pitch, a_row + 8 * i + group, 8 * step + pair, a.half);
      left[step][i / 2].set(i % 2, x.x);
      left[step][i / 2].set(i % 2 + 2, x.y);
    }
  }
#pragma unroll
  for (int j = 0; j < kResultColumns; ++j) {
    Fragment<kBytesB, 2> right[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Pair x =
          load_pair<kBytesB, kAlongB>(b_tile, b_pitch, b_row + 8 * j + group, 8 * step + pair, b.half);
      right[step].set(0, x.x);
      right[step].set(1, x.y);
    }
#pragma unroll
    for (int i = 0; i < kResultRows; ++i) {
      float sum[4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (kBytesA == 4) multiply_tf32(sum, left[step][i].low, right[step].high);
        if constexpr (kBytesB == 4) multiply_tf32(sum, left[step][i].high, right[step].low);
        multiply_tf32(sum, left[step][i].high, right[step].high);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] += sum[e];
    }
  }
}

}  // namespace prelora::cuda
