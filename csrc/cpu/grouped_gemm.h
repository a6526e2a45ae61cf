// Many products of unequal sizes in one call on CPU; problem.h says what each means. Torch-free.
#pragma once

#include <cstdint>
#include <functional>

#include "../problem.h"

namespace prelora::cpu {

// Calls its argument over [0, count), cut as it likes, on whichever threads it likes, and returns when all is done.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>;

// One parallel region of at most `threads` workers; results do not depend on how many there are, bit for bit.
// Inputs must not overlap any C, except a D that is its own problem's C.
void grouped_gemm(const Problem* problems, int64_t count, const Dtypes& dtypes, int64_t threads,
                  const Parallel& parallel);

// The sum of squares of each C, which is neither read nor written (nor rounded to its dtype).
void grouped_squares(const Problem* problems, int64_t count, const Dtypes& dtypes, double* squares, int64_t threads,
                     const Parallel& parallel);

// What the products run on: "avx512", "avx2" or "generic"; the best that this processor has unless set.
const char* isa();

// Makes later calls run on the named one; false, and nothing changed, where this processor or build lacks it.
bool set_isa(const char* name);

}  // namespace prelora::cpu
