// Memory for results that every step makes anew: kept when they die, and handed out again.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace prelora::cpu {

// `bytes` of memory, aligned to 64 bytes, of a result that died or else new. Throws std::bad_alloc.
void* take(size_t bytes);

// The other way; never more is kept than was out at one time.
void give_back(void* memory, size_t bytes) noexcept;

// Frees all that is kept, and returns how many bytes that was.
size_t release_kept() noexcept;

// Floats in kept memory, of which sizes that differ little share pieces.
class KeptFloats {
 public:
  explicit KeptFloats(int64_t count)
      : bytes_(std::bit_ceil(static_cast<size_t>(count) * sizeof(float))), floats_(static_cast<float*>(take(bytes_))) {}
  ~KeptFloats() { give_back(floats_, bytes_); }
  KeptFloats(const KeptFloats&) = delete;
  KeptFloats& operator=(const KeptFloats&) = delete;

  float* data() const { return floats_; }

 private:
  size_t bytes_;
  float* floats_;
};

}  // namespace prelora::cpu
