// How a call is shared out over the threads of whoever calls.
#pragma once

#include <cstdint>
#include <functional>

namespace prelora::cpu {

// Calls its argument over [0, count), cut as it likes, on whichever threads it likes, and returns when all is done.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>;

// Runs every task, 0 to count - 1, on at most `threads` workers that each take the next one when they are free.
void run_tasks(int64_t count, int64_t threads, const Parallel& parallel, const std::function<void(int64_t)>& task);

}  // namespace prelora::cpu
