// One block of one product: packing, tiles, and what becomes of the sums.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine.h"
#include "pack.h"
#include "tile.h"

namespace prelora::cpu {
namespace {

template <class S>
typename S::Vector load_as(Dtype dtype, const void* p, int64_t offset, int64_t lanes) {
  if (dtype == Dtype::kFloat32) return S::load(static_cast<const float*>(p) + offset, lanes);
  if (dtype == Dtype::kBFloat16) return S::load(static_cast<const BFloat16*>(p) + offset, lanes);
  return S::load(static_cast<const Float16*>(p) + offset, lanes);
}

template <class S>
void store_as(Dtype dtype, void* p, int64_t offset, typename S::Vector x, int64_t lanes) {
  if (dtype == Dtype::kFloat32) return S::store(static_cast<float*>(p) + offset, x, lanes);
  if (dtype == Dtype::kBFloat16) return S::store(static_cast<BFloat16*>(p) + offset, x, lanes);
  return S::store(static_cast<Float16*>(p) + offset, x, lanes);
}

// The least equal shares of `total` that are at most `most`: no narrow last panel.
inline int64_t even_share(int64_t total, int64_t most) {
  const int64_t shares = (total + most - 1) / most;
  return (total + shares - 1) / shares;
}

template <class S>
class BlockRun {
 public:
  explicit BlockRun(const Block& block)
      : block_(block),
        problem_(block.problem),
        rows_(block.row_end - block.row),
        columns_(block.column_end - block.column),
        panel_rows_(even_share(rows_, S::kTileRows)) {
    const auto start = reinterpret_cast<uintptr_t>(block.scratch);
    b_ = reinterpret_cast<float*>((start + 63) / 64 * 64);
    sums_ = b_ + kScratchB;
    a_ = sums_ + kScratchC;
  }

  void run() {
    if (problem_.k <= kShortK) {
      run_short();
    } else {
      run_long();
    }
    if (block_.stream) S::fence();
    if (block_.squares) *block_.squares = squares_;
  }

 private:
  static constexpr int64_t kColumns = kTileColumns<S>;

  // Few summed terms: B stays packed in L2, and C and D are passed over once, along their rows.
  void run_short() {
    const int64_t steps = steps_of(problem_.k);
    for (int64_t j = 0; j < columns_; j += kColumns) pack_b(j, 0, problem_.k, b_ + j * steps);
    for (int64_t i = 0; i < rows_; i += panel_rows_) {
      pack_a(i, 0, problem_.k, a_);
      for (int64_t j = 0; j < columns_; j += kColumns) {
        if (finishes_in_registers() && columns_ - j >= kColumns) {
          finish_tile(i, j);
        } else {
          run_tile<S>(panel(i), steps, a_, b_ + j * steps, Ahead{}, Keep<S>{sums_, false});
          put(i, j, sums_);
        }
      }
    }
  }

  // Many: each panel of B is packed into L1, used by every row and forgotten, while the next one is fetched.
  void run_long() {
    const int64_t pass = S::kTerms * even_share(steps_of(problem_.k), kLongPass);
    for (int64_t k = 0; k < problem_.k; k += pass) {
      const int64_t depth = std::min(pass, problem_.k - k), steps = steps_of(depth);
      for (int64_t i = 0; i < rows_; i += panel_rows_) pack_a(i, k, depth, a_ + i * steps);
      for (int64_t j = 0; j < columns_; j += kColumns) {
        pack_b(j, k, depth, b_);
        for (int64_t i = 0; i < rows_; i += panel_rows_) {
          run_tile<S>(panel(i), steps, a_ + i * steps, b_, i == 0 ? b_ahead(j, k, depth) : Ahead{},
                      Keep<S>{sums(i, j), k > 0});
        }
      }
    }
    for (int64_t j = 0; j < columns_; j += kColumns) {
      for (int64_t i = 0; i < rows_; i += panel_rows_) put(i, j, sums(i, j));
    }
  }

  static int64_t steps_of(int64_t depth) { return (depth + S::kTerms - 1) / S::kTerms; }
  int64_t panel(int64_t i) const { return std::min(panel_rows_, rows_ - i); }
  float* sums(int64_t i, int64_t j) const { return sums_ + j * rows_ + i * kColumns; }
  bool finishes_in_registers() const {
    return !block_.swapped && problem_.beta != 0 && block_.dtypes.d == Dtype::kFloat32 &&
           (block_.squares || block_.dtypes.c != Dtype::kFloat16);
  }

  void pack_a(int64_t i, int64_t k, int64_t depth, float* to) const {
    pack<S>(block_.dtypes.a, problem_.a, problem_.lda, block_.row + i, k, !problem_.trans_a, panel(i), depth, panel(i),
            to);
  }

  void pack_b(int64_t j, int64_t k, int64_t depth, float* to) const {
    pack<S>(block_.dtypes.b, problem_.b, problem_.ldb, block_.column + j, k, problem_.trans_b,
            std::min(kColumns, columns_ - j), depth, kColumns, to);
  }

  // The panel of B after that of column j and term k.
  Ahead b_ahead(int64_t j, int64_t k, int64_t depth) const {
    j += kColumns;
    if (j >= columns_) {
      j = 0;
      k += depth;
      depth = std::min(depth, problem_.k - k);
    }
    const int64_t size = bytes_of(block_.dtypes.b), width = std::min(kColumns, columns_ - j);
    const int64_t column = block_.column + j;
    const int64_t offset = problem_.trans_b ? column * problem_.ldb + k : k * problem_.ldb + column;
    const uintptr_t at = reinterpret_cast<uintptr_t>(problem_.b) + static_cast<uintptr_t>(offset * size);
    if (problem_.trans_b) return {at, depth * size, problem_.ldb * size, depth > 0 ? width : 0};
    return {at, width * size, problem_.ldb * size, depth};
  }

  // A whole tile that never leaves the registers: into C, or into the sum of squares.
  void finish_tile(int64_t i, int64_t j) {
    if (block_.squares) {
      run_out(i, j, Square<S>{d_at(i, j), problem_.ldd, problem_.alpha, problem_.beta, &squares_});
    } else if (block_.dtypes.c == Dtype::kFloat32) {
      run_out(i, j, write<float>(i, j));
    } else {
      run_out(i, j, write<BFloat16>(i, j));
    }
  }

  template <class T>
  Write<S, T> write(int64_t i, int64_t j) const {
    T* c = static_cast<T*>(problem_.c) + (block_.row + i) * problem_.ldc + block_.column + j;
    const bool stream = block_.stream && S::can_stream(sizeof(T));
    return {c, d_at(i, j), problem_.ldc, problem_.ldd, problem_.alpha, problem_.beta, stream};
  }

  template <class Out>
  void run_out(int64_t i, int64_t j, const Out& out) const {
    const int64_t steps = steps_of(problem_.k);
    run_tile<S>(panel(i), steps, a_, b_ + j * steps, d_ahead(i, j), out);
  }

  const float* d_at(int64_t i, int64_t j) const {
    return static_cast<const float*>(problem_.d) + (block_.row + i) * problem_.ldd + block_.column + j;
  }

  // The whole tile of D after that of row i and column j: merging ViT-L is 3 % faster than without.
  Ahead d_ahead(int64_t i, int64_t j) const {
    j += kColumns;
    if (columns_ - j < kColumns) {
      j = 0;
      i += panel_rows_;
    }
    if (i >= rows_) return {};
    return {reinterpret_cast<uintptr_t>(d_at(i, j)), kColumns * 4, problem_.ldd * 4, panel(i)};
  }

  // Hands on one tile of sums, of any dtypes and layout.
  void put(int64_t i, int64_t j, const float* sums) {
    const int64_t rows = panel(i), columns = std::min(kColumns, columns_ - j);
    const int64_t row = block_.row + i, column = block_.column + j;
    for (int64_t v = 0; v < columns; v += S::kLanes) {
      const int64_t lanes = std::min<int64_t>(S::kLanes, columns - v);
      if (!block_.swapped) {
        for (int64_t r = 0; r < rows; ++r) put(row + r, column + v, S::load(sums + r * kColumns + v), lanes);
        continue;
      }
      typename S::Vector x[S::kLanes];
      for (int r = 0; r < S::kLanes; ++r) x[r] = r < rows ? S::load(sums + r * kColumns + v) : S::zero();
      S::transpose(x);
      for (int64_t r = 0; r < lanes; ++r) put(column + v + r, row, x[r], rows);
    }
  }

  // `lanes` elements of one row of C as it lies in memory.
  void put(int64_t row, int64_t column, typename S::Vector x, int64_t lanes) {
    x = S::multiply(x, S::all(problem_.alpha));
    if (problem_.beta != 0) {
      const auto d = load_as<S>(block_.dtypes.d, problem_.d, row * problem_.ldd + column, lanes);
      x = S::fma(d, S::all(problem_.beta), x);
    }
    if (block_.squares) {
      x = S::first(x, lanes);
      squares_ += S::sum(S::multiply(x, x));
    } else {
      store_as<S>(block_.dtypes.c, problem_.c, row * problem_.ldc + column, x, lanes);
    }
  }

  const Block& block_;
  const Problem& problem_;
  const int64_t rows_, columns_, panel_rows_;
  float *a_, *b_, *sums_;
  double squares_ = 0;
};

template <class S>
void run_block(const Block& block) {
  BlockRun<S>(block).run();
}

}  // namespace
}  // namespace prelora::cpu
