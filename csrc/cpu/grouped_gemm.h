// Many products of unequal sizes in one call on CPU; problem.h says what each means. Torch-free.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "parallel.h"

namespace prelora::cpu {

// One parallel region of at most `threads` workers; results do not depend on how many there are, bit for bit.
// Inputs must not overlap any C, except a D that is its own problem's C.
void grouped_gemm(const Problem* problems, int64_t count, const Dtypes& dtypes, int64_t threads,
                  const Parallel& parallel);

// The sum of squares of each C, which is neither read nor written (nor rounded to its dtype).
void grouped_squares(const Problem* problems, int64_t count, const Dtypes& dtypes, double* squares, int64_t threads,
                     const Parallel& parallel);

}  // namespace prelora::cpu
