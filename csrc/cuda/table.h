// A call's problems as its kernels read them: where each one's tiles start, and a row of numbers for each.
#pragma once

#include "../tile_map.h"
#include "grouped_gemm.h"

namespace prelora::cuda {

// 16-byte accesses are possible: the address is a multiple of 16, and so is the distance between rows.
enum Wide : int32_t { kWideA = 1, kWideB = 2, kWideC = 4, kWideD = 8 };

struct alignas(16) Row {
  void* c;
  const void* d;
  const void* a;
  const void* b;
  int64_t ldc, ldd, lda, ldb;
  int32_t m, n, k;
  float alpha, beta;
  int32_t trans_a, trans_b, wide;
  TileShape shape;
  TileGrid grid;
  int32_t problem;        // its place in the caller's list
  int32_t first_output;   // of all problems' tiles of C
  int32_t first_partial;  // of all tiles that are parts of split sums
};

// Three ascending lists of count + 1 entries, then the rows, in order of cost.
struct Table {
  int32_t* starts;          // of each problem's tiles
  int32_t* output_starts;   // of its tiles of C
  int32_t* combine_starts;  // of its tiles of C whose sum is split
  Row* rows;
};

PRELORA_HOST_DEVICE int64_t starts_bytes(int64_t count) { return (count + 1 + 3) / 4 * 16; }

PRELORA_HOST_DEVICE Table table_at(void* memory, int64_t count) {
  auto* bytes = static_cast<unsigned char*>(memory);
  const int64_t each = starts_bytes(count);
  return {reinterpret_cast<int32_t*>(bytes), reinterpret_cast<int32_t*>(bytes + each),
          reinterpret_cast<int32_t*>(bytes + 2 * each), reinterpret_cast<Row*>(bytes + 3 * each)};
}

}  // namespace prelora::cuda
