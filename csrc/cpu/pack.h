// Copies of A and B, in fp32 or in pairs of bf16, in the order in which the tiles read them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"

namespace prelora::cpu {
namespace {

// to[k * stride + i] = from[k * ld + i] for i < width, zero up to the stride; S::kTerms values of k share one lane.
// A stride below kLanes is written in whole vectors, each over the last one's excess; `to` has kLanes to spare.
template <class S, class T>
void pack_rows(const T* from, int64_t ld, int64_t width, int64_t depth, int64_t stride, float* to) {
  for (int64_t k = 0; k < depth; k += S::kTerms) {
    for (int64_t i = 0; i < stride; i += S::kLanes) {
      const int64_t lanes = std::clamp<int64_t>(width - i, 0, S::kLanes);
      const T* at = from + k * ld + i;
      if constexpr (S::kTerms == 1) {
        S::store(to + i, S::load(at, lanes));
      } else {
        S::store(to + i, S::load_terms(at, ld, lanes, k + 1 < depth));
      }
    }
    to += stride;
  }
}

// to[k * stride + i] = from[i * ld + k], as above.
template <class S, class T>
void pack_columns(const T* from, int64_t ld, int64_t width, int64_t depth, int64_t stride, float* to) {
  constexpr int64_t kRun = int64_t{S::kLanes} * S::kTerms;
  for (int64_t i = 0; i < stride; i += S::kLanes) {
    const T* row = from + i * ld;
    const int64_t rows = std::clamp<int64_t>(width - i, 0, S::kLanes);
    float* at = to + i;
    for (int64_t k = 0; k < depth; k += kRun) {
      const int64_t terms = std::min(depth - k, kRun), lanes = (terms + S::kTerms - 1) / S::kTerms;
      typename S::Vector x[S::kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < S::kLanes; ++r) {
        if (r >= rows) {
          x[r] = S::zero();
        } else if constexpr (S::kTerms == 1) {
          x[r] = S::load(row + r * ld + k, terms);
        } else {
          x[r] = S::load_run(row + r * ld + k, terms);
        }
      }
      S::transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < S::kLanes; ++r) {
        if (r < lanes) S::store(at + r * stride, x[r]);
      }
      at += S::kLanes * stride;
    }
  }
}

template <class S, class T>
void pack(const void* from, int64_t ld, int64_t i, int64_t k, bool contiguous_in_k, int64_t width, int64_t depth,
          int64_t stride, float* to) {
  const T* at = static_cast<const T*>(from);
  if (contiguous_in_k) {
    pack_columns<S>(at + i * ld + k, ld, width, depth, stride, to);
  } else {
    pack_rows<S>(at + k * ld + i, ld, width, depth, stride, to);
  }
}

// One panel: `width` rows of op(A) from i, or columns of op(B), and `depth` of the summed dimension from k.
template <class S>
void pack(Dtype dtype, const void* from, int64_t ld, int64_t i, int64_t k, bool contiguous_in_k, int64_t width,
          int64_t depth, int64_t stride, float* to) {
  if constexpr (S::kTerms == 2) {
    pack<S, BFloat16>(from, ld, i, k, contiguous_in_k, width, depth, stride, to);
  } else if (dtype == Dtype::kFloat32) {
    pack<S, float>(from, ld, i, k, contiguous_in_k, width, depth, stride, to);
  } else if (dtype == Dtype::kBFloat16) {
    pack<S, BFloat16>(from, ld, i, k, contiguous_in_k, width, depth, stride, to);
  } else {
    pack<S, Float16>(from, ld, i, k, contiguous_in_k, width, depth, stride, to);
  }
}

}  // namespace
}  // namespace prelora::cpu
