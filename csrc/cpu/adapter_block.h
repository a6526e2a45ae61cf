// A few tokens' share of A's and B's gradients: the low-rank products of rows that stay in L2 until all are done.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "block.h"
#include "engine.h"
#include "pack.h"

namespace prelora::cpu {
namespace {

// out[t, r] = scale * sum over k of x[t, k] * p[k, r], or added to what is there, for kRows tokens and kVectors vectors
// of ranks, `width` columns of them; p is packed.
template <class S, int kVectors, int kRows>
void shrink_tile(int64_t steps, const float* x, int64_t ldx, const float* p, float scale, float* out, int64_t ldo,
                 int64_t width, bool add) {
  typename S::Vector sums[kRows][kVectors];
  clear<S>(sums);
  // Every third row has a pointer; the two after it are one and two times ldx away, which an address can hold.
  const float* third[(kRows + 2) / 3];
#pragma GCC unroll 8
  for (int i = 0; i < (kRows + 2) / 3; ++i) third[i] = x + 3 * i * ldx;
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; ++k) {
    typename S::Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = S::load(p + v * S::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename S::Vector factor = S::all(third[i / 3][(i % 3) * ldx]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = S::fma(factor, row[v], sums[i][v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < (kRows + 2) / 3; ++i) ++third[i];
    p += kVectors * S::kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lanes = std::clamp<int64_t>(width - v * S::kLanes, 0, S::kLanes);
      float* at = out + i * ldo + v * S::kLanes;
      S::store(at, S::fma(sums[i][v], S::all(scale), add ? S::load(at, lanes) : S::zero()), lanes);
    }
  }
}

// sums[r, j] = sum over t of s[t, r] * y[t, j], or added to what is there, for kRows ranks and kVectors vectors of
// features, of a single one `lanes`.
template <class S, int kVectors, int kRows>
void gather_tile(int64_t tokens, const float* s, int64_t lds, const float* y, int64_t ldy, float* sums, int64_t ld,
                 int64_t lanes, bool add) {
  typename S::Vector x[kRows][kVectors];
  clear<S>(x);
#pragma GCC unroll 1
  for (int64_t t = 0; t < tokens; ++t) {
    typename S::Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      row[v] = kVectors > 1 ? S::load(y + v * S::kLanes) : S::load(y, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename S::Vector factor = S::all(s[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[i][v] = S::fma(factor, row[v], x[i][v]);
    }
    s += lds;
    y += ldy;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* at = sums + i * ld + v * S::kLanes;
      if (kVectors > 1) {
        S::store(at, add ? S::add(S::load(at), x[i][v]) : x[i][v]);
      } else {
        S::store(at, add ? S::add(S::load(at, lanes), x[i][v]) : x[i][v], lanes);
      }
    }
  }
}

template <class S>
using ShrinkTile = decltype(&shrink_tile<S, 1, 1>);
template <class S>
using GatherTile = decltype(&gather_tile<S, 1, 1>);

template <class S, int kVectors, size_t... kIndex>
constexpr std::array<ShrinkTile<S>, sizeof...(kIndex)> shrink_tiles(std::index_sequence<kIndex...>) {
  return {shrink_tile<S, kVectors, static_cast<int>(kIndex) + 1>...};
}

template <class S, int kVectors, size_t... kIndex>
constexpr std::array<GatherTile<S>, sizeof...(kIndex)> gather_tiles(std::index_sequence<kIndex...>) {
  return {gather_tile<S, kVectors, static_cast<int>(kIndex) + 1>...};
}

// The tiles of `rows` rows, 1 to kTileRows, and of as many vectors as there are or of one.
template <class S>
ShrinkTile<S> shrink_tile_of(bool wide, int64_t rows) {
  static constexpr auto kWide = shrink_tiles<S, S::kTileVectors>(std::make_index_sequence<S::kTileRows>());
  static constexpr auto kNarrow = shrink_tiles<S, 1>(std::make_index_sequence<S::kTileRows>());
  return (wide ? kWide : kNarrow)[static_cast<size_t>(rows - 1)];
}

template <class S>
GatherTile<S> gather_tile_of(bool wide, int64_t rows) {
  static constexpr auto kWide = gather_tiles<S, S::kTileVectors>(std::make_index_sequence<S::kTileRows>());
  static constexpr auto kNarrow = gather_tiles<S, 1>(std::make_index_sequence<S::kTileRows>());
  return (wide ? kWide : kNarrow)[static_cast<size_t>(rows - 1)];
}

// Columns of the next panel of packed A or B: of all vectors of a tile, or of one where that holds the rest.
template <class S>
constexpr int64_t panel_columns(int64_t left) {
  return left > S::kLanes ? kTileColumns<S> : S::kLanes;
}

template <class S>
class AdapterRun {
 public:
  explicit AdapterRun(const AdapterBlock& block)
      : block_(block), g_(*block.gradients), tokens_(block.token_end - block.token) {}

  void run() {
    float* scratch = block_.scratch;
    const auto take = [&scratch](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    const int64_t rank = g_.rank;
    const Rows x = g_.x ? rows(g_.x, g_.in_features, take) : Rows{}, dy = rows(g_.dy, g_.out_features, take);
    // dS and S first: along the rows, x and dy come from memory faster than down the columns.
    Rows ds{}, s{};
    if (g_.da && g_.ds) {
      ds = rows(g_.ds, rank, take);
    } else if (g_.da) {
      float* to = take(tokens_ * rank);
      for (int64_t i = 0; i < g_.count; ++i) {
        const AdapterSlice& slice = g_.slices[i];
        const float* b = block_.packed_b + packed_floats(slice.element, slice.row);
        shrink(slice.rows, dy.at + slice.row, dy.ld, b, slice.rank, slice.scaling, to + slice.first);
      }
      ds = {to, rank};
    }
    if (g_.db && g_.s) {
      s = rows(g_.s, rank, take);
    } else if (g_.db) {
      float* to = take(tokens_ * rank);
      shrink(g_.in_features, x.at, x.ld, block_.packed_a, rank, 1, to);
      s = {to, rank};
    }
    if (g_.da) gather(rank, ds, g_.in_features, x, block_.sums_a);
    for (int64_t i = 0; i < g_.count && g_.db; ++i) {
      const AdapterSlice& slice = g_.slices[i];
      gather(slice.rank, {s.at + slice.first, s.ld}, slice.rows, {dy.at + slice.row, dy.ld},
             block_.sums_b + slice.element);
    }
  }

 private:
  // Of a chunk of the features that `shrink` sums over: 32 columns of p are 32 KB.
  static constexpr int64_t kDepth = 256;

  struct Rows {
    const float* at;
    int64_t ld;
  };

  // The block's rows of an activation, in fp32, and not 4 KB apart: those share one set of L1, and evict each other.
  template <class Take>
  Rows rows(const void* from, int64_t columns, const Take& take) const {
    const int64_t first = block_.token * columns;
    if (g_.activations == Dtype::kFloat32 && columns * 4 % 4096 != 0) {
      return {static_cast<const float*>(from) + first, columns};
    }
    const int64_t ld = columns + kMaxLanes;
    float* to = take(tokens_ * ld);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t i = 0; i < columns; i += S::kLanes) {
        const int64_t lanes = std::min<int64_t>(S::kLanes, columns - i);
        S::store(to + t * ld + i, load_as<S>(g_.activations, from, first + t * columns + i, lanes), lanes);
      }
    }
    return {to, ld};
  }

  // out[t, r] = scale * sum over k of x[t, k] * p[k, r] for every token of the block; out has g.rank columns. A chunk of
  // a panel of p stays in L1 while all tokens pass.
  void shrink(int64_t depth, const float* x, int64_t ldx, const float* p, int64_t rank, float scale, float* out) const {
    const int64_t panel = even_share(tokens_, S::kTileRows);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t steps = std::min(kDepth, depth - k);
      for (int64_t r = 0; r < rank; r += panel_columns<S>(rank - r)) {
        const int64_t columns = panel_columns<S>(rank - r);
        for (int64_t t = 0; t < tokens_; t += panel) {
          const int64_t count = std::min(panel, tokens_ - t);
          shrink_tile_of<S>(columns > S::kLanes, count)(steps, x + t * ldx + k, ldx, p + r * depth + k * columns, scale,
                                                        out + t * g_.rank + r, g_.rank, rank - r, k > 0);
        }
      }
    }
  }

  // sums[r, j] = sum over t of s[t, r] * y[t, j] over the tokens of the block, or added to what is there.
  void gather(int64_t rank, Rows s, int64_t features, Rows y, float* sums) const {
    constexpr int64_t kWide = kTileColumns<S>;
    const int64_t panel = even_share(rank, S::kTileRows);
    for (int64_t j = 0; j < features;) {
      const bool wide = features - j >= kWide;
      for (int64_t r = 0; r < rank; r += panel) {
        const int64_t count = std::min(panel, rank - r);
        gather_tile_of<S>(wide, count)(tokens_, s.at + r, s.ld, y.at + j, y.ld, sums + r * features + j, features,
                                       std::min<int64_t>(S::kLanes, features - j), block_.add);
      }
      j += wide ? kWide : S::kLanes;
    }
  }

  const AdapterBlock& block_;
  const AdapterGradients& g_;
  const int64_t tokens_;
};

// Nothing in an instruction set that sums pairs of bf16: `engine` is never of one.
template <class S>
void run_adapter_block(const AdapterBlock& block) {
  if constexpr (S::kTerms == 1) AdapterRun<S>(block).run();
}

// A, stored [rank, features], where `transposed`, or B_i, stored [features, rank]: panels of ranks, features by features.
template <class S>
void pack_adapter(Dtype dtype, const void* from, int64_t features, int64_t rank, bool transposed, float* to) {
  if constexpr (S::kTerms == 1) {
    for (int64_t r = 0; r < rank; r += panel_columns<S>(rank - r)) {
      const int64_t columns = panel_columns<S>(rank - r);
      pack<S>(dtype, from, transposed ? features : rank, r, 0, transposed, std::min(columns, rank - r), features,
              columns, to + r * features);
    }
  }
}

}  // namespace
}  // namespace prelora::cpu
