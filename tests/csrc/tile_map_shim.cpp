// csrc/tile_map.h for ctypes: a problem is four integers, m, n, k and beta.
#include "../../csrc/tile_map.h"

namespace {

std::vector<prelora::Problem> problems_of(const int64_t* sizes, int64_t count) {
  std::vector<prelora::Problem> problems(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const one = sizes + 4 * i;
    problems[i].m = one[0], problems[i].n = one[1], problems[i].k = one[2];
    problems[i].beta = static_cast<float>(one[3]);
  }
  return problems;
}

prelora::Dtypes dtypes_of(const int32_t* codes) {
  return {prelora::Dtype{codes[0]}, prelora::Dtype{codes[1]}, prelora::Dtype{codes[2]}, prelora::Dtype{codes[3]}};
}

}  // namespace

extern "C" {

int64_t count_tiles(const int64_t* sizes, int64_t count, const int32_t* dtypes) {
  return prelora::map_tiles(problems_of(sizes, count).data(), count, dtypes_of(dtypes)).starts.back();
}

// Walks the tiles as `blocks` blocks do and writes, in the order of the blocks, for each tile: block, flat tile,
// problem, and the first and the end of its rows, columns and k, within the problem.
void walk(const int64_t* sizes, int64_t count, const int32_t* dtypes, int64_t blocks, int64_t* out) {
  const std::vector<prelora::Problem> problems = problems_of(sizes, count);
  const prelora::TileMap map = prelora::map_tiles(problems.data(), count, dtypes_of(dtypes));
  const std::vector<int32_t> starts(map.starts.begin(), map.starts.end());
  for (int64_t block = 0; block < blocks; ++block) {
    int32_t found = 0;
    for (int64_t flat = block; flat < map.starts.back(); flat += blocks) {
      found = prelora::find_problem(starts.data(), static_cast<int32_t>(count), static_cast<int32_t>(flat), found);
      const prelora::TileGrid& grid = map.grids[found];
      const prelora::TileShape& shape = map.shapes[found];
      const prelora::Problem& p = problems[map.order[found]];
      const prelora::TilePlace place = prelora::place_tile(grid, static_cast<int32_t>(flat) - starts[found]);
      const int64_t row = int64_t{place.row} * shape.rows(), column = int64_t{place.column} * shape.columns();
      const int64_t k = int64_t{place.part} * grid.depth;
      const int64_t line[] = {block, flat, map.order[found], row, std::min(p.m, row + shape.rows()), column,
                              std::min(p.n, column + shape.columns()), k, std::min(p.k, k + grid.depth)};
      out = std::copy(std::begin(line), std::end(line), out);
    }
  }
}

void balance(const int64_t* sizes, int64_t count, const int32_t* dtypes, int64_t blocks, double* out) {
  const prelora::Balance b = prelora::balance(problems_of(sizes, count).data(), count, dtypes_of(dtypes), blocks);
  out[0] = b.grouped, out[1] = b.padded, out[2] = b.separate;
}

void traffic(const int64_t* sizes, int64_t count, const int32_t* dtypes, int64_t* out) {
  const prelora::Traffic t = prelora::traffic(problems_of(sizes, count).data(), count, dtypes_of(dtypes));
  out[0] = t.moved, out[1] = t.least;
}

}  // extern "C"
