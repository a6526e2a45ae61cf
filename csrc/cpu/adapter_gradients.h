// Gradients of one layer's A and B from its input and its output's gradient, each passed over once. Torch-free.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "parallel.h"

namespace prelora::cpu {

// Rows of W with a rank of their own: dy's columns from `row` on, S's from `first`, and B's elements from `element`.
struct AdapterSlice {
  int64_t rows, rank;
  float scaling;
  int64_t row, first, element;
};

// dA = dS^T·x and dB_i = s_i · dy_i^T·S_i, with S = x·A^T and dS_i = s_i · dy_i·B_i unless they are given. Matrices are
// contiguous: dy [tokens, out], x [tokens, in], S and dS [tokens, rank], A and dA [rank, in]; B and dB hold every
// slice's [rows, rank], one after another. Sums are fp32 whatever the dtypes.
struct AdapterGradients {
  const void *dy, *x, *s, *ds;  // x null where neither dA nor S is computed; S, dS null: not given
  const void *a, *b;
  void *da, *db;  // null: not wanted
  int64_t tokens, in_features, out_features, rank, elements_b;
  const AdapterSlice* slices;
  int64_t count;
  Dtype activations, dtype_a, dtype_b;
};

// At most `threads` workers at once; results do not depend on how many there are, bit for bit.
void adapter_gradients(const AdapterGradients& gradients, int64_t threads, const Parallel& parallel);

}  // namespace prelora::cpu
