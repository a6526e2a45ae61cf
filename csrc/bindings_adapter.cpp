// torch.ops.prelora_C.adapter_gradients: what backward of one layer owes its A and B.
#include "bindings.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/adapter_gradients.h"

namespace prelora {
namespace {

using Given = std::optional<at::Tensor>;

const void* matrix(const char* name, const at::Tensor& tensor, int64_t rows, int64_t columns, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(),
                    name, " is ", tensor.sizes(), ", strides ", tensor.strides(), ", not a contiguous [", rows, ", ",
                    columns, "]");
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(),
                    " on ", tensor.device(), ", not ", dtype, " on cpu");
  return tensor.const_data_ptr();
}

std::vector<cpu::AdapterSlice> slices_of(at::IntArrayRef rows, at::IntArrayRef ranks, at::ArrayRef<double> scaling) {
  TORCH_CHECK_VALUE(rows.size() == ranks.size() && scaling.size() == ranks.size(), "lists of different lengths");
  TORCH_CHECK_VALUE(!rows.empty(), "there is no slice");
  std::vector<cpu::AdapterSlice> slices;
  int64_t row = 0, first = 0, element = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK_VALUE(rows[i] > 0 && ranks[i] > 0, "slice ", i, ": ", rows[i], " rows of rank ", ranks[i]);
    slices.push_back({rows[i], ranks[i], static_cast<float>(scaling[i]), row, first, element});
    row += rows[i];
    first += ranks[i];
    element += rows[i] * ranks[i];
  }
  return slices;
}

std::vector<at::Tensor> adapter_gradients(const at::Tensor& dy, const Given& x, const Given& s, const Given& ds,
                                          const at::Tensor& a, const at::Tensor& b, at::IntArrayRef rows,
                                          at::IntArrayRef ranks, at::ArrayRef<double> scaling, bool need_a,
                                          bool need_b) {
  const std::vector<cpu::AdapterSlice> slices = slices_of(rows, ranks, scaling);
  const cpu::AdapterSlice& last = slices.back();
  const int64_t out_features = last.row + last.rows, rank = last.first + last.rank;
  const int64_t elements_b = last.element + last.rows * last.rank;
  TORCH_CHECK_VALUE(dy.dim() == 2 && a.dim() == 2 && b.is_contiguous() && b.numel() == elements_b && b.device().is_cpu(),
                    "dy is ", dy.sizes(), ", A ", a.sizes(), ", B ", b.sizes(), " on ", b.device(), " for ",
                    elements_b, " elements");
  TORCH_CHECK_VALUE(x || !(need_a || (need_b && !s)), "x is not given");
  const int64_t tokens = dy.size(0), in_features = a.size(1);
  const at::ScalarType dtype = dy.scalar_type();
  const auto given = [&](const char* name, const Given& tensor, int64_t columns) {
    return tensor ? matrix(name, *tensor, tokens, columns, dtype) : nullptr;
  };
  std::vector<at::Tensor> gradients;
  const auto gradient_of = [&](bool needed, const at::Tensor& factor) -> void* {
    if (!needed) return nullptr;
    gradients.push_back(at::empty(factor.sizes(), factor.options()));
    return gradients.back().mutable_data_ptr();
  };
  const cpu::AdapterGradients problem{matrix("dy", dy, tokens, out_features, dtype),
                                      given("x", x, in_features),
                                      given("S", s, rank),
                                      given("dS", ds, rank),
                                      matrix("A", a, rank, in_features, a.scalar_type()),
                                      b.const_data_ptr(),
                                      gradient_of(need_a, a),
                                      gradient_of(need_b, b),
                                      tokens,
                                      in_features,
                                      out_features,
                                      rank,
                                      elements_b,
                                      slices.data(),
                                      static_cast<int64_t>(slices.size()),
                                      dtype_of("dy", dy),
                                      dtype_of("A", a),
                                      dtype_of("B", b)};
  cpu::adapter_gradients(problem, threads(), run_in_parallel);
  return gradients;
}

}  // namespace
}  // namespace prelora

TORCH_LIBRARY_FRAGMENT(prelora_C, library) {
  library.def(
      "adapter_gradients(Tensor dy, Tensor? x, Tensor? s, Tensor? ds, Tensor lora_a, Tensor lora_b, int[] rows, "
      "int[] ranks, float[] scaling, bool need_a, bool need_b) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(prelora_C, CPU, library) {
  library.impl("adapter_gradients", prelora::adapter_gradients);
}
