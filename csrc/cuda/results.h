// What becomes of a tile's sums, staged in shared memory: C, or the sum of its squares, or a part of a split sum.
#pragma once

#include "operands.h"
#include "table.h"

namespace prelora::cuda {

// The largest tiles of A and B at once are 128 and 32 rows along k, in fp32.
constexpr int kStageBytes = (128 + 32) * kPitchAlongK<4>;
constexpr int kDOffset = 2 * kStageBytes;
constexpr int kWarpSumsOffset = kDOffset + 4 * kTileElements;
constexpr int kSharedBytes = kWarpSumsOffset + 4 * kThreads / kWarpSize;

struct Call {
  Table table;
  Dtypes dtypes;
  int32_t count, tiles;
  float* partials;  // [parts of split sums, kTileElements]
  float* squares;   // [tiles of C]; null: C is written
};

// Begins to copy D's tile, rows without padding; no copy where D is not read.
__device__ __forceinline__ void copy_d(const Call& call, const Row& row, const TilePlace& place, unsigned char* to) {
  if (row.beta == 0.0f) return;
  const int bytes = bytes_of(call.dtypes.d), first_row = place.row * row.shape.rows();
  const int first_column = place.column * row.shape.columns();
  const int rows_log2 = row.shape.rows_log2, columns_log2 = row.shape.columns_log2();
  const auto* const from = static_cast<const unsigned char*>(row.d) + (first_row * row.ldd + first_column) * bytes;
  const int rows = row.m - first_row, row_bytes = min(1 << columns_log2, row.n - first_column) * bytes;
  const bool wide = (row.wide & kWideD) != 0;
  if (bytes == 4) {
    copy_tile<4>({to, from, row.ldd * 4, 4 << columns_log2, rows_log2, columns_log2 - 2, rows, row_bytes}, wide);
  } else {
    copy_tile<2>({to, from, row.ldd * 2, 2 << columns_log2, rows_log2, columns_log2 - 3, rows, row_bytes}, wide);
  }
}

__device__ __forceinline__ int staged_pitch(const TileShape& shape) { return shape.columns() + 8; }

__device__ __forceinline__ float load_element(const unsigned char* elements, int i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(elements)[i];
  return widen(reinterpret_cast<const uint16_t*>(elements)[i], dtype == Dtype::kFloat16);
}

__device__ __forceinline__ uint32_t pack(float low, float high, bool half) {
  return half ? pack_halves(low, high) : pack_bfloats(low, high);
}

// Stores `valid` elements that make up 16 bytes if there are `kVector` of them.
template <int kVector>
__device__ __forceinline__ void store_vector(unsigned char* c, const float (&x)[kVector], int valid, bool wide,
                                             bool half) {
  if constexpr (kVector == 4) {
    if (wide && valid == kVector) {
      *reinterpret_cast<float4*>(c) = make_float4(x[0], x[1], x[2], x[3]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < valid) reinterpret_cast<float*>(c)[j] = x[j];
    }
  } else {
    uint32_t packed[kVector / 2];
#pragma unroll
    for (int j = 0; j < kVector / 2; ++j) packed[j] = pack(x[2 * j], x[2 * j + 1], half);
    if (wide && valid == kVector) {
      *reinterpret_cast<uint4*>(c) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < valid) reinterpret_cast<uint16_t*>(c)[j] = static_cast<uint16_t>(packed[j / 2] >> (j % 2 * 16));
    }
  }
}

// Makes C of the staged sums and D, `kVector` elements at a time; returns this thread's squares, where those are asked.
template <int kVector>
__device__ __forceinline__ float finish_vectors(const Call& call, const Row& row, const TilePlace& place,
                                                const unsigned char* memory) {
  constexpr int kVectorLog2 = kVector == 4 ? 2 : 3;
  const int columns_log2 = row.shape.columns_log2(), first_row = place.row * row.shape.rows();
  const int first_column = place.column * row.shape.columns(), pitch = staged_pitch(row.shape);
  float squares = 0.0f;
  for (int i = threadIdx.x; i < kTileElements / kVector; i += kThreads) {
    const int r = i >> (columns_log2 - kVectorLog2), column = (i << kVectorLog2) - (r << columns_log2);
    const int valid = min(kVector, row.n - first_column - column);
    if (first_row + r >= row.m || valid <= 0) continue;
    const float* const sums = reinterpret_cast<const float*>(memory) + r * pitch + column;
    float x[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = row.alpha * sums[j];
    if (row.beta != 0.0f) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        x[j] = fmaf(row.beta, load_element(memory + kDOffset, (i << kVectorLog2) + j, call.dtypes.d), x[j]);
      }
    }
    if (call.squares != nullptr) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) squares += j < valid ? x[j] * x[j] : 0.0f;
    } else {
      const int64_t at = (first_row + r) * row.ldc + first_column + column;
      store_vector<kVector>(global(static_cast<unsigned char*>(row.c) + at * (16 / kVector)), x, valid,
                            (row.wide & kWideC) != 0, call.dtypes.c == Dtype::kFloat16);
    }
  }
  return squares;
}

// Of a tile whose sums are staged by all threads: C, or the sum of its squares. Afterwards shared memory is free.
__device__ __forceinline__ void finish_tile(const Call& call, const Row& row, const TilePlace& place,
                                            unsigned char* memory) {
  __syncthreads();
  const float squares = bytes_of(call.dtypes.c) == 4 ? finish_vectors<4>(call, row, place, memory)
                                                     : finish_vectors<8>(call, row, place, memory);
  auto* const warp_sums = reinterpret_cast<float*>(memory + kWarpSumsOffset);
  if (call.squares != nullptr) {
    const float sum = sum_of_warp(squares);
    if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  if (call.squares != nullptr && threadIdx.x == 0) {
    call.squares[row.first_output + place.output] = (warp_sums[0] + warp_sums[1]) + (warp_sums[2] + warp_sums[3]);
  }
}

__device__ __forceinline__ float4* partial(const Call& call, const Row& row, int32_t tile) {
  return reinterpret_cast<float4*>(call.partials + int64_t{row.first_partial + tile} * kTileElements);
}

__device__ __forceinline__ float4* staged_vector(const Row& row, unsigned char* memory, int i) {
  const int r = i >> (row.shape.columns_log2() - 2), column = (i << 2) - (r << row.shape.columns_log2());
  return reinterpret_cast<float4*>(reinterpret_cast<float*>(memory) + r * staged_pitch(row.shape) + column);
}

}  // namespace prelora::cuda
