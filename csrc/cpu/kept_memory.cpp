// malloc gives large memory back to the system, whose fresh pages then come at 3 GB/s where a kept one is written at
// 17 (2 cores of an AMD EPYC in a virtual machine, 2026): merging a ViT-L into new memory took five times as long.
#include "kept_memory.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <utility>

namespace prelora::cpu {
namespace {

constexpr size_t kAlignment = 64;

struct Piece {
  void* memory;
  size_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::deque<Piece> pieces;  // the oldest first
  size_t bytes = 0, out = 0, most_out = 0;
};

Kept& kept() {
  // Never destroyed: a tensor may outlive every static object.
  static Kept* const all = new Kept;
  return *all;
}

}  // namespace

void* take(size_t bytes) {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.mutex);
  void* memory = nullptr;
  const auto fits = [bytes](const Piece& piece) { return piece.bytes == bytes; };
  const auto found = std::find_if(all.pieces.begin(), all.pieces.end(), fits);
  if (found != all.pieces.end()) {
    memory = found->memory;
    all.bytes -= bytes;
    all.pieces.erase(found);
  } else {
    memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (!memory) throw std::bad_alloc();
  }
  all.out += bytes;
  all.most_out = std::max(all.most_out, all.out);
  return memory;
}

void give_back(void* memory, size_t bytes) noexcept {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.out -= bytes;
  all.bytes += bytes;
  all.pieces.push_back({memory, bytes});
  while (all.bytes > all.most_out) {
    all.bytes -= all.pieces.front().bytes;
    std::free(all.pieces.front().memory);
    all.pieces.pop_front();
  }
}

size_t release_kept() noexcept {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.mutex);
  for (const Piece& piece : all.pieces) std::free(piece.memory);
  all.pieces.clear();
  all.most_out = all.out;
  return std::exchange(all.bytes, 0);
}

}  // namespace prelora::cpu
