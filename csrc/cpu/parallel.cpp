#include "parallel.h"

#include <algorithm>
#include <atomic>

namespace prelora::cpu {

void run_tasks(int64_t count, int64_t threads, const Parallel& parallel, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  const auto drain = [&] {
    for (int64_t t; (t = next.fetch_add(1)) < count;) task(t);
  };
  const int64_t workers = std::min(std::max<int64_t>(threads, 1), count);
  if (workers == 1) {
    drain();
  } else if (workers > 1) {
    parallel(workers, [&](int64_t begin, int64_t end) {
      if (begin < end) drain();
    });
  }
}

}  // namespace prelora::cpu
