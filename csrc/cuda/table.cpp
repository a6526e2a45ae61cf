// Builds a call's table on the host.
#include "table.h"

#include <algorithm>
#include <limits>

namespace prelora::cuda {
namespace {

bool wide(const void* pointer, int64_t stride, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * bytes_of(dtype) % 16 == 0;
}

int32_t wide_accesses(const Problem& p, const Dtypes& dtypes) {
  return (wide(p.a, p.lda, dtypes.a) ? kWideA : 0) | (wide(p.b, p.ldb, dtypes.b) ? kWideB : 0) |
         (wide(p.c, p.ldc, dtypes.c) ? kWideC : 0) | (wide(p.d, p.ldd, dtypes.d) ? kWideD : 0);
}

const char* refusal(const Problem* problems, int64_t count, const Dtypes& dtypes) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (const Dtype dtype : {dtypes.a, dtypes.b, dtypes.c, dtypes.d}) {
    if (dtype != Dtype::kFloat32 && dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat16) {
      return "grouped_gemm takes float32, bfloat16 and float16";
    }
  }
  if (count < 0 || count >= kMost) return "grouped_gemm takes 0 to 2^31 - 2 problems";
  for (int64_t i = 0; i < count; ++i) {
    const Problem& p = problems[i];
    if (std::min({p.m, p.n, p.k}) < 0 || std::max({p.m, p.n, p.k}) > kMost - kTileElements) {
      return "grouped_gemm takes sizes from 0 to 2^31 - 4097";
    }
    if (p.m > 1 && p.ldc < p.n) return "grouped_gemm needs rows of C that do not overlap";
  }
  return nullptr;
}

Row make_row(const Problem& p, const Dtypes& dtypes, const TileMap& map, int64_t place) {
  Row row{};
  row.c = p.c, row.d = p.d, row.a = p.a, row.b = p.b;
  row.ldc = p.ldc, row.ldd = p.ldd, row.lda = p.lda, row.ldb = p.ldb;
  row.m = static_cast<int32_t>(p.m), row.n = static_cast<int32_t>(p.n), row.k = static_cast<int32_t>(p.k);
  row.alpha = p.alpha, row.beta = p.beta;
  row.trans_a = p.trans_a, row.trans_b = p.trans_b, row.wide = wide_accesses(p, dtypes);
  row.shape = map.shapes[place], row.grid = map.grids[place], row.problem = map.order[place];
  return row;
}

}  // namespace

size_t table_bytes(int64_t count) { return 3 * starts_bytes(count) + count * sizeof(Row); }

size_t Plan::gemm_workspace() const { return size_t{4} * kTileElements * partials; }

size_t Plan::squares_workspace() const { return gemm_workspace() + size_t{4} * outputs; }

const char* build_table(const Problem* problems, int64_t count, const Dtypes& dtypes, void* host_table, Plan* plan) {
  if (const char* reason = refusal(problems, count, dtypes)) return reason;
  const TileMap map = map_tiles(problems, count, dtypes);
  if (map.starts.back() > kMostTiles) return "grouped_gemm takes up to 2^30 tiles of 4096 elements in one call";
  const Table table = table_at(host_table, count);
  int32_t tiles = 0, outputs = 0, combined = 0, partials = 0;
  for (int64_t i = 0; i < count; ++i) {
    Row row = make_row(problems[map.order[i]], dtypes, map, i);
    row.first_output = outputs, row.first_partial = partials;
    table.starts[i] = tiles, table.output_starts[i] = outputs, table.combine_starts[i] = combined;
    const bool split = row.grid.parts > 1;
    tiles += row.grid.tiles(), outputs += row.grid.outputs();
    combined += split ? row.grid.outputs() : 0, partials += split ? row.grid.tiles() : 0;
    table.rows[i] = row;
  }
  table.starts[count] = tiles, table.output_starts[count] = outputs, table.combine_starts[count] = combined;
  *plan = {dtypes, static_cast<int32_t>(count), tiles, outputs, combined, partials};
  return nullptr;
}

}  // namespace prelora::cuda
