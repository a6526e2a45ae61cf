// One product of a grouped call, C = beta * D + alpha * op(A) * op(B), as host and device both see it. Torch-free.
#pragma once

#include <cstdint>

namespace prelora {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Sizes and strides are in elements. op(A) is m x k, op(B) k x n, C and D m x n; sums are fp32 whatever the dtypes.
// A is stored [m, k], or [k, m] where `trans_a`; B [k, n], or [n, k] where `trans_b`; rows are contiguous.
// D may be C itself; it is not read where beta is 0 (NaN in it does not reach C).
struct Problem {
  void* c;
  const void* d;
  const void* a;
  const void* b;
  int64_t m, n, k;
  int64_t ldc, ldd, lda, ldb;
  float alpha, beta;
  bool trans_a, trans_b;
};

// The dtypes of all problems of one call.
struct Dtypes {
  Dtype a, b, c, d;
};

}  // namespace prelora
