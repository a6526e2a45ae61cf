// Tokens cut into spans, each with sums of its own, which are then added up in their order.
#include "adapter_gradients.h"

#include <algorithm>
#include <vector>

#include "adapter_products.h"
#include "convert.h"
#include "engine.h"
#include "kept_memory.h"

namespace prelora::cpu {
namespace {

// Of one block: with a ViT's layers, x and dy of as many tokens stay in L2 between the products that read them.
constexpr int64_t kBlockTokens = 64;
// Of one span at least: its sums are written and read once more, which beside this many tokens' x and dy is little.
constexpr int64_t kSpanTokens = 192, kSpanTokensPerRank = 3;
// Spans of a few thousand tokens; of more tokens, as many as keep a big machine busy.
constexpr int64_t kSpans = 16, kLongSpanTokens = 2048;
// Columns of one task of adding up; and fewer elements than this one thread adds up before another is awake.
constexpr int64_t kAddedColumns = 512, kAddedAlone = 65536;

int64_t spans_of(int64_t tokens, int64_t rank) {
  const int64_t least = std::max(kSpanTokens, kSpanTokensPerRank * rank);
  return std::clamp<int64_t>(tokens / least, 1, std::max(kSpans, tokens / kLongSpanTokens));
}

// More sums than these do not stay in L2 from one block to the next, beside what the block itself reads.
constexpr int64_t kManySums = 65536;

bool takes_products(const AdapterGradients& g) {
  const bool all_fp32 = g.activations == Dtype::kFloat32 && g.dtype_a == Dtype::kFloat32 && g.dtype_b == Dtype::kFloat32;
  return all_fp32 && g.tokens > 0 && g.rank * g.in_features + g.elements_b > kManySums;
}

void put(Dtype dtype, void* to, int64_t at, float x) {
  if (dtype == Dtype::kFloat32) return narrow(x, static_cast<float*>(to)[at]);
  if (dtype == Dtype::kBFloat16) return narrow(x, static_cast<BFloat16*>(to)[at]);
  narrow(x, static_cast<Float16*>(to)[at]);
}

class Run {
 public:
  explicit Run(const AdapterGradients& gradients)
      : g_(gradients),
        spans_(spans_of(g_.tokens, g_.rank)),
        elements_a_(g_.rank * g_.in_features),
        packed_a_(computes_s() ? packed_floats(elements_a_, g_.in_features) + kMaxLanes : 0),
        packed_b_(computes_ds() ? packed_floats(g_.elements_b, g_.out_features) + kMaxLanes : 0),
        sums_(spans_ * per_span()) {
    pack();
  }

  void run(int64_t threads, const Parallel& parallel) {
    run_tasks(spans_, threads, parallel, [this](int64_t span) { sum_up(span); });
    if (spans_ * per_span() < kAddedAlone) threads = 1;
    if (g_.da) {
      const int64_t pieces = pieces_of(g_.in_features);
      run_tasks(g_.rank * pieces, threads, parallel, [&](int64_t task) { finish_a(task / pieces, task % pieces); });
    }
    if (g_.db) finish_b(threads, parallel);
  }

 private:
  static int64_t pieces_of(int64_t columns) { return (columns + kAddedColumns - 1) / kAddedColumns; }
  int64_t per_span() const { return (g_.da ? elements_a_ : 0) + (g_.db ? g_.elements_b : 0); }
  float* sums_a(int64_t span) { return sums_.data() + span * per_span(); }
  float* sums_b(int64_t span) { return sums_a(span) + (g_.da ? elements_a_ : 0); }

  bool computes_s() const { return g_.db && !g_.s; }
  bool computes_ds() const { return g_.da && !g_.ds; }

  // A for S, and B for dS, once for all tokens.
  void pack() {
    const Engine& by = *engine();
    if (computes_s()) by.pack_adapter(g_.dtype_a, g_.a, g_.in_features, g_.rank, true, packed_a_.data());
    for (int64_t i = 0; i < g_.count && computes_ds(); ++i) {
      const AdapterSlice& slice = g_.slices[i];
      const char* b = static_cast<const char*>(g_.b) + slice.element * bytes_of(g_.dtype_b);
      float* to = packed_b_.data() + packed_floats(slice.element, slice.row);
      by.pack_adapter(g_.dtype_b, b, slice.rows, slice.rank, false, to);
    }
  }

  // The sums of one span, over block after block of its tokens.
  void sum_up(int64_t span) {
    const int64_t first = span * g_.tokens / spans_, end = (span + 1) * g_.tokens / spans_;
    if (first == end) std::fill_n(sums_a(span), per_span(), 0.0f);
    const int64_t blocks = std::max<int64_t>((end - first + kBlockTokens - 1) / kBlockTokens, 1);
    const int64_t step = (end - first + blocks - 1) / blocks;
    // Kept by the thread: allocated anew, its pages would be faulted in and cleared at every call.
    thread_local std::vector<float> scratch;
    scratch.resize(std::max(scratch.size(), static_cast<size_t>(adapter_scratch(g_, step))));
    for (int64_t token = first; token < end; token += step) {
      engine()->run_adapter({&g_, packed_a_.data(), packed_b_.data(), token, std::min(token + step, end), sums_a(span),
                             sums_b(span), token > first, scratch.data()});
    }
  }

  // Adds `count` sums of every span, from `at` on of those of the first, to the first's.
  void add_up(float* at, int64_t count) {
    for (int64_t span = 1; span < spans_; ++span) {
      const float* from = at + span * per_span();
      for (int64_t i = 0; i < count; ++i) at[i] += from[i];
    }
  }

  void finish_a(int64_t row, int64_t piece) {
    const int64_t first = row * g_.in_features + piece * kAddedColumns;
    const int64_t count = std::min(kAddedColumns, g_.in_features - piece * kAddedColumns);
    float* sums = sums_a(0) + first;
    add_up(sums, count);
    for (int64_t i = 0; i < count; ++i) put(g_.dtype_a, g_.da, first + i, sums[i]);
  }

  // B's are summed as their transposes.
  void finish_b(int64_t threads, const Parallel& parallel) {
    for (int64_t i = 0; i < g_.count; ++i) {
      const AdapterSlice& slice = g_.slices[i];
      float* sums = sums_b(0) + slice.element;
      run_tasks(pieces_of(slice.rows), threads, parallel, [&](int64_t piece) {
        const int64_t first = piece * kAddedColumns, count = std::min(kAddedColumns, slice.rows - first);
        for (int64_t r = 0; r < slice.rank; ++r) {
          float* row = sums + r * slice.rows + first;
          add_up(row, count);
          for (int64_t j = 0; j < count; ++j) {
            put(g_.dtype_b, g_.db, slice.element + (first + j) * slice.rank + r, slice.scaling * row[j]);
          }
        }
      });
    }
  }

  const AdapterGradients& g_;
  const int64_t spans_, elements_a_;
  const KeptFloats packed_a_, packed_b_, sums_;
};

}  // namespace

void adapter_gradients(const AdapterGradients& gradients, int64_t threads, const Parallel& parallel) {
  if (takes_products(gradients)) {
    adapter_gradients_by_products(gradients, threads, parallel);
  } else {
    Run(gradients).run(threads, parallel);
  }
}

}  // namespace prelora::cpu
