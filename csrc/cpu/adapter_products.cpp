#include "adapter_products.h"

#include <vector>

#include "grouped_gemm.h"
#include "kept_memory.h"

namespace prelora::cpu {
namespace {

struct Matrix {
  const float* at;
  int64_t ld;
};

constexpr Dtypes kFloats{Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32, Dtype::kFloat32};

// c [m, n] = alpha * a [m, k] * op(b).
Problem product(float* c, int64_t ldc, Matrix a, Matrix b, int64_t m, int64_t n, int64_t k, float alpha, bool trans_b) {
  return {c, nullptr, a.at, b.at, m, n, k, ldc, 0, a.ld, b.ld, alpha, 0, false, trans_b};
}

// c [m, n] = alpha * sum over tokens of a[t, :]^T * b[t, :].
Problem sum_over_tokens(float* c, int64_t ldc, Matrix a, Matrix b, int64_t m, int64_t n, int64_t tokens, float alpha) {
  return {c, nullptr, a.at, b.at, m, n, tokens, ldc, 0, a.ld, b.ld, alpha, 0, true, false};
}

const float* floats(const void* from) { return static_cast<const float*>(from); }

}  // namespace

void adapter_gradients_by_products(const AdapterGradients& g, int64_t threads, const Parallel& parallel) {
  const int64_t tokens = g.tokens, rank = g.rank, in_features = g.in_features;
  const bool computes_s = g.db && !g.s, computes_ds = g.da && !g.ds;
  const KeptFloats own_s(computes_s ? tokens * rank : 0), own_ds(computes_ds ? tokens * rank : 0);
  const float* s = computes_s ? own_s.data() : floats(g.s);
  const float* ds = computes_ds ? own_ds.data() : floats(g.ds);
  const Matrix x{floats(g.x), in_features};
  std::vector<Problem> shrunk, summed;
  if (computes_s) {
    shrunk.push_back(product(own_s.data(), rank, x, {floats(g.a), in_features}, tokens, rank, in_features, 1, true));
  }
  if (g.da) {
    float* da = static_cast<float*>(g.da);
    summed.push_back(sum_over_tokens(da, in_features, {ds, rank}, x, rank, in_features, tokens, 1));
  }
  for (int64_t i = 0; i < g.count; ++i) {
    const AdapterSlice& slice = g.slices[i];
    const Matrix dy{floats(g.dy) + slice.row, g.out_features};
    if (computes_ds) {
      shrunk.push_back(product(own_ds.data() + slice.first, rank, dy, {floats(g.b) + slice.element, slice.rank},
                               tokens, slice.rank, slice.rows, slice.scaling, false));
    }
    if (g.db) {
      float* db = static_cast<float*>(g.db) + slice.element;
      summed.push_back(sum_over_tokens(db, slice.rank, dy, {s + slice.first, rank}, slice.rows, slice.rank,
                                       tokens, slice.scaling));
    }
  }
  for (const std::vector<Problem>* problems : {&shrunk, &summed}) {
    grouped_gemm(problems->data(), static_cast<int64_t>(problems->size()), kFloats, threads, parallel);
  }
}

}  // namespace prelora::cpu
