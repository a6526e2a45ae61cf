// What one instruction set offers to grouped_gemm.cpp: the work on one block of one problem.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "adapter_gradients.h"

namespace prelora::cpu {

// Up to this k, one pass over k: C goes straight from registers to memory. Above, sums are kept in `Block::scratch`.
constexpr int64_t kShortK = 256;
// k of one pass of a long product: 32 columns of B are 16 KB, half of L1.
constexpr int64_t kLongPass = 128;
// Of B, packed, in a short product: 256 KB, so that it stays in L2 while the rows of D stream past.
constexpr int64_t kShortPacked = 65536;
constexpr int64_t kLongRows = 112, kLongColumns = 256;
// Most rows and columns of a register tile, and lanes of a vector, of any instruction set.
constexpr int64_t kMaxTileRows = 14, kMaxTileColumns = 32, kMaxLanes = 16;

constexpr int64_t kScratchA = std::max(kMaxTileRows * kShortK, kLongRows * kLongPass) + kMaxLanes;
constexpr int64_t kScratchB = kShortPacked + kShortK * kMaxTileColumns;
constexpr int64_t kScratchC = (kLongRows + kMaxTileRows) * kLongColumns;
constexpr int64_t kScratchFloats = kScratchA + kScratchB + kScratchC + 3 * kMaxLanes;

// Rows [row, row_end) and columns [column, column_end) of op(A)·op(B).
struct Block {
  Problem problem;
  Dtypes dtypes;
  bool swapped;  // problem is the transposed one: its C[i, j] lies at c[j * ldc + i], its D alike
  bool stream;   // store past the caches
  int64_t row, row_end, column, column_end;
  float* scratch;   // kScratchFloats, aligned to 64 bytes
  double* squares;  // where the block's sum of squares goes instead of C; or null
};

// Room for A, or the first slices of B, packed: ranks are padded to whole vectors, feature by feature.
inline int64_t packed_floats(int64_t elements, int64_t features) { return elements + (kMaxLanes - 1) * features; }

// Tokens [token, token_end) of A's and B's gradients.
struct AdapterBlock {
  const AdapterGradients* gradients;
  const float *packed_a, *packed_b;  // by pack_adapter: A, and each slice's B_i from packed_floats(element, row) on
  int64_t token, token_end;
  float *sums_a, *sums_b;  // dA [rank, in]; of each slice dB_i^T / s_i [rank, rows]
  bool add;                // to what is in the sums
  float* scratch;          // adapter_scratch floats
};

// Of x, dy, S and dS, each as it is or copied with rows of kMaxLanes more.
inline int64_t adapter_scratch(const AdapterGradients& g, int64_t tokens) {
  return tokens * (g.in_features + g.out_features + 2 * g.rank + 4 * kMaxLanes);
}

struct Engine {
  const char* name;
  bool (*available)();
  void (*run)(const Block& block);
  void (*run_adapter)(const AdapterBlock& block);
  // From A, stored [rank, features], if transposed, else from B_i: packed_floats, and kMaxLanes to spare.
  void (*pack_adapter)(Dtype dtype, const void* from, int64_t features, int64_t rank, bool transposed, float* to);
};

// The best that this processor has, unless another was set.
const Engine* engine();

// Null where the build has no such instruction set.
const Engine* avx512_engine();
const Engine* avx512_bf16_engine();  // takes only problems whose A and B are bf16
const Engine* avx2_engine();
const Engine* generic_engine();

}  // namespace prelora::cpu
