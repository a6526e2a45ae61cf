// The register tile: a few rows of packed A times a few vectors of packed B, and what happens to the sums.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "convert.h"

namespace prelora::cpu {
namespace {

// Memory that will be read soon, fetched by two lines at each step of k: `rows` times `bytes`, `stride` apart.
struct Ahead {
  uintptr_t at = 0;
  int64_t bytes = 0, stride = 0, rows = 0, done = 0;  // done: of the row at `at`

  void step() {
    line();
    line();
  }

 private:
  void line() {
    if (rows == 0) return;
    // Into L2: rows 4 KB apart share one set of L1 (8 ways), where 14 of them would evict each other.
    __builtin_prefetch(reinterpret_cast<const void*>(at + static_cast<uintptr_t>(done)), 0, 2);
    done += 64;
    if (done >= bytes) {
      done = 0;
      at += static_cast<uintptr_t>(stride);
      --rows;
    }
  }
};

template <class S>
constexpr int64_t kTileColumns = int64_t{S::kLanes} * S::kTileVectors;

// Keeps the sums, row after row: of the first pass over k, or added to those of the passes before.
template <class S>
struct Keep {
  float* sums;
  bool add;

  template <int kRows>
  void operator()(typename S::Vector (&x)[kRows][S::kTileVectors]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) {
        float* at = sums + i * kTileColumns<S> + v * S::kLanes;
        S::store(at, add ? S::add(S::load(at), x[i][v]) : x[i][v]);
      }
    }
  }
};

// C = beta * D + alpha * sums, of a whole tile with D in fp32.
template <class S, class T>
struct Write {
  T* c;
  const float* d;
  int64_t ldc, ldd;
  float alpha, beta;
  bool stream;

  template <int kRows>
  void operator()(typename S::Vector (&x)[kRows][S::kTileVectors]) const {
    const typename S::Vector scale = S::all(alpha), keep = S::all(beta);
    // All of D before any of C: a load waits for an earlier store whose address has the same last 12 bits.
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) {
        x[i][v] = S::fma(x[i][v], scale, S::multiply(S::load(d + i * ldd + v * S::kLanes), keep));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) S::store_row(c + i * ldc, x[i], stream);
  }
};

// Adds the squares of what Write would write.
template <class S>
struct Square {
  const float* d;
  int64_t ldd;
  float alpha, beta;
  double* total;

  template <int kRows>
  void operator()(typename S::Vector (&x)[kRows][S::kTileVectors]) const {
    const typename S::Vector scale = S::all(alpha), keep = S::all(beta);
    typename S::Vector sum = S::zero();
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) {
        const auto c = S::fma(x[i][v], scale, S::multiply(S::load(d + i * ldd + v * S::kLanes), keep));
        sum = S::fma(c, c, sum);
      }
    }
    *total += S::sum(sum);
  }
};

template <class S, int kRows, int kVectors>
inline void clear(typename S::Vector (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = S::zero();
  }
}

template <class S, class Out, int kRows>
void tile(int64_t steps, const float* a, const float* b, const Ahead& ahead, const Out& out) {
  typename S::Vector x[kRows][S::kTileVectors];
  clear<S>(x);
  Ahead next = ahead;
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; ++k) {
    typename S::Vector row[S::kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < S::kTileVectors; ++v) row[v] = S::load(b + v * S::kLanes);
    next.step();
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename S::Vector factor = S::all(a[i]);
#pragma GCC unroll 4
      for (int v = 0; v < S::kTileVectors; ++v) x[i][v] = S::accumulate(factor, row[v], x[i][v]);
    }
    a += kRows;
    b += kTileColumns<S>;
  }
  while (next.rows > 0) next.step();
  out(x);
}

template <class S, class Out>
using Tile = void (*)(int64_t steps, const float* a, const float* b, const Ahead& ahead, const Out& out);

template <class S, class Out, size_t... kIndex>
constexpr std::array<Tile<S, Out>, sizeof...(kIndex)> tiles(std::index_sequence<kIndex...>) {
  return {tile<S, Out, static_cast<int>(kIndex) + 1>...};
}

// The tile of `rows` rows, 1 to kTileRows.
template <class S, class Out>
void run_tile(int64_t rows, int64_t steps, const float* a, const float* b, const Ahead& ahead, const Out& out) {
  static constexpr auto kTiles = tiles<S, Out>(std::make_index_sequence<S::kTileRows>());
  kTiles[static_cast<size_t>(rows - 1)](steps, a, b, ahead, out);
}

}  // namespace
}  // namespace prelora::cpu
