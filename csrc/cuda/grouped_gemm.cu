// The kernels of grouped_gemm.h.
//
// A persistent grid walks the tiles of all problems. A block brings A and B to shared memory 16 of k at a time, the
// next chunk while it multiplies one, and D's tile meanwhile; then C's tile passes through shared memory, so that 16
// bytes are stored at once. Sums along a long k are split between blocks: those parts go to a workspace, and a second
// kernel adds them up in order. Every element is summed in one order, so equal inputs give equal bits.
#include "grouped_gemm.h"

#include <algorithm>

#include "results.h"

namespace prelora::cuda {
namespace {

// Three blocks fit a multiprocessor of sm_80 by registers, 168 a thread, and by shared memory, 164 KiB less 1 a block.
// Above each kernel stands its budget, which tests/test_cuda_compile.py holds the compiler to.
constexpr int kBlocksPerMultiprocessor = 3;

__device__ __forceinline__ Operand operand_a(const Call& call, const Row& row, const TilePlace& place) {
  return {static_cast<const unsigned char*>(row.a), row.lda * bytes_of(call.dtypes.a),
          place.row * row.shape.rows(), row.m, row.shape.rows_log2,
          !row.trans_a, (row.wide & kWideA) != 0, call.dtypes.a == Dtype::kFloat16};
}

__device__ __forceinline__ Operand operand_b(const Call& call, const Row& row, const TilePlace& place) {
  return {static_cast<const unsigned char*>(row.b), row.ldb * bytes_of(call.dtypes.b),
          place.column * row.shape.columns(), row.n, row.shape.columns_log2(),
          row.trans_b != 0, (row.wide & kWideB) != 0, call.dtypes.b == Dtype::kFloat16};
}

template <int kBytes>
__device__ __forceinline__ int tile_bytes_shared(const Operand& x) {
  return x.along_k ? kPitchAlongK<kBytes> << x.extent_log2 : pitch_across_k<kBytes>(x.extent_log2) * kChunk;
}

// Sums a tile's part of k, and leaves it in shared memory, fp32, rows `staged_pitch` apart.
template <int kBytesA, int kBytesB>
__device__ __forceinline__ void multiply_tile(const Call& call, const Row& row, const TilePlace& place,
                                              unsigned char* memory) {
  const Operand a = operand_a(call, row, place), b = operand_b(call, row, place);
  const int begin = place.part * row.grid.depth, depth = min(row.grid.depth, row.k - begin);
  const int chunks = (depth + kChunk - 1) / kChunk;
  const int b_offset = tile_bytes_shared<kBytesA>(a);
  const auto copy_chunk = [&](int chunk) {
    if (chunk < chunks) {
      unsigned char* const stage = memory + chunk % 2 * kStageBytes;
      const int left = depth - chunk * kChunk;
      copy_operand<kBytesA>(stage, a, begin + chunk * kChunk, min(kChunk, left));
      copy_operand<kBytesB>(stage + b_offset, b, begin + chunk * kChunk, min(kChunk, left));
    }
    commit_copies();
  };

  const int warp = threadIdx.x / kWarpSize, across_log2 = row.shape.columns_log2() - kWarpLog2;
  const int a_row = (warp >> across_log2) << kWarpLog2, b_row = (warp & ((1 << across_log2) - 1)) << kWarpLog2;
  Sums sums = {};
  copy_chunk(0);
  copy_chunk(1);
  if (row.grid.parts == 1) copy_d(call, row, place, memory + kDOffset);
  commit_copies();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    // D's copy, the third group, may be under way until something begun after it is needed.
    if (chunk == 0) {
      wait_copies<2>();
    } else if (chunk == 1) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    if (chunk > 0) copy_chunk(chunk + 1);
    const unsigned char* const stage = memory + chunk % 2 * kStageBytes;
    switch (a.along_k * 2 + b.along_k) {
      case 0:
        multiply_chunk<kBytesA, false, kBytesB, false>(sums, stage, a, a_row, stage + b_offset, b, b_row);
        break;
      case 1:
        multiply_chunk<kBytesA, false, kBytesB, true>(sums, stage, a, a_row, stage + b_offset, b, b_row);
        break;
      case 2:
        multiply_chunk<kBytesA, true, kBytesB, false>(sums, stage, a, a_row, stage + b_offset, b, b_row);
        break;
      default:
        multiply_chunk<kBytesA, true, kBytesB, true>(sums, stage, a, a_row, stage + b_offset, b, b_row);
    }
  }
  wait_copies<0>();
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, pitch = staged_pitch(row.shape);
  auto* const staged = reinterpret_cast<float*>(memory) + (a_row + lane / 4) * pitch + b_row + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kResultRows; ++i) {
#pragma unroll
    for (int j = 0; j < kResultColumns; ++j) {
      *reinterpret_cast<float2*>(staged + 16 * i * pitch + 8 * j) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(staged + (16 * i + 8) * pitch + 8 * j) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
  }
}

// Budget: 168 registers, 47120 bytes of shared memory.
template <int kBytesA, int kBytesB>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) grouped_gemm_kernel(Call call) {
  unsigned char* const memory = shared_memory<kSharedBytes>();
  int32_t problem = 0;
  for (int32_t flat = blockIdx.x; flat < call.tiles; flat += gridDim.x) {
    problem = find_problem(call.table.starts, call.count, flat, problem);
    const Row& row = call.table.rows[problem];
    const int32_t tile = flat - call.table.starts[problem];
    const TilePlace place = place_tile(row.grid, tile);
    multiply_tile<kBytesA, kBytesB>(call, row, place, memory);
    if (row.grid.parts == 1) {
      finish_tile(call, row, place, memory);
      continue;
    }
    __syncthreads();
    float4* const to = partial(call, row, tile);
    for (int i = threadIdx.x; i < kTileElements / 4; i += kThreads) to[i] = *staged_vector(row, memory, i);
    __syncthreads();
  }
}

// The outputs whose sums are split: the parts of each in order, then as any other tile.
// Budget: 128 registers, 47120 bytes of shared memory.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) grouped_combine_kernel(Call call) {
  unsigned char* const memory = shared_memory<kSharedBytes>();
  int32_t problem = 0;
  for (int32_t flat = blockIdx.x; flat < call.tiles; flat += gridDim.x) {
    problem = find_problem(call.table.combine_starts, call.count, flat, problem);
    const Row& row = call.table.rows[problem];
    const TilePlace place = place_tile(row.grid, flat - call.table.combine_starts[problem]);
    copy_d(call, row, place, memory + kDOffset);
    commit_copies();
    for (int i = threadIdx.x; i < kTileElements / 4; i += kThreads) {
      float4 sum = partial(call, row, place.output)[i];
      for (int part = 1; part < row.grid.parts; ++part) {
        const float4 x = partial(call, row, place.output + part * row.grid.outputs())[i];
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
      *staged_vector(row, memory, i) = sum;
    }
    wait_copies<0>();
    finish_tile(call, row, place, memory);
  }
}

// One block adds up the tiles' sums of a problem: threads stride over them, then halve what is left.
// Budget: 32 registers, 1024 bytes of shared memory.
__global__ void __launch_bounds__(kThreads) grouped_squares_kernel(Call call, double* squares) {
  auto* const sums = reinterpret_cast<double*>(shared_memory<kThreads * sizeof(double)>());
  const int thread = threadIdx.x;
  for (int32_t problem = blockIdx.x; problem < call.count; problem += gridDim.x) {
    const int32_t begin = call.table.output_starts[problem], end = call.table.output_starts[problem + 1];
    double sum = 0.0;
    for (int32_t i = begin + thread; i < end; i += kThreads) sum += call.squares[i];
    sums[thread] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread < half) sums[thread] += sums[thread + half];
      __syncthreads();
    }
    if (thread == 0) squares[call.table.rows[problem].problem] = sums[0];
  }
}

using GemmKernel = void (*)(Call);

GemmKernel gemm_kernel(const Dtypes& dtypes) {
  const bool wide_b = bytes_of(dtypes.b) == 4;
  if (bytes_of(dtypes.a) == 4) return wide_b ? grouped_gemm_kernel<4, 4> : grouped_gemm_kernel<4, 2>;
  return wide_b ? grouped_gemm_kernel<2, 4> : grouped_gemm_kernel<2, 2>;
}

cudaError_t launch_tiles(const Plan& plan, Call call, int blocks, cudaStream_t stream) {
  call.tiles = plan.tiles;
  if (plan.tiles > 0) PRELORA_LAUNCH(gemm_kernel(plan.dtypes), std::min(blocks, plan.tiles), kThreads, stream, call);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  call.tiles = plan.combined;
  if (plan.combined > 0) {
    PRELORA_LAUNCH(grouped_combine_kernel, std::min(blocks, plan.combined), kThreads, stream, call);
  }
  return cudaGetLastError();
}

Call make_call(const void* device_table, const Plan& plan, float* partials, float* squares) {
  return {table_at(const_cast<void*>(device_table), plan.count), plan.dtypes, plan.count, 0, partials, squares};
}

}  // namespace

cudaError_t grouped_gemm(const void* device_table, const Plan& plan, void* workspace, int multiprocessors,
                         cudaStream_t stream) {
  if (multiprocessors < 1) return cudaErrorInvalidValue;
  const Call call = make_call(device_table, plan, static_cast<float*>(workspace), nullptr);
  return launch_tiles(plan, call, multiprocessors * kBlocksPerMultiprocessor, stream);
}

cudaError_t grouped_squares(const void* device_table, const Plan& plan, double* squares, void* workspace,
                            int multiprocessors, cudaStream_t stream) {
  if (multiprocessors < 1) return cudaErrorInvalidValue;
  if (plan.count == 0) return cudaSuccess;
  auto* const partials = static_cast<float*>(workspace);
  const Call call = make_call(device_table, plan, partials, partials + int64_t{plan.partials} * kTileElements);
  const int blocks = multiprocessors * kBlocksPerMultiprocessor;
  if (const cudaError_t error = launch_tiles(plan, call, blocks, stream); error != cudaSuccess) return error;
  PRELORA_LAUNCH(grouped_squares_kernel, std::min(blocks, plan.count), kThreads, stream, call, squares);
  return cudaGetLastError();
}

}  // namespace prelora::cuda
