// Many products of unequal sizes in one launch on CUDA; problem.h says what each means. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace prelora::cuda {

// What a launch must know of its table beforehand, passed by value: with it, a captured CUDA graph needs no host data.
struct Plan {
  Dtypes dtypes;
  int32_t count;     // problems
  int32_t tiles;     // of all problems, each part of a split sum counted
  int32_t outputs;   // tiles of C
  int32_t combined;  // tiles of C whose sum is split; 0: one launch does it all, else a second adds the parts up
  int32_t partials;  // those parts
  // Bytes of device memory that the two calls need for themselves while they run, aligned to 16; the caller's.
  size_t gemm_workspace() const;
  size_t squares_workspace() const;
};

// Bytes of a table of `count` problems.
size_t table_bytes(int64_t count);

// Fills `host_table`, of `table_bytes(count)` bytes aligned to 16, which the caller copies to the device, again to a
// multiple of 16. Addresses are stored, nothing is read through them. Returns null, or why it cannot: then `plan` and
// the table are undefined.
const char* build_table(const Problem* problems, int64_t count, const Dtypes& dtypes, void* host_table, Plan* plan);

// Computes every C of the table, on `stream`. `multiprocessors`: of the current device, which holds all memory.
cudaError_t grouped_gemm(const void* device_table, const Plan& plan, void* workspace, int multiprocessors,
                         cudaStream_t stream);

// Writes the sum of squares of each C, unrounded, to squares[problem]; C itself is not touched and may be null.
cudaError_t grouped_squares(const void* device_table, const Plan& plan, double* squares, void* workspace,
                            int multiprocessors, cudaStream_t stream);

}  // namespace prelora::cuda
