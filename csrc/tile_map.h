// How the outputs of many products are cut into tiles, and which block of a persistent grid makes which tile.
//
// Pure functions of sizes: no torch, no CUDA. The kernels call `find_problem` and `place_tile`, the tests all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "problem.h"

#if defined(__CUDACC__)
#define PRELORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PRELORA_HOST_DEVICE inline
#endif

namespace prelora {

// Every tile has 4096 elements, whatever its shape, so that one block size and one shared-memory budget serve all.
constexpr int kTileLog2 = 12;
constexpr int kTileElements = 1 << kTileLog2;
// Depth of what is in shared memory at once: twice the 8 of one tensor-core step, and no more than small ranks fill.
constexpr int kChunk = 16;
// Below this depth, what a split writes and reads again would weigh against the operands: 32 x 2 / 256 of them.
constexpr int kLeastDepth = 256;
// Splits stop here: twenty tiles for each of the three blocks on each of 132 multiprocessors. ViT-L's gradients then
// leave 2 % of the grid idle and move 3 % more for their parts; with a quarter of the tiles, 16 % and nothing.
constexpr int64_t kTilesWanted = 8192;
constexpr int64_t kMostTiles = int64_t{1} << 30;

struct TileShape {
  int32_t rows_log2;
  PRELORA_HOST_DEVICE int32_t columns_log2() const { return kTileLog2 - rows_log2; }
  PRELORA_HOST_DEVICE int32_t rows() const { return 1 << rows_log2; }
  PRELORA_HOST_DEVICE int32_t columns() const { return 1 << columns_log2(); }
};

// Tiles of one problem. `parts` blocks share the sum over k of each output tile, `depth` of k each.
struct TileGrid {
  int32_t rows, columns, parts, depth;
  PRELORA_HOST_DEVICE int32_t outputs() const { return rows * columns; }
  PRELORA_HOST_DEVICE int32_t tiles() const { return outputs() * parts; }
};

// A tile within its problem: row and column of tiles, part of k, and which of the problem's outputs it belongs to.
struct TilePlace {
  int32_t row, column, part, output;
};

PRELORA_HOST_DEVICE TilePlace place_tile(const TileGrid& grid, int32_t tile) {
  const int32_t part = tile / grid.outputs(), output = tile - part * grid.outputs();
  // The shorter side varies fastest: neighbours, which run together, then share what is large of the large operand.
  const bool down = grid.rows <= grid.columns;
  const int32_t side = down ? grid.rows : grid.columns;
  const int32_t along = output / side, across = output - along * side;
  return {down ? across : along, down ? along : across, part, output};
}

// The problem that a flat tile belongs to: the first, from `from` on, that ends after it. `starts` has count + 1 items.
// Tiles of a block ascend, so that the search gallops from the last answer: two loads where problems are large.
PRELORA_HOST_DEVICE int32_t find_problem(const int32_t* starts, int32_t count, int32_t tile, int32_t from) {
  int32_t low = from, step = 1;
  while (low + step < count && starts[low + step] <= tile) {
    low += step;
    step *= 2;
  }
  int32_t high = low + step < count ? low + step : count;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (starts[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

inline int64_t cover(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Ranks up to 32 take tiles that are all rank on that side, so that the wide operand is read once; 64 x 64 else.
inline TileShape choose_shape(int64_t m, int64_t n) {
  if (m <= 32 && m <= n) return {5};
  if (n <= 32) return {7};
  return {6};
}

inline TileGrid cut(const Problem& problem, TileShape shape, int64_t depth_wanted) {
  const int64_t rows = cover(problem.m, shape.rows()), columns = cover(problem.n, shape.columns());
  const int64_t parts_wanted = std::max<int64_t>(1, (problem.k + depth_wanted / 2) / depth_wanted);
  const int64_t depth = std::max<int64_t>(kChunk, cover(cover(problem.k, parts_wanted), kChunk) * kChunk);
  const int64_t parts = std::max<int64_t>(1, cover(problem.k, depth));
  return {static_cast<int32_t>(rows), static_cast<int32_t>(columns), static_cast<int32_t>(parts),
          static_cast<int32_t>(depth)};
}

// The depth to split sums at, where at all: what leaves `kTilesWanted` tiles of equal cost.
inline int64_t choose_depth(const Problem* problems, int64_t count) {
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    const TileShape shape = choose_shape(problems[i].m, problems[i].n);
    work += cover(problems[i].m, shape.rows()) * cover(problems[i].n, shape.columns()) * problems[i].k;
  }
  return std::max<int64_t>(kLeastDepth, cover(cover(work, kTilesWanted), kChunk) * kChunk);
}

PRELORA_HOST_DEVICE int32_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Bytes that a tile's block loads and stores; a part of a sum stores fp32, and whoever adds the parts up loads them.
inline int64_t tile_bytes(const Problem& problem, TileShape shape, const TileGrid& grid, TilePlace place,
                          Dtypes dtypes) {
  const int64_t rows = std::min<int64_t>(shape.rows(), problem.m - int64_t{place.row} * shape.rows());
  const int64_t columns = std::min<int64_t>(shape.columns(), problem.n - int64_t{place.column} * shape.columns());
  const int64_t depth = std::min<int64_t>(grid.depth, problem.k - int64_t{place.part} * grid.depth);
  const int64_t operands = depth * (rows * bytes_of(dtypes.a) + columns * bytes_of(dtypes.b));
  const int64_t d = problem.beta != 0.0f ? bytes_of(dtypes.d) : 0;
  const int64_t result = rows * columns * (bytes_of(dtypes.c) + d);
  if (grid.parts == 1) return operands + result;
  return operands + 2 * 4 * int64_t{kTileElements} + (place.part == 0 ? result : 0);
}

// All problems of a call, the costliest tiles first: what a stride leaves uneven is then at most one of the last.
struct TileMap {
  std::vector<int32_t> order;     // of problems, by cost
  std::vector<TileShape> shapes;  // by place in `order`, as all that follows
  std::vector<TileGrid> grids;
  std::vector<int64_t> starts;  // of each problem's tiles; one more entry, the number of all tiles
};

inline TileMap map_tiles(const Problem* problems, int64_t count, Dtypes dtypes) {
  const int64_t depth = choose_depth(problems, count);
  std::vector<int64_t> cost(count);
  TileMap map;
  for (int64_t i = 0; i < count; ++i) {
    const TileShape shape = choose_shape(problems[i].m, problems[i].n);
    cost[i] = tile_bytes(problems[i], shape, cut(problems[i], shape, depth), {0, 0, 0, 0}, dtypes);
    map.order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(map.order.begin(), map.order.end(), [&](int32_t x, int32_t y) { return cost[x] > cost[y]; });
  map.starts.push_back(0);
  for (const int32_t i : map.order) {
    map.shapes.push_back(choose_shape(problems[i].m, problems[i].n));
    map.grids.push_back(cut(problems[i], map.shapes.back(), depth));
    const TileGrid& grid = map.grids.back();
    map.starts.push_back(map.starts.back() + int64_t{grid.rows} * grid.columns * grid.parts);
  }
  return map;
}

// Bytes of every tile of a call, in the order in which blocks take them.
inline std::vector<double> tile_costs(const Problem* problems, int64_t count, Dtypes dtypes) {
  const TileMap map = map_tiles(problems, count, dtypes);
  std::vector<double> costs;
  costs.reserve(map.starts.back());
  for (size_t i = 0; i < map.order.size(); ++i) {
    const Problem& problem = problems[map.order[i]];
    for (int32_t tile = 0; tile < map.grids[i].tiles(); ++tile) {
      const TilePlace place = place_tile(map.grids[i], tile);
      costs.push_back(static_cast<double>(tile_bytes(problem, map.shapes[i], map.grids[i], place, dtypes)));
    }
  }
  return costs;
}

// What the busiest of `blocks` has to do: block b takes tiles b, b + blocks, ...
inline double longest_share(const std::vector<double>& costs, int64_t blocks) {
  std::vector<double> shares(blocks, 0.0);
  for (size_t tile = 0; tile < costs.size(); ++tile) shares[tile % blocks] += costs[tile];
  return *std::max_element(shares.begin(), shares.end());
}

// Of the time that `blocks` blocks take together, the share in which they wait for the last one or work on padding,
// were a tile's time its bytes: in one launch, with every problem padded to the largest, and a launch for each.
struct Balance {
  double grouped, padded, separate;
};

inline Balance balance(const Problem* problems, int64_t count, Dtypes dtypes, int64_t blocks) {
  const std::vector<double> costs = tile_costs(problems, count, dtypes);
  double useful = 0.0, separate = 0.0;
  for (const double cost : costs) useful += cost;
  if (useful == 0.0) return {0.0, 0.0, 0.0};
  std::vector<Problem> padded(problems, problems + count);
  for (int64_t i = 0; i < count; ++i) {
    separate += longest_share(tile_costs(problems + i, 1, dtypes), blocks);
    for (Problem& p : padded) {
      p.m = std::max(p.m, problems[i].m), p.n = std::max(p.n, problems[i].n), p.k = std::max(p.k, problems[i].k);
    }
  }
  const auto idle = [&](double longest) { return 1.0 - useful / (longest * static_cast<double>(blocks)); };
  return {idle(longest_share(costs, blocks)), idle(longest_share(tile_costs(padded.data(), count, dtypes), blocks)),
          idle(separate)};
}

// Bytes that a call's blocks load and store, and those of every matrix once, which no grid can do without.
struct Traffic {
  int64_t moved, least;
};

inline Traffic traffic(const Problem* problems, int64_t count, Dtypes dtypes) {
  Traffic total{0, 0};
  for (const double cost : tile_costs(problems, count, dtypes)) total.moved += static_cast<int64_t>(cost);
  for (int64_t i = 0; i < count; ++i) {
    const Problem& p = problems[i];
    total.least += p.m * p.k * bytes_of(dtypes.a) + p.k * p.n * bytes_of(dtypes.b);
    total.least += p.m * p.n * (bytes_of(dtypes.c) + (p.beta != 0.0f ? bytes_of(dtypes.d) : 0));
  }
  return total;
}

}  // namespace prelora
