// Memory for results that every step makes anew: kept when they die, and handed out again.
#pragma once

#include <cstddef>

namespace prelora::cpu {

// `bytes` of memory, aligned to 64 bytes, of a result that died or else new. Throws std::bad_alloc.
void* take(size_t bytes);

// The other way; never more is kept than was out at one time.
void give_back(void* memory, size_t bytes) noexcept;

// Frees all that is kept, and returns how many bytes that was.
size_t release_kept() noexcept;

}  // namespace prelora::cpu
