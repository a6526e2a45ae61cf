// From torch's tensors to the problems of problem.h, for the bindings of every device.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "problem.h"

namespace prelora {

// Raises ValueError for a dtype that is not built.
Dtype dtype_of(const char* name, const at::Tensor& tensor);

// In torch's own threads, as many as torch.set_num_threads allows; a caller that is in one of them keeps to it.
int64_t threads();
void run_in_parallel(int64_t tasks, const std::function<void(int64_t, int64_t)>& run);

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
