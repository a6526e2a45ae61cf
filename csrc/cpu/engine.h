// What one instruction set offers to grouped_gemm.cpp: the work on one block of one problem.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

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

struct Engine {
  const char* name;
  bool (*available)();
  void (*run)(const Block& block);
};

// Null where the build has no such instruction set.
const Engine* avx512_engine();
const Engine* avx512_bf16_engine();  // takes only problems whose A and B are bf16
const Engine* avx2_engine();
const Engine* generic_engine();

}  // namespace prelora::cpu
