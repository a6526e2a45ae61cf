// From torch's tensors to the problems of problem.h, for the bindings of every device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "problem.h"

namespace prelora {

// The arguments of a grouped operator, one of each list for a group; `d`, `beta` and `out` may be empty: none.
struct Arguments {
  at::TensorList a, b, d, out;
  at::ArrayRef<double> alpha, beta;
  const c10::List<bool>& trans_a;
  const c10::List<bool>& trans_b;
};

struct Call {
  std::vector<Problem> problems;
  Dtypes dtypes;
};

// Raises ValueError where a kernel would read or write beside the tensors. What else is wrong, such as outputs that
// overlap, prelora.ops has refused. Where there is no `out`, C is null.
Call gather(const Arguments& arguments, c10::DeviceType device);

}  // namespace prelora
