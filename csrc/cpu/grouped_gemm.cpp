// Problems cut into blocks of about equal cost, and the blocks shared out over threads.
#include "grouped_gemm.h"

#include <memory>
#include <vector>

#include "convert.h"
#include "engine.h"

namespace prelora::cpu {
namespace {

// A quarter of a millisecond of one core at 95 GFLOP/s, and of memory at 17 GB/s: long beside the 1 µs that handing
// out a block costs, short beside a call.
constexpr double kBlockFlops = 24e6, kBlockBytes = 4e6;
// C beyond this is not in any cache when it is next read, so it need not be fetched into one to be written.
constexpr double kStreamBytes = 64e6;

// Two bf16 factors go through instructions of their own beside AVX-512.
const Engine* engine_for(const Dtypes& dtypes) {
  const Engine *best = engine(), *bf16 = avx512_bf16_engine();
  const bool both = dtypes.a == Dtype::kBFloat16 && dtypes.b == Dtype::kBFloat16;
  return both && best == avx512_engine() && bf16 && bf16->available() ? bf16 : best;
}

// The least number of equal parts of `total`, none above `most`, rounded up to `multiple`.
int64_t part(int64_t total, int64_t most, int64_t multiple) {
  const int64_t parts = (total + most - 1) / most;
  const int64_t each = (total + parts - 1) / parts;
  return (each + multiple - 1) / multiple * multiple;
}

struct Job {
  Problem problem;
  bool swapped;
  int64_t rows, columns;  // of a block
};

Job job_of(Problem p, const Dtypes& dtypes) {
  if (p.alpha == 0) p.k = 0;
  if (p.k == 0) p.alpha = 0;
  Job job{p, false, 1, 1};
  if (p.m == 0 || p.n == 0) return job;
  // Vectors lie along the columns and a tile takes any number of rows: a narrow C is computed as its transpose.
  if (p.n < p.m && (p.n <= kMaxTileColumns || p.k > kShortK)) {
    job.swapped = true;
    job.problem.m = p.n;
    job.problem.n = p.m;
    job.problem.a = p.b;
    job.problem.b = p.a;
    job.problem.lda = p.ldb;
    job.problem.ldb = p.lda;
    job.problem.trans_a = !p.trans_b;
    job.problem.trans_b = !p.trans_a;
  }
  const int64_t m = job.problem.m, n = job.problem.n;
  if (p.k > kShortK) {
    job.rows = part(m, kLongRows, 1);
    job.columns = part(n, kLongColumns, kMaxTileColumns);
    return job;
  }
  job.columns = part(n, std::min<int64_t>(4096, kShortPacked / std::max<int64_t>(p.k, 1)), kMaxTileColumns);
  const double bytes = static_cast<double>(bytes_of(dtypes.c) + bytes_of(dtypes.d));
  const double elements = std::min(kBlockFlops / (2.0 * static_cast<double>(p.k) + 1), kBlockBytes / bytes);
  const int64_t rows = static_cast<int64_t>(elements) / job.columns;
  job.rows = part(m, std::max<int64_t>(rows, 4 * kMaxTileRows), kMaxTileRows);
  return job;
}

struct Task {
  int64_t job, row, column;
};

bool streams(const Problem& p, const Dtypes& dtypes) {
  const int64_t size = bytes_of(dtypes.c);
  return p.c != p.d && reinterpret_cast<uintptr_t>(p.c) % 64 == 0 && p.ldc * size % 64 == 0;
}

float* scratch() {
  // Kept by the thread: allocated anew, its pages would be faulted in and cleared at every call.
  thread_local std::unique_ptr<float[]> floats(new float[kScratchFloats]);
  return floats.get();
}

void run(const Problem* problems, int64_t count, const Dtypes& dtypes, double* squares, int64_t threads,
         const Parallel& parallel) {
  std::vector<Job> jobs;
  std::vector<Task> tasks;
  double written = 0;
  for (int64_t i = 0; i < count; ++i) {
    jobs.push_back(job_of(problems[i], dtypes));
    const Job& job = jobs.back();
    written += static_cast<double>(job.problem.m * job.problem.n * bytes_of(dtypes.c));
    for (int64_t row = 0; row < job.problem.m && job.problem.n > 0; row += job.rows) {
      for (int64_t column = 0; column < job.problem.n; column += job.columns) tasks.push_back({i, row, column});
    }
  }
  std::vector<double> partial(squares ? tasks.size() : 0);
  const Engine* served_by = engine_for(dtypes);
  run_tasks(static_cast<int64_t>(tasks.size()), threads, parallel, [&](int64_t index) {
    const size_t t = static_cast<size_t>(index);
    const Job& job = jobs[static_cast<size_t>(tasks[t].job)];
    Block block{job.problem, dtypes, job.swapped, false, tasks[t].row, 0, tasks[t].column, 0, scratch(), nullptr};
    if (job.swapped) std::swap(block.dtypes.a, block.dtypes.b);
    block.stream = written > kStreamBytes && streams(job.problem, dtypes);
    block.row_end = std::min(job.problem.m, block.row + job.rows);
    block.column_end = std::min(job.problem.n, block.column + job.columns);
    if (squares) block.squares = &partial[t];
    served_by->run(block);
  });
  if (!squares) return;
  std::fill(squares, squares + count, 0.0);
  for (size_t t = 0; t < tasks.size(); ++t) squares[tasks[t].job] += partial[t];
}

}  // namespace

void grouped_gemm(const Problem* problems, int64_t count, const Dtypes& dtypes, int64_t threads,
                  const Parallel& parallel) {
  run(problems, count, dtypes, nullptr, threads, parallel);
}

void grouped_squares(const Problem* problems, int64_t count, const Dtypes& dtypes, double* squares, int64_t threads,
                     const Parallel& parallel) {
  run(problems, count, dtypes, squares, threads, parallel);
}

}  // namespace prelora::cpu
